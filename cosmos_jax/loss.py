"""The training objective: flow matching per modality, and next-token cross-entropy, in one number.

In: params, packed batch, key. Out: loss and additive metrics. Spec model.md §3.5 and §6.3:

    item loss = Σ over noisy elements of (prediction − target)² / (all elements of the item, clean ones included)
    modality  = mean over the items of the whole batch;    text = mean over supervised tokens of the whole batch

Denominators are global counts of the batch, computed before the model runs; so micro-batches, packs and devices add up
to the same loss and the same gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cosmos_jax import flow, shard
from cosmos_jax.config import Config
from cosmos_jax.model import cosmos
from cosmos_jax.model.modality import take_rows
from cosmos_jax.precision import Precision
from data_pipelines.schema import MODALITIES
from pallas_kernels import flow as kernels

SIGMA_BUCKETS = 4  # equal parts of [0, 1], for the metrics
LOGIT_CHUNK = 1024  # und positions whose logits exist at once, per row


def denominators(batch: dict) -> dict[str, jax.Array]:
    """Items per modality and supervised text tokens of a batch; at least 1 each."""
    items = batch["segment_items"].sum((0, 1))
    counts = {name: items[i] for i, name in enumerate(MODALITIES)}
    counts["text"] = (batch["und_targets"] >= 0).sum()
    return {name: jnp.maximum(n, 1).astype(jnp.float32) for name, n in counts.items()}


def loss_fn(params, cfg: Config, batch: dict, key: jax.Array, precision: Precision, counts=None):
    """Loss (scalar float32) and metrics of one batch or micro-batch.

    `counts`: `denominators` of the whole batch when `batch` is a micro-batch of it. Every metric is additive over
    micro-batches: `loss/<modality>` (unweighted), `sigma/sum` and `sigma/count` [4] (generation loss per sigma bucket).
    """
    n = counts or denominators(batch)
    noised = flow.noise_batch(key, batch, cfg.flow, cfg.model.patch)
    out = cosmos.apply(params, cfg.model, batch, noised.x_t, noised.timesteps, precision=precision)

    loss, metrics = jnp.float32(0.0), {}
    bucket = jnp.clip((noised.sigma * SIGMA_BUCKETS).astype(jnp.int32), 0, SIGMA_BUCKETS - 1)
    in_bucket = (bucket[..., None] == jnp.arange(SIGMA_BUCKETS)).astype(jnp.float32)
    sums, items = jnp.zeros(SIGMA_BUCKETS), jnp.zeros(SIGMA_BUCKETS)
    for i, name in enumerate(MODALITIES):
        if name not in out.velocity:
            continue
        token = kernels.squared_error(
            out.velocity[name], noised.x0[name], noised.noise[name], noised.noisy[name], batch[f"{name}_weight"]
        )
        metrics[f"loss/{name}"] = token.sum() / n[name]
        loss = loss + getattr(cfg.flow, f"weight_{name}") * metrics[f"loss/{name}"]
        sums = sums + (take_rows(in_bucket, batch[f"{name}_segment_ids"]) * token[..., None]).sum((0, 1))
        items = items + (in_bucket * batch["segment_items"][..., i : i + 1]).sum((0, 1))
    metrics["sigma/sum"], metrics["sigma/count"] = jax.lax.stop_gradient((sums, items))

    text, correct = cross_entropy(params, cfg, batch, out.hidden, precision)
    metrics["loss/text"] = text / n["text"]
    metrics["text/accuracy"] = correct / n["text"]
    return loss + cfg.flow.weight_text * metrics["loss/text"], metrics


def cross_entropy(params, cfg: Config, batch: dict, hidden: jax.Array, precision: Precision):
    """Summed next-token cross-entropy and number of correct argmax tokens over the supervised und positions.

    Logits are made a chunk of positions at a time and recomputed in the backward pass: [B,U,vocab] never exists.
    """
    b, u, _ = hidden.shape
    axis = shard.token_axis(hidden)
    own = u // shard.parts(axis)
    n = next(n for n in range(-(-u // LOGIT_CHUNK), own + 1) if own % n == 0)

    def chunks(x):
        """[B,U,…] → [n,B,U/n,…]; chunk i takes tokens i, i+n, …: every device works on tokens it already holds."""
        out = ("batch", axis, "token", "act")[: x.ndim + 1]
        return jnp.moveaxis(shard.reshape(x, (b, u // n, n, *x.shape[2:]), out), 2, 0)

    def body(total, xs):
        h, target = xs
        logits = cosmos.logits(params, cfg.model, h, precision=precision)
        target = shard.at_work(target)
        picked = ((target[..., None] == jnp.arange(logits.shape[-1])) * logits).sum(-1)
        nll = jax.nn.logsumexp(logits, -1) - picked
        right, valid = picked >= logits.max(-1), target >= 0
        return (total[0] + jnp.where(valid, nll, 0.0).sum(), total[1] + (right & valid).sum()), None

    start = (jnp.float32(0.0), jnp.int32(0))
    xs = (chunks(hidden), chunks(shard.constrain(batch["und_targets"], ("batch", axis))))
    (total, correct), _ = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), start, xs)
    return total, correct
