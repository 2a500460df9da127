"""Text and pictures → token ids: a chat format over any `tokenizer.json`.

In: turns of a conversation. Out: ids, and which of them are supervised and which stand for pictures. The toy's
vocabulary is a byte-level BPE trained on toy captions; a real one drops in unchanged, with its folder's chat template.
`python -m data_pipelines.tokenizer` trains it again and writes data_pipelines/toy_world/tokenizer.json.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from data_pipelines import chat
from data_pipelines.sample import Turn
from data_pipelines.video import Pixels

TOY = pathlib.Path(__file__).parent / "toy_world" / "tokenizer.json"
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
NAMES = {  # of the control tokens that this file looks for, unless tokenizer_config.json calls them otherwise
    "eos_token": "<|im_end|>", "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>",
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
}  # fmt: skip
VOCAB = 512


class Prompt(NamedTuple):
    """A conversation as tokens."""

    ids: np.ndarray  # [L] int32
    supervised: np.ndarray  # [L] bool: the assistant's words, each turn's closing <|im_end|> included (spec §3.5)
    kinds: np.ndarray  # [L] int32: 0 text, 1 image, 2 video, as the reference's mm_token_type_ids
    pictures: tuple[Pixels, ...]  # in the order of their tokens


class ChatTokenizer:
    """A chat format (default: Qwen's, spec model.md §4.1) over a Hugging Face `tokenizer.json`.

    Text of users never becomes a control token: special tokens are taken only where the template puts them.
    """

    def __init__(
        self, path: str | pathlib.Path = TOY, render: chat.Render = chat.qwen, names: Mapping[str, str] = NAMES
    ):
        path = pathlib.Path(path)
        if not path.exists():
            raise ValueError(f"tokenizer file {path} does not exist; pass the tokenizer.json of the checkpoint.")
        self._tok = tokenizers.Tokenizer.from_file(str(path))
        self._tok.encode_special_tokens = True  # "<|im_end|>" in a caption is plain text
        self._render, self._names = render, names
        missing = [t for t in (*(SPECIAL if render is chat.qwen else ()), *names.values()) if self._id(t) is None]
        if missing:
            raise ValueError(f"tokenizer {path} lacks {missing[0]}; it is not a Qwen-style chat tokenizer.")
        added = [t for t in self._tok.get_added_tokens_decoder().values() if t.special]
        greedy = [t.content for t in added if t.lstrip or t.rstrip or t.single_word]
        if greedy:
            raise ValueError(
                f"tokenizer {path}: {greedy[0]} depends on the text around it; only plain ones are supported."
            )
        special = [t.content for t in added]
        self._control = re.compile(f"({'|'.join(map(re.escape, sorted(special, key=len, reverse=True)))})")
        self.eos, self.im_start = self._id(names["eos_token"]), self._id("<|im_start|>")
        self.vision_start, self.vision_end = self._id(names["vision_start_token"]), self._id(names["vision_end_token"])
        self.image_pad, self.video_pad = self._id(names["image_token"]), self._id(names["video_token"])

    @classmethod
    def load(cls, folder: str | pathlib.Path) -> ChatTokenizer:
        """A checkpoint's tokenizer with its own chat template (Qwen's format if it brings none). ValueError as said."""
        folder = pathlib.Path(folder)
        config = _json(folder / "tokenizer_config.json")
        named = {**(extra if isinstance(extra := config.get("extra_special_tokens"), dict) else {}), **config}
        texts = {k: v["content"] if isinstance(v, dict) else v for k, v in named.items() if k.endswith("_token")}
        names = {k: texts.get(k) or name for k, name in NAMES.items()}
        template = _template(folder, config)
        variables = {k: v for k, v in texts.items() if isinstance(v, str)}
        render = chat.qwen if template is None else chat.jinja(template, variables, str(folder))
        return cls(folder / "tokenizer.json", render, names)

    def _id(self, token: str) -> int | None:
        return self._tok.token_to_id(token)

    @property
    def vocab_size(self) -> int:
        return self._tok.get_vocab_size()

    def save(self, path: str | pathlib.Path) -> None:
        self._tok.save(str(path))

    def encode(self, text: str) -> list[int]:
        return self._tok.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens and ids below 0 are left out."""
        return self._tok.decode([int(i) for i in ids if i >= 0], skip_special_tokens=True)

    def chat(self, messages: Sequence[tuple[str, str]], add_generation_prompt: bool = True) -> list[int]:
        """(role, text) pairs → `<|im_start|>role\\ntext<|im_end|>\\n` …, then the assistant's header."""
        turns = [Turn(role, (text,)) for role, text in messages]
        return self.conversation(turns, add_generation_prompt).ids.tolist()

    def generation_ids(self, prompt: str, system: str | None = None) -> list[int]:
        """The text split of a sample that generates: chat(system if there is one, prompt), eos, <|vision_start|>."""
        turns = [("user", prompt)] if system is None else [("system", system), ("user", prompt)]
        return [*self.chat(turns), self.eos, self.vision_start]

    def conversation(
        self, turns: Sequence[Turn], add_generation_prompt: bool = True, video_wrapper: bool = False
    ) -> Prompt:
        """Render, put every picture's tokens in its place, encode. ValueError if the template loses a picture.

        An image is <|vision_start|> pads <|vision_end|>; a clip one such span per temporal patch, each after its time:
        `<1.5 seconds>` (spec §3.2). video_wrapper keeps the template's own pair around all spans of a clip, as
        transformers 5.23 does for Qwen3-VL; the models were trained without (docs/reasoner.md).
        """
        mark = chat.mark_for([p for t in turns for p in t.parts if isinstance(p, str)])
        text = self._render([self._message(t, mark) for t in turns], add_generation_prompt=add_generation_prompt)
        waiting = [p for t in turns for p in t.parts if isinstance(p, Pixels)]
        text, pictures = self._expand(text, waiting, video_wrapper)
        ids: list[int] = []
        for i, piece in enumerate(self._control.split(text)):  # plain, control, plain, control, …
            ids += [self._id(piece)] if i % 2 else self.encode(piece.replace(mark, ""))
        tokens = np.asarray(ids, np.int32)
        kinds = (tokens == self.image_pad) + 2 * (tokens == self.video_pad)
        return Prompt(tokens, self._supervised(ids), kinds.astype(np.int32), pictures)

    def _message(self, turn: Turn, mark: str) -> dict:
        """The turn as a Hugging Face template reads it. Neighbouring texts are joined: no token hides in two halves."""
        content: list[dict] = []
        for part in turn.parts:
            if isinstance(part, Pixels):
                content.append({"type": "video" if part.times else "image"})
            elif content and content[-1]["type"] == "text":
                content[-1]["text"] += part
            else:
                content.append({"type": "text", "text": part})
        texts = [c for c in content if c["type"] == "text"]
        for c in texts:
            c["text"] = chat.escape(c["text"], self._control, mark)
        return {
            "role": turn.role,
            "content": content if len(texts) < len(content) else "".join(c["text"] for c in texts),
        }

    def _expand(self, text: str, pictures: Sequence[Pixels], wrapper: bool) -> tuple[str, tuple[Pixels, ...]]:
        """Put the pictures, images and clips each in their order, where the template left room for them."""
        n = self._names
        start, end, image, video = (n[f"{k}_token"] for k in ("vision_start", "vision_end", "image", "video"))
        waiting: dict[str, Iterator[Pixels]] = {
            "image": iter([p for p in pictures if not p.times]), "video": iter([p for p in pictures if p.times])
        }  # fmt: skip
        placed: list[Pixels] = []

        def tokens(place: re.Match) -> str:
            kind = "image" if place[0] == image else "video"
            p = next(waiting[kind], None)
            if p is None:
                raise ValueError(f"the chat template makes room for more {kind}s than the conversation has.")
            placed.append(p)
            pads = p.merged[0] * p.merged[1]
            if kind == "image":
                return image * pads
            return "".join(f"<{t:.1f} seconds>{start}{video * pads}{end}" for t in p.times)

        rooms = [image, video] if wrapper else [image, start + video + end, video]
        text = re.sub("|".join(map(re.escape, rooms)), tokens, text)
        if len(placed) != len(pictures):
            raise ValueError(f"the chat template shows {len(placed)} of the conversation's {len(pictures)} pictures.")
        return text, tuple(placed)

    def _supervised(self, ids: Sequence[int]) -> np.ndarray:
        """From behind each assistant header to its eos."""
        mask = np.zeros(len(ids), bool)
        role, header = self.encode("assistant"), 1 + len(self.encode("assistant\n"))
        for i, token in enumerate(ids):
            if token == self.im_start and list(ids[i + 1 : i + 1 + len(role)]) == role and self.eos in ids[i:]:
                mask[i + header : ids.index(self.eos, i) + 1] = True
        return mask


def _json(path: pathlib.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path} is not JSON ({e}).") from e


def _template(folder: pathlib.Path, config: Mapping[str, Any]) -> str | None:
    """The chat template of a checkpoint, wherever its version of transformers kept it; None = there is none."""
    if (file := folder / "chat_template.jinja").exists():
        return file.read_text(encoding="utf-8")
    found = _json(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(found, list):  # several, by name
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found


def train(texts: Sequence[str], vocab: int = VOCAB, special: Sequence[str] = SPECIAL) -> tokenizers.Tokenizer:
    """A byte-level BPE over `texts`; `special` tokens come first. Deterministic; every string round-trips."""
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tok.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(special),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    return tok


def toy_texts(episodes: int = 400) -> list[str]:
    """What the toy world says: captions, instructions, questions, answers, and the words of the template."""
    from data_pipelines.toy_world.stream import StreamSource

    texts = ["system\nuser\nassistant\n<1.5 seconds>"] * episodes
    for e in StreamSource(episodes, 30_000_000):
        texts += [e.caption, e.instruction, "Describe the video."] + [t for qa in e.qa for t in qa]
    return texts


if __name__ == "__main__":
    train(toy_texts()).save(str(TOY))
    print(f"wrote {TOY}")
