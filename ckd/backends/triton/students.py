"""The first kernels of a backward, which run over the students."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ckd._triton.contrastive_ce_backward import STUDENTS_MULTIPLE, student_factors_kernel
from ckd._triton.rows import student_gradient_kernel
from ckd._triton.tiles import power_of_two
from ckd.backends.interface import Needs, Saved, Targets
from ckd.backends.triton.call import Call, stride

# The most programs of student_gradient_kernel. Each writes partial sums, and every program of
# student_factors_kernel reads them all, BLOCK_PARTS at a time.
STUDENT_PROGRAMS = 1024
BLOCK_PARTS = 256


class RowGradients(NamedTuple):
    """The gradients that reach each student's outputs."""

    g: Tensor | None  # [B] d loss / d nll, after division by `kept`; None: zeros
    h: Tensor | None  # [B] d loss / d lse; None: zeros
    kept: Tensor | None  # [] the number of students in a mean loss; None: 1

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
    """The outputs of student_gradient_kernel; those not requested are uninitialised."""

    d_student: Tensor
    along: Tensor  # [programs] partial sums of d_logit_scale
    largest: Tensor  # [programs] upper bounds on |G|, the gradient with respect to the logits


def student_gradient(
    call: Call,
    rows: RowGradients,
    residual: Tensor,
    attention: Tensor,
    needs: Needs,
    targets: Targets | None = None,
    p_other: Tensor | None = None,
) -> StudentGradient:
    """The gradients of student and scale, from slope = g residual + h attention. g counts as 0 for
    a student without a valid target; targets None: all are valid. `largest` needs p_other."""
    has_slope = needs.student or needs.logit_scale
    block_rows = 8
    programs = min(-(-call.batch // block_rows), STUDENT_PROGRAMS)
    d_student = call.empty(0)
    if needs.student:
        d_student = call.empty(call.batch, call.student_dim, dtype=call.student.dtype)
    along, largest = call.empty(programs), call.empty(programs)
    target, shift, smoothing, ignore_index = None, None, 0.0, 0
    if targets is not None:
        target, shift = targets.target, targets.shift
        smoothing, ignore_index = targets.label_smoothing, targets.ignore_index
    student_gradient_kernel[(programs,)](
        call.student, call.scale, target, *rows, residual, attention, p_other, shift,
        d_student, along, largest,
        call.batch, call.student_dim, call.student.stride(0), *rows.strides,
        ignore_index, call.bank_rows, None if shift is None else shift.shape[1], smoothing,
        HAS_TARGET=target is not None, **rows.flags, HAS_SLOPE=has_slope,
        HAS_STUDENT=needs.student, HAS_BOUND=p_other is not None, SHIFTED=shift is not None,
        BLOCK_ROWS=block_rows, BLOCK_WIDTH=min(256, power_of_two(call.student_dim)),
    )  # fmt: skip
    return StudentGradient(d_student, along, largest)


class Students(NamedTuple):
    """The factors of each student in the bank's gradient, [padded] each; student_factors_kernel
    defines them. They are multiplied by the sign of g + h where that is said."""

    u: Tensor  # [padded, width] unit rows, times the sign
    column: Tensor  # int32, the target's row of the bank; -1: none
    rate: Tensor  # logit_scale log2(e), times the sign
    cosine: Tensor  # reference that is subtracted from the bank's cosines, times the sign
    above: Tensor  # subtracted from the exponent (to base 2): lse minus reference, log |g + h|
    at_target: Tensor  # G / size at the target, times the sign
    by_all: Tensor  # label smoothing's share of every G / size, times the sign
    by_shift: Tensor | None  # -g times the sign; None without a shift
    size: Tensor  # [1] upper bound on |G|

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
        """Compute the factors, and write d_logit_scale to d_scale unless that is None."""
        multiple = STUDENTS_MULTIPLE.value
        count = -(-call.batch // multiple) * multiple
        size = call.empty(1)
        column = call.empty(count, dtype=torch.int32)
        rate, cosine, above, at_target, by_all = (call.empty(count) for _ in range(5))
        by_shift = None if targets.shift is None else call.empty(count)
        u = call.empty(count, call.width, dtype=call.operand)
        parts = len(by_student.largest)
        reference = call.reference(saved.cache)
        block_rows = 8
        student_factors_kernel[(count // block_rows,)](
            call.student, call.scale, targets.target, *rows, saved.lse, reference, saved.p_other,
            by_student.largest, by_student.along,
            u, column, rate, cosine, above, at_target, by_all, by_shift, size, d_scale,
            call.batch, parts, call.student_dim, call.student.stride(0), call.width,
            *rows.strides, targets.ignore_index, call.bank_rows, targets.label_smoothing,
            **rows.flags, HAS_SCALE=d_scale is not None, HAS_REFERENCE=reference is not None,
            SHIFTED=by_shift is not None, HALF=call.half, PRECISION=call.precision,
            BLOCK_ROWS=block_rows, BLOCK_WIDTH=min(256, power_of_two(call.width)),
            BLOCK_PARTS=BLOCK_PARTS,
        )  # fmt: skip
        return cls(u, column, rate, cosine, above, at_target, by_all, by_shift, size)
