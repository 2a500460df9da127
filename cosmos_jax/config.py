"""Typed configuration: ml_collections file → frozen dataclasses, with errors that name the nearest field.

In: a `ConfigDict` (configs/*.py) and `--config.a.b=value` overrides. Out: `Config`, hashable and therefore usable as a
static jit argument. Imports no jax, so a mistake is reported before any device is touched.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from data_pipelines.schema import VIT_KINDS, Bucket, SequenceSpec
from data_pipelines.tasks import INDEX


class ConfigError(ValueError):
    """A setting that does not exist, has the wrong type, or contradicts another."""


@dataclass(frozen=True)
class VisionConfig:
    """The reasoner's vision encoder: Qwen3-VL's (Nano, Super) or SigLIP2's (Edge). Spec model.md §3.1, §3.3."""

    kind: str = "qwen3vl"  # qwen3vl | siglip2
    layers: int = 27
    hidden: int = 1152
    heads: int = 16
    mlp: int = 4304
    patch: int = 16  # pixels per side
    temporal: int = 2  # frames per patch
    grid: int = 48  # side of the learned position table
    deepstack: tuple[int, ...] = (8, 16, 24)  # layers whose features are added to und layers 0, 1, 2; siglip2: ()
    merger: int = 0  # inner width of the merger; 0 = four patches wide
    norm_eps: float = 1e-6
    rope_theta: float = 1e4  # unused by siglip2
    init_std: float = 0.02

    def __post_init__(self):
        _one_of("model.vision.kind", self.kind, VIT_KINDS)
        if self.kind == "siglip2" and (self.deepstack or self.temporal != 1):
            raise ConfigError(
                "model.vision.kind='siglip2' has no deep-stack and one frame per patch; set deepstack=() and "
                f"temporal=1 (they are {self.deepstack} and {self.temporal})."
            )

    @property
    def merger_width(self) -> int:
        return self.merger or 4 * self.hidden


@dataclass(frozen=True)
class ModelConfig:
    """One Cosmos 3 architecture; Nano, Super, Edge and the toy differ only here (spec model.md §1.2)."""

    name: str = "nano"
    layers: int = 36
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    mlp: int = 12288
    mlp_act: str = "swiglu"  # swiglu | relu2 (Edge)
    norm_eps: float = 1e-6
    norm_cast: str = "before_weight"  # before_weight (Nano, Super) | after_weight (Edge): where RMSNorm rounds
    qk_norm_und: bool = True  # Edge: False
    k_norm_und_for_gen: bool = False  # Edge: True
    rope_theta: float = 5e6
    rope_sections: tuple[int, int, int] = (24, 20, 20)  # frequency slots of T, H, W
    vocab: int = 151936
    latent_channels: int = 48
    patch: int = 2
    action_dim: int = 64  # 0 = no action stream
    domains: int = 32
    sound_dim: int = 64  # 0 = no sound stream
    timestep_scale: float = 1e-3
    base_fps: float = 24.0
    temporal_factor: int = 4
    sound_latent_fps: float = 25.0
    temporal_margin: float = 15000.0
    init_std: float = 0.02  # deviation of fresh backbone weights (the Hugging Face rule; small widths want more)
    vision: VisionConfig | None = None  # the reasoner's eye; None = text only
    scan: bool = True  # False unrolls the layers (debugging, layer-by-layer parity)
    remat: str = "none"  # none | full | dots | attn: what the backward pass recomputes
    attention: str = "auto"  # auto | xla | mosaic_tpu | mosaic_gpu | cudnn: which kernel (docs/kernels.md)
    context: str = "all_gather"  # all_gather | ring | ulysses: how gen tokens that mesh.cp spreads meet
    und_tokens: str = "spread"  # spread | replicated: und tokens over mesh.cp

    def __post_init__(self):
        _one_of("model.mlp_act", self.mlp_act, ("swiglu", "relu2"))
        _one_of("model.norm_cast", self.norm_cast, ("before_weight", "after_weight"))
        _one_of("model.remat", self.remat, ("none", "full", "dots", "attn"))
        _one_of("model.attention", self.attention, ("auto", "xla", "mosaic_tpu", "mosaic_gpu", "cudnn"))
        _one_of("model.context", self.context, ("all_gather", "ring", "ulysses"))
        _one_of("model.und_tokens", self.und_tokens, ("spread", "replicated"))
        if self.heads % self.kv_heads:
            raise ConfigError(f"model.heads={self.heads} must be a multiple of model.kv_heads={self.kv_heads}.")
        if sum(self.rope_sections) * 2 != self.head_dim:
            raise ConfigError(
                f"model.rope_sections={self.rope_sections} must sum to head_dim/2 = {self.head_dim // 2}; "
                "change one of the two."
            )
        if self.k_norm_und_for_gen and self.qk_norm_und:
            raise ConfigError("model.k_norm_und_for_gen exists only where model.qk_norm_und is False (Edge).")
        if self.vision and len(self.vision.deepstack) > self.layers:
            raise ConfigError("model.vision.deepstack has more taps than the model has layers; shorten it.")

    @property
    def sequence(self) -> SequenceSpec:
        v = self.vision
        return SequenceSpec(
            latent_channels=self.latent_channels,
            patch=self.patch,
            action_dim=self.action_dim,
            sound_dim=self.sound_dim,
            vit_kind=v.kind if v else "qwen3vl",
            vit_patch=v.patch if v else 0,
            vit_grid=v.grid if v else 0,
            vit_temporal=v.temporal if v else 2,
            base_fps=self.base_fps,
            temporal_factor=self.temporal_factor,
            sound_latent_fps=self.sound_latent_fps,
            temporal_margin=self.temporal_margin,
        )


@dataclass(frozen=True)
class DataConfig:
    # toy: stream from the simulator | toy_tfds: array_record files written by the TFDS builder | rehearsal: noise of
    # the published sizes, to try a launch and measure it
    source: str = "toy"
    tfds_dir: str = ""  # where toy_tfds lives
    episodes: int = 4000  # training episodes of the toy world (seeds 0 … episodes-1)
    eval_episodes: int = 64  # held-out episodes
    eval_split: str = "test"  # test | development: tune on the second, report the first
    seed: int = 0
    prefetch: int = 4  # batches prepared ahead
    workers: int = 0  # processes that prepare samples; 0 = a thread of the training process
    look_ahead: int = 4  # samples beyond a row's worth from which the packer may choose, in every row
    # Rows take up the same kinds of samples in the same step, so that none is much dearer than the others, for which
    # all wait. A step then sees fewer kinds: where rows cost the same anyway, let each draw its own.
    in_step: bool = True
    mixture: tuple[tuple[str, float], ...] = ()  # (task, share of the samples); shares are normalised
    bucket: Bucket = field(default_factory=lambda: Bucket(8, 128, 128, 96, 32, 64, 8))  # of the global batch
    caption_dropout: float = 0.1  # share of generation samples whose caption is emptied (classifier-free guidance)

    def __post_init__(self):
        _one_of("data.eval_split", self.eval_split, ("test", "development"))


@dataclass(frozen=True)
class FlowConfig:
    """Rectified flow (spec model.md §6)."""

    sigma_image: str = "logitnormal"  # logitnormal | waver | uniform
    sigma_video: str = "waver"
    shift_image: float = 3.0
    shift_video: float = 3.0
    weight_vision: float = 10.0
    weight_action: float = 10.0
    weight_sound: float = 2.0
    weight_text: float = 1.0

    def __post_init__(self):
        for name in ("sigma_image", "sigma_video"):
            _one_of(f"flow.{name}", getattr(self, name), ("logitnormal", "waver", "uniform"))


@dataclass(frozen=True)
class OptimConfig:
    name: str = "adamw"  # adamw | muon (the matrices of both towers; AdamW for the rest)
    lr: float = 5e-4
    schedule: str = "cosine"  # cosine | linear | constant, after the warm-up
    warmup: int = 50
    final_lr: float = 0.0  # as a share of lr
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-6
    momentum: float = 0.95  # of muon
    weight_decay: float = 0.0
    clip: float = 1.0  # global gradient norm; 0 = off
    accumulate: int = 1  # micro-batches per step (the batch is split along its rows)
    trainable: tuple[str, ...] = ("",)  # path substrings; "" matches everything
    frozen: tuple[str, ...] = ()  # path substrings that win over `trainable`
    lr_scale: tuple[tuple[str, float], ...] = ()  # (path substring, factor); the first match counts
    offload: bool = False  # moments and averages wait in host memory between steps
    ema: float = 0.1  # power-law EMA width s (spec model.md §6.5); 0 = no EMA

    def __post_init__(self):
        _one_of("optim.name", self.name, ("adamw", "muon"))
        _one_of("optim.schedule", self.schedule, ("cosine", "linear", "constant"))

    def trains(self, path: str) -> bool:
        """Is the parameter of this path trained?"""
        return any(p in path for p in self.trainable) and not any(p in path for p in self.frozen)


@dataclass(frozen=True)
class MeshConfig:
    """Mesh axis sizes. Their product must equal the number of devices; -1 in one place takes what is left."""

    data: int = 1  # replicas, each with all parameters (HSDP); slices of a TPU are divided along it
    fsdp: int = -1  # parameters divided (ZeRO-3)
    tp: int = 1  # heads, MLP and vocabulary divided; norms and residuals over tokens
    cp: int = 1  # tokens of a pack divided
    cfg: int = 1  # generating: guidance branches side by side


@dataclass(frozen=True)
class PrecisionConfig:
    params: str = "float32"
    compute: str = "auto"  # auto: bfloat16 on TPU and GPU, float32 on CPU (printed at start)
    matmul: str = "default"  # default | highest
    reduce: str = "float32"  # float32 | compute: how gradients of matrices are added up over devices


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 500
    keep: int = 2  # newest checkpoints kept
    keep_every: int = 0  # checkpoints of every so many steps are kept for ever; 0 = off
    sample_every: int = 0  # sample grids during training; 0 = off
    tensorboard: bool = True
    profile: tuple[int, ...] = ()  # (first, last): trace these steps into workdir/profile
    grace: float = 25.0  # seconds from SIGTERM to the end of the process, saved or not
    on_nonfinite: str = "stop"  # stop | skip: what a batch whose loss or gradient is not finite does
    skip_limit: int = 10  # batches skipped in a row before the run stops
    spike: float = 3.0  # warn of a loss this many times its running median; 0 = off
    spike_window: int = 128  # steps of that median
    hang: float = 1800.0  # seconds without a step before all stacks are printed; 0 = off
    hang_slow: float = 7200.0  # the same where programs compile or disks are slow: start, first step, save, sample
    on_hang: str = "report"  # report (and wait on) | abort (the process ends, for its cluster to restart)

    def __post_init__(self):
        _one_of("train.on_nonfinite", self.on_nonfinite, ("stop", "skip"))
        _one_of("train.on_hang", self.on_hang, ("report", "abort"))
        for name in ("steps", "log_every", "checkpoint_every", "keep", "skip_limit", "spike_window"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name}={getattr(self, name)} must be at least 1.")
        for name in ("keep_every", "sample_every", "spike", "hang", "hang_slow"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"train.{name}={getattr(self, name)} must not be negative (0 turns it off).")
        if self.keep_every % self.checkpoint_every:
            raise ConfigError(
                f"train.keep_every={self.keep_every} must be a multiple of train.checkpoint_every="
                f"{self.checkpoint_every}: other steps are not saved."
            )
        if self.profile and not (len(self.profile) == 2 and 1 <= self.profile[0] <= self.profile[1]):
            raise ConfigError(f"train.profile={self.profile} must be two steps, the first and the last, as in (10,12).")
        if not self.grace > 0:
            raise ConfigError(f"train.grace={self.grace} must be positive; clusters give about 30 s after SIGTERM.")
        if 0 < self.spike <= 1:
            raise ConfigError(f"train.spike={self.spike} would warn of half of all steps; give more than 1, or 0.")


@dataclass(frozen=True)
class SampleConfig:
    solver: str = "unipc"  # unipc | euler
    steps: int = 35
    shift: float = 10.0
    guidance: float = 6.0
    steps_of: tuple[tuple[str, int], ...] = ()  # (task, steps): these tasks take their own, not `steps`
    shift_of: tuple[tuple[str, float], ...] = ()  # (task, shift): these tasks take their own, not `shift`
    seed: int = 0
    max_new_tokens: int = 64  # text decoding
    temperature: float = 0.0  # 0 = greedy
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 1 = off
    repetition_penalty: float = 1.0  # words of prompt and answer get less likely; 1 = off
    presence_penalty: float = 0.0  # words of the answer get less likely; 0 = off

    def __post_init__(self):
        _one_of("sample.solver", self.solver, ("unipc", "euler"))
        for name in ("steps_of", "shift_of"):
            for key, _ in getattr(self, name):
                _one_of(f"sample.{name}", key, tuple(INDEX))


@dataclass(frozen=True)
class EvalConfig:
    samples: int = 64  # samples per generation row
    questions: int = 128
    rollouts: int = 48  # closed-loop episodes
    chunks: int = 2  # policy calls per rollout


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = MeshConfig()
    precision: PrecisionConfig = PrecisionConfig()
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluate: EvalConfig = EvalConfig()


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(allowed)}{nearest(value, allowed)}.")


def nearest(word: str, candidates) -> str:
    """A hint like (did you mean …?), or an empty string."""
    close = difflib.get_close_matches(str(word), [str(c) for c in candidates], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def from_dict(raw: Any, cls: type = Config, where: str = "config") -> Any:
    """Build the frozen dataclass `cls` from a mapping; every unknown key or wrong type is one clear `ConfigError`."""
    raw = dict(raw.items()) if hasattr(raw, "items") else raw
    if not isinstance(raw, dict):
        raise ConfigError(f"{where} must be a group of settings, not {raw!r}.")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(raw) - set(hints))
    if unknown:
        raise ConfigError(f"{where}.{unknown[0]} is not a setting{nearest(unknown[0], hints)}.")
    return cls(**{name: _convert(value, hints[name], f"{where}.{name}") for name, value in raw.items()})


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(value, next(a for a in args if a is not type(None)), where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_dict(value, hint, where)
    if origin is tuple:
        if hasattr(value, "items"):  # a ConfigDict {"text2image": 1.0} for tuple[tuple[str, float], ...]
            value = list(value.items())
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} must be a list, not {value!r}.")
        inner = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
        if len(inner) != len(value):
            raise ConfigError(f"{where} needs {len(inner)} values, got {len(value)}.")
        return tuple(_convert(v, t, f"{where}[{i}]") for i, (v, t) in enumerate(zip(value, inner, strict=True)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where} must be {hint.__name__}, got {value!r}.")
    return value


def to_dict(config: Any) -> dict:
    """Plain nested dict (for JSON in a checkpoint); `from_dict(to_dict(c)) == c`."""
    return dataclasses.asdict(config)
