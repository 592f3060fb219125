"""Rung 4: times of the loss. Providers take turns, each in a process of its own.

Times are multiples of F0, the time of one cuBLAS float16 product of the logits' shape in the same
run. Peers get unit rows of students and bank from plain torch, whose time counts (loss/peers.py).
Providers that lack memory for a large bank get an eighth of it, and their times are multiplied
by 8.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import replace

from common.workers import Failed, Worker
from gpu.cold import cold_starts
from gpu.contenders import CUBLAS, EAGER, NOTES, OWN, PEERS, RIVALS, absent_text, contenders
from gpu.device import Device
from gpu.job import Job, Record, pack
from gpu.timed import FORWARD, STEP, Bench
from loss import providers
from loss.problem import Problem

LARGE = {
    "learned": Problem(4096, 1_280_000, 1024, 256),
    "frozen": Problem(4096, 1_280_000, 256, 256, learned=False),
    "one target": Problem(1024, 50_000, 1024, 256),
    "32 targets": Problem(1024, 50_000, 1024, 256, targets=32),
    "W 128": Problem(4096, 320_000, 1024, 128),
    "W 64": Problem(4096, 320_000, 1024, 64),
    "pairs": Problem(32768, 32768, 512, 512, learned=False),
}
SMALL = Problem(256, 1000, 1024, 256)
TINY = {
    "learned": Problem(16, 96, 24, 32),
    "32 targets": Problem(16, 96, 24, 32, targets=5),
    "frozen": Problem(16, 64, 24, 24, learned=False),
}
TINY_SMALL = Problem(8, 40, 24, 16)
FIRST, PAIRS, SMALL_CASE = "learned", "pairs", "small"
EIGHTH = 8
ROUNDS, CALLS = 3, 3
PATIENCE = 60.0  # most seconds of a first call, compilation included
PEERS_PATIENCE = 25.0  # the same for a peer
ENOUGH = 20.0  # seconds: with less time left, no further case begins
TURN = 20.0  # most seconds of a turn
DIFFERS = 0.02  # a loss this far (relative) from the median is wrong: half precision errs by less


def run(job: Job) -> None:
    device = Device.of(job)
    able, absent = contenders(job, device)
    job.put(absent=absent)
    workers = {name: Worker(Bench, device, name) for name in able}
    for worker in workers.values():
        worker.send("prepare")  # all import side by side
    if absent:
        job.line(absent_text(absent))
    try:
        for name, problem, names in cases(job):
            chosen = [n for n in able if n in names]
            if job.left < ENOUGH:
                job.line(f"{name}: left out, no time left")
            elif problem is None:
                cold_starts(job, device, TINY_SMALL if job.rehearse else SMALL)
            elif name == SMALL_CASE:
                measure_small(job, problem, chosen, workers, device)
            elif {*chosen} - {CUBLAS}:
                measure_large(job, name, problem, chosen, workers, device)
    finally:
        for worker in workers.values():
            worker.kill()


def cases(job: Job) -> Iterator[tuple[str, Problem | None, tuple[str, ...]]]:
    """Name, sizes and providers of the cases; ours before the peers. No sizes: cold starts."""
    large, small = (TINY, TINY_SMALL) if job.rehearse else (LARGE, SMALL)
    own = (CUBLAS, *OWN)
    yield FIRST, large[FIRST], (*own, EAGER)
    yield SMALL_CASE, small, (*own, EAGER)
    for name in [name for name in large if name not in (FIRST, PAIRS)]:
        yield name, large[name], (*own, EAGER) if name == "frozen" else own
    yield "cold start", None, ()
    yield f"{FIRST}, peers", large[FIRST], (CUBLAS, *PEERS)
    yield SMALL_CASE, small, tuple(PEERS)
    if PAIRS in large:
        yield PAIRS, large[PAIRS], (*own, EAGER, *RIVALS)


def measure_large(
    job: Job,
    name: str,
    problem: Problem,
    names: list[str],
    workers: dict[str, Worker],
    device: Device,
) -> None:
    rows = load(job, problem, names, workers, device)
    check_losses(job, name, rows)
    for _ in range(1 if job.rehearse else ROUNDS):
        for provider, row in rows.items():
            for mode in (FORWARD,) if provider == CUBLAS else (FORWARD, STEP):
                take_turn(workers[provider], mode, row)
    report_failures(job, name, rows)
    f0 = rows[CUBLAS].get("forward_ms")
    for provider, row in rows.items():
        derive(row, problem, f0)
        job.row(case=name, provider=provider, **row)
    if f0:
        rate = 2 * problem.batch * problem.bank_rows * problem.student_dim / f0 / 1e9
        f0_text = f"F0 {f0:.2f} ms ({rate:.0f} TF/s)"
    else:
        f0_text = f"no F0: {rows[CUBLAS].get('failed')}"
    others = {provider: row for provider, row in rows.items() if provider != CUBLAS}
    if name not in (FIRST, PAIRS) and not {*PEERS} & {*names}:
        texts = [f"{provider} {short_text(row)}" for provider, row in others.items()]
        job.packed(f"{name} {problem}:", [f0_text, *texts])
        return
    job.line(f"{name} {problem}: {f0_text}")
    for provider, row in others.items():
        job.line(f"  {provider:<17} {long_text(row)}")
    if name == FIRST:
        breakdown(job, rows, workers)


def load(
    job: Job, problem: Problem, names: list[str], workers: dict[str, Worker], device: Device
) -> dict[str, Record]:
    """Results of the providers' first calls; one provider at a time, since tiles are tuned then."""
    rows: dict[str, Record] = {}
    for provider in names:
        row = rows[provider] = {"times": 1, "note": NOTES.get(provider, "")}
        if not workers[provider].is_alive():
            workers[provider] = Worker(Bench, device, provider)
        part = problem
        if provider not in (CUBLAS, *OWN) and is_large(problem):
            row["times"] = EIGHTH
            part = replace(problem, bank_rows=problem.bank_rows // EIGHTH)
        unfit = providers.find(provider).unfit(problem) if provider in PEERS else None
        try:
            if unfit is not None:
                raise Failed(unfit)
            patience = PEERS_PATIENCE if provider in NOTES else PATIENCE
            row |= workers[provider].ask("load", part, seconds=min(patience, job.left))
        except Failed as failure:
            row["failed"] = str(failure)
    return rows


def report_failures(job: Job, name: str, rows: dict[str, Record]) -> None:
    """A failure of our backends is wrong; a peer's is only a row."""
    for provider in OWN:
        if "failed" in rows.get(provider, {}):
            job.wrong(f"{provider} {name}: {rows[provider]['failed']}")


def check_losses(job: Job, name: str, rows: dict[str, Record]) -> None:
    alike = {n: r for n, r in rows.items() if n not in RIVALS and r["times"] == 1}
    losses = {n: r["loss"] for n, r in alike.items() if "loss" in r}
    for provider, loss in losses.items():
        if not abs(loss / statistics.median_low(losses.values()) - 1) < DIFFERS:
            job.wrong(f"{provider} {name}: a loss of {loss:.5g} among {losses}")


def is_large(problem: Problem) -> bool:
    """Whether eager's logits and their gradient exceed the memory that other processes leave."""
    return problem.batch * problem.bank_rows > 1 << 30


def take_turn(worker: Worker, mode: str, row: Record) -> None:
    """Add times to a row, and their median; fewer calls if a step is slow."""
    if "failed" in row:
        return
    calls = CALLS if row.get("first_step_s", 0) < 1 or row.get("step_ms", 1e9) < 300 else 1
    try:
        found = worker.ask("time", mode, calls, seconds=TURN)
    except Failed as failure:
        row["failed"] = f"{mode}: {failure}"
        return
    times = row.setdefault(f"{mode}_times", [])
    times += [row["times"] * x for x in found]
    row[f"{mode}_ms"] = statistics.median(times)


def derive(row: Record, problem: Problem, f0: float | None) -> None:
    """Add multiples of F0, and rates of the operations that the loss needs."""
    for mode, flops in ((FORWARD, problem.forward_flops()), (STEP, problem.step_flops())):
        if f"{mode}_ms" in row:
            row[f"{mode}_tflops"] = flops / row[f"{mode}_ms"] / 1e9
            row[f"{mode}_f0"] = row[f"{mode}_ms"] / f0 if f0 else math.nan


def long_text(row: Record) -> str:
    if "failed" in row:
        return str(row["failed"])[:90]
    texts = []
    for mode in (FORWARD, STEP):
        ms, f0, rate = (row[f"{mode}_{unit}"] for unit in ("ms", "f0", "tflops"))
        texts.append(f"{mode} {ms:.4g} ms {f0:.2f} F0 {rate:.0f} TF/s")
    if "peak_mib" in row:
        texts.append(f"{row['peak_mib']:,.0f} MiB")
    if row["times"] > 1:
        texts.append(f"(1/{row['times']} of K, x {row['times']})")
    return "; ".join([*texts, row["note"]]).removesuffix("; ")


def short_text(row: Record) -> str:
    if "failed" in row:
        return str(row["failed"])[:40]
    return f"{row['forward_f0']:.2f} / {row['step_f0']:.2f} F0"


def breakdown(job: Job, rows: dict[str, Record], workers: dict[str, Worker]) -> None:
    """Add lines with the kernels of a large step and their times."""
    for provider in OWN:
        if "failed" in rows.get(provider, {"failed": "it is not here"}):
            continue
        try:
            table = workers[provider].ask("kernels", seconds=TURN)[:10]
        except Failed as failure:
            job.wrong(f"{provider}, profiled: {failure}")
            continue
        job.put(**{f"kernels of {provider}": table})
        cells = [f"{short(name)} {count}x {ms:.2f}" for name, count, ms in table]
        if cells:
            job.line(pack(f"  {provider}, ms:", cells)[0])


def short(kernel: str) -> str:
    """A kernel's name without return type, namespaces, arguments and template parameters."""
    name = kernel.removeprefix("void ").partition("(")[0].partition("<")[0]
    return name.rpartition("::")[2].removesuffix("_kernel")


def measure_small(
    job: Job, problem: Problem, names: list[str], workers: dict[str, Worker], device: Device
) -> None:
    rows, calls = load(job, problem, names, workers, device), 3 if job.rehearse else 100
    check_losses(job, "small", rows)
    report_failures(job, "small", rows)
    for provider, row in rows.items():
        if provider == CUBLAS or "failed" in row:
            continue
        # The graph last: a failed capture may make the worker's CUDA context unusable.
        for call, arguments in (("called", (calls,)), ("kernels", ()), ("graph", (50,))):
            try:
                row[call] = workers[provider].ask(call, *arguments, seconds=TURN)
            except Failed as failure:
                row[f"no {call}"] = str(failure)
                if call == "graph":
                    workers[provider].kill()
                if provider in OWN:
                    job.wrong(f"{provider} small, {call}: {failure}")
                if not workers[provider].is_alive():
                    break
    if {*OWN} & {*names}:
        job.line(f"small {problem}: a step in a graph, as called, Python's part")
    for provider, row in rows.items():
        job.row(case="small", provider=provider, **row)
        if provider != CUBLAS:
            job.line(f"  {provider:<17} {small_text(row)}")


def small_text(row: Record) -> str:
    if "failed" in row:
        return str(row["failed"])[:90]
    graph = f"{row['graph']:.0f} us" if "graph" in row else f"(no graph: {row['no graph'][:40]})"
    texts = [graph]
    if "called" in row:
        texts += [f"{row['called'][name]:.0f} us" for name in ("eager_us", "host_us")]
    launches = sum(count for _, count, _ in row.get("kernels", []))
    return f"{', '.join(texts)}; {launches} launches; first step {row['first_step_s']:.1f} s"
