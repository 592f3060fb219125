"""Rung 3: every op, backend and arithmetic against float64, on shapes that meet every edge.

Beside the errors: what kernels leave unwritten is NaN, a second run gives the same bits, and the
calls hold on streams, threads, in graphs and under torch.compile (gpu/modes.py). Errors are stated
relative to the largest that eager torch makes, in the same arithmetic, over some orders of rows.
Processes share the work, since compiling takes most of the time.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ckd
from gpu.cases import (
    EXACT,
    HALF,
    IN_TF32,
    SHAPES,
    SIMILARITY,
    TF32,
    Case,
    Results,
    Shape,
    arithmetic,
    eager,
    make_case,
    norm,
    total,
    truth,
    unit_rows,
)
from gpu.device import BACKENDS, Device
from gpu.job import Job, reason_of
from gpu.modes import MODES, check_mode
from gpu.workers import Failed, each
from gpu.wrappers import check_wrappers

WORKERS = 12
PATIENCE = 75.0  # seconds in which a worker has to come to its next result
KEPT = 128 << 20  # bytes of a projected bank
ORDERS = 3  # of rows, in which eager is asked
SHAPES_OF_TASK = 4
CONTRASTIVE, SIMILAR, MODE = "contrastive", "similarity", "mode"
# An error may be `constant + slope * tau`, or twice eager's up to `most` times that: eager has no
# digits left where the softmax is peaked. (constant, slope, most); relative to truth()'s sizes.
ALLOWED = {EXACT: (0.0, 3e-6, 4), TF32: (1e-3, 1e-4, 2), HALF: (1e-3, 2e-4, 4)}
Task = tuple[Device, str, str, str, tuple[str, ...]]  # op, backend, arithmetic, names of shapes


def run(job: Job) -> None:
    device = Device.of(job)
    for backend in BACKENDS:
        reason = device.missing(backend)
        if reason is not None:
            job.wrong(f"backend {backend} cannot run: {reason}")
    tasks = list(all_tasks(job, device))
    wanted = sum(len(names) for *_, names in tasks)
    table: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    workers = 2 if job.rehearse else min(WORKERS, os.cpu_count() or 1)
    done = 0
    # Beside the others, since nvcc takes its time; there is no chip to compare in a rehearsal.
    vectors = None if job.rehearse else ThreadPoolExecutor(1).submit(check_wrappers, job.work)
    for task, item in each(check, tasks, workers, PATIENCE):
        _, op, backend, kind, names = task
        if isinstance(item, Failed):
            job.wrong(f"{backend} {kind} {op}, one of {', '.join(names)}: {item}")
            continue
        done += 1
        job.row(op=op, backend=backend, arithmetic=kind, **item)
        if item["wrong"]:
            more = f", and {len(item['wrong']) - 2} more" if len(item["wrong"]) > 2 else ""
            text = ", ".join(item["wrong"][:2]) + more
            job.wrong(f"{backend} {kind} {op} '{item['shape']}': {text}")
        table.setdefault((backend, op, kind), []).append(item)
        head = f"{done} of {wanted} checks; largest error against float64 / multiple of eager's:"
        job.lines([head, *summary(table)])
    if vectors is not None:
        text, is_wrong = vectors.result()
        (job.wrong if is_wrong else job.line)(text)


def all_tasks(job: Job, device: Device) -> Iterator[Task]:
    """The worthiest first; what is compiled longest, early."""
    backends = [name for name in BACKENDS if device.missing(name) is None]
    for backend in backends:
        yield from tasks_of(CONTRASTIVE, backend, HALF, job, device)
        for mode in MODES:
            yield device, MODE, backend, HALF, (mode,)
    for backend in reversed(backends):
        yield from tasks_of(CONTRASTIVE, backend, EXACT, job, device)
    if "triton" in backends:  # float32 is exact with cuda, whatever is permitted
        yield from tasks_of(CONTRASTIVE, "triton", TF32, job, device)
    for backend, kind in itertools.product(backends, (HALF, EXACT, TF32)):
        if (backend, kind) != ("cuda", TF32):
            yield from tasks_of(SIMILAR, backend, kind, job, device)


def tasks_of(op: str, backend: str, kind: str, job: Job, device: Device) -> Iterator[Task]:
    """Shapes that are neighbours share kernels that are compiled once."""
    shapes = [s for s in SHAPES if kind == HALF or s.dtype == torch.float32]
    names = [s.name for s in shapes if kind != TF32 or s.name in IN_TF32]
    if op == SIMILAR:
        names = [name for name in names if name in SIMILARITY]
    if job.rehearse:
        names = names[:: 3 if backend == "cuda" else 5]
    size = SHAPES_OF_TASK if backend == "triton" else 3 * SHAPES_OF_TASK
    for first in range(0, len(names), size):
        yield device, op, backend, kind, tuple(names[first : first + size])


def check(task: Task) -> Iterator[dict[str, Any]]:
    """In a worker: an item for each shape, with its errors and what is wrong."""
    device, op, backend, kind, names = task
    device.set_up()
    # Memory that is handed out is filled with NaN, and tiles are not measured.
    torch.use_deterministic_algorithms(op != MODE, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    for name in names:
        try:
            yield {"shape": name, **examine(op, name, backend, kind, device)}
        except Exception as error:
            if "CUDA" in str(error) or isinstance(error, torch.OutOfMemoryError):
                raise  # the device may be lost to this process
            yield {"shape": name, "errors": {}, "wrong": [reason_of(error)]}


def examine(op: str, name: str, backend: str, kind: str, device: Device) -> dict[str, Any]:
    """The errors of a shape, or of a mode none; and what is wrong."""
    if op == MODE:
        return {"errors": {}, "wrong": check_mode(name, backend, device)}
    shape = next(shape for shape in SHAPES if shape.name == name)
    shape = shape.smaller() if device.rehearse else shape
    check = check_contrastive if op == CONTRASTIVE else check_similarity
    return check(shape, backend, kind, device)


def check_contrastive(shape: Shape, backend: str, kind: str, device: Device) -> dict[str, Any]:
    ckd.backends.set_cache_limit(KEPT if shape.keep else 0)
    case = make_case(shape, device.name)
    exact, sizes = truth(case)
    found = ours(case, backend, kind)
    again = ours(case, backend, kind)
    wrong = [f"{n} differs in a second run" for n, x in found.items() if not same(x, again[n])]
    theirs = eager_errors(case, kind, exact, sizes)
    errors, more = judge(found, exact, sizes, theirs, kind, shape.tau)
    return {"errors": errors, "wrong": wrong + more}


def ours(case: Case, backend: str, kind: str) -> Results:
    case, shape = case.with_leaves(), case.shape
    call: Any = ckd.contrastive_cross_entropy  # the inputs of every shape are of one type
    with arithmetic(kind, case.bank.device.type):
        output = call(
            *case.arguments,
            label_smoothing=shape.smoothing,
            reduction=shape.reduction,
            return_lse=shape.lse,
            backend=backend,
        )
    loss, lse = output if shape.lse else (output, None)
    leaves = case.leaves()
    # With the arithmetic's settings off: the backward has to remember them.
    with arithmetic(kind if kind == TF32 else EXACT, case.bank.device.type):
        grads = torch.autograd.grad(total(case, loss, lse), list(leaves.values()))
    results = {"loss": loss.detach(), **dict(zip(leaves, grads))}
    return results if lse is None else {**results, "lse": lse.detach()}


def eager_errors(
    case: Case, kind: str, exact: Results, sizes: dict[str, float]
) -> dict[str, float]:
    """The largest of some orders of the rows, for each result."""
    worst: dict[str, float] = {}
    for seed in range(ORDERS):
        moved, order = case.reordered(seed)
        back = order.argsort()
        for name, x in eager(moved, kind).items():
            of_rows = name in ("student", "lse") or (name == "loss" and x.dim() > 0)
            value = error(x[back] if of_rows else x, exact[name], sizes[name])
            worst[name] = max(worst.get(name, 0.0), value)
    return worst


def error(x: Tensor, exact: Tensor, size: float) -> float:
    """Relative to `size`; infinite where one is NaN and the other is not."""
    if not torch.equal(x.isnan(), exact.isnan()):
        return float("inf")
    difference = norm(x.double() - exact)
    return 0.0 if difference == 0 else difference / max(size, 1e-30)


def judge(
    found: Results,
    exact: Results,
    sizes: dict[str, float],
    theirs: dict[str, float],
    kind: str,
    tau: float,
) -> tuple[dict[str, tuple[float, float]], list[str]]:
    """(error, eager's) of each result, and in words what is beyond what is allowed."""
    errors, wrong = {}, []
    constant, slope, most = ALLOWED[kind]
    floor = constant + slope * max(tau, 1.0)
    for name, x in found.items():
        if sizes[name] < 1e-30:  # nothing to be relative to
            if norm(x) > 1e-6 or x.isnan().any():
                wrong.append(f"{name} is {norm(x):.1e}, not 0")
            continue
        mine = error(x, exact[name], sizes[name])
        errors[name] = (mine, theirs[name])
        narrow = 4e-3 if x.dtype in (torch.bfloat16, torch.float16) else 0.0
        limit = max(floor, min(2 * theirs[name], most * floor)) + narrow
        if not mine <= limit:
            wrong.append(f"{name} {mine:.1e}, eager {theirs[name]:.1e}, allowed {limit:.1e}")
    return errors, wrong


def check_similarity(shape: Shape, backend: str, kind: str, device: Device) -> dict[str, Any]:
    case = make_case(shape, device.name)
    g = torch.Generator(device.name).manual_seed(1)
    upstream = torch.randn(shape.batch, shape.rows, device=device.name, generator=g)

    def ours(case: Case) -> Tensor:
        inputs = (case.student, case.bank, case.weight, case.bias, case.logit_scale)
        return ckd.normalized_similarity(*inputs, backend=backend)

    def results(case: Case, how: Callable[[Case], Tensor], kind: str) -> Results:
        with arithmetic(kind, device.name):
            logits = how(case)
        leaves = case.leaves()
        grads = torch.autograd.grad(logits, list(leaves.values()), upstream.to(logits.dtype))
        return {"logits": logits.detach(), **dict(zip(leaves, grads))}

    exact = results(case.with_leaves(torch.float64), eager_logits, EXACT)
    sizes = {name: norm(x) for name, x in exact.items()}
    # Sums over all pairs of random signs, which cancel.
    sizes["logit_scale"] = max(sizes["logit_scale"], norm(upstream) / shape.width**0.5)
    found = results(case.with_leaves(), ours, kind)
    again = results(case.with_leaves(), ours, kind)
    wrong = [f"{n} differs in a second run" for n, x in found.items() if not same(x, again[n])]
    plain = results(case.with_leaves(), eager_logits, kind)
    theirs = {name: error(x, exact[name], sizes[name]) for name, x in plain.items()}
    errors, more = judge(found, exact, sizes, theirs, kind, shape.tau)
    return {"errors": errors, "wrong": wrong + more}


def eager_logits(case: Case) -> Tensor:
    half = torch.is_autocast_enabled(case.bank.device.type)
    z = case.bank.to(torch.bfloat16 if half else case.student.dtype)
    if case.weight is not None:
        z = F.linear(z, case.weight, case.bias)
    return case.logit_scale * (unit_rows(case.student) @ unit_rows(z).T)


def same(a: Tensor, b: Tensor) -> bool:
    """The same numbers, or NaN, everywhere."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def summary(table: dict[tuple[str, str, str], list[dict[str, Any]]]) -> list[str]:
    """Lines for each backend: how many shapes are right, and of each result the largest error, and
    the largest multiple of eager's in the same arithmetic."""
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


def right_of(items: list[dict[str, Any]]) -> str:
    return f"{sum(not item['wrong'] for item in items)}/{len(items)}"


def worst(items: list[dict[str, Any]], name: str | None = None) -> str:
    """The largest error of a result, or of all, and the largest multiple of eager's."""
    pairs = [p for i in items for n, p in i["errors"].items() if name in (None, n)]
    if not pairs:
        return "-"
    return f"{max(pairs)[0]:.0e}/{max(mine / max(theirs, 1e-9) for mine, theirs in pairs):.1f}"
