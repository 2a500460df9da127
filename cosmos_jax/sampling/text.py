"""The reasoner speaks: prefill, then one compiled loop over new tokens.

In: a packed batch with one right-padded prompt per row (text, and ViT features where the prompt has pictures). Out: new
token ids. Logits go through repetition penalty → presence penalty → temperature → top-k → top-p → multinomial, in this
order (spec model.md §3.4).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cosmos_jax import shard
from cosmos_jax.config import ModelConfig, SampleConfig
from cosmos_jax.model import cosmos, decode
from cosmos_jax.model.modality import take_rows
from cosmos_jax.precision import Precision

PAD = -1  # what follows the end of an answer


def generate_text(
    params: dict,
    cfg: ModelConfig,
    batch: dict,
    sample: SampleConfig,
    *,
    eos: tuple[int, ...],
    precision: Precision,
    seeds: np.ndarray | None = None,
) -> jax.Array:
    """New tokens [B, sample.max_new_tokens] int32: each row up to its eos, then -1; a row without a prompt is all -1.

    One prompt per row (ValueError otherwise), as und segment 0 without padding in front. Row b draws from the seed
    (sample.seed, seeds[b]); by default seeds[b] = b. Temperature 0 is greedy. New tokens continue at the prompt's
    largest position + 1 on all three axes (Qwen3-VL).
    """
    segments = batch["und_segment_ids"]
    if isinstance(segments, np.ndarray) and (np.any(segments > 0) or np.any(np.diff(segments, axis=1) > 0)):
        raise ValueError("text decoding takes one prompt per row: pack each prompt alone, from the left.")
    if sample.max_new_tokens < 1:
        raise ValueError(f"sample.max_new_tokens={sample.max_new_tokens} must be at least 1.")
    if sample.repetition_penalty <= 0:
        raise ValueError(f"sample.repetition_penalty={sample.repetition_penalty} must be above 0; 1 is off.")
    seeds = np.arange(segments.shape[0], dtype=np.int32) if seeds is None else seeds
    penalties = (sample.repetition_penalty, sample.presence_penalty)
    knobs = (sample.max_new_tokens, sample.temperature, sample.top_k, sample.top_p, *penalties)
    return _generate(params, cfg, batch, seeds, jax.random.key(sample.seed), knobs, tuple(eos), precision)


@functools.partial(jax.jit, static_argnums=(1, 5, 6, 7))
def _generate(params, cfg, batch, seeds, key, knobs, eos, precision):
    limit, *how, repetition, presence = knobs
    penalised = repetition != 1 or presence != 0
    seeds = shard.constrain(jnp.asarray(seeds), ("batch",))
    valid = batch["und_segment_ids"] >= 0
    lengths = valid.sum(1).astype(jnp.int32)
    position = jnp.where(valid[:, None], batch["und_positions"], -1.0).max((1, 2)) + 1
    hidden, cache = decode.prefill(params, cfg, batch, limit, precision=precision)
    last = take_rows(hidden, lengths[:, None] - 1)
    logits = cosmos.logits(params, cfg, last, precision=precision)[:, 0]
    asked = said = None  # [B, vocab] bool: words of the prompt, words of the answer so far
    if penalised:
        asked = jax.vmap(lambda ids, there: jnp.zeros(cfg.vocab, bool).at[ids].max(there))(batch["und_ids"], valid)
        said = jnp.zeros_like(asked)

    @functools.partial(jax.vmap, in_axes=(0, 0, None, None))
    def draw_row(logits, seed, key, step):
        return choose(logits, jax.random.fold_in(jax.random.fold_in(key, seed), step), *how)

    def draw(logits, step, done, said):
        logits = shard.constrain(logits, ("batch", "feature"))  # every row whole
        if penalised:
            logits = penalise(logits, asked, said, repetition, presence)
        return jnp.where(done, PAD, shard.rowwise(draw_row, logits, seeds, shared=(key, step)))

    def add(said, token):
        return said | (token[:, None] == jnp.arange(cfg.vocab)) if penalised else None

    def ends(token):
        return functools.reduce(jnp.logical_or, [token == e for e in eos], token == PAD)

    token = draw(logits, jnp.int32(0), lengths == 0, said)
    said = add(said, token)
    answer = jnp.where(jnp.arange(limit) == 0, token[:, None], PAD)

    def unfinished(carry):
        step, token, done, *_ = carry
        return (step < limit) & ~jnp.all(done)

    def body(carry):
        step, token, done, answer, cache, said = carry
        at = jnp.broadcast_to((position + (step - 1))[:, None], (*position.shape, 3))
        logits, cache = decode.decode_step(
            params, cfg, jnp.maximum(token, 0), at, cache, lengths + step - 1, precision=precision
        )
        token = draw(logits, step, done, said)
        answer = jnp.where(jnp.arange(limit) == step, token[:, None], answer)
        return step + 1, token, done | ends(token), answer, cache, add(said, token)

    return jax.lax.while_loop(unfinished, body, (jnp.int32(1), token, ends(token), answer, cache, said))[3]


def penalise(logits: jax.Array, asked: jax.Array, said: jax.Array, repetition: float, presence: float) -> jax.Array:
    """logits [..., vocab] float32, of words that were there before made less likely (or, below 1 and 0, likelier).

    asked, said: bool, the words of the prompt and of the answer. repetition divides positive logits of either and
    multiplies negative ones (CTRL; transformers); presence is subtracted, once, from those of the answer alone, as
    cosmos-framework (mot/unified_mot.py) and vLLM have it.
    """
    if repetition != 1:
        less = jnp.where(logits > 0, logits / repetition, logits * repetition)
        logits = jnp.where(asked | said, less, logits)
    return jnp.where(said, logits - presence, logits) if presence else logits


def choose(logits: jax.Array, key: jax.Array, temperature: float, top_k: int, top_p: float) -> jax.Array:
    """One token id from logits [vocab] float32. Temperature 0: the largest. ValueError for settings out of range."""
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"sample.temperature={temperature} ≥ 0, top_k={top_k} ≥ 0, 0 < top_p={top_p} ≤ 1 must hold.")
    if temperature == 0:
        return jnp.argmax(logits).astype(jnp.int32)
    return jax.random.categorical(key, keep(logits / temperature, top_k, top_p)).astype(jnp.int32)


def keep(logits: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """logits [vocab] with −∞ outside the k largest, then outside the smallest set whose probability reaches top_p."""
    if 0 < top_k < logits.shape[-1]:
        logits = jnp.where(logits < jax.lax.top_k(logits, top_k)[0][-1], -jnp.inf, logits)
    if top_p < 1:
        order = jnp.argsort(-logits)
        p = jax.nn.softmax(logits[order])
        before = jnp.cumsum(p) - p  # probability of everything larger
        logits = jnp.where((before >= top_p)[jnp.argsort(order)], -jnp.inf, logits)
    return logits
