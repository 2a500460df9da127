"""Compile one request in its own process and read what came out.

In: `Request`. Out: the answer of `program.py`, or `PlanError`, one sentence. Imports no jax.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile

from cosmos_jax.config import Config, ConfigError, to_dict
from cosmos_jax.plan.program import MARK, environment


class PlanError(ConfigError):
    """What was asked for cannot be compiled."""


@dataclasses.dataclass(frozen=True)
class Request:
    config: Config
    topology: str
    what: str = "train"
    size: str = ""


def compiled(request: Request) -> dict:
    """The program's answer: memory, collectives, …; or {"exhausted": bytes} where the compiler itself gave up.

    PlanError for a mesh or a setting that is refused, and for a compiler that died.
    """
    asked = dataclasses.asdict(request) | {"config": to_dict(request.config)}
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(
            [sys.executable, "-m", "cosmos_jax.plan.program"], input=json.dumps(asked), stdout=subprocess.PIPE,
            stderr=errors, text=True, env=os.environ | environment(), check=False,
        )  # fmt: skip
        errors.seek(0)
        last = [x for x in errors.read().splitlines() if x.strip()][-3:]
    lines = [x for x in done.stdout.splitlines() if x.startswith(MARK)]
    if not lines:
        raise PlanError(f"compiling for {request.topology} ended with {done.returncode}: {' '.join(last)}")
    answer = json.loads(lines[-1].removeprefix(MARK))
    if "refused" in answer:
        raise PlanError(answer["refused"])
    return answer
