"""Pipelines without a model: one knows every answer, one knows none. For the tests of evaluation and report."""

import functools
from types import SimpleNamespace

import numpy as np

from cosmos_jax.config import Config, DataConfig, EvalConfig, ModelConfig, VisionConfig
from data_pipelines.action import ActionStats
from data_pipelines.schema import Bucket
from data_pipelines.tasks import task
from data_pipelines.tokenizer import ChatTokenizer
from data_pipelines.toy_world import codecs
from data_pipelines.toy_world.env import PolicyEnv
from data_pipelines.toy_world.episodes import CAPTION_REQUEST, make_episode
from data_pipelines.toy_world.samples import TASKS, ToyAssets
from data_pipelines.toy_world.stream import SPLITS

CONFIG = Config(
    model=ModelConfig(
        name="fake", layers=1, hidden=32, heads=2, kv_heads=1, head_dim=16, mlp=32, rope_sections=(4, 2, 2), vocab=512,
        latent_channels=codecs.CHANNELS, action_dim=16, sound_dim=codecs.SOUND_CHANNELS,
        vision=VisionConfig(layers=1, hidden=32, heads=2, mlp=32, patch=8, grid=8, deepstack=()),
    ),
    data=DataConfig(
        episodes=60, eval_episodes=14, look_ahead=8, mixture=tuple((t.name, 1.0) for t in TASKS),
        bucket=Bucket(rows=4, und=256, gen=320, vision=320, action=64, sound=128, segments=6, vit=512),
    ),
    evaluate=EvalConfig(samples=12, questions=40, rollouts=6, chunks=2),
)  # fmt: skip


@functools.cache
def assets() -> ToyAssets:
    """Codecs of a few episodes: good enough for tests."""
    raw = np.concatenate([make_episode(codecs.FIT_SEED + i).actions for i in range(20)])
    return ToyAssets(*codecs.fit(20), ActionStats.fit(raw), ChatTokenizer())


class Fake:
    """What `evaluate` asks of a pipeline, with the answers left to `clip`, `act` and `say`."""

    def __init__(self, config: Config = CONFIG):
        self.config, self.assets, self.spec, self.params = config, assets(), config.model.sequence, {"w": np.zeros(7)}
        self.applied: dict[str, dict] = {}
        self.requests: list = []

    def generate(self, samples, **settings):
        self.requests += samples
        return [self.one(s) for s in samples]

    def one(self, s):
        rule = task(s.task)
        actions = self.act(s) if rule.action == "noisy" else None
        video, sound = self.clip(s)
        video = video[: 1 if rule.vision == "image" else None] if rule.makes_video else None
        return SimpleNamespace(video=video, sound=sound if s.sound_latents is not None else None, actions=actions)

    def reason(self, samples):
        self.requests += samples
        return [self.say(s) for s in samples]

    def held_out_loss(self, batches, seed=0):
        return {f"loss/{m}": self.loss for m in ("vision", "action", "sound", "text")}


class Oracle(Fake):
    """Looks the truth up by the number of the held-out episode; drives with the scripted expert."""

    loss = 1e-3

    def __init__(self):
        super().__init__()
        self.envs: dict[int, PolicyEnv] = {}

    def clip(self, s):
        e = make_episode(SPLITS["test"] + s.sample_id)
        return e.video, e.sound

    def act(self, s):
        if s.task == "inverse_dynamics":
            return make_episode(SPLITS["test"] + s.sample_id).actions
        env, out = self.envs.setdefault(s.sample_id, PolicyEnv(SPLITS["test"] + s.sample_id)), []
        for _ in range(16):
            out.append(env.expert_action())
            env.step(out[-1])
        return np.stack(out)

    def say(self, s):
        e = make_episode(SPLITS["test"] + s.sample_id)
        return e.caption if s.prompt == CAPTION_REQUEST else dict(e.qa)[s.prompt]


class Garbage(Fake):
    """Grey pictures, silence, wild actions, no words."""

    loss = 99.0

    def clip(self, s):
        return np.full_like(make_episode(0).video, 128), np.zeros((2, 13600), np.float32)

    def act(self, s):
        wild = 3.0 * np.random.RandomState(s.sample_id).normal(size=(16, 10))
        return np.eye(10)[[9] * 16] if s.task == "policy" else wild  # the hand stays open where it is

    def say(self, s):
        return ""
