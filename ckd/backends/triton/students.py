"""Launches of the kernels over students with which a backward begins."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ckd._triton.contrastive_ce_backward import STUDENTS_MULTIPLE, student_factors_kernel
from ckd._triton.rows import student_gradient_kernel
from ckd._triton.tiles import power_of_two
from ckd.backends.interface import Needs, Saved, Targets
from ckd.backends.triton.call import Call, stride

# Programs of student_gradient_kernel at most: every program of student_factors_kernel reads the
# parts of sums that they leave, BLOCK_PARTS at once.
STUDENT_PROGRAMS = 1024
BLOCK_PARTS = 256


class RowGradients(NamedTuple):
    """The gradients of the students' losses that a backward begins with."""

    g: Tensor | None  # d loss / d nll [B], or with `kept` that of the mean; None: zeros
    h: Tensor | None  # d loss / d lse [B]; None: zeros
    kept: Tensor | None  # [] how many students the mean is over

    @property
    def strides(self) -> tuple[int, int]:
        return stride(self.g), stride(self.h)

    @property
    def flags(self) -> dict[str, bool]:
        return {
            "HAS_G": self.g is not None,
            "HAS_H": self.h is not None,
            "HAS_KEPT": self.kept is not None,
        }


class StudentGradient(NamedTuple):
    """The outputs of student_gradient_kernel; one that is not asked for holds no values."""

    d_student: Tensor
    along: Tensor  # parts of d_logit_scale
    largest: Tensor  # upper bounds on |G|, the gradient with respect to the logits


def student_gradient(
    call: Call,
    rows: RowGradients,
    residual: Tensor,
    attention: Tensor,
    needs: Needs,
    targets: Targets | None = None,
    p_other: Tensor | None = None,
) -> StudentGradient:
    """The gradients of student and scale, from slope = g residual + h attention. A student
    without a target (None: every one has) takes no part of g. With p_other also `largest`."""
    has_slope = needs.student or needs.logit_scale
    block_rows = 8
    programs = min(-(-call.batch // block_rows), STUDENT_PROGRAMS)
    d_student = call.empty(0)
    if needs.student:
        d_student = call.empty(call.batch, call.student_dim, dtype=call.student.dtype)
    along, largest = call.empty(programs), call.empty(programs)
    target, smoothing, ignore_index = (None, 0.0, 0) if targets is None else targets[:3]
    student_gradient_kernel[(programs,)](
        call.student, call.scale, target, *rows, residual, attention, p_other,
        d_student, along, largest,
        call.batch, call.student_dim, call.student.stride(0), *rows.strides,
        ignore_index, call.bank_rows, smoothing,
        HAS_TARGET=target is not None, **rows.flags, HAS_SLOPE=has_slope,
        HAS_STUDENT=needs.student, HAS_BOUND=p_other is not None,
        BLOCK_ROWS=block_rows, BLOCK_WIDTH=min(256, power_of_two(call.student_dim)),
    )  # fmt: skip
    return StudentGradient(d_student, along, largest)


class Students(NamedTuple):
    """What the bank's gradient needs of each student (student_factors_kernel)."""

    u: Tensor  # [padded, width]
    column: Tensor
    rate: Tensor
    cosine: Tensor
    above: Tensor
    at_target: Tensor
    by_all: Tensor
    size: Tensor

    @classmethod
    def of(
        cls,
        call: Call,
        targets: Targets,
        rows: RowGradients,
        saved: Saved,
        by_student: StudentGradient,
        d_scale: Tensor | None,
    ) -> Students:
        """d_logit_scale is written to d_scale, unless that is None."""
        multiple = STUDENTS_MULTIPLE.value
        count = -(-call.batch // multiple) * multiple
        size = call.empty(1)
        column = call.empty(count, dtype=torch.int32)
        rate, cosine, above, at_target, by_all = (call.empty(count) for _ in range(5))
        u = call.empty(count, call.width, dtype=call.operand)
        parts = len(by_student.largest)
        reference = call.reference(saved.cache)  # None where the op is called without a cache
        block_rows = 8
        student_factors_kernel[(count // block_rows,)](
            call.student, call.scale, targets.target, *rows, saved.lse, reference, saved.p_other,
            by_student.largest, by_student.along,
            u, column, rate, cosine, above, at_target, by_all, size, d_scale,
            call.batch, parts, call.student_dim, call.student.stride(0), call.width,
            *rows.strides, targets.ignore_index, call.bank_rows, targets.label_smoothing,
            **rows.flags, HAS_SCALE=d_scale is not None, HAS_REFERENCE=reference is not None,
            HALF=call.half, PRECISION=call.precision, BLOCK_ROWS=block_rows,
            BLOCK_WIDTH=min(256, power_of_two(call.width)), BLOCK_PARTS=BLOCK_PARTS,
        )  # fmt: skip
        return cls(u, column, rate, cosine, above, at_target, by_all, size)
