"""The problems of rung `right`, their results in float64, and those of eager torch.

The float64 results share no code with the package: they follow the formulae of docs/design.md.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LEAVES = ("student", "weight", "bias", "logit_scale")
EXACT, TF32, HALF = "exact", "tf32", "half"
IGNORED = -100
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes, kinds of inputs, and options. `students`: their similarity to their target's row:
    "far" (a flat softmax), "half", "peaked", or "rivals" (another row is about as near)."""

    name: str
    batch: int
    rows: int
    dim: int
    width: int
    tau: float = 14.3
    projection: bool = True
    bias: bool = True
    students: str = "half"
    bank: torch.dtype = torch.float16
    dtype: torch.dtype = torch.float32  # of students and projection
    smoothing: float = 0.0
    reduction: str = "mean"
    lse: bool = False
    ignored: bool = False
    outside: bool = False  # some targets lie outside the bank
    each: int = 1  # weighted targets of a student
    keep: bool = True  # the forward keeps the projected bank for the backward

    def smaller(self) -> Shape:
        """A smaller shape, for a rehearsal."""
        batch, rows = min(self.batch, 9), min(self.rows, 37)
        sizes = {"batch": batch, "rows": rows, "dim": min(self.dim, 24) | 1 & self.dim}
        width = self.width if self.width in (16, 300) else min(self.width, 40)
        sizes |= {"width": width}
        if not self.projection:
            sizes["dim"] = sizes["width"]
        sizes["each"] = min(self.each, 5)
        # On the CPU a target outside the bank raises.
        return replace(self, **sizes, outside=False)  # type: ignore[arg-type]


# Widths for every layout of both backends' kernels, whole and ragged; one row, one bank row, and
# sizes on either side of tiles of 32 to 128; several chunks; every option, alone and with others.
# Ordered by width: a task takes neighbours, which share compiled kernels.
SHAPES = (
    Shape("one row", 1, 10, 8, 16),
    Shape("tau 1, W 16", 33, 500, 64, 16, tau=1.0),
    Shape("no projection, W 64", 256, 5000, 64, 64, projection=False),
    Shape("W 64", 100, 3000, 512, 64, bias=False),
    Shape("73,600 targets", 2300, 4000, 64, 64, each=32),
    Shape("all ignored", 8, 100, 64, 64, ignored=True),
    Shape("70,000 students", 70_000, 64, 32, 64),
    Shape("one bank row", 7, 1, 96, 128),
    Shape("W 128, smoothing", 128, 2000, 768, 128, smoothing=0.1),
    Shape("float32 bank", 100, 700, 200, 128, bank=torch.float32),
    Shape("bfloat16 bank", 100, 700, 200, 128, bank=torch.bfloat16, smoothing=0.1),
    Shape("bfloat16 students", 64, 1000, 256, 128, dtype=torch.bfloat16),
    Shape("ragged, W 130", 65, 997, 771, 130, keep=False),
    Shape("rows of their own", 70, 900, 256, 130, reduction="none", ignored=True, outside=True),
    Shape("lse, W 200", 64, 1500, 384, 200, lse=True),
    Shape("ragged, sum", 65, 997, 771, 250, reduction="sum", lse=True, smoothing=0.1, ignored=True),
    Shape("1,000 classes", 256, 1000, 1024, 256),
    Shape("tau 100", 130, 1000, 1024, 256, tau=100.0),
    Shape("flat, tau 1", 128, 1000, 96, 256, tau=1.0, students="far"),
    Shape("peaked", 64, 500, 256, 256, students="peaked"),
    Shape("rivals", 256, 4000, 256, 256, students="rivals", bias=False),
    Shape("rivals, tau 100", 256, 4000, 256, 256, tau=100.0, students="rivals", bias=False),
    Shape("8,192 targets", 256, 20_000, 256, 256, each=32, lse=True),
    Shape("weighted targets", 128, 1000, 256, 256, each=8, smoothing=0.1),
    Shape("several chunks, weighted", 512, 60_000, 256, 256, each=33, keep=False),
    Shape("several chunks", 512, 60_000, 256, 256, keep=False),
    Shape("long sums, tau 1", 64, 60_000, 64, 256, tau=1.0),
    Shape("W 300", 33, 500, 96, 300),
    Shape("no projection, W 512", 64, 3000, 512, 512, projection=False),
    Shape("W 512, lse", 96, 2000, 512, 512, lse=True, smoothing=0.1),
    Shape("W 768", 70, 3000, 768, 768, smoothing=0.1),
)
SIMILARITY = ("one row", "W 64", "float32 bank", "ragged, W 130", "1,000 classes", "W 300", "W 768")
IN_TF32 = (
    *("one row", "W 64", "one bank row", "W 128, smoothing", "ragged, W 130", "lse, W 200"),
    *("1,000 classes", "tau 100", "rivals", "rivals, tau 100", "several chunks", "W 300"),
)


@dataclass
class Case:
    """Inputs, and the factors of the differentiated sum of loss and lse (see `total`)."""

    shape: Shape
    student: Tensor
    bank: Tensor
    target: Tensor  # [B], or [B, each] with target_weight
    target_weight: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    logit_scale: Tensor
    factor: Tensor  # of the loss, or of each row's
    lse_factor: Tensor

    @property
    def arguments(self) -> tuple[Tensor | None, ...]:
        return self.student, self.bank, self.target, self.weight, self.bias, self.logit_scale

    def leaves(self) -> dict[str, Tensor]:
        every = {name: getattr(self, name) for name in LEAVES}
        return {name: x for name, x in every.items() if x is not None}

    def with_leaves(self, dtype: torch.dtype | None = None) -> Case:
        """A copy whose leaves require gradients; in another dtype, if given."""
        copies = {n: x.detach().clone().to(dtype or x.dtype) for n, x in self.leaves().items()}
        bank = self.bank if dtype is None else self.bank.to(dtype)
        leaves: dict[str, Any] = {n: x.requires_grad_() for n, x in copies.items()}
        return replace(self, bank=bank, **leaves)

    def reordered(self, seed: int) -> tuple[Case, Tensor]:
        """A random permutation of students and bank rows, and the permutation of the students."""
        g = torch.Generator().manual_seed(seed)
        batch, rows = len(self.student), len(self.bank)
        order = torch.randperm(batch, generator=g).to(self.target.device)
        places = torch.randperm(rows, generator=g).to(self.target.device)
        inverse = places.argsort()
        valid = (self.target >= 0) & (self.target < rows)
        target = torch.where(valid, inverse[self.target.clamp(0, rows - 1)], self.target)
        factor = self.factor[order] if self.factor.dim() else self.factor
        moved = replace(self, student=self.student[order], bank=self.bank[places])
        moved = replace(moved, target=target[order], factor=factor)
        if self.target_weight is not None:
            moved = replace(moved, target_weight=self.target_weight[order])
        return replace(moved, lse_factor=self.lse_factor[order]), order


def make_case(shape: Shape, device: str, seed: int = 0) -> Case:
    g = torch.Generator(device).manual_seed(seed)

    def randn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=g, device=device)

    bank = randn(shape.rows, shape.dim).half().to(shape.bank)
    weight = bias = None
    z = bank.float()
    if shape.projection:
        weight = randn(shape.width, shape.dim) / math.sqrt(shape.dim)
        bias = 0.1 * randn(shape.width) if shape.bias else None
        z = F.linear(z, weight, bias)
    target = torch.randint(shape.rows, (shape.batch,), generator=g, device=device)
    noise = randn(shape.batch, shape.width)
    mixed = {"far": 0.0, "half": 0.5, "peaked": 100.0, "rivals": 0.0}[shape.students]
    student = mixed * z[target] + noise
    if shape.students == "rivals":
        n = F.normalize(z, dim=1)
        student = n[target] + 0.9 * n[(target + 1) % shape.rows]
    if shape.ignored:
        target[:: 1 if shape.name == "all ignored" else 3] = IGNORED
    if shape.outside:
        target[1::5] = shape.rows
        target[2::10] = -7
    target_weight = None
    if shape.each > 1:
        others = torch.randint(
            shape.rows, (shape.batch, shape.each - 1), generator=g, device=device
        )
        target = torch.cat([target[:, None], others], dim=1)
        target_weight = torch.rand(target.shape, generator=g, device=device) ** 3
        target_weight /= target_weight.sum(1, keepdim=True)
    rows = shape.reduction == "none"
    factor = torch.linspace(-1, 2, shape.batch) if rows else torch.tensor(1.0)
    heights = torch.linspace(-2, 1, shape.batch) / shape.batch
    dtype, scale = shape.dtype, torch.tensor(shape.tau)
    weight = None if weight is None else weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    more = (x.to(device) for x in (scale, factor, heights))
    return Case(shape, student.to(dtype), bank, target, target_weight, weight, bias, *more)


def total(case: Case, loss: Tensor, lse: Tensor | None) -> Tensor:
    """The scalar to differentiate. A target outside the bank makes it NaN, not its gradients."""
    return (loss * case.factor).sum() + (0 if lse is None else (lse * case.lse_factor).sum())


def _outside(case: Case) -> Tensor:
    beyond = (case.target < 0) | (case.target >= len(case.bank))
    return beyond & (case.target != IGNORED)


def truth(case: Case) -> tuple[Results, dict[str, float]]:
    """Loss, lse and gradients in float64, and for each the size to which its error is relative.

    The size is the result's norm; for a sum over rows at least the norm of its terms, since a sum
    whose terms cancel still carries their rounding.
    """
    case = case.with_leaves(torch.float64)
    scale = case.logit_scale.detach().expand(len(case.student)).clone().requires_grad_()
    z = case.bank
    if case.weight is not None:
        z = F.linear(z, case.weight, case.bias)
        z.retain_grad()
    logits = scale[:, None] * (unit_rows(case.student) @ unit_rows(z).T)
    loss, lse = loss_and_lse(case, logits)
    objective = total(case, loss, lse if case.shape.lse else None)
    objective.backward()
    assert scale.grad is not None
    results = {"loss": loss.detach(), "lse": lse.detach(), "logit_scale": scale.grad.sum()}
    leaves = case.leaves().items()
    results |= {n: x.grad for n, x in leaves if n != "logit_scale" and x.grad is not None}
    sizes = {name: norm(x) for name, x in results.items()}
    sizes["logit_scale"] = max(sizes["logit_scale"], norm(scale.grad))
    if "bias" in results and z.grad is not None:
        sizes["bias"] = max(sizes["bias"], norm(z.grad))
    return results, sizes


def loss_and_lse(case: Case, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and lse from all logits. Without smoothing the target is left out of the sum, so that a
    loss near zero has its full relative precision."""
    shape, rows = case.shape, logits.shape[1]
    if case.target_weight is not None:
        return weighted_loss(case, logits), logits.logsumexp(1)
    valid = (case.target >= 0) & (case.target < rows)
    column = case.target.clamp(0, rows - 1)[:, None]
    own, lse = logits.gather(1, column)[:, 0], logits.logsumexp(1)
    if shape.smoothing or rows == 1:
        nll = lse - (1 - shape.smoothing) * own - shape.smoothing * logits.mean(1)
    else:
        nll = F.softplus(logits.scatter(1, column, -math.inf).logsumexp(1) - own)
    nll = torch.where(valid, nll, 0.0)
    if shape.outside:
        nll = torch.where(_outside(case), torch.nan, nll)
    kept = (case.target != IGNORED).sum().clamp(min=1)
    return {"none": nll, "sum": nll.sum(), "mean": nll.sum() / kept}[shape.reduction], lse


def weighted_loss(case: Case, logits: Tensor) -> Tensor:
    """The mean loss of weighted targets, in plain torch."""
    assert case.target_weight is not None
    log_p, smoothing = logits.log_softmax(1), case.shape.smoothing
    own = (case.target_weight.to(log_p.dtype) * log_p.gather(1, case.target)).sum(1)
    return -((1 - smoothing) * own + smoothing * log_p.mean(1)).mean()


def unit_rows(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True)


def norm(x: Tensor) -> float:
    """The 2-norm without NaN entries, which some losses have by design."""
    return torch.linalg.vector_norm(x.double().nan_to_num(nan=0.0)).item()


@contextlib.contextmanager
def arithmetic(kind: str, device: str) -> Iterator[None]:
    """Set the precision of float32 products: exact, TF32, or bfloat16 by autocast."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if kind == TF32 else "highest")
    try:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=kind == HALF):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def eager(case: Case, kind: str) -> Results:
    """The results of plain torch, whose errors set the limits."""
    case = case.with_leaves()
    with arithmetic(kind, case.bank.device.type):
        dtype = torch.bfloat16 if kind == HALF else case.student.dtype
        z = case.bank.to(dtype)
        if case.weight is not None:
            z = F.linear(z, case.weight, case.bias)
        n, u = F.normalize(z, dim=1), F.normalize(case.student, dim=1)
        cosines = u @ n.T
    table = case.logit_scale.float() * cosines.float()
    if case.target_weight is not None:
        loss = weighted_loss(case, table)
    else:
        loss = F.cross_entropy(
            table,
            # F.cross_entropy asserts on the device for a target outside the bank.
            torch.where(_outside(case), IGNORED, case.target),
            label_smoothing=case.shape.smoothing,
            reduction=case.shape.reduction,
            ignore_index=IGNORED,
        )
    if case.shape.outside:
        loss = torch.where(_outside(case), torch.nan, loss)
    lse = table.logsumexp(1)
    leaves = case.leaves()
    grads = torch.autograd.grad(
        total(case, loss, lse if case.shape.lse else None), list(leaves.values())
    )
    return {"loss": loss.detach(), "lse": lse.detach(), **dict(zip(leaves, grads))}
