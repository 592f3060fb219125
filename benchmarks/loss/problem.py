"""The problems that bench_loss.py times: sizes, inputs, and their least operations and bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LOGIT_SCALE = 14.0
LEARNED = 0.25  # weight of the target's row in a student: keeps the loss well above 0
TRUTH_LOGITS = 1 << 27  # most logits of the float64 truth


@dataclass(frozen=True)
class Problem:
    """Sizes as in the op's docstring; `learned`: with a projection, and gradients for it."""

    batch: int
    bank_rows: int
    teacher_dim: int
    student_dim: int
    learned: bool = True
    targets: int = 1  # weighted targets of a student

    def __str__(self) -> str:
        sizes = f"{self.batch},{self.bank_rows},{self.teacher_dim},{self.student_dim}"
        sizes += f" with {self.targets} targets" if self.targets > 1 else ""
        return sizes if self.learned else sizes + ",frozen"

    @classmethod
    def parse(cls, text: str) -> Problem:
        """From B,K,D,W or B,K,D,W,frozen (no projection: D must equal W). Raises ValueError."""
        parts = text.split(",")
        learned = parts[-1] != "frozen"
        try:
            sizes = [int(part) for part in (parts if learned else parts[:-1])]
        except ValueError:
            sizes = []
        if len(sizes) != 4 or min(sizes) < 1:
            raise ValueError(
                f"a case is one of {', '.join(CASES | GPU_CASES)}, or B,K,D,W or B,K,D,W,frozen "
                f"with positive sizes, such as 256,1000,1024,256; got {text!r}"
            )
        if not learned and sizes[2] != sizes[3]:
            raise ValueError(f"a frozen case has no projection, so D must equal W; got {text!r}")
        batch, bank_rows, teacher_dim, student_dim = sizes
        return cls(batch, bank_rows, teacher_dim, student_dim, learned)

    @property
    def is_in_batch(self) -> bool:
        """The bank holds the teacher's embeddings of the batch: row i belongs to student i."""
        return not self.learned and self.batch == self.bank_rows

    # Lower bounds for loss and gradients. A multiply-add is two operations; a provider's
    # recomputation, copies and conversions do not count.

    def forward_flops(self) -> int:
        b, k, d, w = self.batch, self.bank_rows, self.teacher_dim, self.student_dim
        return 2 * b * k * w + (2 * k * d * w if self.learned else 0)

    def step_flops(self) -> int:
        """Forward and backward, without storing the logits.

        The student's gradient takes sums over the bank (2 B K W); the projection's takes the
        logits again and dZ (2 B K W each) and d_weight (2 K D W).
        """
        b, k, d, w = self.batch, self.bank_rows, self.teacher_dim, self.student_dim
        learned = 4 * b * k * w + 2 * k * d * w if self.learned else 0
        return self.forward_flops() + 2 * b * k * w + learned

    def forward_bytes(self) -> int:
        """Reads the float16 bank, students and projection once."""
        weight = 4 * self.student_dim * (self.teacher_dim + 1) if self.learned else 0
        return 2 * self.bank_rows * self.teacher_dim + 4 * self.batch * self.student_dim + weight

    def step_bytes(self) -> int:
        """As forward_bytes, plus the gradients once and, for d_weight, the bank a second time."""
        gradients = self.forward_bytes() - 2 * self.bank_rows * self.teacher_dim
        return self.forward_bytes() + (self.forward_bytes() if self.learned else gradients)


CASES = {
    "call": Problem(1, 10, 64, 64),
    "centroids-100": Problem(64, 100, 1024, 256),
    "centroids-1k": Problem(256, 1000, 1024, 256),
    "bank-20k": Problem(1024, 20000, 768, 256),
    "ragged-20k": Problem(1000, 19997, 771, 250),
    "bank-100k": Problem(512, 100000, 768, 256),
    "imagenet-21k": Problem(1024, 21841, 1024, 256),
    "frozen-50k": Problem(1024, 50000, 512, 512, learned=False),
    "in-batch-4k": Problem(4096, 4096, 512, 512, learned=False),
}
# For a GPU's memory: a bank row for each image of ImageNet-1k, and the batch as its own bank.
GPU_CASES = {
    "bank-1.3m": Problem(4096, 1_280_000, 1024, 256),
    "frozen-1.3m": Problem(4096, 1_280_000, 256, 256, learned=False),
    "wide-100k": Problem(4096, 100_000, 768, 768),
    "in-batch-32k": Problem(32768, 32768, 768, 768, learned=False),
    "in-batch-64k": Problem(65536, 65536, 512, 512, learned=False),
}
# One batch against banks of growing length.
SWEEP = tuple(f"256,{10**n},1024,256" for n in range(1, 6))
QUICK = ("call", "centroids-100")


@dataclass(frozen=True)
class Inputs:
    """Leaves that require gradients, and the bank in float16."""

    student: Tensor
    bank: Tensor
    target: Tensor  # [B], or [B, M] with weighted targets
    weight: Tensor | None
    bias: Tensor | None
    logit_scale: Tensor
    target_weight: Tensor | None = None

    @property
    def leaves(self) -> list[Tensor]:
        every = (self.student, self.weight, self.bias, self.logit_scale)
        return [x for x in every if x is not None]

    def cast(self, dtype: torch.dtype, students: int | None = None) -> Inputs:
        """A copy in `dtype`, bank included, with the first `students` students."""

        def leaf(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.detach().to(dtype, copy=True).requires_grad_()

        student, scale = leaf(self.student[:students]), leaf(self.logit_scale)
        assert student is not None
        assert scale is not None
        return Inputs(
            student,
            self.bank.to(dtype),
            self.target[:students],
            leaf(self.weight),
            leaf(self.bias),
            scale,
            None if self.target_weight is None else self.target_weight[:students],
        )


def make_inputs(problem: Problem, device: str = "cpu", seed: int = 0) -> Inputs:
    """Inputs of a problem: equal in every process."""
    g = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=device)

    b, k, d, w = problem.batch, problem.bank_rows, problem.teacher_dim, problem.student_dim
    bank = torch.empty(k, d, dtype=torch.float16, device=device)
    for part in bank.split(4096):  # never the whole bank in float32
        part.copy_(randn(*part.shape))
    target = torch.randint(k, (b,), generator=g, device=device)
    if problem.is_in_batch:
        target = torch.arange(b, device=device)
    weight = bias = None
    own = bank[target].float()
    if problem.learned:
        weight = randn(w, d) / math.sqrt(d)
        bias = 0.1 * randn(w)
        own = F.linear(own, weight, bias)
        weight.requires_grad_()
        bias.requires_grad_()
    student = (LEARNED * own + randn(b, w)).detach().requires_grad_()
    scale = torch.tensor(LOGIT_SCALE, device=device).requires_grad_()
    target_weight = None
    if problem.targets > 1:
        others = torch.randint(k, (b, problem.targets - 1), generator=g, device=device)
        target = torch.cat([target[:, None], others], dim=1)
        target_weight = torch.rand(target.shape, generator=g, device=device)
        target_weight /= target_weight.sum(1, keepdim=True)
    return Inputs(student, bank, target, weight, bias, scale, target_weight)


def checked_students(problem: Problem) -> int:
    """The number of students in the float64 truth: all, if their logits fit."""
    return max(1, min(problem.batch, TRUTH_LOGITS // problem.bank_rows))


def unit_rows(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """u [B, W] and n [K, W] in plain torch, in the student's dtype."""
    bank = inputs.bank.to(inputs.student.dtype)
    z = bank if inputs.weight is None else F.linear(bank, inputs.weight, inputs.bias)
    return F.normalize(inputs.student, dim=1), F.normalize(z, dim=1)


def eager(inputs: Inputs) -> Tensor:
    """The loss as one writes it in plain torch."""
    u, n = unit_rows(inputs)
    return F.cross_entropy(inputs.logit_scale * (u @ n.T), inputs.target)
