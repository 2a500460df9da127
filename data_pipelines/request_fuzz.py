"""Break requests on purpose: `python -m data_pipelines.request_fuzz --count=2000` (docs/requests.md).

In: a number of requests and a seed. Out: per kind of damage, how many could run and how many were refused; the slowest.
Each must give a `Resolved` or one sentence (`RequestError`), never another exception.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import random
import tempfile
import time
import wave
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image

from data_pipelines import canvas
from data_pipelines.request_fields import KEYS
from data_pipelines.request_file import read
from data_pipelines.request_resolve import FAMILIES, Facts, resolve
from data_pipelines.request_values import RequestError

ACTION = {"domain_name": "bridge_orig_lerobot", "action_chunk_size": 16, "image_size": 256, "fps": 5}
TEMPLATES: dict[str, dict[str, Any]] = {  # a request of every mode, all good for Nano
    "t2i": {"model_mode": "text2image", "prompt": "a cup", "num_steps": 4, "resolution": "256"},
    "t2v": {"model_mode": "text2video", "prompt": '{"subject": "a cup"}', "num_frames": 25, "aspect_ratio": "4,3"},
    "t2vs": {"prompt": "rain", "enable_sound": True, "height": 192, "width": 320, "seed": 7, "num_outputs": 2},
    "i2v": {"model_mode": "image2video", "prompt": "it moves", "vision_path": "good/picture.png", "guidance": 3},
    "i2vs": {"prompt": "it falls", "vision_path": "good/photo.jpg", "enable_sound": True, "negative_prompt": "blur"},
    "v2v": {"model_mode": "video2video", "prompt": "go on", "vision_path": "good/clip.mp4", "fps": 12},
    "i2i": {"model_mode": "image2image", "prompt": "make it red", "vision_path": "good/picture.webp"},
    "s2v": {"model_mode": "audio_image2video", "sound_path": "good/sound.wav", "vision_path": "good/picture.png"},
    "v2s": {"model_mode": "video2sound", "vision_path": "good/clip.mp4", "prompt": "steps"},
    "fd": ACTION | {"model_mode": "forward_dynamics", "vision_path": "good/clip.mp4", "action_path": "good/16.json"},
    "id": ACTION | {"model_mode": "inverse_dynamics", "vision_path": "good/clip.mp4", "action_path": "nowhere.json"},
    "wam": ACTION | {"model_mode": "wam", "prompt": "pick it up", "vision_path": "good/picture.png"},
    "transfer": {"prompt_path": "good/prompt.txt", "vision_path": "good/clip.mp4", "edge": {"weight": 0.5}, "blur": {}},
    "depth": {"prompt": "a street", "depth": {"control_path": "good/clip.mp4"}, "control_guidance": 2.0},
    "ask": {"model_mode": "reasoner", "prompt": "What is it?", "vision_path": "good/clip.mp4", "presence_penalty": 1},
    "images": {
        "prompt": "Which is red?",
        "images": ["good/picture.png", "good/photo.jpg"],
        "do_sample": True,
        "top_k": 5,
    },
    "turns": {
        "turns": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "image", "image": "good/picture.png"}, {"type": "text", "text": "Hi"}],
            },
        ]
    },
    "url": {"prompt": "it moves", "vision_path": "https://example.com/a/picture.png?raw=true", "extra": {"psnr": 14.0}},
}
MILD: dict[str, list[Any]] = {  # values that make sense, though not together
    "model_mode": ["text2image", "image2video", "video2video", "policy", "text2video_sound", "reasoner", "transfer"],
    "num_frames": [1, 5, 24, 25, 93, 121, 400], "fps": [1, 10, 24, 60], "resolution": ["256", "480", "720", "768"],
    "aspect_ratio": ["1,1", "9,16", None], "height": [192, 256, 1024], "width": [320, 256, 48], "num_steps": [4, 35],
    "guidance": [0, 1, 7.0], "guidance_interval": [[400, 1000], [0, 1.5]], "shift": [3, 10.0], "normalize_cfg": [True],
    "enable_sound": [True, False], "seed": [0, 2**31 - 1], "num_outputs": [1, 3], "negative_prompt": ["", "fog"],
    "condition_frame_indexes_vision": [[], [0], [0, 1], [1, 0], [0, 0], [0, 1, 2, 3, 4, 5, 6], [90]], "extra": [{}],
    "condition_video_keep": ["first", "last"], "action_chunk_size": [15, 16, 24], "image_size": [256, 300, 480],
    "raw_action_dim": [10, 7], "domain_name": ["av", "umi", "bridge"], "edge": [{}, {"preset_edge_threshold": "low"}],
    "depth": [{}, {"control_path": "good/clip.mp4", "weight": 0}], "wsm": [{"control_path": "good/picture.png"}],
    "max_frames": [1, 20], "num_conditional_frames": [0, 1, 93], "control_guidance": [1.0, 3], "top_p": [0.9, 1],
    "do_sample": [True, False], "temperature": [1, 0.7], "max_new_tokens": [1, 64], "sigma_max": [80, 40],
    "prompt_upsampling": [False, True], "output_dir": ["/tmp"], "prompt": ["", "{", '{"fps": 3}'], "images": [[]],
}  # fmt: skip
MODELS = [
    *FAMILIES.values(),
    Facts("a reasoner", generates=False, sound=False, action_dim=0),
    Facts("a blind model", sees=False, action_dim=0),
    Facts("a distilled model", resolution="768", tiers=("768",), sound=False, steps=4),
]
JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 3, 17, 10**6, 10**19, -(10**300), 0.5, -0.0, 1e-320, 1e300, "", " ", "24",
    "nan", "\0", "\ud800", "x" * 300, "ä" * 5000, "../../../etc/passwd", "/dev/zero", "~nobody/x.png",
    "file:///etc/passwd", "https://", "http://[/x.png",
    [], {}, [[]], [1, 2], [900, 100], [0, 0], ["a", None], {"a": 1}, [0] * 3000, {"type": "image"}, "{width.__class__}",
    "{fps:99999999}", "{", "good", "good/picture.png", "good/clip.mp4", "good/sound.wav", "good/16.json",
]  # fmt: skip


def write_media(root: Path) -> tuple[list[str], list[str]]:
    """Small media files in root/good and root/bad; their paths below root."""
    good, bad = root / "good", root / "bad"
    good.mkdir(parents=True)
    bad.mkdir()
    rng = np.random.RandomState(0)
    pixels = rng.randint(0, 255, (48, 64, 3)).astype(np.uint8)
    for name in ("picture.png", "picture.webp", "photo.jpg"):
        PIL.Image.fromarray(pixels).save(good / name)
    with av.open(str(good / "clip.mp4"), "w", options={"movflags": "faststart"}) as out:  # cut, it still opens
        stream = out.add_stream("mpeg4", rate=12)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"  # type: ignore[attr-defined]
        for i in range(25):
            frame = av.VideoFrame.from_ndarray(np.roll(pixels, i, 1), format="rgb24")
            out.mux(stream.encode(frame))  # type: ignore[attr-defined]
        out.mux(stream.encode())  # type: ignore[attr-defined]
    with wave.open(str(good / "sound.wav"), "wb") as w:
        w.setparams((2, 2, 8000, 0, "NONE", ""))
        w.writeframes(rng.randint(-99, 99, 8000).astype("<i2").tobytes())
    (good / "16.json").write_text(json.dumps(rng.standard_normal((16, 10)).tolist()))
    (good / "prompt.txt").write_text("a street\n")
    files = sorted(good.iterdir())
    for f in files:
        data = f.read_bytes()
        (bad / f"empty{f.suffix}").write_bytes(b"")
        (bad / f"cut{f.suffix}").write_bytes(data[: len(data) * 2 // 3])
        (bad / f"head{f.suffix}").write_bytes(data[:20])
        (bad / f"noise{f.suffix}").write_bytes(rng.bytes(3000))
        (bad / f"folder{f.suffix}").mkdir()
        other = files[(files.index(f) + 3) % len(files)]
        (bad / f"other{f.suffix}").write_bytes(other.read_bytes())
    header = b"IHDR" + (60000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    bomb = b"\x89PNG\r\n\x1a\n\x00\x00\x00\r" + header + zlib.crc32(header).to_bytes(4, "big")
    (bad / "bomb.png").write_bytes(bomb + (good / "picture.png").read_bytes()[33:])
    PIL.Image.fromarray(pixels).save(bad / "gif.png", format="GIF")
    (bad / "playlist.mp4").write_text("#EXTM3U\n#EXTINF:1,\nhttp://localhost:9/x.ts\n#EXT-X-ENDLIST\n")
    for name, words in (
        ("nan", "[[NaN]]"), ("ragged", "[[1,2],[1]]"), ("words", '[["a"]]'), ("big", "[[1e999]]"), ("flat", "[1,2]"),
        ("deep", "[" * 5000 + "]" * 5000), ("object", '{"actions": 5}'), ("long", f"[[{'9' * 5000}]]"),
    ):  # fmt: skip
        (bad / f"{name}.json").write_text(words)
    return [str(f.relative_to(root)) for f in files], [str(f.relative_to(root)) for f in sorted(bad.iterdir())]


@dataclasses.dataclass
class Fuzz:
    """Damaged requests, one after the other, in a folder of their own."""

    root: Path
    seed: int

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.good, self.bad = write_media(self.root)
        self.kinds: dict[str, Callable[[dict], dict | str | bytes]] = {
            "none": lambda r: r, "mild": self._mild, "value": self._value, "number": self._number, "size": self._size,
            "typo": self._typo, "file": self._file, "media": self._media, "drop": self._drop, "mixed": self._mixed,
            "twice": self._twice, "nested": self._nested, "bytes": self._bytes, "batch": self._batch,
            "place": self._place,
        }  # fmt: skip

    def make(self, i: int) -> tuple[str, Path]:
        """The i-th request file, and the kind of its damage."""
        kind = list(self.kinds)[i % len(self.kinds)]
        request = json.loads(json.dumps(self.random.choice(list(TEMPLATES.values()))))
        made = self.kinds[kind](request)
        if isinstance(made, str):
            return kind, self.root / made
        path = self.root / f"{kind}{i}.{'jsonl' if kind == 'batch' else 'json'}"
        path.write_bytes(json.dumps(made).encode() if isinstance(made, dict) else made)
        return kind, path

    def _mild(self, r: dict) -> dict:
        keys = self.random.sample(list(MILD), self.random.choice([1, 1, 2, 4]))
        return r | {k: self.random.choice(MILD[k]) for k in keys}

    def _value(self, r: dict) -> dict:
        return r | {self.random.choice([*r, *KEYS]): self.random.choice(JUNK)}

    def _number(self, r: dict) -> bytes:
        keys = [k for k, x in r.items() if isinstance(x, int | float)] + ["num_frames", "fps", "seed", "top_p", "shift"]
        number = self.random.choice(
            ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, "1e-400", "-7", "0", "1e18"]
        )
        return json.dumps(r | {self.random.choice(keys): "@"}).replace('"@"', number).encode()

    def _size(self, r: dict) -> dict:
        sizes = [1, 15, 16, 17, 100, 480, 720, 4096, 4097, 10**9, -16, 192.0, 191.5]
        return r | {k: self.random.choice(sizes) for k in self.random.sample(["height", "width", "num_frames"], 2)}

    def _typo(self, r: dict) -> dict:
        key = self.random.choice(list(KEYS))
        at = self.random.randrange(len(key))
        return r | {key[:at] + self.random.choice(["", "x", key[at] * 2, "\n", "é"]) + key[at + 1 :]: 1}

    def _file(self, r: dict) -> dict:
        key = self.random.choice(
            ["vision_path", "sound_path", "action_path", "prompt_path", "negative_prompt_file", "depth"]
        )
        path = self.random.choice(
            [*self.good, *self.bad, "missing.png", "missing.mp4", "", ".png", "a/" * 200 + "b.png"]
        )
        return r | {key: {"control_path": path} if key == "depth" else path}

    def _media(self, r: dict) -> dict:
        """The request's own media, damaged."""
        keys = [k for k in r if k in ("vision_path", "sound_path", "action_path") and (self.root / r[k]).is_file()]
        if not keys:
            return self._file(r)
        key = self.random.choice(keys)
        data = bytearray((self.root / r[key]).read_bytes())
        for _ in range(self.random.choice([1, 20, 500])):
            data[self.random.randrange(len(data))] = self.random.randrange(256)
        if self.random.random() < 0.5:
            del data[self.random.randrange(len(data)) :]
        new = self.root / f"damaged{Path(r[key]).suffix}"
        new.write_bytes(data)
        return r | {key: new.name}

    def _drop(self, r: dict) -> dict:
        for key in self.random.sample(list(r), self.random.randint(1, len(r))):
            del r[key]
        return r

    def _mixed(self, r: dict) -> dict:
        other = self.random.choice(list(TEMPLATES.values()))
        return r | {k: other[k] for k in self.random.sample(list(other), self.random.randint(1, len(other)))}

    def _twice(self, r: dict) -> bytes:
        key = self.random.choice(list(r))
        return (json.dumps(r)[:-1] + f", {json.dumps(key)}: {json.dumps(r[key])}}}").encode()

    def _nested(self, r: dict) -> bytes:
        depth, key = (
            self.random.choice([5, 29, 40, 900, 100_000]),
            self.random.choice(["extra", "turns", "edge", "prompt"]),
        )
        left, right = self.random.choice([("[", "]"), ('{"a":', "}")])
        deep = left * depth + "1" + right * depth
        return json.dumps({k: x for k, x in r.items() if k != key} | {key: "@"}).replace('"@"', deep).encode()

    def _bytes(self, r: dict) -> bytes:
        data = json.dumps(r, ensure_ascii=False).encode()
        at = self.random.randrange(len(data))
        return self.random.choice([
            b"\xef\xbb\xbf" + data, data.decode().encode("utf-16"), data[:at], data[:at] + b"\xff" + data[at:],
            data[:at] + b"\0" + data[at + 1 :], data + data, b"", b" \n", b"[" + data + b"]", b"null", b"3", b'"x"',
            data[:at] + bytes([self.random.randrange(256)]) + data[at + 1 :], data.replace(b" ", b"\n"),
        ])  # fmt: skip

    def _batch(self, r: dict) -> bytes:
        lines = [json.dumps(self.random.choice(list(TEMPLATES.values()))).encode() for _ in range(4)]
        bad = self._value(r) if self.random.random() < 0.5 else r | {"name": "batch"}
        lines += [
            self.random.choice([json.dumps(bad).encode(), b"{", b"", b"[]", json.dumps(bad).encode() + b"\r"])
        ] * 2
        self.random.shuffle(lines)
        return b"\n".join(lines)

    def _place(self, r: dict) -> str:
        """A file that is not there, is a folder, has another extension or a strange name."""
        name = self.random.choice(
            ["gone.json", "good", "a.txt", "b.yaml", ".json", "c d é.json", "x" * 300 + ".json", "..json"]
        )
        if len(name) < 20 and name not in ("gone.json", "good"):
            (self.root / name).write_text(json.dumps(r))
        return name


def judge(path: Path, facts: Facts, media: Path | None, convention: str = "framework") -> str:
    """'run' or 'refused'. Any exception but `RequestError`, or a message that is not one sentence, is passed on."""
    try:
        for request in read(path, media):
            json.dumps(resolve(request, facts, convention).record())
        return "run"
    except RequestError as e:
        words = str(e)
        if (
            "\n" in words
            or not words.endswith(".")
            or words.endswith("..")
            or len(words) > 700
            or path.name not in words
        ):
            raise AssertionError(f"not one sentence with its file: {words!r}") from e
        return "refused"


def run(count: int, seed: int, root: Path) -> tuple[dict[str, collections.Counter], tuple[float, str]]:
    """({kind of damage: {run, refused}}, (seconds, name) of the slowest)."""
    fuzz, slowest = Fuzz(root, seed), (0.0, "")
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for i in range(count):
        kind, path = fuzz.make(i)
        facts, media = fuzz.random.choice(MODELS), fuzz.random.choice([None, root / "good", root, root / "nowhere"])
        start = time.perf_counter()
        try:
            counts[kind][judge(path, facts, media, fuzz.random.choice(canvas.CONVENTIONS))] += 1
        except Exception as e:
            content = path.read_bytes()[:500] if path.is_file() else b""
            raise AssertionError(f"request {i} of seed {seed} ({kind}, {facts.name}): {content!r}") from e
        slowest = max(slowest, (time.perf_counter() - start, path.name))
    return counts, slowest


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Damage requests and see that each runs or is refused in one sentence."
    )
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        counts, (seconds, name) = run(options.count, options.seed, Path(folder))
        print(f"{'damage':10} {'run':>6} {'refused':>8}")
        for kind, c in counts.items():
            print(f"{kind:10} {c['run']:6} {c['refused']:8}")
        total = sum((c for c in counts.values()), collections.Counter())
        print(f"{'all':10} {total['run']:6} {total['refused']:8}   in {time.perf_counter() - start:.1f} s")
        print(f"slowest: {1000 * seconds:.0f} ms ({name})")


if __name__ == "__main__":
    main()
