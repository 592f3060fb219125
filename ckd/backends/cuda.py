"""The ops in CUDA C++ (csrc/cuda), for NVIDIA GPUs from sm_80 on.

Operands of the matrix units are float16 where half precision is permitted (bfloat16 in the
projection of a bank that is not float16); else each float32 number is split into several 16-bit
pieces (csrc/cuda/tile.cuh). Sums are float32. No logits in memory, no host synchronisation. Results
are bitwise reproducible: atomics compute only maxima, which do not depend on the order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ckd.backends import native
from ckd.backends.device import Gpu, beyond_limits, elsewhere
from ckd.backends.interface import (
    Forward,
    Gradients,
    Inputs,
    Keep,
    Needs,
    Plan,
    Problem,
    Saved,
    Targets,
    Upstream,
    check_targets,
    zero_gradients,
)
from ckd.backends.targets import split_targets as split_targets

_C, _missing = native._C, native.missing
if _missing is None and not hasattr(_C, "cuda_contrastive_ce_forward"):
    _missing = "ckd._C was built without CUDA; python -m ckd.info says why"
gpu = Gpu()

ELEMENTS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # Element of arguments.h
WIDTH_MULTIPLE = 16  # rows of the projected bank are padded to a multiple of this
TILE = 64  # rows and columns of a kernel's tile
PIECE_SCALE = 64  # factor of the pieces of a float32 number
MAX_PARTS = 16  # of a split sum
LEAST_TERMS = 8 * TILE  # of a part of a split sum: with fewer, adding the parts costs too much
WIDEST = 1 << 20  # elements of a row: a launch has at most 65,535 tiles along it


def use(module: ModuleType, device: Gpu) -> None:
    """Take the kernels from another module and launch them on another device: for tests."""
    global _C, _missing, gpu
    _C, _missing, gpu = module, None, device


def missing() -> str | None:
    """Why the backend can serve no problem on the current GPU, or None."""
    return _missing_on(None)


def _missing_on(device_index: int | None) -> str | None:
    reason = _missing or gpu.missing()
    if reason is not None:
        return reason
    if gpu.type == "cuda" and torch.version.hip is not None:
        return "the GPU is AMD's"
    major, minor = gpu.capability(device_index)
    if major < 8:
        return f"the GPU is of compute capability {major}.{minor}; the kernels need 8.0"
    return None


def unsupported(problem: Problem) -> str | None:
    reason = (
        elsewhere(problem, gpu)  # first, since a query of the GPUs takes longer
        or _missing_on(problem.device_index)
        or beyond_limits(problem, spare_rows=2 * TILE)  # kernels also index the next tile's rows
    )
    if reason is None and max(problem.student_dim, problem.teacher_dim) > WIDEST:
        return f"the tensors have rows wider than {WIDEST:,}"
    if reason is None and problem.batch * problem.targets >= 2**31 - TILE:
        return "has 32-bit indices: fewer than 2^31 - 64 targets of all students together"
    return reason


def contrastive_ce_cache_bytes(problem: Problem) -> int:
    """Size of a cache for two numbers of each student, and for the whole projected bank with its
    inverse norms unless that is beyond the limit."""
    width = -(-problem.student_dim // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    pieces = 1 if problem.allow_half else 3
    needed = problem.bank_rows * (2 * pieces * width + 4)
    return _reference_bytes(problem.batch) + (needed if needed <= problem.cache_limit else 0)


def _reference_bytes(batch: int) -> int:
    """Padded to the alignment of the projected bank, which follows in the cache."""
    return -(-8 * batch // 256) * 256


def _cache_parts(cache: Tensor, batch: int) -> tuple[int, int]:
    """The addresses of both parts, 0 for a missing one."""
    bank = cache[_reference_bytes(batch) :]
    return cache.data_ptr(), bank.data_ptr() if len(bank) > 0 else 0


def contrastive_ce_forward(inputs: Inputs, targets: Targets, plan: Plan, keep: Keep) -> Forward:
    check_targets(targets, len(inputs.bank))
    call = _Call(inputs, plan)
    batch, reduction = len(inputs.student), targets.reduction
    cache = call.empty(keep.cache_bytes, dtype=torch.uint8)
    nll, lse, p_other = (call.empty(batch) for _ in range(3))
    loss, kept = call.empty(0 if reduction == "none" else ()), call.empty(0)
    if reduction == "mean":
        kept = call.empty(())
    if batch == 0:  # nothing is launched
        loss.zero_()
        kept.fill_(1)
    residual = call.empty(inputs.student.shape if keep.residual else 0)
    attention = call.empty(inputs.student.shape if keep.attention else 0)
    own_targets = _Targets(targets)
    reference, bank = _cache_parts(cache, batch)
    call.run(
        partial(
            _C.cuda_contrastive_ce_forward,
            targets=own_targets.arguments,
            reference=reference,
            cache=bank,
            nll=nll.data_ptr(),
            loss=loss.data_ptr(),
            kept=kept.data_ptr(),
            lse=lse.data_ptr(),
            p_other=p_other.data_ptr(),
            residual=residual.data_ptr(),
            attention=attention.data_ptr(),
        )
    )
    loss = nll if reduction == "none" else loss
    return Forward(loss, lse, kept, p_other, residual, attention, cache)


def contrastive_ce_backward(
    upstream: Upstream, inputs: Inputs, targets: Targets, plan: Plan, saved: Saved, needs: Needs
) -> Gradients:
    if len(inputs.student) == 0:
        return zero_gradients(inputs, needs)
    call = _Call(inputs, plan)
    own_targets = _Targets(targets)
    if needs.weight or needs.bias:
        own_targets.sort_shift()
    gradients = _Gradients(call, needs)
    reference, bank = _cache_parts(saved.cache, len(inputs.student))
    call.run(
        partial(
            _C.cuda_contrastive_ce_backward,
            targets=own_targets.arguments,
            shift_order=own_targets.shift_order,
            reference=reference,
            cache=bank,
            d_nll=_strided(upstream.d_loss),
            kept=saved.kept.data_ptr(),
            d_lse=_strided(upstream.d_lse),
            lse=saved.lse.data_ptr(),
            p_other=saved.p_other.data_ptr(),
            residual=saved.residual.data_ptr(),
            attention=saved.attention.data_ptr(),
            d_student=gradients.student.data_ptr(),
            along=gradients.along.data_ptr(),
            d_weight=gradients.weight.data_ptr(),
            d_bias=gradients.bias.data_ptr(),
            weight_parts=gradients.parts,
        )
    )
    return gradients.result()


def similarity_forward(inputs: Inputs, plan: Plan) -> Tensor:
    call = _Call(inputs, plan)
    logits = call.empty(len(inputs.student), len(inputs.bank))
    call.run(partial(_C.cuda_similarity_forward, logits=logits.data_ptr()))
    return logits


def similarity_backward(d_logits: Tensor, inputs: Inputs, plan: Plan, needs: Needs) -> Gradients:
    batch, width = inputs.student.shape
    if batch == 0:
        return zero_gradients(inputs, needs)
    call = _Call(inputs, plan)
    d_logits = d_logits.float().contiguous()
    gradients = _Gradients(call, needs)
    of_rows, of_bank = needs.student or needs.logit_scale, needs.weight or needs.bias
    # They scale float16 operands: one for each student's slope, one for each bank row's gradient.
    largest_of_student, largest_of_row = (
        torch.linalg.vector_norm(d_logits, torch.inf, dim=dim) if wanted else call.empty(0)
        for dim, wanted in ((1, of_rows), (0, of_bank))
    )
    parts = call.parts(batch, call.row_length, len(inputs.bank))
    slope = call.empty((parts, batch, call.row_length) if of_rows else 0)
    call.run(
        partial(
            _C.cuda_similarity_backward,
            d_logits=d_logits.data_ptr(),
            largest_of_student=largest_of_student.data_ptr(),
            largest_of_row=largest_of_row.data_ptr(),
            slope=slope.data_ptr(),
            slope_parts=parts,
            d_weight=gradients.weight.data_ptr(),
            d_bias=gradients.bias.data_ptr(),
            weight_parts=gradients.parts,
        )
    )
    if of_rows:
        slope = slope.sum(0)
        if call.exact:  # add the products with the high and the low pieces of the bank
            piece = -(-width // 16) * 16
            slope = (slope[:, :piece] + slope[:, 2 * piece :]) / PIECE_SCALE
        slope = slope[:, :width].contiguous()
        one = call.empty(1).fill_(1)
        call.run(
            partial(
                _C.cuda_contrastive_ce_backward,
                d_nll=(one.data_ptr(), 0),
                residual=slope.data_ptr(),
                d_student=gradients.student.data_ptr(),
                along=gradients.along.data_ptr(),
            )
        )
    return gradients.result()


class _Targets:
    """The targets in the kernels' form; holds the tensors whose addresses it passes."""

    def __init__(self, targets: Targets) -> None:
        self._target = targets.target.contiguous()
        self._rows = self._shift = None
        shift: tuple[int, int, int] = (0, 0, 0)
        if targets.shift is not None and targets.shift_rows is not None:
            self._rows = targets.shift_rows.contiguous()
            self._shift = targets.shift.float().contiguous()
            shift = (self._rows.data_ptr(), self._shift.data_ptr(), self._rows.shape[1])
        options = (targets.ignore_index, targets.label_smoothing)
        self.arguments = (self._target.data_ptr(), *options, *shift)
        self.shift_order = (0, 0)

    def sort_shift(self) -> None:
        """Sort the entries of the shift by bank row, so that each row's are summed in one place."""
        if self._rows is None:
            return
        # 32-bit keys take half the passes of a radix sort.
        self._sorted = self._rows.flatten().int().sort(stable=True)
        self.shift_order = (self._sorted.values.data_ptr(), self._sorted.indices.data_ptr())


class _Gradients:
    """Outputs of the kernels, [0] for a gradient that is not requested."""

    def __init__(self, call: _Call, needs: Needs) -> None:
        self._call, self._needs = call, needs
        (batch, width), dim = call.student.shape, call.bank.shape[1]
        of_rows, projection = needs.student or needs.logit_scale, needs.weight or needs.bias
        # In half precision a block of the weight_gradient kernel computes two tiles of columns.
        self.parts = parts = call.parts(width, dim if call.exact else dim / 2, len(call.bank))
        self.student = call.empty((batch, width) if needs.student else 0, dtype=call.dtype)
        self.along = call.empty(batch if of_rows else 0)  # its sum is d_logit_scale
        self.weight = call.empty((parts, width, dim) if projection else 0)
        self.bias = call.empty((parts, width) if needs.bias else 0)

    def result(self) -> Gradients:
        """The gradients in their inputs' dtypes, [0] where none is requested."""
        call, needs = self._call, self._needs
        d_weight = d_bias = d_scale = None
        if needs.weight and call.weight_like is not None:
            d_weight = _sum_of_parts(self.weight).to(call.weight_like.dtype)
        if needs.bias and call.bias_like is not None:
            d_bias = _sum_of_parts(self.bias).to(call.bias_like.dtype)
        if needs.logit_scale:
            d_scale = self.along.sum()
        others = (call.empty(0) if d is None else d for d in (d_weight, d_bias, d_scale))
        return Gradients(self.student, *others)


class _Call:
    """The inputs in the kernels' form; holds the tensors whose addresses it passes."""

    def __init__(self, inputs: Inputs, plan: Plan) -> None:
        student, bank, weight, bias, logit_scale = inputs
        self.exact, self.dtype = not plan.allow_half, student.dtype
        self.student = student if student.stride(1) == 1 else student.contiguous()
        self.bank = bank if bank.stride(1) == 1 else bank.contiguous()
        self.weight_like, self.bias_like = weight, bias
        self.weight = None if weight is None else self._operand(weight)
        self.bias = None if bias is None else bias.float().contiguous()
        self.scale = logit_scale.float()
        self._inputs = (
            _rows(self.student),
            _rows(self.bank),
            (0, 0) if self.weight is None else (self.weight.data_ptr(), self.weight.stride(0)),
            0 if self.bias is None else self.bias.data_ptr(),
            self.scale.data_ptr(),
            self.exact,
        )

    def _operand(self, weight: Tensor) -> Tensor:
        """The weight in the dtype of the projection's operands, with rows aligned to 16 bytes."""
        if self.exact:
            return weight.float().contiguous()
        half = torch.float16 if self.bank.dtype == torch.float16 else torch.bfloat16
        spare = -weight.shape[1] % 8
        weight = weight.to(half).contiguous()
        if spare:
            return torch.nn.functional.pad(weight, (0, spare))
        if weight.data_ptr() % 16 == 0 and weight.stride(0) % 8 == 0:
            return weight
        # One row is contiguous whatever its stride: a copy gets the stride D.
        return weight.clone(memory_format=torch.contiguous_format)

    def empty(self, *shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.student.device)

    @property
    def row_length(self) -> int:
        """Elements of a unit row with all its pieces."""
        return (3 if self.exact else 1) * -(-self.student.shape[1] // 16) * 16

    def parts(self, rows: int, columns: float, terms: int) -> int:
        """The split-k factor of a product [rows, columns] that sums over `terms`: enough parts that
        its blocks fill the GPU, two on each multiprocessor."""
        tiles = math.ceil(rows / TILE) * math.ceil(columns / TILE)
        wanted = 2 * gpu.processors(self.student.device) // tiles
        return max(1, min(wanted, MAX_PARTS, terms // LEAST_TERMS))

    def run(self, function: Callable[..., int]) -> None:
        """Launch the kernels of a function of _C: its first call, without a workspace, returns the
        size of the workspace that it needs."""
        device = self.student.device
        sizes = (gpu.processors(device), gpu.chunk_rows)
        needed = function(inputs=self._inputs, launch=(*sizes, 0, 0))
        workspace = self.empty(max(1, needed), dtype=torch.uint8)
        with gpu.current(device):
            launch = (*sizes, workspace.data_ptr(), gpu.stream(device))
            error = function(inputs=self._inputs, launch=launch)
        if error != 0:
            raise RuntimeError(_start_failed(device, error))


def _start_failed(device: torch.device, error: int) -> str:
    text = f"{_C.cuda_error(error)} (cudaError {error})"
    if _C.cuda_error_is_of_earlier_work(error):
        return (
            f"work started on {device} before this call, by any library, has failed: {text}; "
            "run again with CUDA_LAUNCH_BLOCKING=1 to see which"
        )
    return (
        f"a kernel of ckd could not be started on {device}: {text}; "
        "python -m ckd.info says what ckd._C was built for"
    )


def _sum_of_parts(parts: Tensor) -> Tensor:
    return parts.squeeze(0) if len(parts) == 1 else parts.sum(0)


def _strided(d: Tensor | None) -> tuple[int, int]:
    """(address, stride) of a gradient [B]; stride 0 for a 0-dim one, which all rows share."""
    return (0, 0) if d is None else (d.data_ptr(), d.stride(0) if d.dim() > 0 else 0)


def _rows(matrix: Tensor) -> tuple[int, int, int, int, int]:
    return (matrix.data_ptr(), ELEMENTS[matrix.dtype], *matrix.shape, matrix.stride(0))
