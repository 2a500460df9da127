"""The toy world keeps its promises: deterministic, physical, exactly described, in sync."""

import dataclasses
import hashlib
import pickle
import time

import numpy as np
import pytest

from data_pipelines import action as actions
from data_pipelines.action import ActionStats
from data_pipelines.toy_world import codecs, sound, world
from data_pipelines.toy_world.env import PolicyEnv
from data_pipelines.toy_world.episodes import Episode, caption, make_episode
from data_pipelines.toy_world.expert import DIRECTIONS, raw_action
from data_pipelines.toy_world.render import SIZE, locate, locate_gripper
from data_pipelines.toy_world.stream import StreamSource
from data_pipelines.toy_world.world import State


@pytest.fixture(scope="module")
def episodes():
    return [make_episode(s) for s in range(120)]


@pytest.fixture(scope="module")
def fitted():
    return codecs.fit(60)


def digest(e: Episode) -> str:
    h = hashlib.sha256()
    for f in dataclasses.fields(e):
        x = getattr(e, f.name)
        h.update(x.tobytes() if isinstance(x, np.ndarray) else repr(x).encode())
    return h.hexdigest()


def test_an_episode_is_a_function_of_its_seed(episodes):
    assert [digest(make_episode(s)) for s in range(4)] == [digest(e) for e in episodes[:4]]
    assert len({digest(e) for e in episodes}) == len(episodes)


def test_pucks_never_leave_the_table_or_overlap_for_long(episodes):
    for e in episodes:
        table = e.pucks / SIZE
        assert table.min() > 0 and table.max() < 1


def free(pos, vel, materials):
    n = len(pos)
    return State(np.array(pos, float), np.array(vel, float), tuple(range(n)), tuple(materials), (0.05, 0.05, 0.0))


STILL = actions.encode(actions.pose(np.zeros(2), np.zeros(2), np.zeros(2)), np.ones(1))[0]


def test_energy_never_grows_without_the_gripper():
    state = free([[0.3, 0.5], [0.6, 0.52], [0.8, 0.8]], [[0.8, 0.1], [0, 0], [-0.5, 0.4]], [0, 1, 2])
    energy = [float((state.mass * (state.vel**2).sum(1)).sum())]
    for _ in range(20):
        state, _ = world.step(state, STILL)
        energy.append(float((state.mass * (state.vel**2).sum(1)).sum()))
    assert all(b <= a + 1e-12 for a, b in zip(energy, energy[1:], strict=False)) and energy[-1] < 0.5 * energy[0]


def test_collisions_conserve_momentum(monkeypatch):
    monkeypatch.setattr(world, "FRICTION", 0.0)
    state = free([[0.35, 0.5], [0.6, 0.53]], [[0.9, 0.0], [0, 0]], [0, 2])
    before = (state.mass[:, None] * state.vel).sum(0)
    struck = []
    for _ in range(3):
        state, events = world.step(state, STILL)
        struck += [e.kind for e in events]
    assert "puck" in struck
    np.testing.assert_allclose((state.mass[:, None] * state.vel).sum(0), before, atol=1e-12)


def test_actions_are_what_the_gripper_did(episodes):
    for e in episodes[:20]:
        travelled = np.hypot(*np.diff(e.gripper, axis=0).T) / SIZE
        np.testing.assert_allclose(travelled, np.hypot(*e.actions[:, :2].T), atol=2e-4)
        assert travelled.max() <= world.MAX_STEP + 1e-3
        assert set(np.unique(e.actions[:, 9])) <= {0.0, 1.0}


def test_actions_integrate_to_the_poses(episodes):
    for e in episodes[:20]:
        at = actions.pose(*e.poses[0].astype(np.float64))
        for t, (x, y, yaw) in zip(actions.decode(e.actions), e.poses[1:], strict=True):
            at = at @ t
            np.testing.assert_allclose(at, actions.pose(x, y, yaw), atol=1e-5)


def test_what_the_gripper_lets_go_of_stays():
    state = dataclasses.replace(free([[0.5, 0.5]], [[0, 0]], [1]), gripper=(0.5, 0.7, 0.3))
    for is_open in (False, False, False, False, True, True, True):
        assert state.held == (-1 if state.open else 0)
        before, (state, events) = state.pos, world.step(state, raw_action(state, np.zeros(2), 0.0, is_open))
    assert state.held == -1 and not events
    np.testing.assert_array_equal(state.pos, before)


@pytest.mark.parametrize("is_open", [True, False])
def test_an_empty_palm_pushes(is_open):
    state = dataclasses.replace(free([[0.5, 0.5]], [[0, 0]], [1]), gripper=(0.25, 0.5, 0.0), open=is_open)
    kinds = []
    for _ in range(4):
        state, events = world.step(state, raw_action(state, np.array([0.07, 0.0]), 0.0, is_open))
        kinds += [e.kind for e in events]
    assert state.pos[0, 0] > 0.6 and "gripper" in kinds


def test_poses_round_trip_through_actions():
    rng = np.random.RandomState(0)
    poses = actions.pose(*rng.uniform(-1, 1, (3, 9)))
    back = [poses[0]]
    for t in actions.decode(actions.encode(poses, np.ones(8))):
        back.append(back[-1] @ t)
    np.testing.assert_allclose(back, poses, atol=2e-6)
    np.testing.assert_array_equal(actions.rot6d(np.eye(3)), [1, 0, 0, 0, 1, 0])


def test_sound_is_synchronous_with_the_impacts(episodes):
    found = 0
    for e in episodes:
        heard = sound.onsets(e.sound)
        if e.onsets and heard:
            found += 1
            assert min(abs(heard[0] - t) for t in e.onsets) <= 0.02
            assert all(min(abs(h - t) for t in e.onsets) <= 0.02 for h in heard)
        if not e.onsets:
            assert not heard and not e.sound.any()
    assert found > 30


def test_captions_and_answers_tell_what_happened(episodes):
    held = moved = hits = 0
    for e in episodes:
        qa = dict(e.qa)
        assert qa["How many pucks are there?"] == ("one", "two", "three")[len(e.colours) - 1]
        left = e.colours[int(np.argmin(e.pucks[0, :, 0]))]
        assert qa["Which colour is leftmost at the start?"] == left
        colour = qa["Which colour moves?"]
        if colour != "none":
            moved += 1
            d = e.pucks[-1, e.colours.index(colour)] - e.pucks[0, e.colours.index(colour)]
            way = qa["Which way does the puck move?"]
            axis, sign = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}[way]
            assert d[axis] * sign >= 0 and abs(d[axis]) >= abs(d[1 - axis]) - 1e-3
            assert colour in e.caption.lower()
        if qa["Does the gripper hold a puck at the end?"] == "yes":
            held += 1
            assert "carries" in e.caption or "grasps" in e.caption
        if e.onsets:
            hits += 1
            assert f"at {e.onsets[0]:.1f} s" in e.caption
    assert min(held, moved, hits) > 20


def test_captions_name_the_true_partner_of_every_impact():
    """Three pucks of one material: the middle one must not be named for the last."""
    state = free([[0.3, 0.3], [0.3, 0.8], [0.6, 0.3]], [[0.9, 0.0], [0, 0], [0, 0]], [1, 1, 1])
    states, events = [state], []
    for _ in range(4):
        state, new = world.step(state, STILL)
        states, events = [*states, state], [*events, *new]
    assert [(e.kind, e.puck, e.other) for e in events] == [("puck", 0, 2)]
    assert caption(states, events) == f"The blue glass puck slides right. Red hits blue at {events[0].time:.1f} s."


def test_captions_tell_every_early_impact(episodes):
    for e in episodes:
        for at, kind, puck, other in e.events[:2]:
            if kind == "gripper":
                who, what = "The gripper", e.colours[puck]
            else:
                who = e.colours[puck].capitalize()
                what = e.colours[other] if kind == "puck" else f"the {kind} wall"
            assert f"{who} hits {what} at {at:.1f} s." in e.caption


def test_demonstrations_do_what_they_say(episodes):
    done = []
    for e in episodes:
        colour = next((c for c in e.colours if c in e.instruction), None)
        if e.kind == "push":
            d = (e.pucks[-1] - e.pucks[0])[e.colours.index(colour)] / SIZE * (1, -1)  # rows count downwards
            done.append(d @ DIRECTIONS[e.instruction.split()[-1][:-1]] > 0.11)
        elif e.kind != "slide":
            done.append(colour in e.caption and dict(e.qa)["Does the gripper hold a puck at the end?"] == "yes")
    assert np.mean(done) > 0.97


def test_speed_is_printed():
    start = time.process_time()
    for s in range(50):
        make_episode(s)
    print(f"{20 * (time.process_time() - start):.1f} ms per episode")


def test_no_question_has_one_answer_for_almost_everything(episodes):
    for q in {q for e in episodes for q, _ in e.qa}:
        answers = [dict(e.qa)[q] for e in episodes]
        assert max(answers.count(a) for a in set(answers)) <= 0.75 * len(answers), q


def test_the_expert_succeeds_and_chance_does_not():
    wins = {"expert": [], "random": []}
    for seed in range(45):
        for who in wins:
            env, rng = PolicyEnv(seed), np.random.RandomState(seed)
            assert not env.success()
            for _ in range(32):
                env.step(env.expert_action() if who == "expert" else env.random_action(rng))
            wins[who].append(env.success())
    assert np.mean(wins["expert"]) >= 0.9 and np.mean(wins["random"]) <= 0.15


def test_pucks_and_gripper_are_found_in_pictures(episodes):
    off = [np.abs(locate(e.video, c) - e.pucks[:, i]).mean() for e in episodes[:30] for i, c in enumerate(e.colours)]
    assert np.nanmedian(off) < 0.5
    assert np.isnan(locate(np.full((1, SIZE, SIZE, 3), 205, np.uint8), "red")).all()
    grip = [np.linalg.norm(locate_gripper(e.video) - e.gripper, axis=1).mean() for e in episodes[:30]]
    assert np.median(grip) < 3  # the fingers put the centroid ahead of the pose


def test_video_codec_is_causal_and_faithful(fitted, episodes):
    video, _ = fitted
    e = episodes[0]
    z = video.encode(e.video)
    assert z.shape == (codecs.CHANNELS, 5, SIZE // 8, SIZE // 8) and z.dtype == np.float32
    for k in range(5):
        changed = e.video.copy()
        changed[4 * k + 1 :] = 0
        np.testing.assert_array_equal(video.encode(changed)[:, : k + 1], z[:, : k + 1])
        np.testing.assert_array_equal(video.encode(e.video[: 4 * k + 1]), z[:, : k + 1])
    psnr = [
        10 * np.log10(255**2 / np.mean((video.decode(video.encode(e.video)) - e.video.astype(float)) ** 2))
        for e in episodes[:20]
    ]
    assert np.mean(psnr) > 25
    all_z = np.stack([video.encode(e.video) for e in episodes])
    assert 0.8 < all_z.std() < 1.2 and abs(all_z.mean()) < 0.1


def test_sound_codec_keeps_onsets(fitted, episodes):
    _, codec = fitted
    error = []
    for e in [e for e in episodes if e.onsets]:
        z = codec.encode(e.sound)
        assert z.shape == (codecs.SOUND_CHANNELS, 43)
        back = codec.decode(z, e.sound.shape[1])
        assert back.shape == e.sound.shape
        heard = sound.onsets(back)
        error.append(abs(heard[0] - e.onsets[0]) if heard else 1.0)
    assert np.median(error) <= 0.02 and np.mean(np.array(error) <= 0.05) >= 0.9


@pytest.mark.parametrize(
    ("video", "words"),
    [
        (np.zeros((16, 48, 48, 3), np.uint8), "16 frames"),
        (np.zeros((5, 44, 48, 3), np.uint8), "multiples of 8"),
        (np.zeros((5, 48, 48, 3), np.float32), "uint8"),
    ],
)
def test_bad_videos_are_refused(fitted, video, words):
    with pytest.raises(ValueError, match=words):
        fitted[0].encode(video)


def test_codecs_and_statistics_survive_disk(fitted, tmp_path, episodes):
    codecs.save(tmp_path / "c.npz", *fitted)
    assert codecs.fingerprint(*codecs.load(tmp_path / "c.npz")) == codecs.fingerprint(*fitted)
    with pytest.raises(ValueError, match="does not exist"):
        codecs.load(tmp_path / "none.npz")
    stats = ActionStats.fit(np.concatenate([e.actions for e in episodes]))
    stats.save(tmp_path / "s.json")
    assert ActionStats.load(tmp_path / "s.json") == stats
    x = stats.normalise(episodes[0].actions)
    np.testing.assert_allclose(stats.denormalise(x), episodes[0].actions, atol=1e-6)
    assert np.abs(x).max() < 2


def test_actions_of_another_kind_are_refused(episodes):
    stats = ActionStats.fit(np.concatenate([e.actions for e in episodes]))
    with pytest.raises(ValueError, match="7 channels"):
        stats.normalise(np.zeros((4, 7)))
    with pytest.raises(ValueError, match="NaN"):
        stats.normalise(np.full((4, 10), np.nan))
    with pytest.raises(ValueError, match="after normalising"):
        stats.normalise(100 * episodes[0].actions)


def test_tfds_holds_the_same_episodes_without_tensorflow(tmp_path):
    from data_pipelines.toy_world import tfds_builder

    with pytest.raises(ValueError, match="no toy_world dataset"):
        tfds_builder.open_source(tmp_path, "train")
    tfds_builder.write(tmp_path, train=6, test=2)
    source = tfds_builder.open_source(tmp_path, "train")
    found = {e.seed: e for e in (source[i] for i in range(len(source)))}
    stream = StreamSource(6)
    assert {s: digest(e) for s, e in found.items()} == {i: digest(stream[i]) for i in range(6)}
    assert len(tfds_builder.open_source(tmp_path, "test")) == 2
    assert digest(pickle.loads(pickle.dumps(source))[4]) == digest(source[4])  # as a worker process gets it
