"""Checks that need a GPU, in one command: correctness, speed, tuning of tiles, cost of training.

    python benchmarks/gpu_check.py                      eight minutes, every rung
    python benchmarks/gpu_check.py --only right fast --out found --budget 240
    python benchmarks/gpu_check.py --rehearse           on the CPU, tiny, under two minutes

Rungs (stages) run in order of importance, each in a process of its own with a time limit. One that
crashes, hangs or finds an error becomes a row of the table, with its results so far, and the next
one runs. The exit status is 0 if all that ran is right. A rehearsal runs the Triton kernels in
Triton's interpreter and the CUDA kernels in their emulation, to show that the script itself works.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu.job import ROOT, Record, read_records, write_record
from gpu.table import table

GRACE = 3.0  # seconds from SIGTERM to SIGKILL
LEAST = 5.0  # seconds: a rung is not started with less time
LOG = 4000  # characters kept of a failed rung's output
Ending = tuple[str, str] | None  # status and reason of a rung that failed, or None


@dataclass(frozen=True)
class Rung:
    """`seconds`: its time limit. `file`: in --out, of one or several rungs. `kernels`: a rehearsal
    runs the GPU backends interpreted; else the CPU's own, which are faster."""

    name: str
    seconds: float
    file: str
    module: str = ""
    kernels: bool = True


# In order of importance. Six files; with the figure of `train` and the table eight.
RUNGS = (
    Rung("machine", 40, "machine.json"),
    Rung("build", 150, "machine.json"),
    Rung("right", 140, "right.json"),
    Rung("fast", 160, "fast.json"),
    Rung("sanitizer", 60, "checks.json"),
    Rung("tests", 120, "checks.json"),
    Rung("tiles", 90, "tiles.json"),
    Rung("train", 150, "training.json", kernels=False),
    Rung("accuracy", 900, "training.json", kernels=False),
)
TABLE = "summary.txt"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="gpu_check-", ignore_cleanup_errors=True) as work:
        return climb(options.rungs, options, Path(work))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = [rung.name for rung in RUNGS]
    summary, *_ = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument(
        "--budget",
        type=float,
        default=480,
        metavar="SECONDS",
        help="time limit of all rungs together (default: %(default)s)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=names,
        metavar="RUNG",
        default=names,
        help=f"rungs to run: {', '.join(names)} (default: all)",
    )
    parser.add_argument(
        "--skip", nargs="+", choices=names, metavar="RUNG", default=[], help="rungs to leave out"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/gpu_check"),
        help="the folder of all results (default: %(default)s)",
    )
    parser.add_argument("--data", help="for rung accuracy: CIFAR-10, as for python -m ckd.train")
    parser.add_argument("--teacher-weights", help="for rung accuracy: a resnet56's .safetensors")
    parser.add_argument("--rehearse", action="store_true", help="run on the CPU, with tiny sizes")
    options = parser.parse_args(arguments)
    if not options.budget > 0:
        parser.error(f"--budget: expected a positive number, got {options.budget}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: expected a folder that can be made, got {options.out}: {error}")
    options.rungs = [r for r in RUNGS if r.name in options.only and r.name not in options.skip]
    return options


def climb(rungs: Sequence[Rung], options: argparse.Namespace, work: Path) -> int:
    """Run the rungs, then print the table; returns the exit status."""
    start, records = time.monotonic(), dict[str, Record]()
    try:
        for rung in rungs:
            left = options.budget - (time.monotonic() - start)
            records[rung.name] = {"status": "started"}
            records[rung.name] = run(rung, left, options, work)
    finally:  # also after a signal
        files = {rung.name: rung.file for rung in rungs}
        for name in [name for name, record in records.items() if record["status"] == "started"]:
            records[name] |= read_records(options.out / files[name]).get(name, {})
        text = table(records, files, time.monotonic() - start)
        with contextlib.suppress(OSError):
            (options.out / TABLE).write_text(text + "\n")
        print(f"\n{text}", flush=True)
    fine = ("ok",) if options.rehearse else ("ok", "left out")
    return 0 if all(record["status"] in fine for record in records.values()) else 1


def run(rung: Rung, left: float, options: argparse.Namespace, work: Path) -> Record:
    """Run a rung; its record, with its ending."""
    file, limit = options.out.resolve() / rung.file, min(rung.seconds, left)
    if limit < LEAST:
        record: Record = {"status": "left out", "reason": "no time left", "seconds": 0.0}
        write_record(file, rung.name, record)
        return record
    print(f"== {rung.name}, {limit:.0f} s at most", flush=True)
    write_record(file, rung.name, {"status": "started"})
    log, begin = work / f"{rung.name}.log", time.monotonic()
    ending: Ending = ("stopped", "by a signal to gpu_check.py")
    try:
        words = command(rung, file, work, limit, options)
        ending = attempt(words, environment(rung, options.rehearse), limit, log)
    finally:
        record = read_records(file).get(rung.name, {"status": "crashed"})
        record["seconds"] = round(time.monotonic() - begin, 1)
        if ending is not None:
            record |= {"status": ending[0], "reason": record.get("reason") or ending[1]}
        if record["status"] not in ("ok", "left out"):
            record["log"] = log.read_text(errors="replace")[-LOG:]
        write_record(file, rung.name, record)
    report(rung.name, record)
    return record


def command(
    rung: Rung, file: Path, work: Path, limit: float, options: argparse.Namespace
) -> list[str]:
    module = rung.module or f"gpu.{rung.name}"
    words = [sys.executable, "-m", "gpu", "--name", rung.name, "--module", module]
    words += ["--file", str(file), "--work", str(work), "--seconds", f"{limit:.1f}"]
    for flag, value in (("--data", options.data), ("--teacher-weights", options.teacher_weights)):
        words += [flag, value] if value else []
    return words + ["--rehearse"] * options.rehearse


def attempt(words: list[str], variables: dict[str, str], limit: float, log: Path) -> Ending:
    """Run a process group to its end or time limit; status and reason if it failed, else None."""
    with open(log, "wb") as output:
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        return "out of time", f"stopped after {limit:.0f} s"
    finally:
        kill(process)
    if code < 0:
        return "killed", f"by {signal.Signals(-code).name}"
    return ("crashed", f"exit status {code}") if code > 0 else None


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and its whole group; one that survives SIGKILL is left behind."""
    for number, grace in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        if process.poll() is None:
            _signal_group(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
    _signal_group(process.pid, signal.SIGKILL)  # members that outlived the first process


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def environment(rung: Rung, rehearse: bool) -> dict[str, str]:
    """A rung's environment: this tree's modules first; in a rehearsal no GPU, Triton interprets."""
    paths = [str(ROOT / "benchmarks"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    if rehearse:
        own |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        own["TRITON_INTERPRET"] = "1" if rung.kernels else "0"
    return {**os.environ, **own}


def report(name: str, record: Record) -> None:
    reason = f": {record['reason']}" if record.get("reason") else ""
    print(f"   {name} {record['status']}{reason}, {record['seconds']:.0f} s", flush=True)
    for text in record.get("wrong", [])[:10]:
        print(f"   WRONG {text}")
    if record["status"] not in ("ok", "left out", "WRONG"):
        for text in record.get("log", "").splitlines()[-12:]:
            print(f"   | {text[:140]}")


if __name__ == "__main__":
    sys.exit(main())
