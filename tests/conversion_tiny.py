"""Tiny PyTorch folders in many files, by the reference libraries themselves, every weight random."""

import json

import jax

from conversion import convert
from cosmos_jax.parity import tiny


def diffusers_folder(path, *, mixed=False):
    """transformer (in many files), vae, sound_tokenizer, scheduler, tokenizer files. mixed: bfloat16 in places."""
    model = tiny.transformer()
    if mixed:  # whole parameters, and one layer of a stacked one
        for name, p in model.named_parameters():
            if "mlp" in name or "layers.1.self_attn.to_q" in name:
                p.data = p.data.bfloat16()
    model.save_pretrained(path / "transformer", max_shard_size="100KB")
    tiny.vae().save_pretrained(path / "vae")
    tiny.sound_tokenizer().save_pretrained(path / "sound_tokenizer")
    tiny.scheduler("nano").save_pretrained(path / "scheduler")
    names = {"transformer": "Cosmos3OmniTransformer", "vae": "AutoencoderKLWan"}
    index = {"_class_name": "Cosmos3OmniPipeline"} | {k: ["diffusers", v] for k, v in names.items()}
    (path / "model_index.json").write_text(json.dumps(index | {"default_use_system_prompt": False}))
    (path / "text_tokenizer").mkdir()
    (path / "text_tokenizer" / "tokenizer.json").write_text("{}")
    return path


def reasoner_folder(path, kind, **other):
    """What transformers writes for a tiny Qwen3-VL, or the reasoner of Cosmos 3, in several files."""
    tiny.reasoner(kind, **other).save_pretrained(path, max_shard_size="200KB")
    return path


def run(src, dst, layout="orbax", **kw):
    return convert.prepare(src, dst, layout, **kw)[2](lambda n: None)


def assert_same(ours, theirs):
    """Two Tensors, byte for byte."""
    assert set(ours) == set(theirs)
    for k in theirs:
        assert ours[k].dtype == theirs[k].dtype and ours[k].shape == theirs[k].shape, k
        assert ours[k].tobytes() == theirs[k].tobytes(), k


def placed(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
