"""The contrastive cross-entropy in Triton kernels: forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ckd._triton import tiles
from ckd._triton.contrastive_ce import combine_kernel, forward_kernel, keep_targets_kernel
from ckd._triton.tiles import Tiles, power_of_two
from ckd.backends.device import Gpu
from ckd.backends.interface import (
    Forward,
    Gradients,
    Inputs,
    Keep,
    Needs,
    Plan,
    Saved,
    Targets,
    Upstream,
    reduce_rows,
    zero_gradients,
)
from ckd.backends.triton.call import FORWARD_BYTES, Call, Chunk
from ckd.backends.triton.projection import ProjectionGradient, gradients
from ckd.backends.triton.students import RowGradients, Students, student_gradient
from ckd.backends.triton.targets import Shift, add_shift, contiguous


def forward(gpu: Gpu, inputs: Inputs, targets: Targets, plan: Plan, keep: Keep) -> Forward:
    call = Call(gpu, inputs, plan, FORWARD_BYTES)
    cache = call.empty(keep.cache_bytes, dtype=torch.uint8)
    nll, lse, p_other = (call.empty(call.batch) for _ in range(3))
    residual = call.empty(inputs.student.shape if keep.residual else 0)
    attention = call.empty(inputs.student.shape if keep.attention else 0)
    if call.batch == 0:
        loss, kept = reduce_rows(nll, targets)
        return Forward(loss, lse, kept, p_other, residual, attention, cache)
    with call.on_device():
        sums = SoftmaxSums(call, targets, keep.residual or keep.attention, call.cached_bank(cache))
        for chunk in call.chunks(cache):
            sums.add(chunk)
        mean = (call.empty(()), call.empty(())) if targets.reduction == "mean" else None
        sums.combine(
            nll,
            lse,
            p_other,
            residual if keep.residual else None,
            attention if keep.attention else None,
            call.reference(cache),
            mean,
        )
    loss, kept = mean or reduce_rows(nll, targets)
    return Forward(loss, lse, kept, p_other, residual, attention, cache)


def backward(
    gpu: Gpu,
    upstream: Upstream,
    inputs: Inputs,
    targets: Targets,
    plan: Plan,
    saved: Saved,
    needs: Needs,
) -> Gradients:
    call = Call(gpu, inputs, plan)
    if call.batch == 0:
        return zero_gradients(inputs, needs)
    targets = contiguous(targets)
    d_loss, d_lse = upstream
    mean = d_loss is not None and targets.reduction == "mean"
    d_loss = None if d_loss is None else d_loss.expand(targets.target.shape)
    rows = RowGradients(d_loss, d_lse, saved.kept if mean else None)
    learned = needs.weight or needs.bias
    with call.on_device():
        found = student_gradient(
            call, rows, saved.residual, saved.attention, needs, targets,
            saved.p_other if learned else None,
        )  # fmt: skip
        if not learned:
            d_scale = found.along.sum() if needs.logit_scale else None
            return gradients(call, needs, found.d_student, d_scale)
        d_scale = call.empty(()) if needs.logit_scale else None
        students = Students.of(call, targets, rows, saved, found, d_scale)
        shift = Shift.of(call, targets, len(students.u))
        projection = ProjectionGradient(call, needs)
        for chunk in call.chunks(saved.cache, filled=True):
            projection.add_softmax(chunk, students, shift, targets.label_smoothing > 0)
        return gradients(call, needs, found.d_student, d_scale, projection)


class SoftmaxSums:
    """The softmax sums of the forward: `add` each chunk of the bank, then `combine`."""

    def __init__(
        self, call: Call, targets: Targets, keep_values: bool, whole_bank: Tensor | None
    ) -> None:
        self._call, self._targets = call, contiguous(targets)
        self._target = self._targets.target
        self._keep_values = keep_values
        sizes = (call.batch, call.chunk_rows, call.processors)
        self._candidates = tiles.forward_tiles(call.width, call.arithmetic, call.family, *sizes)
        self._tiles: Tiles | None = None
        first = self._candidates[0]
        students, columns = self._programs(first)
        self._splits = tiles.splits(
            call.chunk_rows, first.bank, students * columns, call.processors
        )
        batch, width = call.batch, call.width
        self._u = call.students()
        most = max(self._programs(chosen)[1] for chosen in self._candidates)
        self._top, self._total = (call.empty(most, self._splits, batch) for _ in range(2))
        self._values = call.empty((self._splits, batch, width) if keep_values else 0)
        self._arrived = call.empty(1, dtype=torch.int32)
        self._whole_bank = whole_bank  # its unit rows, if it is cached or a single chunk
        self._n_target: Tensor | None = None  # [B, width] n_y, if it is neither
        self._n_shift = None if targets.shift is None else call.empty(batch, width)
        smooth = targets.label_smoothing > 0
        self._n_sum = (
            torch.zeros(width, dtype=torch.float32, device=self._target.device) if smooth else None
        )

    def _programs(self, chosen: Tiles) -> tuple[int, int]:
        """The grid: programs along the students and along the width."""
        call = self._call
        columns = -(-call.width // chosen.width) if self._keep_values else 1
        return -(-call.batch // chosen.batch), columns

    def add(self, chunk: Chunk) -> None:
        call, count = self._call, len(chunk.n)
        sizes = (call.batch, count, chunk.first, call.bank_rows, self._targets.ignore_index)
        if count == call.bank_rows:
            self._whole_bank = chunk.n
        if self._whole_bank is None:
            self._keep_targets(chunk, sizes)

        def launch(chosen: Tiles) -> None:
            students, columns = self._programs(chosen)
            forward_kernel[(students, self._splits, columns)](
                self._u, chunk.n, self._target, call.scale, self._top,
                self._total, self._values, self._arrived, *sizes, call.width,
                KEEP_VALUES=self._keep_values, HALF=call.half,
                PRECISION=call.precision, **chosen.launch(call.width),
            )  # fmt: skip

        if self._tiles is None:  # tuned on the first chunk: later launches add to its results
            kind = (call.batch, count, call.width, self._keep_values)
            self._tiles = call.choose("forward", kind, self._candidates, launch)
        launch(self._tiles)
        if self._n_sum is not None:
            self._n_sum += chunk.n.sum(0, dtype=torch.float32)

    def _keep_targets(self, chunk: Chunk, sizes: tuple[int, ...]) -> None:
        call = self._call
        if self._n_target is None:
            self._n_target = call.empty(call.batch, call.width, dtype=call.operand)
        keep_targets_kernel[(-(-call.batch // 16),)](
            chunk.n, self._target, self._n_target, *sizes, call.width,
            BLOCK_BATCH=16, BLOCK_WIDTH=min(128, power_of_two(call.width)),
        )  # fmt: skip
        if self._n_shift is not None:
            add_shift(call, self._targets, chunk.n, chunk.first, self._n_shift)

    def combine(
        self,
        nll: Tensor,
        lse: Tensor,
        p_other: Tensor,
        residual: Tensor | None,
        attention: Tensor | None,
        reference: Tensor | None,
        mean: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Write the results of every student to the tensors passed; None: not requested. `mean` is
        (mean loss, number of students in it), both 0-dim."""
        call, targets = self._call, self._targets
        gather = self._whole_bank is not None
        if self._whole_bank is not None and self._n_shift is not None:
            add_shift(call, targets, self._whole_bank, 0, self._n_shift)
        loss, kept = mean or (None, None)
        combine_kernel[(-(-call.batch // 2),)](
            self._u, self._target, call.scale, self._top, self._total, self._values,
            self._whole_bank if gather else self._n_target, self._n_sum, self._n_shift,
            nll, lse, p_other, residual, attention, reference, loss, kept, self._arrived,
            call.batch, self._splits, call.bank_rows, targets.ignore_index,
            targets.label_smoothing, call.width, call.student_dim,
            GATHER=gather, HALF=call.half, SMOOTH=self._n_sum is not None,
            SHIFTED=self._n_shift is not None, KEEP_RESIDUAL=residual is not None,
            KEEP_ATTENTION=attention is not None, KEEP_REFERENCE=reference is not None,
            MEAN=mean is not None,
            BLOCK_BATCH=2, BLOCK_SPLITS=tiles.MOST_SPLITS,
            BLOCK_WIDTH=min(256, power_of_two(call.width)), BLOCK_MEAN=1024,
        )  # fmt: skip
