"""One training step and one evaluation step: pure, jitted once, the state donated.

In: state (state.py) and a packed batch. Out: the next state and metrics that stay on the device until they are read.

The noise of step n is drawn from fold_in(rng, n) and the sample ids alone, so a resumed run and any split into
micro-batches see the same numbers. If the loss or a gradient is not finite the state comes back untouched, with
metrics["finite"] False.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from cosmos_jax import optim, precision, shard
from cosmos_jax import state as states
from cosmos_jax.config import Config
from cosmos_jax.loss import SIGMA_BUCKETS, denominators, loss_fn
from cosmos_jax.model import cosmos


def make_train_step(cfg: Config) -> Callable[[dict, dict], tuple[dict, dict]]:
    """Compile-once `step(state, batch) -> (state, metrics)`; `state` is donated.

    metrics, all scalars: loss, loss/<modality> (unweighted means), loss/sigma_<i> (generation loss of the i-th quarter
    of [0, 1]; NaN when no sample fell there), text/accuracy, grad_norm (before clipping), lr,
    tokens/{und,gen} (real ones), finite (bool).
    """
    trained, _ = optim.select(cfg.optim, cosmos.abstract(cfg.model))
    optimizer = optim.build(cfg.optim, cfg.train.steps, trained)
    learning_rate = optim.schedule(cfg.optim, cfg.train.steps)
    exact = precision.resolve(cfg.precision)

    def step(waiting: dict, batch: dict) -> tuple[dict, dict]:
        state = states.wake(cfg, waiting)
        trained, frozen = optim.select(cfg.optim, state["params"])
        key = jax.random.fold_in(jax.random.wrap_key_data(state["rng"]), state["step"])
        counts = denominators(batch)

        def loss(trained, batch, frozen, key, counts):
            return loss_fn(optim.join(trained, frozen), cfg, batch, key, exact, counts)

        (total, metrics), grads = accumulate(loss, trained, batch, cfg.optim.accumulate, frozen, key, counts)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)

        updates, opt = optimizer.update(grads, state["opt"], trained)
        trained = optax.apply_updates(trained, updates)
        ema = optim.ema_update(state["ema"], trained, state["step"], cfg.optim.ema) if cfg.optim.ema else {}
        new = {
            "step": state["step"] + 1,
            "params": optim.join(trained, frozen),
            "opt": opt,
            "ema": ema,
            "rng": state["rng"],
        }
        new = states.rest(cfg, jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state))
        report = _report(total, metrics, batch) | {"grad_norm": norm, "lr": learning_rate(state["step"])}
        return new, report | {"finite": finite}

    return jax.jit(step, donate_argnums=0)


def make_eval_step(cfg: Config) -> Callable[[dict, dict, jax.Array], dict]:
    """`step(params, batch, key) -> metrics`: the training loss without gradients, for held-out batches."""
    exact = precision.resolve(cfg.precision)

    def step(params: dict, batch: dict, key: jax.Array) -> dict:
        total, metrics = loss_fn(params, cfg, batch, key, exact)
        return _report(total, metrics, batch) | {"finite": jnp.isfinite(total)}

    return jax.jit(step)


def accumulate(loss: Callable, trained: dict, batch: dict, n: int, *shared):
    """((loss, metrics), gradients) of a batch, n micro-batches of rows one after the other.

    `loss(trained, micro, *shared)` divides by the counts of the whole batch, so everything it returns adds up exactly.
    Micro-batch i takes rows i, i+n, i+2n, …: every device keeps working on rows it already holds. Replicas (mesh axis
    data) add up once, after the last; within a replica each micro-batch reduces over fsdp, where whole gradients would
    not fit.
    """
    grad = jax.value_and_grad(loss, has_aux=True)
    if n == 1:
        return grad(trained, batch, *shared)

    def split(x):
        shape = (x.shape[0] // n, n, *x.shape[1:])
        return jnp.moveaxis(shard.reshape(x, shape, ("batch",) + ("token",) * (len(shape) - 1)), 1, 0)

    def run(trained, batch, *shared):
        def body(total, micro):
            return jax.tree.map(jnp.add, total, grad(trained, micro, *shared)), None

        micro = jax.tree.map(split, batch)
        one = jax.tree.map(lambda x: x[0], micro)
        shapes, _ = jax.eval_shape(grad, trained, one, *shared)  # of (loss, metrics)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), jax.tree.map(jnp.zeros_like, trained)
        return jax.lax.scan(body, zeros, micro)[0]

    return shard.per_replica(run, trained, batch, *shared)


def _report(total: jax.Array, metrics: dict, batch: dict) -> dict:
    """Scalars to log, from the additive metrics of loss_fn."""
    metrics = dict(metrics)
    sums, items = metrics.pop("sigma/sum"), metrics.pop("sigma/count")
    by_sigma = jnp.where(items > 0, sums / jnp.maximum(items, 1), jnp.nan)
    report = {"loss": total, **metrics}
    report |= {f"loss/sigma_{i}": by_sigma[i] for i in range(SIGMA_BUCKETS)}
    return report | {f"tokens/{s}": (batch[f"{s}_segment_ids"] >= 0).sum() for s in ("und", "gen")}
