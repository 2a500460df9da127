"""A conversation as one string: Qwen's chat format, or the Jinja template that a checkpoint brings.

In: messages as Hugging Face templates read them. Out: text with control tokens. A control token that a user wrote is
broken by a mark before (`escape`), so that tokenizer.py takes only the template's own for such.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

import jinja2
import jinja2.sandbox

Render = Callable[..., str]  # (messages, add_generation_prompt=…) → text
PLACES = {k: f"<|vision_start|><|{k}_pad|><|vision_end|>" for k in ("image", "video")}


def qwen(messages: Sequence[Mapping], add_generation_prompt: bool = True) -> str:
    """The chat format of Qwen3-VL's instruction models: no system turn but a given one (spec model.md §4.1)."""
    text = ""
    for m in messages:
        content = m["content"]
        if not isinstance(content, str):
            content = "".join(PLACES.get(part["type"], part.get("text")) for part in content)
        text += f"<|im_start|>{m['role']}\n{content}<|im_end|>\n"
    return text + ("<|im_start|>assistant\n" if add_generation_prompt else "")


def jinja(template: str, variables: Mapping[str, str], where: str) -> Render:
    """The renderer of a checkpoint's chat_template; `variables` are the names it may use (eos_token …).

    The template is foreign code, so it runs in Jinja's sandbox. ValueError, naming `where`, if it is broken or refuses.
    """

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda x, **options: json.dumps(x, **{"ensure_ascii": False, **options})
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    try:
        compiled = environment.from_string(template)
    except jinja2.TemplateError as e:
        raise ValueError(f"{where}: the chat template cannot be read ({e}).") from e

    def render(messages: Sequence[Mapping], add_generation_prompt: bool = True) -> str:
        try:
            return compiled.render(messages=messages, add_generation_prompt=add_generation_prompt, **variables)
        except (jinja2.TemplateError, TypeError) as e:
            raise ValueError(f"{where}: the chat template refuses this conversation ({e}).") from e

    return render


def mark_for(texts: Sequence[str]) -> str:
    """A character that none of the texts contains (from Unicode's private use area)."""
    used = set().union(*texts)
    return next(c for c in map(chr, range(0xE000, 0xF900)) if c not in used)


def escape(text: str, control: re.Pattern, mark: str) -> str:
    """Break every control token that a user wrote by a mark after its first character."""
    return control.sub(lambda m: m[0][0] + mark + m[0][1:], text)
