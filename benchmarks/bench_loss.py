"""Time, memory and errors of the distillation loss, by ckd's backends and by plain torch.

    python benchmarks/bench_loss.py                      every case, some ten minutes
    python benchmarks/bench_loss.py --quick              the small ones, under two minutes
    python benchmarks/bench_loss.py --case 256,5000,768,256 --providers eager,cpu
    python benchmarks/bench_loss.py --sweep --plot curves.png --csv rows.csv
    python benchmarks/bench_loss.py --out mine.json
    python benchmarks/bench_loss.py --show mine.json

Measures for each case and provider, in this order: peak memory, errors against float64 (a wrong
provider is not timed), and times, for which the providers take turns. benchmarks/README.md explains
the columns.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import NamedTuple

from common import command, machine
from common.report import Record, write_record
from common.timing import quantiles
from common.workers import NO_MEMORY, Failed, Worker
from loss import providers, report
from loss.bench import FORWARD, STEP, Bench, Errors
from loss.problem import CASES, GPU_CASES, QUICK, SWEEP, Problem

TURN = 0.05  # seconds of a provider's turn
LEAST_ROUNDS = 7
# The largest relative error of loss and gradients that counts as right, by whether arithmetic is in
# bfloat16. Eager reaches 1e-6 and 1e-2 on these problems; a mistake gives 0.1 or more.
ALLOWED = {False: 1e-4, True: 5e-2}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.show:
        return command.show(options, report.show) or finish(options.record, options)
    record: Record = {
        "benchmark": "loss",
        "machine": machine.describe(options.threads, options.device),
        "limits": machine.limits(options.threads, options.device),
        "seconds": options.seconds,
        "competitors": options.competitors,
        "cases": [],
    }
    report.show_machine(record)
    for name, problem in options.cases.items():
        record["cases"].append(run_case(name, problem, options))
        report.show_case(record["cases"][-1], record["limits"])
        if options.out:
            write_record(options.out, record)
    wrong = [row for case in record["cases"] for row in case["rows"] if row.get("wrong")]
    return finish(record, options) or (1 if wrong else 0)


def finish(record: Record, options: argparse.Namespace) -> int:
    """Write the CSV file and the plot of a complete record; returns the exit status."""
    try:
        if options.csv:
            report.write_csv(record, options.csv)
        if options.plot:
            report.plot(record, options.plot)
    except ValueError as error:
        print(f"--plot: {error}", file=sys.stderr)
        return 1
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__)
    parser.add_argument(
        "--case",
        action="append",
        metavar="CASE",
        help=f"{', '.join(CASES | GPU_CASES)}, or sizes B,K,D,W (batch, bank "
        "rows, teacher and student width) or B,K,D,W,frozen (no projection); may be repeated",
    )
    parser.add_argument("--quick", action="store_true", help=f"only the cases {', '.join(QUICK)}")
    parser.add_argument(
        "--sweep", action="store_true", help=f"banks from {SWEEP[0]} to {SWEEP[-1]}, for --plot"
    )
    command.add_device(parser)
    parser.add_argument(
        "--providers",
        help="comma-separated; ratios are to the first; also cpu:TIER and "
        f"cpu-bf16:TIER (default on the CPU: {','.join(providers.of_device('cpu'))}; on a GPU: "
        f"{','.join(providers.of_device('cuda'))})",
    )
    command.add_threads(parser)
    parser.add_argument(
        "--seconds",
        type=float,
        help="time to measure each provider and mode for (default: 2; quick: 0.3)",
    )
    parser.add_argument(
        "--competitors", type=int, default=0, help="other processes that keep a core busy"
    )
    command.add_files(
        parser,
        csv="write a CSV line per measured time",
        plot="draw time and memory over the rows of the bank (PNG)",
    )
    return command.parse(parser, arguments, check, "loss")


def check(options: argparse.Namespace) -> None:
    """Fill in defaults. Raises ValueError that names the argument and the values it takes."""
    if options.seconds is None:
        options.seconds = 0.3 if options.quick else 2.0
    command.check_seconds(options.seconds)
    command.check_least(options, threads=1, competitors=0)
    command.check_device(options)
    known = CASES | GPU_CASES
    every = CASES if options.device == "cpu" else known
    names = options.case or (QUICK if options.quick else SWEEP if options.sweep else every)
    command.check_names("--case", list(names))
    options.cases = {n: known[n] if n in known else Problem.parse(n) for n in names}
    if options.plot:
        try:
            report.longest_sweep([{"problem": asdict(one)} for one in options.cases.values()])
        except ValueError as error:
            raise ValueError(f"--plot: {error}") from error
    able = providers.of_device(options.device)
    options.asked = options.providers is not None
    options.providers = options.providers.split(",") if options.asked else able
    command.check_names("--providers", options.providers)
    for provider in options.providers:
        if options.device not in providers.find(provider).devices:
            raise ValueError(
                f"{provider!r} does not run on {options.device}; these do: {', '.join(able)}"
            )


def run_case(name: str, problem: Problem, options: argparse.Namespace) -> Record:
    rows: list[Record] = []
    workers: dict[str, Worker] = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            truths: dict[str, Truth] = {}
            for provider in options.providers:
                found = providers.find(provider)
                reason = found.missing() or found.unfit(problem)
                if reason is not None and named(provider, options):
                    rows.append({"provider": provider, "half": found.half, "failed": reason})
                if reason is not None:
                    continue
                rows.append({"provider": provider, "half": found.half})
                # Started together: loading torch takes longer than the measurements.
                workers[provider] = start(provider, problem, options)
            for row in [row for row in rows if "failed" not in row]:
                truth = providers.find(row["provider"]).truth
                if truth not in truths:
                    path = f"{folder}/{truth}.pt"
                    truths[truth] = write_truth(problem, truth, path, options)
                if truths[truth].failed is not None:
                    row["failed"] = f"no float64 to compare with: {truths[truth].failed}"
                    continue
                examine(workers[row["provider"]], row, truths[truth].path)
        able = [row for row in rows if "failed" not in row and "wrong" not in row]
        with busy(options.competitors):
            for mode in (STEP, FORWARD):
                take_turns(mode, able, workers, options.seconds)
    finally:
        for worker in workers.values():
            worker.stop()
    return {
        "name": name,
        "problem": asdict(problem),
        "step_flops": problem.step_flops(),
        "step_bytes": problem.step_bytes(),
        "forward_flops": problem.forward_flops(),
        "forward_bytes": problem.forward_bytes(),
        "rows": rows,
    }


def start(provider: str, problem: Problem, options: argparse.Namespace) -> Worker:
    return Worker(Bench, provider, problem, options.device, threads=options.threads)


def named(provider: str, options: argparse.Namespace) -> bool:
    """Whether a provider that cannot run gets a row: if it was asked for, or is not a peer."""
    return options.asked or not providers.find(provider).is_peer


class Truth(NamedTuple):
    """The file of loss and gradients in float64, or the reason why there is none."""

    path: str
    failed: str | None = None


def write_truth(problem: Problem, name: str, path: str, options: argparse.Namespace) -> Truth:
    worker = start("eager", problem, options)
    try:
        worker.ask("truth", name, path)
    except Failed as failure:
        if failure.result not in NO_MEMORY:
            raise  # a mistake: nothing could be compared
        return Truth(path, failure.result)
    finally:
        worker.stop()
    return Truth(path)


def examine(worker: Worker, row: Record, truth: str) -> None:
    """Measure memory and errors into `row`."""
    try:
        row["peak_mib"] = worker.ask("memory")
        errors: Errors = worker.ask("errors", truth)
    except Failed as failure:
        row["failed"] = failure.result
        return
    row["errors"] = errors.values
    if not errors.worst <= ALLOWED[row["half"]]:
        row["wrong"] = f"an error of {errors.worst:.1e} against float64"


def take_turns(mode: str, rows: list[Record], workers: dict[str, Worker], seconds: float) -> None:
    times: dict[str, list[float]] = {row["provider"]: [] for row in rows}
    start, rounds = time.perf_counter(), 0
    while rounds < LEAST_ROUNDS or time.perf_counter() - start < seconds * len(rows):
        rounds += 1
        for row in [row for row in rows if "failed" not in row]:
            try:
                times[row["provider"]] += workers[row["provider"]].ask("time", mode, TURN)
            except Failed as failure:
                row["failed"] = failure.result
    for row in rows:
        if "failed" not in row:
            row[mode] = quantiles(times[row["provider"]], "calls")


@contextmanager
def busy(processes: int) -> Iterator[None]:
    context = multiprocessing.get_context("spawn")
    started = [
        context.Process(target=_spin, args=(os.getpid(),), daemon=True) for _ in range(processes)
    ]
    for process in started:
        process.start()
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.join()


def _spin(parent: int) -> None:
    while os.getppid() == parent:  # ends also when the parent was killed
        pass


if __name__ == "__main__":
    command.run(main)
