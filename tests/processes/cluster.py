"""Several processes of one run, over loopback, each with its own simulated devices."""

import socket
import subprocess
import sys

import synthetic


def start(argv: list[str], processes: int, devices: int, **environment: str) -> list[subprocess.Popen]:
    """`python *argv` in every process; each finds the others through the variables of `cosmos_jax.dist`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = synthetic.environment(devices) | environment
    shared |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes)}
    return [
        subprocess.Popen(
            [sys.executable, "-u", *argv], env=shared | {"JAX_PROCESS_ID": str(i)}, cwd=synthetic.ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for i in range(processes)
    ]  # fmt: skip


def alone(argv: list[str], devices: int, **environment: str) -> subprocess.Popen:
    """`python *argv` in one process that joins no other."""
    return subprocess.Popen(
        [sys.executable, "-u", *argv], env=synthetic.environment(devices) | environment, cwd=synthetic.ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(running: list[subprocess.Popen], timeout: int = 300) -> list[tuple[int, str]]:
    """(return code, output) of each. One that does not end in time takes all with it, and the test."""
    try:
        outputs = [p.communicate(timeout=timeout)[0] for p in running]
    finally:
        for p in running:
            p.kill()
    return [(p.returncode, out) for p, out in zip(running, outputs, strict=True)]
