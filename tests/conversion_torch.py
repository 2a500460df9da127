"""PyTorch tensors against what a reader here makes of them, byte for byte."""

import torch

from conversion.torch_pickle import DTYPES


def raw(x: torch.Tensor) -> bytes:
    return x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(found, tensors):
    assert set(found) == set(tensors)
    for name, x in tensors.items():
        assert found[name].shape == tuple(x.shape) == found.shapes[name], name
        assert found[name].dtype == found.dtypes[name] == DTYPES[str(x.dtype)], name
        assert found[name].tobytes() == raw(x), name
