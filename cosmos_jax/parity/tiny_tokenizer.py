"""A tiny Qwen-style tokeniser for the tiny checkpoints: byte-level BPE, Qwen's control tokens, its chat template.

In: nothing but the words below. Out: the files of a tokenizer as released repositories have them in text_tokenizer/ and
at their top, which transformers and `ChatTokenizer.load` both read. Ids of the visual tokens are those of the tiny
reasoners' config.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import tokenizers
import transformers

from cosmos_jax.parity import prompts
from data_pipelines import tokenizer

WORDS = prompts.TINY.image  # ids below are words (the last of them unused), control tokens follow
CONTROL = (  # the first four as in `prompts.TINY`
    "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|endoftext|>", "<|im_start|>",
    "<|im_end|>",
)  # fmt: skip
ID = {token: WORDS + i for i, token in enumerate(CONTROL)}
TEMPLATE = (  # Qwen's chat format (spec model.md §4.1)
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}"
    "{{ '<|vision_start|><|' + part.type + '_pad|><|vision_end|>' }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SUBJECTS = ("A small robot", "The red cube", "A gripper", "The camera", "One hand", "A car")
VERBS = ("moves across", "lifts", "is not near", "turns around", "pours water into", "generates")
OBJECTS = ("a table.", "the cup.", "a road, 24 FPS.", "an image.", "the video of 720x1280.", "an assistant.")


def make() -> transformers.PreTrainedTokenizerFast:
    """The same for every family."""
    texts = [" ".join(words) for words in itertools.product(SUBJECTS, VERBS, OBJECTS)]
    trained = tokenizer.train(["system\nuser\nassistant\n", *texts], WORDS, special=())
    unused = [f"<|unused_{i}|>" for i in range(trained.get_vocab_size(), WORDS)]
    trained.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in (*unused, *CONTROL)])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=list(CONTROL),
    )  # fmt: skip
    made.chat_template = TEMPLATE
    return made


def write(folder: Path) -> None:
    make().save_pretrained(folder)
