"""cuDNN attention compiled for an H200 that is not here: jax accepts every argument, XLA both calls.

Without the chip XLA does not ask cuDNN for its kernels (the workspace of the calls stays empty), so whether it has them
is not shown here. Needs the wheels jax-cuda13-plugin, jax-cuda13-pjrt and nvidia-cudnn-cu13.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as internal
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import targets
from pallas_kernels.attention import Segments, attention, choose, gen_plan, und_plan


def missing() -> str | None:
    if jax.__version_info__ < (0, 11):
        return f"the cudnn backend needs jax ≥ 0.11, here is {jax.__version__}"
    if internal.cuda_versions is None:
        return "the wheel jax-cuda13-plugin is not installed"
    try:
        internal.check_cudnn_version()
    except RuntimeError as e:
        return f"the wheel nvidia-cudnn-cu13 is not installed: {e}"
    return None


@pytest.mark.skipif(missing() is not None, reason=missing() or "")
@pytest.mark.parametrize("samples", [1, 8])
def test_compiles_for_an_h200(monkeypatch, samples):
    """Two streams, forward and backward: two calls of each kind, causal for und, and packed if samples are several."""
    monkeypatch.setattr(internal, "check_compute_capability", lambda _: True)  # it asks the machine, not the target
    monkeypatch.setattr(internal, "is_cuda_compute_capability_equal", lambda capability: capability == "9.0")
    axis = (jax.sharding.AxisType.Explicit,)
    mesh = Mesh(np.array(targets.topology("h200:1").devices), ("x",), axis_types=axis)

    def described(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))

    def step(s, gen, und):
        how = dict(impl="cudnn", samples=samples)
        plans = gen_plan(s, **how), und_plan(s, **how)

        def both(gen, und):
            over = attention(gen[0], (und[1], gen[1]), (und[2], gen[2]), plans[0], scale=0.09)
            return over, attention(*und, plans[1], scale=0.09)

        out, back = jax.vjp(both, gen, und)
        return out, back(out)

    with jax.set_mesh(mesh):
        assert choose("cudnn")[0] == "cudnn"
        gen, und = ([described(2, n, heads, 128) for heads in (32, 8, 8)] for n in (512, 128))
        s = Segments(described(2, 128, dtype=jnp.int32), described(2, 512, dtype=jnp.int32))
        lowered = jax.jit(step).lower(s, gen, und)
        compiled = lowered.compile().as_text()
    for call in ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"):
        assert compiled.count(f'custom_call_target="{call}"') == 2
    asked = lowered.as_text()
    assert asked.count("PADDING_CAUSAL") == 2 and asked.count("max_seg_per_batch") == 4
    assert asked.count(f"\\22max_seg_per_batch\\22: {samples}") == 4
