"""Rung 3: every op, backend and arithmetic against float64, on shapes that cover every edge.

Beside the errors it checks that all memory is written (new memory is filled with NaN), that a
second run gives the same bits, and that calls work on streams, in threads, in CUDA graphs and under
torch.compile (gpu/modes.py). Errors are stated as multiples of eager torch's largest error, in the
same arithmetic, over some permutations of the rows. Processes share the work, since compilation
takes most of the time.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from common.workers import Failed, each
from gpu.cases import EXACT, HALF, IN_TF32, SHAPES, SIMILARITY, TF32
from gpu.checks import CONTRASTIVE, MODE, SIMILAR, Task, check
from gpu.device import BACKENDS, Device
from gpu.job import Job
from gpu.modes import MODES
from gpu.wrappers import check_wrappers

WORKERS = 12
PATIENCE = 75.0  # most seconds to a worker's next result
SHAPES_OF_TASK = 4
Item = dict[str, Any]  # a result of `check`
Table = dict[tuple[str, str, str], list[Item]]  # by backend, op and arithmetic


def run(job: Job) -> None:
    device = Device.of(job)
    for backend in BACKENDS:
        reason = device.missing(backend)
        if reason is not None:
            job.wrong(f"backend {backend} cannot run: {reason}")
    # One compile thread: a pool in each worker costs more than it gains.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    # In a thread beside the tasks, since nvcc is slow. A rehearsal has no chip to compare.
    vectors = None if job.rehearse else ThreadPoolExecutor(1).submit(check_wrappers, job.work)
    tasks = list(all_tasks(job, device))
    wanted, table = sum(len(task.names) for task in tasks), Table()
    while tasks:
        tasks = list(work(tasks, wanted, table, job))
    if vectors is not None:
        text, is_wrong = vectors.result()
        (job.wrong if is_wrong else job.line)(text)


def work(tasks: list[Task], wanted: int, table: Table, job: Job) -> Iterator[Task]:
    """Record the tasks' results; yield the remaining shapes of each task that failed at one."""
    workers = 2 if job.rehearse else min(WORKERS, os.cpu_count() or 1)
    ahead = {task: list(task.names) for task in tasks}
    for task, item in each(check, tasks, workers, PATIENCE):
        name = ahead[task].pop(0) if ahead[task] else "the end"
        what = f"{task.backend} {task.arithmetic} {task.op} '{name}'"
        if isinstance(item, Failed):
            job.wrong(f"{what}: {item}")
            if ahead[task]:
                yield replace(task, names=tuple(ahead[task]))
            continue
        job.row(op=task.op, backend=task.backend, arithmetic=task.arithmetic, **item)
        if item["wrong"]:
            more = f", and {len(item['wrong']) - 2} more" if len(item["wrong"]) > 2 else ""
            job.wrong(f"{what}: {', '.join(item['wrong'][:2])}{more}")
        table.setdefault((task.backend, task.op, task.arithmetic), []).append(item)
        done = sum(map(len, table.values()))
        head = f"{done} of {wanted} checks; largest error against float64 / multiple of eager's:"
        job.lines([head, *summary(table)])


def all_tasks(job: Job, device: Device) -> Iterator[Task]:
    """The most important tasks first; those that compile longest, early."""
    backends = [name for name in BACKENDS if device.missing(name) is None]
    for backend in backends:
        yield from tasks_of(CONTRASTIVE, backend, HALF, job, device)
        for mode in MODES:
            yield Task(device, MODE, backend, HALF, (mode,))
    for backend in reversed(backends):
        yield from tasks_of(CONTRASTIVE, backend, EXACT, job, device)
    if "triton" in backends:  # backend cuda computes float32 exactly, TF32 permitted or not
        yield from tasks_of(CONTRASTIVE, "triton", TF32, job, device)
    for backend, kind in itertools.product(backends, (HALF, EXACT, TF32)):
        if (backend, kind) != ("cuda", TF32):
            yield from tasks_of(SIMILAR, backend, kind, job, device)


def tasks_of(op: str, backend: str, kind: str, job: Job, device: Device) -> Iterator[Task]:
    """Tasks of neighbouring shapes, which share compiled kernels."""
    shapes = [s for s in SHAPES if kind == HALF or s.dtype == torch.float32]
    names = [s.name for s in shapes if kind != TF32 or s.name in IN_TF32]
    if op == SIMILAR:
        names = [name for name in names if name in SIMILARITY]
    if job.rehearse:
        names = names[:: 3 if backend == "cuda" else 7]
    size = SHAPES_OF_TASK if backend == "triton" else 3 * SHAPES_OF_TASK
    for first in range(0, len(names), size):
        yield Task(device, op, backend, kind, tuple(names[first : first + size]))


def summary(table: Table) -> list[str]:
    """Lines for each backend: the number of shapes that are right, and for each result the largest
    error and the largest multiple of eager's error in the same arithmetic."""
    lines = []
    for backend in BACKENDS:
        for kind in (HALF, EXACT, TF32):
            items = table.get((backend, CONTRASTIVE, kind), [])
            names = ("loss", "lse", "student", "weight", "bias", "logit_scale")
            cells = [f"{n.removeprefix('logit_')} {worst(items, n)}" for n in names]
            if items:
                lines.append(f"{backend} {kind} {right_of(items)}: {' '.join(cells)}")
        similar = {kind: table.get((backend, SIMILAR, kind), []) for kind in (HALF, EXACT, TF32)}
        texts = [f"{k} {right_of(items)}: {worst(items)}" for k, items in similar.items() if items]
        modes = table.get((backend, MODE, HALF), [])
        good = [item["shape"] for item in modes if not item["wrong"]]
        lines += [f"{backend} similarity {'; '.join(texts)}"] * bool(texts)
        lines += [f"{backend} {right_of(modes)}: {', '.join(good)}"] * bool(modes)
    return lines


def right_of(items: list[Item]) -> str:
    return f"{sum(not item['wrong'] for item in items)}/{len(items)}"


def worst(items: list[Item], name: str | None = None) -> str:
    """The largest error of one result, or of all, and the largest multiple of eager's."""
    pairs = [p for i in items for n, p in i["errors"].items() if name in (None, n)]
    if not pairs:
        return "-"
    return f"{max(pairs)[0]:.0e}/{max(mine / max(theirs, 1e-9) for mine, theirs in pairs):.1f}"
