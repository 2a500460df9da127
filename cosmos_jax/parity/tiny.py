"""Tiny Cosmos 3 checkpoints with random weights, as PyTorch folders: `python -m cosmos_jax.parity.tiny --out=DIR`.

In: a family, nano, edge or distilled. Out: DIR/diffusers (laid out as a released repository: transformer,
vision_encoder, vae, scheduler, text_tokenizer, sound_tokenizer, the reasoner's files at the top) and DIR/transformers
(the reasoner alone), by the references' own `save_pretrained`. Every weight is random: the stock initialisation leaves
norms at 1, embeddings and log-snakes at 0, and hides whole classes of mistakes. The shapes keep what a port can get
wrong: hidden ≠ heads·head_dim, grouped queries, odd strides.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import (
    AutoencoderKLWan,
    Cosmos3AVAEAudioTokenizer,
    Cosmos3OmniTransformer,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from safetensors import safe_open
from safetensors.torch import save_file

from cosmos_jax.codecs.wan.config import MEAN, STD
from cosmos_jax.parity import prompts, tiny_processor, tiny_tokenizer
from cosmos_jax.parity.reference import rng
from cosmos_jax.sampling import scheduler_config

NANO = dict(
    head_dim=16, hidden_size=48, intermediate_size=80, latent_channel=8, latent_patch_size=2, num_attention_heads=4,
    num_hidden_layers=3, num_key_value_heads=2, patch_latent_dim=32, rms_norm_eps=1e-6, rope_theta=5_000_000.0,
    rope_axes_dim=[4, 2, 2], vocab_size=640, action_dim=12, action_gen=True, num_embodiment_domains=32, sound_dim=6,
    sound_gen=True, sound_latent_fps=25.0,
)  # fmt: skip
EDGE = dict(
    NANO, hidden_act="relu2", qk_norm_for_text=False, use_und_k_norm_for_gen=True, rms_norm_eps=1e-5, rope_theta=1e8,
    sound_gen=False, sound_dim=None,
)  # fmt: skip
DISTILLED = dict(NANO, base_fps=16, action_gen=False, action_dim=None, sound_gen=False, sound_dim=None)
CONFIGS = {  # of what `write` writes: all known embodiments fit into 64 channels
    "nano": dict(NANO, action_dim=64), "edge": dict(EDGE, action_dim=64), "distilled": DISTILLED,
}  # fmt: skip
VAE = dict(
    base_dim=8, decoder_base_dim=12, z_dim=8, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[], dropout=0.0,
    temperal_downsample=[False, True, True], is_residual=True, in_channels=12, out_channels=12, patch_size=2,
    scale_factor_temporal=4, scale_factor_spatial=16, latents_mean=list(MEAN[:8]), latents_std=list(STD[:8]),
)  # fmt: skip
SOUND = dict(  # 25 latents a second: 300 / (2·2·3); an odd stride needs output_padding, n_fft − hop is 6 = 3 + 3
    sampling_rate=300, hop_size=12, enc_dim=6, enc_num_blocks=2, enc_n_fft=8, enc_hop_length=2, enc_latent_dim=12,
    enc_c_mults=[1, 2], enc_strides=[2, 3], vocoder_input_dim=6, dec_dim=4, dec_c_mults=[1, 2, 4],
    dec_strides=[2, 2, 3],
)  # fmt: skip
FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True)
SCHEDULER = {
    "nano": dict(FLOW, use_karras_sigmas=True, sigma_max=200.0, sigma_min=0.147),  # as the released Nano and Super
    "edge": dict(FLOW, flow_shift=3.0),  # with use_native_flow_schedule in model_index.json
}
SIGMAS = [1.0, 0.9375, 0.8333333333333334, 0.625]  # of the released 4-step models
KINDS = {  # of reasoner: its classes in transformers
    "qwen3_vl": (transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration),
    "cosmos3_omni": (transformers.Cosmos3OmniConfig, transformers.Cosmos3OmniForConditionalGeneration),
    "cosmos3_edge": (transformers.Cosmos3EdgeConfig, transformers.Cosmos3EdgeForConditionalGeneration),
}
FAMILY = {"nano": "cosmos3_omni", "edge": "cosmos3_edge", "distilled": "cosmos3_omni"}


def _fill(model: Any, values, seed: int) -> Any:
    """Every parameter p ← values(name, unit noise of its shape)."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.as_tensor(values(name, rng(name, seed).standard_normal(tuple(p.shape)), p)))
    return model.eval()


def transformer(config: dict = NANO, seed: int = 3) -> Cosmos3OmniTransformer:
    """The generator and both towers."""

    def value(name, x, p):
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "weight" and p.ndim == 1:
            return 1.0 + 0.25 * x
        if leaf == "bias" or name.endswith("bias.weight"):
            return 0.1 * x
        if "modality_embed" in name or "embed_tokens" in name:
            return (0.5 if "modality" in name else 0.7) * x
        if "fc.weight" in name:
            return x / math.sqrt(config["action_dim"] if "proj_in" in name else config["hidden_size"])
        return x / math.sqrt(p.shape[-1])

    return _fill(Cosmos3OmniTransformer(**config), value, seed)


def vae(seed: int = 4) -> AutoencoderKLWan:
    """The video VAE, all switches of Wan 2.2 on."""

    def value(name, x, p):
        leaf = name.rsplit(".", 1)[-1]
        return {"gamma": 1 + 0.25 * x, "bias": 0.1 * x}.get(leaf, 0.9 * x / math.sqrt(math.prod(p.shape[1:])))

    return _fill(AutoencoderKLWan(**VAE), value, seed)


def sound_tokenizer(config: dict = SOUND, seed: int = 5) -> Cosmos3AVAEAudioTokenizer:
    """The sound tokeniser; weight-normalised lengths stray by 20 % from those of their directions."""
    model: Any = Cosmos3AVAEAudioTokenizer(**config)
    weights = dict(model.named_parameters())

    def value(name, x, p):
        leaf = name.rsplit(".", 1)[-1]
        if leaf in ("alpha", "beta", "bias"):
            return (0.1 if leaf == "bias" else 0.4) * x
        if leaf == "weight" and p.ndim == 1:
            return 1 + 0.25 * x
        if leaf == "weight_g":
            return p
        return 0.55 * x / math.sqrt(math.prod(p.shape[1:]))

    _fill(model, value, seed)
    with torch.no_grad():
        for name in (n for n in weights if n.endswith("weight_g")):
            g, v = weights[name], weights[name[:-1] + "v"]
            own = v.flatten(1).norm(dim=1).view_as(g)
            g.copy_(own * (1 + 0.2 * torch.from_numpy(rng(name, seed).standard_normal(tuple(g.shape)))))
    return model


def scheduler(family: str, stochastic: bool = True) -> Any:
    """stochastic: whether the distilled one draws fresh noise in every step, as the released ones do."""
    if family != "distilled":
        return UniPCMultistepScheduler(**SCHEDULER[family])
    made: Any = FlowMatchEulerDiscreteScheduler(stochastic_sampling=stochastic)
    made.register_to_config(
        fixed_step_sampler_config={"t_list": SIGMAS, "sample_type": "sde" if stochastic else "ode"},
        fixed_step_requires_explicit_sigmas=True,
    )
    return made


def reasoner_config(kind: str, **other) -> transformers.PretrainedConfig:
    """transformers' config of a tiny reasoner; `other`: settings of the outermost table."""
    edge = kind == "cosmos3_edge"
    rope = dict(rope_type="default", rope_theta=1e8 if edge else 5e6, mrope_section=[4, 2, 2])
    text = dict(
        vocab_size=640, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5 if edge else 1e-6, rope_parameters=rope,
    )  # fmt: skip
    vision: dict[str, Any] = dict(hidden_size=32, intermediate_size=52, patch_size=4)
    if edge:
        vision |= dict(num_hidden_layers=3, num_attention_heads=4, num_patches=36)
        other = dict(projector_hidden_size=72) | other
    else:
        rope["mrope_interleaved"] = True
        vision |= dict(
            depth=4, num_heads=2, temporal_patch_size=2, out_hidden_size=48, num_position_embeddings=36,
            deepstack_visual_indexes=[0, 2, 3],
        )  # fmt: skip
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = dict(zip(names, prompts.TINY, strict=True))
    config = KINDS[kind][0](text_config=text, vision_config=vision, **ids, **other)
    config._attn_implementation = "eager"
    return config


def reasoner(kind: str, seed: int = 5, **other) -> transformers.PreTrainedModel:
    """Qwen3-VL, or the reasoner of Nano and Super (the same network), or of Edge."""

    def value(name, x, p):
        if p.ndim == 1:
            return 0.1 * x if name.endswith("bias") else 1.0 + 0.25 * x
        if any(table in name for table in ("embed_tokens", "pos_embed", "position_embedding")):
            return 0.7 * x
        return x / math.sqrt(math.prod(p.shape[1:]))

    return _fill(KINDS[kind][1](reasoner_config(kind, **other)), value, seed)


def write(out: Path, family: str, stochastic: bool = True) -> list[Path]:
    """Both folders of a family; returns them. stochastic: see `scheduler`."""
    root = out / "diffusers"
    index: dict[str, Any] = {"_class_name": "Cosmos3OmniPipeline"}
    parts: dict[str, Any] = {
        "transformer": transformer(CONFIGS[family]), "vae": vae(), "scheduler": scheduler(family, stochastic),
    }  # fmt: skip
    if family == "nano":
        parts["sound_tokenizer"] = sound_tokenizer()
    for name, part in parts.items():
        part.save_pretrained(root / name)
        index[name] = ["diffusers", type(part).__name__]
    tiny_tokenizer.write(root / "text_tokenizer")
    index["text_tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]
    if family == "edge":  # as released: a scheduler class that is in no diffusers release
        index |= {"use_native_flow_schedule": True, "default_use_system_prompt": False}
        index["scheduler"] = ["diffusers", scheduler_config.EDGE]
        file = root / "scheduler" / "scheduler_config.json"
        _json(file, json.loads(file.read_text()) | {"_class_name": scheduler_config.EDGE})
    _json(root / "model_index.json", index)
    _json(root / "modular_model_index.json", _modular(index, family))
    whole = reasoner(FAMILY[family])
    whole.save_pretrained(out / "transformers")
    _beside(root, whole, family)
    for folder in (root, out / "transformers"):
        tiny_tokenizer.write(folder)
        tiny_processor.write(folder, edge=family == "edge")
    return [root, out / "transformers"]


def _json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n")


def _modular(index: dict[str, Any], family: str) -> dict[str, Any]:
    """`modular_model_index.json`: the same components, and the sigmas of a distilled model."""
    kind, more = ("Distilled", {"distilled_sigmas": SIGMAS}) if family == "distilled" else ("Omni", {})
    parts = {
        n: [*c, {"pretrained_model_name_or_path": "tiny", "subfolder": n, "type_hint": c, "variant": None}]
        for n, c in index.items() if isinstance(c, list)
    }  # fmt: skip
    told = {k: v for k, v in index.items() if not (isinstance(v, list) or k.startswith("_"))}
    return {
        "_class_name": f"Cosmos3{kind}ModularPipeline", "_blocks_class_name": f"Cosmos3{kind}Blocks",
        "is_distilled": family == "distilled", **more, **told, **parts,
    }  # fmt: skip


def _beside(root: Path, whole: transformers.PreTrainedModel, family: str) -> None:
    """The reasoner as a released repository has it: its eye in vision_encoder/, its text tower in transformer/, and at
    the top a config.json and an index over both, from which transformers loads it."""
    whole.config.save_pretrained(root)
    names = {n: v for n, v in whole.state_dict().items() if n.startswith(("model.visual.", "model.projector."))}
    if family != "edge":
        names = {n.removeprefix("model.visual."): v for n, v in names.items()}
    (root / "vision_encoder").mkdir(exist_ok=True)
    if family != "edge":  # whose eye is described at the top alone
        whole.config.vision_config.save_pretrained(root / "vision_encoder")
    save_file({n: v.contiguous() for n, v in names.items()}, root / "vision_encoder" / "model.safetensors")
    where: dict[str, str] = {}
    for file in ("transformer/diffusion_pytorch_model.safetensors", "vision_encoder/model.safetensors"):
        with safe_open(root / file, "pt") as f:
            where |= dict.fromkeys(f.keys(), file)
    size = sum((root / file).stat().st_size for file in set(where.values()))
    table = {"metadata": {"total_size": size}, "weight_map": where}
    _json(root / "model.safetensors.index.json", table)


def main() -> None:
    parser = argparse.ArgumentParser("python -m cosmos_jax.parity.tiny", description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--family", choices=tuple(FAMILY), default="nano")
    options = parser.parse_args()
    for path in write(options.out, options.family):
        print(f"Wrote {path}")


if __name__ == "__main__":
    main()
