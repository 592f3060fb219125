"""The truth that the ops are tested against: eager float64 autograd, written from the formulae.

Shares no code with the package.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GRADIENTS = ("student", "weight", "bias", "logit_scale")


@dataclass
class Case:
    """Inputs of the op; weight and bias may be None."""

    student: Tensor
    bank: Tensor
    target: Tensor
    weight: Tensor | None
    bias: Tensor | None
    logit_scale: Tensor

    def cast(self, dtype: torch.dtype, bank_dtype: torch.dtype | None = None) -> Case:
        """A copy with its tensors rounded to another dtype."""
        changed = {
            f.name: getattr(self, f.name).detach().to(dtype)
            for f in fields(self)
            if f.name != "target" and getattr(self, f.name) is not None
        }
        changed["bank"] = self.bank.detach().to(bank_dtype or dtype)
        return replace(self, **changed)

    def requiring(self, *names: str) -> Case:
        """A copy whose named inputs are leaves that require a gradient."""
        return replace(
            self,
            **{n: getattr(self, n).detach().clone().requires_grad_() for n in names if self.has(n)},
        )

    def has(self, name: str) -> bool:
        return getattr(self, name) is not None

    @property
    def arguments(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, f.name) for f in fields(self))


def make_case(
    batch: int,
    bank_rows: int,
    teacher_dim: int,
    student_dim: int | None = None,
    *,
    bias: bool = True,
    tau: float = 14.2857,
    learned: float = 0.5,
    seed: int = 0,
) -> Case:
    """A float32 case over a float16-representable bank, the same on every default device.

    `learned` mixes the target's own projected row into the student: 0 gives a near-uniform
    softmax, 100 a peaked one. student_dim None: no projection.
    """
    g = torch.Generator("cpu").manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device="cpu").to(torch.get_default_device())

    bank = randn(bank_rows, teacher_dim).half().float()
    weight = b = None
    projected = bank
    if student_dim is not None:
        weight = randn(student_dim, teacher_dim) / math.sqrt(teacher_dim)
        b = 0.1 * randn(student_dim) if bias else None
        projected = F.linear(bank, weight, b)
    target = torch.randint(bank_rows, (batch,), generator=g, device="cpu").to(bank.device)
    student = learned * projected[target] + randn(batch, projected.shape[1])
    return Case(student, bank, target, weight, b, torch.tensor(float(tau)))


def logits(case: Case) -> Tensor:
    z = case.bank if case.weight is None else F.linear(case.bank, case.weight, case.bias)
    return case.logit_scale * (unit_rows(case.student) @ unit_rows(z).T)


def unit_rows(x: Tensor) -> Tensor:
    """Rows over their norms, those with norm below 1e-6 zero (with zero gradient)."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    small = norm < 1e-6
    return (x / norm.masked_fill(small, 1)).masked_fill(small, 0)


def loss_and_lse(
    case: Case,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    target_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """F.cross_entropy on materialised logits; a mean over no rows is 0."""
    table = logits(case)
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "ignore_index": ignore_index}
    valid = case.target != ignore_index
    if target_weight is None:
        nll = F.cross_entropy(table, case.target, reduction="none", **options)
    else:
        nll = weighted_rows(table, case.target, target_weight, **options)
        valid = valid.any(1)
    kept = valid.sum().clamp(min=1)
    loss = {"none": nll, "sum": nll.sum(), "mean": nll.sum() / kept}[reduction]
    return loss, table.logsumexp(1)


def weighted_rows(
    table: Tensor,
    target: Tensor,
    weight: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """[B] -sum_m w_m log p_m of materialised logits, for several targets [B, M]."""
    log_p = table.log_softmax(1)
    valid = target != ignore_index
    w = weight.to(log_p.dtype).masked_fill(~valid, 0)
    own = log_p.gather(1, target.masked_fill(~valid, 0))
    spread = w.sum(1) * log_p.mean(1)
    # Not 0 * log_p: an entry that is ignored or has no weight must not count.
    return -((1 - label_smoothing) * (w * own).sum(1) + label_smoothing * spread)


def gradients(case: Case, loss: Tensor, *, retain_graph: bool = True) -> dict[str, Tensor]:
    """d loss / d input for every input of `case` that requires a gradient."""
    wanted = [n for n in GRADIENTS if case.has(n) and getattr(case, n).requires_grad]
    values = torch.autograd.grad(
        loss, [getattr(case, n) for n in wanted], retain_graph=retain_graph
    )
    return dict(zip(wanted, values))


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth| in the 2-norm; 0 if both are 0, inf if value is not finite."""
    difference = torch.linalg.vector_norm(value.double() - truth.double()).item()
    if math.isnan(difference):
        return math.inf
    size = torch.linalg.vector_norm(truth.double()).item()
    return 0.0 if difference == 0 else difference / max(size, 1e-300)
