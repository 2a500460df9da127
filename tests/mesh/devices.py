"""A mesh test runs its own file again, in a process that has several (simulated) devices."""

import subprocess
import sys

import synthetic


def run(file: str, count: int) -> str:
    """Run `file` where jax has `count` devices; its failure is ours. Returns what it printed."""
    env, command = synthetic.environment(count), [sys.executable, file]
    done = subprocess.run(command, env=env, cwd=synthetic.ROOT, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
