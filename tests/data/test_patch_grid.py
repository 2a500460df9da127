"""Where patches lie, and how they mix the position table, equal transformers and torch."""

import numpy as np
import pytest
import torch
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from data_pipelines import patch_grid
from data_pipelines.schema import SequenceSpec
from data_pipelines.video import preprocess, vit_input

SIZES = [(2, 2), (4, 6), (8, 4), (2, 100), (46, 94), (48, 48), (128, 128)]


def spec(kind: str, grid: int, temporal: int = 1) -> SequenceSpec:
    return SequenceSpec(8, 2, 0, 0, vit_kind=kind, vit_patch=4, vit_grid=grid, vit_temporal=temporal)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("grid", [4, 6, 48])
def test_corners_of_qwen3_vl_equal_transformers_to_the_bit(grid, size):
    index, weight = get_vision_interpolation_indices_and_weights(
        torch.tensor([[1, *size]]), grid, mode="bilinear", align_corners=True, spatial_merge_size=2
    )
    ours = patch_grid.interpolation(*size, spec("qwen3vl", grid))
    np.testing.assert_array_equal(ours[0], index)
    np.testing.assert_array_equal(ours[1], weight)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("grid", [4, 6, 16])
def test_weights_of_siglip2_equal_torch_s_antialiased_resize(grid, size):
    """torch resizes a table of one-hot rows, so that its result is the weights."""
    table = torch.eye(grid**2).reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    want = torch.nn.functional.interpolate(table, size=size, mode="bilinear", align_corners=False, antialias=True)
    index, weight = patch_grid.interpolation(*size, spec("siglip2", grid))
    assert index.shape == (size[0] * size[1], 0)
    np.testing.assert_allclose(weight, patch_grid.merge_order(want[0].permute(1, 2, 0).numpy()), atol=2e-7)


def test_several_pictures():
    grids = [(1, 4, 6), (3, 2, 4)]
    ours = patch_grid.places(grids, spec("qwen3vl", 6))
    np.testing.assert_array_equal(ours.rowcol, get_vision_position_ids(torch.tensor(grids), 2))
    np.testing.assert_array_equal(ours.frame_ids, np.repeat([0, 1, 2, 3], [24, 8, 8, 8]))
    alone = patch_grid.places(grids[1:], spec("qwen3vl", 6))
    np.testing.assert_array_equal(ours.interp_weight[24:], alone.interp_weight)


@pytest.mark.parametrize("kind", ["qwen3vl", "siglip2"])
def test_a_patch_holds_its_pixels(kind):
    """Pixel by pixel: patch n is where `rowcol` says, its numbers in the order of its kind."""
    s = spec(kind, 6, temporal=1 if kind == "siglip2" else 2)
    frames = np.random.RandomState(0).randint(0, 256, (2, 8, 16, 3)).astype(np.uint8)
    vit = vit_input([preprocess(frames, (0.0,), s)], s)
    n, (row, col) = 5, vit.places.rowcol[5] * 4
    for y, x, c, t in np.ndindex(4, 4, 3, s.vit_temporal):
        at = ((c * 2 + t) * 4 + y) * 4 + x if kind == "qwen3vl" else (y * 4 + x) * 3 + c
        assert vit.patches[n, at] == np.float32(frames[t, row + y, col + x, c] / np.float32(255) - 0.5) / np.float32(
            0.5
        )
