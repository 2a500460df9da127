"""What the tests of `generate --request` share: the folder, and eyes on what a run does.

In: a place. Out: a tiny checkpoint folder; run.json and latents read back; what codecs and loader were asked.
"""

import contextlib
import gc
import json
import shutil
import types
import weakref
from unittest import mock

import jax
import numpy as np

from cosmos_jax.codecs.avae import AVAECodec
from cosmos_jax.codecs.wan import WanCodec
from cosmos_jax.inference.bundle import Bundle
from cosmos_jax.parity import run, tiny

STEPS = 2
PICTURE = (100, 150)  # of all observations of actions, so that they share a canvas
MODES = (
    "t2i", "t2v", "i2v", "v2v", "t2v_sound", "s2v", "v2s", "policy", "forward_dynamics", "inverse_dynamics", "transfer",
    "i2i", "ask",
)  # fmt: skip


def nano(where):
    """A PyTorch folder, Nano-like, with the files of the reasoner's processor at its top."""
    run.quiet()
    path = tiny.write(where, "nano")[0]
    shutil.copytree(path / "text_tokenizer", path, dirs_exist_ok=True)
    sees = {"patch_size": 4, "temporal_patch_size": 2, "size": {"shortest_edge": 64, "longest_edge": 2048}}
    for kind, cls in (("image", "Qwen2VLImageProcessor"), ("video", "Qwen3VLVideoProcessor")):
        name = f"{'video_' * (kind == 'video')}preprocessor_config.json"
        (path / name).write_text(json.dumps({f"{kind}_processor_type": cls} | sees))
    return path


def arrays(path):
    with np.load(path) as f:
        return dict(f)


def said(out):
    """run.json."""
    return json.loads((out / "run.json").read_text())


@contextlib.contextmanager
def watched():
    """Shapes that the codecs get, and (weights that are loaded, those of other jobs that are alive then)."""
    seen = types.SimpleNamespace(encoded=[], decoded=[], heard=[], loaded=[])
    alive: dict[str, list] = {}
    load = Bundle.load

    def loading(self, job, *args, **kw):
        gc.collect()
        seen.loaded.append((job, [name for name, refs in alive.items() if any(r() is not None for r in refs)]))
        params = load(self, job, *args, **kw)
        alive[job] = [weakref.ref(x) for x in jax.tree.leaves(params)]
        return params

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Bundle, "load", loading))
        for cls, name, into in (
            (WanCodec, "encode", seen.encoded), (WanCodec, "decode", seen.decoded),
            (WanCodec, "decode_float", seen.decoded), (AVAECodec, "encode", seen.heard),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(cls, name, _recorded(getattr(cls, name), into)))
        yield seen


def _recorded(method, into):
    def called(self, x):
        into.append(x.shape)
        return method(self, x)

    return called
