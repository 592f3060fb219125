"""The ops in CUDA C++ (csrc/cuda), for NVIDIA GPUs from sm_80 on.

Operands of the matrix units are float16 where half precision is permitted (bfloat16 for the
projection of a bank in another dtype), else float32 numbers taken apart into several such; sums
are float32. No logits in memory, no host synchronisation; atomics take maxima alone, which do not
depend on an order: the same bits every time.
"""

from __future__ import annotations

import contextlib
import functools
import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ckd.backends.interface import (
    Forward,
    Gradients,
    Needs,
    Options,
    Problem,
    Saved,
    check_targets,
)

_missing: str | None = None
try:
    from ckd import _C  # type: ignore[attr-defined]
except ImportError as error:
    _C: Any = None  # type: ignore[no-redef]
    _missing = f"ckd._C is not installed ({error}); python -m ckd.info says why"
if _missing is None and not hasattr(_C, "cuda_contrastive_ce_forward"):
    _missing = "ckd._C was built without CUDA; python -m ckd.info says why"

ELEMENTS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # Element of arguments.h
WIDTH_MULTIPLE = 16  # of the projected bank's rows
TILE = 64  # of the kernels
PIECE_SCALE = 64  # by which pieces of float32 numbers are multiplied
MAX_PARTS = 16
LEAST_TERMS = 8 * TILE  # of a part of a long sum: fewer are not worth adding up parts for
WIDEST = 1 << 20  # a row: 65,535 tiles are the most of a launch
DEVICE = "cuda"
# Rows of the bank that are worked on at once; the kernels' own bound is 64 MiB of workspace.
MOST_CHUNK_ROWS = 1 << 40


def missing() -> str | None:
    """Why no problem at all can be served here, on the current GPU."""
    return _missing_on(None)


def _missing_on(device_index: int | None) -> str | None:
    if _missing is not None or DEVICE != "cuda":
        return _missing
    if torch.version.hip is not None:
        return "the GPU is AMD's"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    major, minor = _capability(device_index)
    if major < 8:
        return f"the GPU is of compute capability {major}.{minor}; the kernels need 8.0"
    return None


def unsupported(problem: Problem) -> str | None:
    if problem.device_type != DEVICE:  # first: asking for GPUs takes longer
        return f"the tensors are on {problem.device_type}, not on {DEVICE}"
    reason = _missing_on(problem.device_index)
    if reason is not None:
        return reason
    if problem.student_dtype not in ELEMENTS:
        return f"has no {str(problem.student_dtype).removeprefix('torch.')} arithmetic"
    if max(problem.batch, problem.bank_rows) >= 2**31 - 2 * TILE:  # the next tile's row is one too
        return "has 32-bit row numbers: less than 2^31 - 128 students and bank rows"
    if problem.student_dim == 0 or problem.teacher_dim == 0:
        return "rows of width 0"
    if max(problem.student_dim, problem.teacher_dim) > WIDEST:
        return f"rows wider than {WIDEST:,}"
    return None


def contrastive_ce_cache_bytes(problem: Problem) -> int:
    """Room for the whole projected bank and its inverse norms, or none."""
    width = -(-problem.student_dim // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    pieces = 1 if problem.allow_half else 3
    needed = problem.bank_rows * (2 * pieces * width + 4)
    return needed if needed <= problem.cache_limit else 0


def contrastive_ce_forward(
    student: Tensor,
    bank: Tensor,
    target: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    logit_scale: Tensor,
    options: Options,
    *,
    save_residual: bool,
    save_attention: bool,
    cache_bytes: int,
) -> Forward:
    check_targets(target, len(bank), options.ignore_index)
    call = _Call(student, bank, weight, bias, logit_scale, options.allow_half)
    batch = len(student)
    cache = call.empty(cache_bytes, dtype=torch.uint8)
    nll, lse, p_other = (call.empty(batch) for _ in range(3))
    if options.reduction == "none":
        loss, kept = call.empty(0), call.empty(0)
    else:  # of no rows nothing is started
        loss = call.empty(()).zero_() if batch == 0 else call.empty(())
        kept = call.empty(0)
        if options.reduction == "mean":
            kept = torch.ones_like(loss) if batch == 0 else call.empty(())
    residual = call.empty(student.shape if save_residual else 0)
    attention = call.empty(student.shape if save_attention else 0)
    target = target.contiguous()
    call.run(
        _C.cuda_contrastive_ce_forward,
        (target.data_ptr(), options.ignore_index, options.label_smoothing),
        *(x.data_ptr() for x in (cache, nll, loss, kept, lse, p_other, residual, attention)),
    )
    loss = nll if options.reduction == "none" else loss
    return Forward(loss, lse, kept, p_other, residual, attention, cache)


def contrastive_ce_backward(
    d_loss: Tensor | None,
    d_lse: Tensor | None,
    student: Tensor,
    bank: Tensor,
    target: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    logit_scale: Tensor,
    saved: Saved,
    needs: Needs,
    options: Options,
) -> Gradients:
    call = _Call(student, bank, weight, bias, logit_scale, options.allow_half)
    if len(student) == 0:
        return call.zero_gradients(needs)
    target = target.contiguous()
    gradients = _Gradients(call, needs)
    call.run(
        _C.cuda_contrastive_ce_backward,
        (target.data_ptr(), options.ignore_index, options.label_smoothing),
        saved.cache.data_ptr(),
        _strided(d_loss),
        saved.kept.data_ptr(),
        _strided(d_lse),
        *(x.data_ptr() for x in (saved.lse, saved.p_other, saved.residual, saved.attention)),
        *gradients.of_rows,
        *gradients.of_projection,
    )
    return gradients.result()


def similarity_forward(
    student: Tensor,
    bank: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    logit_scale: Tensor,
    allow_half: bool,
) -> Tensor:
    call = _Call(student, bank, weight, bias, logit_scale, allow_half)
    logits = call.empty(len(student), len(bank))
    call.run(_C.cuda_similarity_forward, logits.data_ptr())
    return logits


def similarity_backward(
    d_logits: Tensor,
    student: Tensor,
    bank: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    logit_scale: Tensor,
    needs: Needs,
    allow_half: bool,
) -> Gradients:
    call = _Call(student, bank, weight, bias, logit_scale, allow_half)
    batch, width = student.shape
    if batch == 0:
        return call.zero_gradients(needs)
    d_logits = d_logits.float().contiguous()
    gradients = _Gradients(call, needs)
    of_rows, of_bank = needs.student or needs.logit_scale, needs.weight or needs.bias
    # By which float16 is scaled: each student's slope, and each bank row's gradient, on its own.
    largest = [
        torch.linalg.vector_norm(d_logits, torch.inf, dim=dim) if wanted else call.empty(0)
        for dim, wanted in ((1, of_rows), (0, of_bank))
    ]
    parts, piece = call.parts(batch, call.row_length, len(bank)), -(-width // 16) * 16
    slope = call.empty((parts, batch, call.row_length) if of_rows else 0)
    call.run(
        _C.cuda_similarity_backward,
        d_logits.data_ptr(),
        (largest[0].data_ptr(), largest[1].data_ptr()),
        slope.data_ptr(),
        parts,
        *gradients.of_projection,
    )
    if of_rows:
        slope = slope.sum(0)
        if call.exact:  # the bank's high and low pieces
            slope = (slope[:, :piece] + slope[:, 2 * piece :]) / PIECE_SCALE
        slope = slope[:, :width].contiguous()
        one = call.empty(1).fill_(1)
        call.run(
            _C.cuda_contrastive_ce_backward,
            (0, 0, 0.0),
            0,
            (one.data_ptr(), 0),
            0,
            (0, 0),
            0,
            0,
            slope.data_ptr(),
            0,
            *gradients.of_rows,
            *(0, 0, 1),
        )
    return gradients.result()


class _Gradients:
    """Room for the gradients that are asked for."""

    def __init__(self, call: _Call, needs: Needs) -> None:
        self._call, self._needs = call, needs
        (batch, width), dim = call.student.shape, call.bank.shape[1]
        of_rows, projection = needs.student or needs.logit_scale, needs.weight or needs.bias
        # A block of the kernel that multiplies with the bank has two tiles of columns, where half
        # precision is permitted.
        self._parts = parts = call.parts(width, dim if call.exact else dim / 2, len(call.bank))
        self._student = call.empty((batch, width) if needs.student else 0, dtype=call.dtype)
        self._along = call.empty(batch if of_rows else 0)
        self._weight = call.empty((parts, width, dim) if projection else 0)
        self._bias = call.empty((parts, width) if needs.bias else 0)

    @property
    def of_rows(self) -> tuple[int, int]:
        return self._student.data_ptr(), self._along.data_ptr()

    @property
    def of_projection(self) -> tuple[int, int, int]:
        return self._weight.data_ptr(), self._bias.data_ptr(), self._parts

    def result(self) -> Gradients:
        """Each in its input's dtype, [0] where none was asked for."""
        call, needs = self._call, self._needs
        d_weight = d_bias = d_scale = None
        if needs.weight and call.weight_like is not None:
            d_weight = _sum_of_parts(self._weight).to(call.weight_like.dtype)
        if needs.bias and call.bias_like is not None:
            d_bias = _sum_of_parts(self._bias).to(call.bias_like.dtype)
        if needs.logit_scale:
            d_scale = self._along.sum()
        others = (call.empty(0) if d is None else d for d in (d_weight, d_bias, d_scale))
        return Gradients(self._student, *others)


class _Call:
    """The inputs as the kernels take them, kept alive until they are started."""

    def __init__(
        self,
        student: Tensor,
        bank: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        logit_scale: Tensor,
        allow_half: bool,
    ) -> None:
        self.exact, self.dtype = not allow_half, student.dtype
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
        """In the dtype of the projection's operands, with rows that begin at 16 bytes."""
        if self.exact:
            return weight.float().contiguous()
        half = torch.float16 if self.bank.dtype == torch.float16 else torch.bfloat16
        spare = -weight.shape[1] % 8
        weight = weight.to(half).contiguous()
        if spare:
            return torch.nn.functional.pad(weight, (0, spare))
        return weight if weight.data_ptr() % 16 == 0 else weight.clone()

    def empty(self, *shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.student.device)

    @property
    def row_length(self) -> int:
        """Of unit rows, with all their pieces."""
        return (3 if self.exact else 1) * -(-self.student.shape[1] // 16) * 16

    def parts(self, rows: int, columns: float, terms: int) -> int:
        """Into how many parts long sums are cut: with the tiles of [rows, columns], as many as run
        at once, two blocks on each multiprocessor."""
        tiles = math.ceil(rows / TILE) * math.ceil(columns / TILE)
        wanted = 2 * _processors(self.student.device) // tiles
        return max(1, min(wanted, MAX_PARTS, terms // LEAST_TERMS))

    def run(self, function: Any, *arguments: Any) -> None:
        device = self.student.device
        sizes = (_processors(device), MOST_CHUNK_ROWS)
        needed = function(self._inputs, *arguments, sizes, 0, 0)
        workspace = self.empty(max(1, needed), dtype=torch.uint8)
        with _on(device):
            stream = torch.cuda.current_stream(device).cuda_stream if DEVICE == "cuda" else 0
            error = function(self._inputs, *arguments, sizes, workspace.data_ptr(), stream)
        if error != 0:
            raise RuntimeError(_start_failed(device, error))

    def zero_gradients(self, needs: Needs) -> Gradients:
        """Of no students."""
        every = (self.student, self.weight_like, self.bias_like, self.scale)
        pairs = zip(every, needs)
        return Gradients(
            *(torch.zeros_like(x) if x is not None and need else self.empty(0) for x, need in pairs)
        )


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
    """A gradient of every row, which may be one number."""
    return (0, 0) if d is None else (d.data_ptr(), d.stride(0) if d.dim() > 0 else 0)


def _rows(matrix: Tensor) -> tuple[int, int, int, int, int]:
    return (matrix.data_ptr(), ELEMENTS[matrix.dtype], *matrix.shape, matrix.stride(0))


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def _capability(device_index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # emulated: enough for several parts
    return torch.cuda.get_device_properties(device).multi_processor_count
