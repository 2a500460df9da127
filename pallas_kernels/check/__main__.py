"""The command: `python -m pallas_kernels.check [--topology=…] [--only=…] [--json=…]`.

In: words. Out: a line for each kernel, and an exit code: 0; 1 if anything is not as its case promises; 2 after a
mistake of the user, with one sentence.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from pallas_kernels.check import judge, topology
from pallas_kernels.check.cases import TABLE, Case
from pallas_kernels.check.program import Outcome, environment

PATIENCE = 900.0  # seconds for one program; an idle core needs a fiftieth of it
LINES = ('{"begins"', '{"topology"')  # what a child's own lines begin with
CHILD = (sys.executable, "-m", "pallas_kernels.check.program")


class Mistake(ValueError):
    """The user's: one sentence."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):  # argparse would print its usage too
        raise Mistake(f"{message[0].upper()}{message[1:]}; see --help.")


def main(argv: Sequence[str] | None = None) -> int:
    parser = _Parser("python -m pallas_kernels.check", description="Compile every kernel for chips that are not here.")
    names = ", ".join(topology.DEFAULT)
    parser.add_argument("--topology", action="append", help=f"may be given several times (default: {names})")
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--json", type=Path, help="a file for every number")
    try:
        options = parser.parse_args(argv)
        work = _chosen(options.topology or topology.DEFAULT, options.only)
        if options.json and not options.json.parent.is_dir():
            raise Mistake(f"--json={options.json}: there is no directory {options.json.parent}.")
    except ValueError as e:
        print(f"pallas_kernels.check: {e}", file=sys.stderr)
        return 2
    return run(work, options.json)


def _chosen(topologies: Sequence[str], only: str | None) -> dict[str, list[Case]]:
    """Topology → its cases."""
    work = {}
    for name in topologies:
        kind = topology.platform(name)
        work[name] = [c for c in TABLE if kind in c.platforms and (only or "") in c.name]
    if not any(work.values()):
        known = ", ".join(c.name for c in TABLE)
        raise Mistake(f"--only={only} is in the name of no case for {', '.join(work)}; there are {known}.")
    return work


def run(work: dict[str, list[Case]], out: Path | None = None, child: Sequence[str] = CHILD) -> int:
    """Compile, print, and say whether all is well: the exit code. child: the process for one topology."""
    begin, failures, kernels, results = time.perf_counter(), 0, 0, []
    print(judge.line(judge.HEADER).rstrip(), flush=True)
    lock = threading.Lock()

    def one(name: str) -> None:
        nonlocal failures, kernels
        cases = {c.name: c for c in work[name]}
        for outcome in outcomes(name, list(cases), child):
            case = cases[outcome.case]
            wrong = judge.problems(case, outcome)
            with lock:
                failures, kernels = failures + bool(wrong), kernels + len(outcome.kernels)
                results.append(dataclasses.asdict(outcome) | {"problems": wrong})
                for row in judge.rows(case, outcome):
                    print(judge.line(row).rstrip(), flush=True)
                for text in wrong:
                    print(f"    FAILED {name} {case.name}: {text}", flush=True)

    workers = max(1, min(len(work), len(os.sched_getaffinity(0))))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, [n for n, cases in work.items() if cases]))
    if out:
        out.write_text(json.dumps(results, indent=1) + "\n")
    spent = time.perf_counter() - begin
    print(f"{len(results)} programs, {kernels} kernels, {failures} failed; {spent:.0f} s.")
    return 1 if failures else 0


def outcomes(
    name: str, cases: list[str], child: Sequence[str] = CHILD, patience: float = PATIENCE
) -> Iterator[Outcome]:
    """One for each case. A process that dies or hangs costs the case that it was at; the rest get a new one."""
    if why := topology.missing(name):
        yield from (Outcome(name, case, error=why) for case in cases)
        return
    left = list(cases)
    while left:
        at: str | None = left[0]
        with tempfile.TemporaryDirectory() as dump, tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                [*child, name, dump, *left], stdout=subprocess.PIPE, stderr=errors, text=True,
                env=os.environ | environment(name, Path(dump)),
            )  # fmt: skip
            alarm = _Alarm(process, patience)
            for text in process.stdout:
                if not text.startswith(LINES):  # a compiler's
                    continue
                said = json.loads(text)
                alarm.again()
                if "begins" in said:
                    at = said["begins"]
                else:
                    left.remove(said["case"])
                    at = left[0] if left else None
                    yield Outcome.read(said)
            ended = process.wait()
            alarm.stop()
            if at is None:
                return
            errors.seek(0)
            last = [x for x in errors.read().splitlines() if x.strip()][-3:]
        how = (
            f"took longer than {patience:.0f} s" if alarm.rang else f"its process ended with {ended}: {' '.join(last)}"
        )
        yield Outcome(name, at, error=how)
        left.remove(at)


class _Alarm:
    """Ends a process that says nothing for too long."""

    def __init__(self, process: subprocess.Popen, seconds: float):
        self.process, self.seconds, self.rang = process, seconds, False
        self.timer: threading.Timer | None = None
        self.again()

    def again(self) -> None:
        self.stop()
        self.timer = threading.Timer(self.seconds, self._ring)
        self.timer.daemon = True
        self.timer.start()

    def stop(self) -> None:
        if self.timer:
            self.timer.cancel()

    def _ring(self) -> None:
        self.rang = True
        self.process.kill()


if __name__ == "__main__":
    sys.exit(main())
