"""Rung `right` in a worker: checks an op on a shape against float64 and eager torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ckd
from common.workers import reason_of
from gpu.cases import (
    EXACT,
    HALF,
    SHAPES,
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
from gpu.device import Device
from gpu.modes import check_mode

CONTRASTIVE, SIMILAR, MODE = "contrastive", "similarity", "mode"
KEPT = 128 << 20  # bytes: the cache limit of a shape that keeps its projected bank
ORDERS = 3  # permutations of the rows for which eager's error is measured
# arithmetic -> (constant, slope, most), relative to truth()'s sizes. The limit of an error is
# constant + slope * tau, or twice eager's error up to `most` times that: where the softmax is
# peaked, eager's error is too large to be a limit.
ALLOWED = {EXACT: (0.0, 3e-6, 4), TF32: (1e-3, 1e-4, 2), HALF: (1e-3, 2e-4, 4)}


@dataclass(frozen=True)
class Task:
    """Shapes or modes for a worker to check, of one op, backend and arithmetic."""

    device: Device
    op: str
    backend: str
    arithmetic: str
    names: tuple[str, ...]


def check(task: Task) -> Iterator[dict[str, Any]]:
    """Yield a result for each shape: its errors, and the failed checks in words."""
    op, device = task.op, task.device
    device.set_up()
    # Fills new memory with NaN, and takes the first tiles instead of tuning.
    torch.use_deterministic_algorithms(op != MODE, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    for name in task.names:
        try:
            yield {"shape": name, **examine(op, name, task.backend, task.arithmetic, device)}
        except Exception as error:
            if "CUDA" in str(error) or isinstance(error, torch.OutOfMemoryError):
                raise  # the CUDA context may be unusable
            yield {"shape": name, "errors": {}, "wrong": [reason_of(error)]}


def examine(op: str, name: str, backend: str, kind: str, device: Device) -> dict[str, Any]:
    """The errors of a shape (a mode has none), and the failed checks in words."""
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
    call: Any = ckd.contrastive_cross_entropy  # Any: the overloads want a literal return_lse
    with arithmetic(kind, case.bank.device.type):
        output = call(
            *case.arguments,
            target_weight=case.target_weight,
            label_smoothing=shape.smoothing,
            reduction=shape.reduction,
            return_lse=shape.lse,
            backend=backend,
        )
    loss, lse = output if shape.lse else (output, None)
    leaves = case.leaves()
    # Without autocast: the backward has to use the forward's arithmetic.
    with arithmetic(kind if kind == TF32 else EXACT, case.bank.device.type):
        grads = torch.autograd.grad(total(case, loss, lse), list(leaves.values()))
    results = {"loss": loss.detach(), **dict(zip(leaves, grads))}
    return results if lse is None else {**results, "lse": lse.detach()}


def eager_errors(
    case: Case, kind: str, exact: Results, sizes: dict[str, float]
) -> dict[str, float]:
    """Eager's largest error of each result over some permutations of the rows."""
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
    """The error relative to `size`; infinite if NaN entries differ."""
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
    """(error, eager's error) of each result, and a message for each error above its limit."""
    errors, wrong = {}, []
    constant, slope, most = ALLOWED[kind]
    floor = constant + slope * max(tau, 1.0)
    for name, x in found.items():
        if sizes[name] < 1e-30:  # no relative error exists
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
        return ckd.normalized_similarity(*inputs, backend=backend)  # type: ignore[arg-type]

    def results(case: Case, how: Callable[[Case], Tensor], kind: str) -> Results:
        with arithmetic(kind, device.name):
            logits = how(case)
        leaves = case.leaves()
        grads = torch.autograd.grad(logits, list(leaves.values()), upstream.to(logits.dtype))
        return {"logits": logits.detach(), **dict(zip(leaves, grads))}

    exact = results(case.with_leaves(torch.float64), eager_logits, EXACT)
    sizes = {name: norm(x) for name, x in exact.items()}
    # A sum over all pairs with random signs, whose terms cancel.
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
    """Whether all entries are equal or both NaN."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())
