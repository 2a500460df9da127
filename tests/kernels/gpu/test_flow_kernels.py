"""The flow kernels for Hopper, simulated, equal XLA's form, values and gradients. They need jax ≥ 0.11."""

import functools

import jax
import pytest
from flow_cases import SHAPES, buffers, compare, error_program, noise_program, update_program

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason=f"Mosaic GPU kernels need jax ≥ 0.11, here is {jax.__version__}"
)


@pytest.mark.parametrize("shape", SHAPES)
def test_noising_and_its_gradients(shape):
    compare(noise_program, (*buffers(4, shape)[:3], buffers(1, shape)[0][..., 0]), "mosaic_gpu")


@pytest.mark.parametrize("shape", SHAPES)
def test_error_and_its_gradient(shape):
    compare(error_program, (*buffers(3, shape), *(b[..., 0] for b in buffers(2, shape))), "mosaic_gpu")


@pytest.mark.parametrize("branches", [("cond",), ("cond", "uncond", "free")])
def test_update(branches):
    compare(functools.partial(update_program, branches), tuple(buffers(9, SHAPES[0])), "mosaic_gpu")
