"""Text ↔ token ids: Qwen's chat format over any `tokenizer.json`.

In: messages. Out: ids. The toy's vocabulary is a byte-level BPE trained on toy captions; a real one drops in unchanged.
`python -m data_pipelines.tokenizer` trains it again and writes data_pipelines/toy_world/tokenizer.json.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import tokenizers

TOY = pathlib.Path(__file__).parent / "toy_world" / "tokenizer.json"
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
VOCAB = 512


class ChatTokenizer:
    """Qwen chat template and special tokens (spec model.md §4.1) over a Hugging Face `tokenizer.json`.

    Text of users never becomes a control token: special tokens are matched only where the template puts them.
    """

    def __init__(self, path: str | pathlib.Path = TOY):
        path = pathlib.Path(path)
        if not path.exists():
            raise ValueError(f"tokenizer file {path} does not exist; pass the tokenizer.json of the checkpoint.")
        self._tok = tokenizers.Tokenizer.from_file(str(path))
        self._tok.encode_special_tokens = True  # "<|im_end|>" in a caption is plain text
        missing = [t for t in SPECIAL if self._tok.token_to_id(t) is None]
        if missing:
            raise ValueError(f"tokenizer {path} lacks {missing[0]}; it is not a Qwen-style chat tokenizer.")
        self.eos = self._id("<|im_end|>")
        self.im_start = self._id("<|im_start|>")
        self.vision_start, self.vision_end = self._id("<|vision_start|>"), self._id("<|vision_end|>")
        self.image_pad, self.video_pad = self._id("<|image_pad|>"), self._id("<|video_pad|>")

    def _id(self, token: str) -> int:
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

    def _turn(self, role: str, text: str, content: Sequence[int] = ()) -> list[int]:
        """Role and text are split together: "\\n" and a text's own leading newlines may be one token."""
        return [self.im_start, *self.encode(f"{role}\n{text}"), *content, self.eos, *self.encode("\n")]

    def chat(self, messages: Sequence[tuple[str, str]], add_generation_prompt: bool = True) -> list[int]:
        """(role, text) pairs → `<|im_start|>role\\ntext<|im_end|>\\n` …, then the assistant's header."""
        ids = [i for role, text in messages for i in self._turn(role, text)]
        return ids + ([self.im_start, *self.encode("assistant\n")] if add_generation_prompt else [])

    def generation_ids(self, prompt: str) -> list[int]:
        """The text split of a sample that generates: chat(prompt), eos, <|vision_start|>."""
        return [*self.chat([("user", prompt)]), self.eos, self.vision_start]

    def reason_ids(
        self, question: str, answer: str | None, pads: Sequence[int], times: Sequence[float]
    ) -> tuple[list[int], list[bool]]:
        """A question about a video and its answer; (ids, which of them are supervised).

        pads[i] visual tokens stand for the frames at times[i] seconds: `<1.5 seconds><|vision_start|>…<|vision_end|>`
        (spec §3.2). Supervised are the answer's tokens and the <|im_end|> that closes it, not the header (spec §3.5).
        """
        texts = [*(f"<{t:.1f} seconds>" for t in times), question]
        content: list[int] = []
        for n, text in zip(pads, texts[1:], strict=True):
            content += [self.vision_start, *[self.video_pad] * n, self.vision_end, *self.encode(text)]
        ids = [*self._turn("user", texts[0], content), self.im_start, *self.encode("assistant\n")]
        if answer is None:
            return ids, [False] * len(ids)
        reply = [*self.encode(answer), self.eos]
        return ids + reply, [False] * len(ids) + [True] * len(reply)


def train(texts: Sequence[str], vocab: int = VOCAB) -> tokenizers.Tokenizer:
    """A byte-level BPE over `texts`. Deterministic; every string round-trips."""
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
        special_tokens=list(SPECIAL),
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
