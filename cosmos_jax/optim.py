"""The optimiser: AdamW or Muon, with a schedule, clipping, frozen and differently paced parameters; power-law EMA.

In: `OptimConfig` and the nested dict of parameters. Out: an optax transformation over the *trained* part of that dict.
Frozen parameters are taken out of the tree before anything is differentiated: no gradient, no moments, no EMA copy.

A parameter is named by its path, e.g. "layers/gen/attn/q"; the settings `trainable`, `frozen` and `lr_scale` hold
substrings of such paths (training.md §1.4: the reference selects the same way).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from flax.traverse_util import flatten_dict, unflatten_dict

from cosmos_jax import flops, shard
from cosmos_jax.config import ConfigError, OptimConfig, nearest


def select(cfg: OptimConfig, params: dict) -> tuple[dict, dict]:
    """Split a tree of parameters (arrays or shapes) into (trained, frozen); `join` is the inverse.

    Raises ConfigError for a pattern that matches no parameter, and when nothing is left to train.
    """
    flat = {key: "/".join(map(str, key)) for key in flatten_dict(params)}
    for setting, patterns in (
        ("trainable", cfg.trainable),
        ("frozen", cfg.frozen),
        ("lr_scale", [p for p, _ in cfg.lr_scale]),
    ):
        for pattern in patterns:
            if not any(pattern in path for path in flat.values()):
                raise ConfigError(f"optim.{setting}: {pattern!r} is in no parameter's path{_hint(pattern, flat)}.")
    chosen = {key for key, path in flat.items() if cfg.trains(path)}
    if not chosen:
        raise ConfigError("optim.trainable and optim.frozen leave no parameter to train; shorten optim.frozen.")
    leaves = flatten_dict(params)
    trained = {key: x for key, x in leaves.items() if key in chosen}
    return unflatten_dict(trained), unflatten_dict({key: x for key, x in leaves.items() if key not in chosen})


def reaches_und(cfg: OptimConfig, params: dict) -> bool:
    """Does any gradient flow into the und tower? (Counting operations needs to know.)"""
    return flops.reaches_und("/".join(map(str, key)) for key in flatten_dict(select(cfg, params)[0]))


def join(trained: dict, frozen: dict) -> dict:
    """The whole tree of parameters from its two parts; a leaf of `trained` wins."""
    return unflatten_dict({**flatten_dict(frozen), **flatten_dict(trained)})


def schedule(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate at 0-based step n: linear warm-up from 0, then cosine, linear or constant until `steps`."""
    decay, last = max(steps - cfg.warmup, 1), cfg.final_lr
    after = {
        "cosine": optax.cosine_decay_schedule(cfg.lr, decay, alpha=last),
        "linear": optax.linear_schedule(cfg.lr, cfg.lr * last, decay),
        "constant": optax.constant_schedule(cfg.lr),
    }[cfg.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, cfg.lr, max(cfg.warmup, 1)), after], [cfg.warmup])


def build(cfg: OptimConfig, steps: int, trained: dict) -> optax.GradientTransformation:
    """clip → direction (Adam or Muon) → decoupled weight decay on every trained parameter → pace → learning rate.

    `trained`: the trained part of the parameters (arrays or shapes). The structure of the optimiser state depends on
    nothing but `optim.name`, so a run may be resumed with another clip, decay or pace.
    """
    factors = unflatten_dict({key: _factor(cfg, "/".join(map(str, key))) for key in flatten_dict(trained)})
    pace = optax.stateless(lambda updates, _: jax.tree.map(lambda u, f: f * u, updates, factors))
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip) if cfg.clip else optax.identity(),
        _direction(cfg, trained),
        optax.add_decayed_weights(cfg.weight_decay),
        pace,
        optax.scale_by_learning_rate(schedule(cfg, steps)),
    )


def _direction(cfg: OptimConfig, trained: dict) -> optax.GradientTransformation:
    """Adam (float32 moments, bias correction); with optim.name = "muon", Muon for the matrices of both towers.

    Muon: Nesterov momentum, orthogonalised by five Newton–Schulz iterations (Jordan et al. 2024), times
    0.2·√max(in, out), which gives it the size of an Adam step, so that both share one learning rate and one decay
    (Liu et al. 2025, arXiv:2502.16982 §2.2).
    """
    adam = optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.eps)
    if cfg.name == "adamw":
        return adam
    matrices = {key: numbers for key, x in flatten_dict(trained).items() if (numbers := _matrix(key, x.ndim))}
    kinds = unflatten_dict({key: "muon" if key in matrices else "adam" for key in flatten_dict(trained)})
    muon = optax.contrib.scale_by_muon(
        beta=cfg.momentum, weight_dimension_numbers=lambda tree: _like(tree, lambda key, _: matrices[key])
    )
    size = optax.stateless(lambda tree, _: _like(tree, lambda key, x: _adam_size(x, matrices[key])))
    return optax.partition({"muon": optax.chain(_unsharded(muon), size), "adam": adam}, kinds)


def _matrix(key: tuple, ndim: int) -> optax.contrib.MuonDimensionNumbers | None:
    """Which axes of a stacked parameter of the towers are in and out; None for what is not a matrix of a tower.

    Layers are stacked along axis 0; q, k, v are [L, in, heads, head_dim] and o is [L, heads, head_dim, out].
    """
    if key[0] != "layers" or ndim < 3:
        return None
    first_out = ndim - 1 if key[-1] == "o" else 2
    return optax.contrib.MuonDimensionNumbers(tuple(range(1, first_out)), tuple(range(first_out, ndim)))


def _like(tree, f: Callable):
    """f(key, leaf) for every leaf of a masked tree of parameters; masked ones stay."""
    flat = flatten_dict(tree)
    return unflatten_dict({k: x if isinstance(x, optax.MaskedNode) else f(k, x) for k, x in flat.items()})


def _adam_size(x: jax.Array, numbers: optax.contrib.MuonDimensionNumbers) -> jax.Array:
    fan_in, fan_out = (np.prod([x.shape[a] for a in axes]) for axes in numbers)
    return x * float(0.2 * np.sqrt(max(fan_in, fan_out)))


def _unsharded(muon: optax.GradientTransformation) -> optax.GradientTransformation:
    """Leave the placement of what happens inside to the compiler; results lie where their inputs lay.

    The iteration's coefficients are constants; optax keeps them in the state, here they stay out of it.
    """

    def init(params):
        return muon.init(params)._replace(ns_coeffs=())

    def update(updates, state, params=None):
        def inside(updates, state):
            updates, state = muon.update(updates, state._replace(ns_coeffs=muon.init({}).ns_coeffs))
            return updates, state._replace(ns_coeffs=())

        if shard.no_mesh():
            return inside(updates, state)
        out = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (updates, state))
        return jax.sharding.auto_axes(inside, out_sharding=out)(updates, state)

    return optax.GradientTransformation(init, update)


def ema_exponent(s: float) -> float:
    """γ of the power-law EMA of relative width s: largest real root of x³ + 7x² + (16 − s⁻²)x + (12 − s⁻²) = 0."""
    roots = np.roots([1.0, 7.0, 16.0 - s**-2, 12.0 - s**-2])
    return float(roots[np.abs(roots.imag) < 1e-9].real.max())


def ema_beta(step: jax.Array, s: float) -> jax.Array:
    """β = (1 − 1/(step+1))^(γ+1), step 0-based (spec model.md §6.5). β(0) = 0: the first step copies."""
    return (1.0 - 1.0 / (jnp.asarray(step, jnp.float32) + 1.0)) ** (ema_exponent(s) + 1.0)


def ema_update(ema: dict, trained: dict, step: jax.Array, s: float) -> dict:
    """ema ← β·ema + (1 − β)·trained, in float32, after optimiser step `step` (0-based)."""
    beta = ema_beta(step, s)
    return jax.tree.map(lambda e, p: beta * e + (1.0 - beta) * p, ema, trained)


def _factor(cfg: OptimConfig, path: str) -> float:
    return next((factor for pattern, factor in cfg.lr_scale if pattern in path), 1.0)


def _hint(pattern: str, flat: dict) -> str:
    """The nearest stretch of a path with as many parts as the pattern has."""
    n = pattern.count("/") + 1
    stretches = {"/".join(map(str, key[i : i + n])) for key in flat for i in range(len(key) - n + 1)}
    return nearest(pattern, sorted(stretches)) or f"; there is, for example, {next(iter(flat.values()))!r}"
