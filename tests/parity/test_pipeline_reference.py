"""The recordings of diffusers' pipelines: every case runs, twice alike, on folders that diffusers itself loads."""

import functools
import json

import diffusers
import numpy as np
import pytest
import torch

from conversion import folder
from cosmos_jax import media
from cosmos_jax.parity import pipeline_cases, pipeline_loops, pipeline_reference, reference, rows, run, tiny
from data_pipelines.tokenizer import ChatTokenizer

FAMILIES = ("nano", "edge", "distilled")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models are so small that PyTorch's threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """family → its folder, opened."""
    run.quiet()

    @functools.cache
    def make(family):
        return folder.open_folder(tiny.write(tmp_path_factory.mktemp(family), family)[0])

    return make


@pytest.fixture(scope="module")
def recorded(checkpoint):
    """family → name → what was recorded."""

    @functools.cache
    def make(family):
        cases = pipeline_cases.cases(pipeline_cases.Facts.of(checkpoint(family)))
        found = pipeline_reference.record_all(checkpoint(family), cases)
        return {c.name: r for c, r in zip(cases, found, strict=True)}

    return make


def test_diffusers_and_we_load_the_tiny_folder(checkpoint):
    path = checkpoint("nano").path
    pipe = diffusers.Cosmos3OmniPipeline.from_pretrained(path, enable_safety_checker=False, dtype=torch.float32)
    assert pipe.sound_tokenizer is not None and pipe.transformer.config.action_dim == 64
    ours = ChatTokenizer.load(path / "text_tokenizer")
    for text in ("A small robot. 24 FPS, été", '{"a": [1, "b"]}', ""):
        messages = [{"role": "system", "content": "You are."}, {"role": "user", "content": text}]
        theirs = pipe.text_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        assert ours.chat([("system", "You are."), ("user", text)]) == theirs.input_ids
    assert (ours.eos, ours.vision_start) == tuple(
        pipe.llm_special_tokens[k] for k in ("eos_token_id", "start_of_generation")
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_case_is_recorded(family, recorded):
    for name, r in recorded(family).items():
        for t in r.traces:
            steps = len(t.timesteps)
            assert steps == len(t.velocities) == len(t.velocities64) == len(t.latents) - 1 == len(t.sigmas) - 1, name
            assert not t.calls and set(t.half) == set(t.truth) == set(pipeline_reference.sampled(steps))
            assert ("uncond" in t.branches) == (r.case.request.get("guidance", 1) != 1), name
            for at in (t.noise, *t.latents, *(v[b] for v in t.velocities for b in t.branches)):
                assert {m: x.shape for m, x in at.items()} == {m: x.shape for m, x in t.latents[0].items()}, name
                assert all(np.isfinite(x).all() for x in at.values()), name
        assert 0 <= r.video.min() < r.video.max() <= 1


def same(a, b):
    for s, t in zip(a.traces, b.traces, strict=True):
        for x, y in zip(s.latents + [s.noise], t.latents + [t.noise], strict=True):
            assert all(np.array_equal(x[m], y[m]) for m in x)
    return np.array_equal(a.video, b.video)


def test_a_recording_does_not_depend_on_what_was_recorded_before(checkpoint, recorded):
    for family, name in (("nano", "t2i"), ("distilled", "t2i")):
        cases = pipeline_cases.cases(pipeline_cases.Facts.of(checkpoint(family)))
        again = pipeline_reference.record_all(
            checkpoint(family), [c for c in cases if c.name == name], doubles=False, half=False
        )
        assert same(again[0], recorded(family)[name])


def test_what_each_case_is_for(recorded):
    nano, edge = recorded("nano"), recorded("edge")
    assert set(nano) - set(edge) == {"t2i_sound", "t2v_sound", "i2v_sound_fps10", "v2v_sound", "s2v", "v2s"}
    noisy = {n: {m: x.astype(int).tolist() for m, x in r.traces[0].noisy.items()} for n, r in nano.items()}
    assert noisy["t2v"] == {"vision": [1, 1, 1]} and noisy["i2v"] == {"vision": [0, 1, 1]}
    assert noisy["v2v"] == {"vision": [0, 0, 1, 1]} and noisy["inverse_dynamics"]["vision"] == [0, 0]
    assert noisy["policy"] == {"vision": [0, 1], "action": [1] * 4}
    assert noisy["forward_dynamics"] == {"vision": [0, 1], "action": [0] * 4}
    assert not any(noisy["s2v"]["sound"]) and all(noisy["v2s"]["sound"]) and not any(noisy["v2s"]["vision"])
    assert {n: len(r.traces[0].context) for n, r in nano.items() if r.traces[0].context} == {
        "transfer": 1, "transfer_two": 2, "i2i": 1, "transfer_weighted": 2
    }  # fmt: skip
    assert {n: len(r.traces) for n, r in nano.items() if len(r.traces) > 1} == {"transfer": 2, "transfer_two": 2}
    assert [t.noisy["vision"].tolist() for t in nano["transfer"].traces] == [[True] * 3, [False, True, True]]
    assert set(nano["transfer"].traces[0].branches) == {"cond", "uncond", "cond_no_control"}
    assert [nano[n].traces[0].domain for n in ("policy", "forward_dynamics", "inverse_dynamics")] == [7, 1, 20]
    assert {n: r.actions.shape for n, r in nano.items() if r.actions is not None} == {
        "policy": (4, 10), "inverse_dynamics": (4, 10)
    }  # fmt: skip
    assert {n: r.wave.shape for n, r in nano.items() if r.wave is not None} == {
        "t2i_sound": (2, 12), "t2v_sound": (2, 120), "i2v_sound_fps10": (2, 276), "v2v_sound": (2, 168),
        "v2s": (2, 120),
    }  # fmt: skip
    assert all(len(t.fresh) == 4 for r in recorded("distilled").values() for t in r.traces)
    lengths = [len(x["cond_no_control"].positions["vision"][0]) for x in [nano["transfer"].traces[0].branches]]
    assert lengths == [18]  # without the control: half as many


def test_conditions_are_still_and_channels_of_other_embodiments_are_zero(recorded):
    for name, r in recorded("nano").items():
        for t in r.traces:
            for m, noisy in t.noisy.items():
                axis = {"action": 0}.get(m, 1)
                first, last = (np.compress(~noisy, x[m], axis) for x in (t.latents[0], t.latents[-1]))
                assert np.abs(last - first).max(initial=0) < 1e-5, name
                assert not any(np.compress(~noisy, v[b][m], axis).any() for v in t.velocities for b in v), name
    policy = recorded("nano")["policy"].traces[0]
    velocities = [v["cond"] for v in [*policy.velocities, *policy.velocities64, *policy.half.values()]]
    for x in [*policy.latents, *velocities]:
        assert not x["action"][:, 10:].any() and x["action"][:, :10].all()


def test_velocities_in_other_precisions_belong_to_the_same_latents(recorded):
    for r in recorded("nano").values():
        for t in r.traces:
            for i, step in enumerate(t.velocities):
                for b, v in step.items():
                    for m, x in v.items():
                        if x.any():
                            assert rows.relative(x, t.velocities64[i][b][m])[0] < 2e-6
                            if i in t.half:
                                assert 1e-3 < rows.relative(t.half[i][b][m], t.truth[i][b][m])[0] < 0.1


def test_distilled_without_fresh_noise(tmp_path):
    opened = folder.open_folder(tiny.write(tmp_path, "distilled", stochastic=False)[0])
    cases = [c for c in pipeline_cases.distilled() if c.name == "i2v"]
    (t,) = pipeline_reference.record_all(opened, cases, doubles=False, half=False)[0].traces
    assert not t.fresh and t.sigmas.tolist() == np.float32([*tiny.SIGMAS, 0]).tolist()
    dsigma = t.sigmas[1] - t.sigmas[0]
    want = t.latents[0]["vision"] + dsigma * t.velocities[0]["cond"]["vision"]
    assert np.allclose(t.latents[1]["vision"], want, atol=1e-6)


def test_one_attention_per_control():
    """One control: as without weights. Two: the weights matter, and only their ratio."""
    model = tiny.transformer(tiny.CONFIGS["nano"])
    items = [torch.from_numpy(reference.draw(f"item {i}", 1, 8, 2, 3, 5)) for i in range(3)]

    def run(items, weights):
        kw = pipeline_loops.pack(list(range(30)), items, [0, 1], None, [], model.config, 10.0, shared=True)
        with torch.no_grad(), pipeline_loops.one_attention_per_control(kw, weights):
            return model(**kw, vision_tokens=items, vision_timesteps=torch.full((12,), 500)).sample[-1]

    assert torch.allclose(run(items[1:], (5.0,)), run(items[1:], ()), atol=1e-5)
    equal = run(items, (1.0, 1.0))
    assert torch.allclose(equal, run(items, (2.0, 2.0)), atol=1e-5)
    assert not torch.allclose(equal, run(items, (1.0, 3.0)), atol=1e-2)
    assert not torch.allclose(equal, run(items, ()), atol=1e-2)
    only = run(items, (1.0, 0.0))
    assert torch.allclose(only, run([items[0], items[2]], (1.0,)), atol=1e-5)


def test_requests_name_files_that_hold_exactly_what_was_made(tmp_path):
    for case in pipeline_cases.cases(pipeline_cases.Facts(300, action=True)):
        told = json.loads(case.write(tmp_path / case.name).read_text())
        assert told["name"] == case.name
        for name, x in case.media.items():
            path = tmp_path / case.name / name
            assert str(path) in json.dumps(told)
            read = {".png": media.read_image, ".json": media.read_actions}.get(path.suffix)
            if path.suffix == ".mp4":
                read = lambda p: media.read_video(p)[0]  # noqa: E731
            elif path.suffix == ".wav":
                read = lambda p: media.read_sound(p, 300)  # noqa: E731
            assert np.array_equal(read(path), x), name
