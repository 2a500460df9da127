"""Names of topologies, and the wheels that compile for them.

In: "v5e:2x2", "h200:1". Out: which platform that is, or one sentence about what is wrong. Imports nothing heavy.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re

DEFAULT = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1", "h200:1")
INSTALL = "pip install -e '.[aot]'"
FAMILIES = {  # name → (platform, the rest of its name)
    "v4": ("tpu", r"\d+x\d+x\d+"),
    "v5e": ("tpu", r"\d+x\d+"),
    "v5p": ("tpu", r"\d+x\d+x\d+"),
    "v6e": ("tpu", r"\d+x\d+"),
    "tpu7x": ("tpu", r"\d+x\d+x\d+"),
    "h200": ("gpu", r"[1-9]\d*"),
}


def platform(name: str) -> str:
    """ "tpu" or "gpu". ValueError, one sentence, for a name that is no topology."""
    family, _, shape = name.partition(":")
    if family not in FAMILIES or not re.fullmatch(FAMILIES[family][1], shape):
        raise ValueError(f"--topology={name} is not a topology; write one like {', '.join(DEFAULT)}.")
    return FAMILIES[family][0]


def missing(name: str) -> str | None:
    """Why programs for this topology cannot be compiled here, and what to install; None if they can."""
    import jax

    if platform(name) == "tpu":
        return None if importlib.util.find_spec("libtpu") else f"{name} needs the wheel libtpu; run: {INSTALL}"
    if jax.__version_info__ < (0, 11):
        return (
            f"{name} needs jax ≥ 0.11, which needs Python ≥ 3.12 (here is jax {jax.__version__}); there run: {INSTALL}"
        )
    for wheel in ("jax-cuda13-plugin", "jax-cuda13-pjrt"):
        try:
            found = importlib.metadata.version(wheel)
        except importlib.metadata.PackageNotFoundError:
            return f"{name} needs the wheel {wheel}; run: {INSTALL}"
        if found != jax.__version__:
            return f"{name} needs {wheel} {jax.__version__}, as jax, and {found} is installed; run: {INSTALL}"
    return None
