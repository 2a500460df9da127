"""Text decoding with a cache says what the whole network says without one, and what transformers says."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch
from parity import oracle
from transformers import Qwen3VLTextConfig, Qwen3VLTextModel
from transformers.generation import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from cosmos_jax.config import ModelConfig, SampleConfig, VisionConfig
from cosmos_jax.model import cosmos, decode
from cosmos_jax.precision import HIGHEST
from cosmos_jax.sampling import text
from data_pipelines.schema import Bucket, empty_batch

NEW = 12
LENGTHS = (9, 3, 14)  # prompts of one batch
NO_EOS = (10**6,)


@functools.lru_cache
def tiny(variant: str):
    ref = {"omni": oracle.OMNI, "edge": oracle.EDGE}[variant]
    model = oracle.reference(ref)
    cfg = oracle.model_config(ref)
    return model, cfg, oracle.params(model, cfg)


@functools.lru_cache
def seeing():
    """A model with eyes: random weights, two deep-stack taps."""
    eye = VisionConfig(layers=3, hidden=24, heads=2, mlp=32, patch=4, grid=6, deepstack=(0, 1))
    cfg = dataclasses.replace(oracle.model_config(oracle.OMNI), vision=eye)
    params = jax.jit(cosmos.init, static_argnums=0)(cfg, jax.random.key(0))
    return cfg, jax.tree.map(lambda x: 4 * x if x.ndim > 2 else x, params)  # stock weights hardly react to the prompt


def prompts(cfg: ModelConfig, room: int = 0, lengths=LENGTHS) -> dict:
    """Right-padded prompts and `room` further slots; tokens 1 to 4 are an image if the model can see."""
    vit = 16 if cfg.vision else 0
    batch = empty_batch(Bucket(len(lengths), max(lengths) + room, 0, 0, 0, 0, 1, vit), cfg.sequence)
    for b, n in enumerate(lengths):
        rng = oracle.rng(f"prompt{b}")
        batch["und_ids"][b, :n] = rng.randint(0, cfg.vocab, n)
        batch["und_segment_ids"][b, :n] = 0
        batch["und_positions"][b, :, :n] = np.arange(n)
        if vit and n > 6:
            batch["und_vit_index"][b, 1:5] = np.arange(4)
            grid = np.array([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1]])  # 2×2 tokens take 2 positions
            batch["und_positions"][b, :, 1:5] = 1 + grid
            batch["und_positions"][b, :, 5:n] = 3 + np.arange(n - 5)
            batch["vit_patches"][b] = rng.standard_normal(batch["vit_patches"].shape[1:])
            batch["vit_segment_ids"][b] = 0
            block, inner = np.divmod(np.arange(16), 4)
            batch["vit_rowcol"][b] = np.stack([block // 2 * 2 + inner // 2, block % 2 * 2 + inner % 2], -1)
            batch["vit_interp_index"][b] = rng.randint(0, 36, (16, 4))
            batch["vit_interp_weight"][b] = 0.25
    return batch


@functools.partial(jax.jit, static_argnums=1)
def all_logits(params, cfg, batch):
    return cosmos.logits(params, cfg, cosmos.und(params, cfg, batch, precision=HIGHEST).hidden, precision=HIGHEST)


def without_cache(params, cfg, new=NEW):
    """Greedy tokens by running the whole und tower again for every token."""
    batch, tokens = prompts(cfg, room=new), []
    at = np.array(LENGTHS)
    rows = np.arange(len(at))
    nxt = batch["und_positions"].max((1, 2)) + 1
    for i in range(new):
        logits = np.asarray(all_logits(params, cfg, batch))[rows, at - 1]
        tokens.append(logits.argmax(-1))
        batch["und_ids"][rows, at] = tokens[-1]
        batch["und_segment_ids"][rows, at] = 0
        batch["und_positions"][rows, :, at] = (nxt + i)[:, None]
        at = at + 1
    return np.stack(tokens, 1)


def generate(params, cfg, batch, eos=NO_EOS, **kw):
    sample = SampleConfig(**(dict(max_new_tokens=NEW) | kw))
    return np.asarray(text.generate_text(params, cfg, batch, sample, eos=eos, precision=HIGHEST))


@pytest.mark.parametrize("variant", ["omni", "edge", "seeing"])
def test_greedy_equals_the_whole_network_without_cache(variant):
    cfg, params = seeing() if variant == "seeing" else tiny(variant)[1:]
    ours, want = generate(params, cfg, prompts(cfg)), without_cache(params, cfg)
    np.testing.assert_array_equal(ours, want)
    assert len(np.unique(want)) > NEW  # not a model that repeats one word


def test_pictures_change_the_answer():
    cfg, params = seeing()
    batch = prompts(cfg)
    seen, batch["vit_patches"] = generate(params, cfg, batch), -batch["vit_patches"]
    assert (generate(params, cfg, batch) != seen)[0].any()


@pytest.mark.parametrize("variant", ["omni", "edge"])
def test_step_logits_equal_the_whole_forward(variant):
    _, cfg, params = tiny(variant)
    full = prompts(cfg)
    want = np.asarray(all_logits(params, cfg, full))
    short = full | {"und_segment_ids": np.where(np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None] - 1, 0, -1)}
    last = np.array(LENGTHS) - 1
    rows = np.arange(len(last))

    @jax.jit
    def run(params):
        _, cache = decode.prefill(params, cfg, short, 2, precision=HIGHEST)
        ids, positions = full["und_ids"][rows, last], full["und_positions"][rows, :, last]
        return decode.decode_step(params, cfg, ids, positions, cache, last.astype(np.int32), precision=HIGHEST)[0]

    assert oracle.relative(run(params), want[rows, last])[0] <= 2e-6


def test_greedy_equals_transformers():
    """The same weights in transformers' Qwen3-VL text model, one prompt at a time."""
    model, cfg, params = tiny("omni")
    config = Qwen3VLTextConfig(
        vocab_size=cfg.vocab, hidden_size=cfg.hidden, intermediate_size=cfg.mlp, num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads, head_dim=cfg.head_dim,
        rms_norm_eps=cfg.norm_eps, rope_parameters=dict(
            rope_type="default", rope_theta=cfg.rope_theta, mrope_section=list(cfg.rope_sections),
            mrope_interleaved=True,
        ),
    )  # fmt: skip
    other = Qwen3VLTextModel(config).eval()
    names = {
        "q_proj": "to_q",
        "k_proj": "to_k",
        "v_proj": "to_v",
        "o_proj": "to_out",
        "q_norm": "norm_q",
        "k_norm": "norm_k",
    }
    state = model.state_dict()

    def theirs(name):
        for a, b in names.items():
            name = name.replace(f"self_attn.{a}", f"self_attn.{b}")
        return state[name]

    other.load_state_dict({name: theirs(name) for name in other.state_dict()})
    batch = prompts(cfg)
    ours = generate(params, cfg, batch)
    for b, n in enumerate(LENGTHS):
        ids = torch.from_numpy(batch["und_ids"][b : b + 1, :n]).long()
        for i in range(NEW):
            with torch.no_grad():
                logits = other(input_ids=ids).last_hidden_state[:, -1] @ state["lm_head.weight"].T
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
            assert ids[0, -1] == ours[b, i], (b, i)


def test_an_answer_ends_with_eos_and_the_others_go_on():
    _, cfg, params = tiny("omni")
    free = generate(params, cfg, prompts(cfg))
    eos = int(free[1, 3])
    ours = generate(params, cfg, prompts(cfg), eos=(eos, 10**6))
    for row, want in zip(ours, free, strict=True):
        end = np.flatnonzero(want == eos)
        stop = end[0] + 1 if len(end) else NEW
        np.testing.assert_array_equal(row[:stop], want[:stop])
        assert (row[stop:] == text.PAD).all()


def test_draws_repeat_by_seed_and_do_not_depend_on_the_batch():
    _, cfg, params = tiny("omni")
    kw = dict(temperature=1.5, top_k=50, top_p=0.95, seed=3)
    batch = prompts(cfg)
    a, again = generate(params, cfg, batch, **kw), generate(params, cfg, batch, **kw)
    other = generate(params, cfg, batch, **kw | {"seed": 4})
    np.testing.assert_array_equal(a, again)
    assert (a != other).any() and (a != generate(params, cfg, batch)).any()
    turned = {k: v[::-1].copy() for k, v in batch.items()}
    sample = SampleConfig(max_new_tokens=NEW, **kw)
    seeds = np.arange(len(LENGTHS), dtype=np.int32)[::-1].copy()
    b = text.generate_text(params, cfg, turned, sample, eos=NO_EOS, precision=HIGHEST, seeds=seeds)
    np.testing.assert_array_equal(np.asarray(b)[::-1], a)


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (5, 1.0), (0, 0.7), (20, 0.8), (3, 0.05), (100, 0.999)])
def test_kept_tokens_equal_transformers(top_k, top_p):
    logits = 3 * np.random.RandomState(0).standard_normal((4, 64)).astype(np.float32)
    want = torch.from_numpy(logits)
    if top_k:
        want = TopKLogitsWarper(top_k)(None, want)
    if top_p < 1:
        want = TopPLogitsWarper(top_p)(None, want)
    ours = jax.vmap(lambda x: text.keep(x, top_k, top_p))(logits)
    np.testing.assert_array_equal(ours, want.numpy())


def present(rows, vocab):
    mask = np.zeros((len(rows), vocab), bool)
    for row, ids in zip(mask, rows, strict=True):
        row[list(ids)] = True
    return mask


@pytest.mark.parametrize("repetition", [1.3, 8.0, 0.7])
def test_repetition_penalty_equals_transformers(repetition):
    rng = np.random.RandomState(1)
    logits = 3 * rng.standard_normal((4, 64)).astype(np.float32)
    asked, said = rng.randint(0, 64, (4, 9)), rng.randint(0, 64, (4, 5))
    ids = torch.from_numpy(np.concatenate([asked, said], 1))
    want = RepetitionPenaltyLogitsProcessor(repetition)(ids, torch.from_numpy(logits.copy())).numpy()
    ours = text.penalise(logits, present(asked, 64), present(said, 64), repetition, 0.0)
    np.testing.assert_array_equal(ours, want)
    assert (want != logits).sum() > 30


@pytest.mark.parametrize("repetition, presence", [(1.0, 1.5), (1.0, -0.5), (1.4, 0.8)])
def test_presence_penalty_counts_words_of_the_answer_once(repetition, presence):
    rng = np.random.RandomState(2)
    logits = 3 * rng.standard_normal((3, 32)).astype(np.float32)
    asked, said = [(1, 2, 3), (4,), (5, 6)], [(3, 7, 7, 7), (), (6, 8)]
    want = logits.copy()
    for row, prompt, answer in zip(want, asked, said, strict=True):
        for word in {*prompt, *answer}:
            if repetition != 1:
                row[word] = row[word] / np.float32(repetition) if row[word] > 0 else row[word] * np.float32(repetition)
        for word in {*answer}:
            row[word] -= np.float32(presence)
    ours = text.penalise(logits, present(asked, 32), present(said, 32), repetition, presence)
    np.testing.assert_array_equal(ours, want)


@pytest.mark.parametrize("repetition, presence", [(1.6, 0.0), (1.0, 3.0), (1.3, -2.0)])
def test_penalised_greedy_decoding_remembers_prompt_and_answer(repetition, presence):
    """The compiled loop against transformers' processor and numpy around the whole network, token by token."""
    cfg, params = seeing()
    ours = generate(params, cfg, prompts(cfg), repetition_penalty=repetition, presence_penalty=presence)
    batch, at, rows = prompts(cfg, room=NEW), np.array(LENGTHS), np.arange(len(LENGTHS))
    nxt = batch["und_positions"].max((1, 2)) + 1
    for i in range(NEW):
        logits = np.array(all_logits(params, cfg, batch))[rows, at - 1]
        for b in rows:
            ids = torch.from_numpy(batch["und_ids"][b : b + 1, : at[b]]).long()
            scores = torch.from_numpy(logits[b : b + 1])
            logits[b] = RepetitionPenaltyLogitsProcessor(repetition)(ids, scores)[0].numpy()
            logits[b, list(set(ours[b, :i]))] -= presence
        np.testing.assert_array_equal(ours[:, i], logits.argmax(-1), err_msg=f"token {i}")
        batch["und_ids"][rows, at] = ours[:, i]
        batch["und_segment_ids"][rows, at] = 0
        batch["und_positions"][rows, :, at] = (nxt + i)[:, None]
        at = at + 1
    assert (ours != generate(params, cfg, prompts(cfg))).any()


def test_draws_follow_the_distribution():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    keys = jax.random.split(jax.random.key(0), 20000)
    drawn = jax.vmap(lambda k: text.choose(logits, k, 0.5, 0, 0.95))(keys)  # squared, then the last one is cut
    p = np.array([0.25, 0.09, 0.0225, 0.0])
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 20000, p / p.sum(), atol=0.01)


def test_contradictions_are_named():
    _, cfg, params = tiny("omni")
    two = prompts(cfg)
    two["und_segment_ids"][0, 5:9] = 1
    with pytest.raises(ValueError, match="one prompt per row"):
        generate(params, cfg, two)
    with pytest.raises(ValueError, match="top_p"):
        generate(params, cfg, prompts(cfg), temperature=1.0, top_p=0.0)
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(params, cfg, prompts(cfg), max_new_tokens=0)
    with pytest.raises(ValueError, match="repetition_penalty"):
        generate(params, cfg, prompts(cfg), repetition_penalty=0.0)
