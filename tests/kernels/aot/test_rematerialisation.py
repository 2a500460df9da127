"""What a TPU's own compiler makes of rematerialised layers. Needs libtpu, no TPU; `make check-kernels` runs it."""

import importlib.util
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import targets
from pallas_kernels.attention import SAVED, attention, full_plan

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: make check-kernels")
KEEP = {"nothing": jax.checkpoint_policies.nothing_saveable, "attn": jax.checkpoint_policies.save_only_these_names}


def compiled(policy) -> str:
    """The gradient of three rematerialised layers in a scan, as the compiler left it."""

    def layer(x, w, plan):
        q = (x @ w).reshape(1, -1, 4, 128)
        o = attention(q, q[:, :, :1], q[:, :, :1], plan, scale=0.1)
        return x + o.reshape(x.shape) @ w, None

    def loss(w, x, ids):
        plan = full_plan(ids)  # outside the scan: made once
        body = jax.checkpoint(lambda x, w: layer(x, w, plan), policy=policy, prevent_cse=False)
        return jax.lax.scan(body, x, w)[0].astype(jnp.float32).sum()

    shapes = (3, 512, 512), (1, 1024, 512)
    arrays = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes] + [jax.ShapeDtypeStruct((1, 1024), jnp.int32)]
    chips = np.array(targets.topology("v5e:2x2").devices)[:1]
    with jax.set_mesh(jax.sharding.Mesh(chips, ("x",))):
        return jax.jit(jax.grad(loss)).lower(*arrays).compile().as_text()


@pytest.fixture(autouse=True)
def no_machine_is_asked(monkeypatch):
    monkeypatch.setitem(os.environ, "TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setitem(os.environ, "ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


@pytest.mark.parametrize(("policy", "forward"), [("nothing", 2), ("attn", 1)])
def test_a_kept_output_is_not_computed_again(policy, forward):
    """With output and log-sum-exp kept by name the backward pass runs its two kernels and no forward one."""
    text = compiled(KEEP[policy](*SAVED) if policy == "attn" else KEEP[policy])
    found = {n: len(re.findall(rf"custom-call\([^\n]*attention_{n}\b", text)) for n in ("forward", "dq", "dkv")}
    assert found == {"forward": forward, "dq": 1, "dkv": 1}
