"""Evaluation without a model: the truth beats every baseline, nonsense beats none, and no request holds its answer."""

import json

import fake_pipeline as fake
import numpy as np
import pytest

from cosmos_jax.evaluate import evaluate, held_out, measure, table, verdict
from cosmos_jax.evaluate.study import UPPER, narrow, row
from data_pipelines.tasks import ALL, task
from data_pipelines.toy_world.episodes import make_episode

KEYS = {"value", "unit", "baselines", "better", "beats"}


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("oracle")
    pipeline = fake.Oracle()
    return evaluate(pipeline, workdir), workdir, pipeline


def test_the_truth_beats_every_baseline(oracle):
    scores, workdir, _ = oracle
    assert {name for name, s in scores.items() if not s["beats"]} == set()
    assert scores["caption, word for word"]["value"] == scores["question answering"]["value"] == 1
    for name in ("forward dynamics, gripper", "forward dynamics, moving pucks", "inverse dynamics, all channels"):
        assert scores[name]["value"] == pytest.approx(0, abs=1e-6), name
    assert scores["policy, closed loop"]["value"] == scores["policy, closed loop"]["baselines"][f"expert {UPPER}"]


def test_the_files_keep_the_contract(oracle):
    scores, workdir, pipeline = oracle
    assert json.loads((workdir / "scores.json").read_text()) == scores
    for s in scores.values():
        assert set(s) == KEYS and s["better"] in ("higher", "lower") and s["baselines"]
        assert all(np.isfinite(v) for v in (s["value"], *s["baselines"].values()))
    facts = json.loads((workdir / "facts.json").read_text())
    assert set(facts["rows"]) == set(scores) and all(r["note"] for r in facts["rows"].values())
    assert facts["config"]["model"]["name"] == "fake" and facts["parameters"] == 7 and len(facts["seconds"]) == 8
    tasks = {"caption", "question", "text2image", "text2video", "text2video_sound", "image2video", "video2video",
             "forward_dynamics", "inverse_dynamics", "policy"}  # fmt: skip
    assert {p.stem for p in (workdir / "examples").glob("*.npz")} == tasks


def test_no_request_holds_what_is_asked_for(oracle):
    requests = oracle[2].requests
    assert {s.task for s in requests} == {t.name for t in map(task, {s.task for s in requests})} and len(requests) > 90
    for s in requests:
        rule = task(s.task)
        if not rule.generates:
            assert s.answer is None
            continue
        if rule.clean_frames != ALL:
            assert not s.vision_latents[:, rule.clean_frames :].any()
        assert s.sound_latents is None or not s.sound_latents.any()
        assert rule.action != "noisy" or not s.actions.any()
        assert rule.action != "clean" or s.actions.any()


def test_nonsense_beats_nothing(tmp_path):
    scores = evaluate(fake.Garbage(), tmp_path)
    assert [name for name, s in scores.items() if s["beats"]] == []


def test_a_row_beats_only_if_it_beats_all_but_the_upper_references():
    def beats(value, better, **baselines):
        return row(value, "px", better, {k.replace("_upper", f" {UPPER}"): v for k, v in baselines.items()})["beats"]

    assert beats(1.0, "lower", copy=2.0, velocity=1.5, expert_upper=0.1)
    assert not beats(1.0, "lower", copy=2.0, velocity=0.9)
    assert not beats(1.0, "lower", copy=1.0), "a tie is not a win"
    assert beats([0.5, np.nan, 0.7], "higher", random=0.5, expert_upper=1.0)
    assert not beats(np.nan, "lower", copy=2.0)
    assert not beats(1.0, "lower", copy=np.nan), "nothing is beaten that could not be measured"


def test_a_loss_is_said_in_words():
    lost = row(3.0, "px", "lower", {"copy the frame": 2.0, "a random time": 4.0, f"expert {UPPER}": 0.0})
    assert verdict(lost) == "does NOT beat copy the frame"
    assert "beats its" in verdict(row(1.0, "px", "lower", {"copy the frame": 2.0}))
    assert "not a number" in verdict(row(np.inf, "px", "lower", {}))
    assert table({"ability": lost}).row_count == 1


def test_the_loss_baselines_are_the_best_of_their_kind():
    rng, n = np.random.RandomState(0), 20000
    x0, noise, s = 3 + 0.5 * rng.normal(size=(n, 2)), rng.normal(size=(n, 2)), rng.uniform(0.05, 1, (n, 1))
    tokens = held_out.Noisy(x0, noise - x0, s * noise + (1 - s) * x0, s, np.full((n, 2), 1 / (2 * n)))
    assert held_out.constant(tokens) == pytest.approx(1 + 0.25, rel=0.02)  # the variance of noise − x0
    posterior = 0.25 / (s**2 + (1 - s) ** 2 * 0.25)  # of noise − x0 given x_t: its variance
    assert held_out.linear(tokens) == pytest.approx(posterior.mean(), rel=0.02)


def test_captions_come_apart_into_slots():
    said = "The gripper pushes the red wood puck down. The gripper hits red at 0.5 s. Red hits the right wall at 1.1 s."
    assert measure.slots(said) == ("pushes", "red", "wood", "down", "The gripper hits red", "0.5")
    assert measure.slots("The blue glass puck slides up.") == ("slides", "blue", "glass", "up", "", "")
    assert measure.slots("The gripper moves alone.") == ("moves", "", "", "", "", "")
    assert measure.slots("") == measure.slots("gibberish at 0.5") == ("",) * 6
    assert measure.colours_named(said + " Blue hits red.") == ["red", "blue"]


def test_positions_are_found_where_the_simulator_put_them():
    e = make_episode(3)
    path = measure.track(e.video, e.colours)
    assert path.shape == (17, 1 + len(e.colours), 2)
    assert np.nanmax(measure.distance(path, path)) == 0
    lost = measure.distance(np.full_like(path, np.nan), path)
    assert np.nanmin(lost) == np.nanmax(lost) == measure.LOST
    assert measure.first_onset(np.zeros((2, 8000), np.float32)) != measure.first_onset(e.sound)


def test_a_puck_is_found_to_a_tenth_of_a_pixel_unless_the_hand_covers_it():
    """Covered ones are found at the middle of what is seen of them, in true and generated frames alike."""
    clear, all_ = [], []
    for e in map(make_episode, range(12)):
        path = measure.track(e.video, e.colours)
        off = np.linalg.norm(path[:, 1:] - e.pucks, axis=-1)
        apart = np.stack([np.linalg.norm(e.pucks - p[:, None], axis=-1) for p in e.pucks.swapaxes(0, 1)])
        free = (np.linalg.norm(e.pucks - path[:, :1], axis=-1) > 16) & ~((apart > 0) & (apart < 16)).any(0)
        clear.append(off[free])
        all_.append(off.ravel())
    assert np.concatenate(clear).max() < 0.1 and np.concatenate(clear).size > 50
    assert np.nanmedian(np.concatenate(all_)) < 0.5


def test_an_impact_is_seen_when_it_happens():
    straight = np.linspace([5.0, 5.0], [37.0, 5.0], 17)[:, None]
    bounce = straight.copy()
    bounce[9:, 0, 0] = bounce[8, 0, 0] - 2.0 * np.arange(1, 9)
    assert np.isnan(measure.seen_impact(straight, 10.0))
    assert measure.seen_impact(bounce, 10.0) == pytest.approx(0.8)
    assert measure.nearest(0.8, [0.1, 0.75]) == pytest.approx(0.05) and np.isnan(measure.nearest(0.8, []))


def test_a_difference_that_may_be_chance_is_called_narrow():
    noise = np.random.RandomState(0).normal(size=100)
    assert narrow(noise, np.zeros(100)) and not narrow(noise + 1, np.zeros(100))
    assert not narrow(noise, 0.0), "a single number has no error to compare with"
    assert not narrow(np.append(noise + 1, np.nan), np.append(np.zeros(100), 5.0)), "what was not measured is left out"
