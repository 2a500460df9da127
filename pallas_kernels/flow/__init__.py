"""The arithmetic of flow matching on tokens: noise them, judge a velocity, take a step of a solver.

In: buffers of tokens [..., N, P] float32 (patches, actions, sound), numbers per token [..., N]. Out: the same. Every
formula of flow matching in the project is here, once; `rows.run` computes it in three ways:

| impl | what it is | where |
|---|---|---|
| `xla` | the formula on whole buffers | everywhere; what `auto` takes |
| `mosaic_tpu` | the same formula tile by tile: `tpu.py` | TPU |
| `mosaic_gpu` | the same: `gpu.py` | H100, H200, jax ≥ 0.11 |

`auto` is XLA on every chip: it already moves the fewest bytes there are (docs/kernels.md has the table), and it fuses
with what stands before and after, which a kernel cannot.
"""

from pallas_kernels.flow.error import squared_error
from pallas_kernels.flow.noising import noise, velocity
from pallas_kernels.flow.rows import IMPLS, choose
from pallas_kernels.flow.update import Updated, guide, update

__all__ = ["IMPLS", "Updated", "choose", "guide", "noise", "squared_error", "update", "velocity"]
