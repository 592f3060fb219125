"""The definition of every op in plain torch: any device, full precision, memory bounded by a tile.

The bank is read in tiles of rows. Arithmetic is float32 (float64 for a float64 student), regardless
of the inputs' dtypes, autocast and `allow_half`. Neither the [B, K] logits nor the projected bank
is ever held in memory. Backward passes are analytic. In the comments u = s/|s|, z = P t + b,
n = z/|z|, l = logit_scale u.n, y is the target's row, and the shift is that of `Targets`.

Rows whose norm is below MIN_NORM count as zero: logits 0, gradient 0. Rows whose norm is not
finite give NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ckd.backends.interface import (
    MAX_LOGIT_SCALE,
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
    reduce_rows,
)
from ckd.backends.targets import split_targets as split_targets

MIN_NORM = 1e-6
NO_COSINE = -2.0  # the maximum over no rows: below every cosine, and finite
TILE_ELEMENTS = 1 << 21  # in the largest array of a tile: 8 MiB in float32
MIN_TILE_ROWS = 64  # with fewer, call overhead outweighs the matrix products


def missing() -> str | None:
    """None, always: the backend needs nothing but torch."""
    return None


def unsupported(problem: Problem) -> str | None:
    """None: every problem is served."""
    return None


def contrastive_ce_cache_bytes(problem: Problem) -> int:
    """Two numbers for each student (see _lse_parts); the backward projects the bank again."""
    return 2 * problem.batch * _accumulator(problem.student_dtype).itemsize


def contrastive_ce_forward(inputs: Inputs, targets: Targets, plan: Plan, keep: Keep) -> Forward:
    """One pass over the bank gives the loss, lse and the gradients with respect to logit_scale u.

    The softmax sums exclude the target: with a = log sum_{k != y} exp(l_k) - l_y, the loss is
    softplus(a) and E - n_y = sigmoid(a) (E' - n_y), where E and E' are the softmax-weighted means
    of n over all k and over k != y. Nothing cancels when the softmax is peaked, whereas lse - l_y
    and E - n_y would lose every digit.
    """
    bank_rows, label_smoothing = len(inputs.bank), targets.label_smoothing
    check_targets(targets, bank_rows)
    with _exact(inputs.student):
        u, _ = _student_rows(inputs.student)
        tau = _positive(inputs.logit_scale)
        has_target = _has_target(targets, bank_rows)
        keep_values = keep.residual or keep.attention
        sums = _sum_over_bank(u, tau, targets, has_target, _tiles(u, inputs), keep_values)

        l_target = tau * sums.cosine_target
        log_total = sums.total.log()
        # a in the docstring; +inf for a row without a target.
        log_odds = tau * (sums.top - sums.cosine_target) + log_total
        p_other = torch.sigmoid(log_odds)
        nll = _softplus(log_odds)
        # lse = tau cosine + beyond. It is as large as tau; the backward needs the small number.
        cosine = torch.where(log_odds < 0, sums.cosine_target, sums.top)
        beyond = torch.where(log_odds < 0, nll, log_total + _softplus(-log_odds))
        lse = tau * cosine + beyond
        n_other = sums.values / sums.total.masked_fill(sums.total == 0, 1)
        n_mean = sums.n_sum / bank_rows
        residual = p_other * (n_other - sums.n_target)
        if label_smoothing > 0:
            l_mean = tau * (u @ n_mean.unsqueeze(1))
            nll = nll + label_smoothing * (l_target - l_mean)
            residual = residual + label_smoothing * (sums.n_target - n_mean)
        if targets.shift is not None:
            nll = nll - tau * (u * sums.n_shift).sum(1, keepdim=True)
            residual = residual - sums.n_shift
        residual = residual.masked_fill(~has_target.unsqueeze(1), 0)
        attention = p_other * n_other + (1 - p_other) * sums.n_target

        without = _loss_without_target(targets, nll)
        nothing = u.new_empty(0)
        loss, kept = reduce_rows(torch.where(has_target, nll.squeeze(1), without), targets)
        return Forward(
            loss=loss,
            kept=kept,
            lse=lse.squeeze(1),
            p_other=p_other.squeeze(1),
            residual=residual if keep.residual else nothing,
            attention=attention if keep.attention else nothing.clone(),
            cache=torch.stack([cosine, beyond]).view(-1).view(torch.uint8)[: keep.cache_bytes],
        )


class _Sums(NamedTuple):
    """The sums of one pass over the bank, for each student row."""

    top: Tensor  # [B, 1] the largest cosine u.n over k != y; NO_COSINE if there is no such k
    total: Tensor  # [B, 1] sum over k != y of exp(l - logit_scale top)
    values: Tensor  # [B, W] the same sum of exp(...) n; zero when not kept
    cosine_target: Tensor  # [B, 1] u.n_y; -inf where there is no target
    n_target: Tensor  # [B, W] n_y; zero where there is no target
    n_sum: Tensor  # [W] sum of all n
    n_shift: Tensor  # [B, W] sum over m of shift_m n_{rows_m}; zero without a shift


def _sum_over_bank(
    u: Tensor,
    tau: Tensor,
    targets: Targets,
    has_target: Tensor,
    tiles: Iterator[_Tile],
    keep_values: bool,
) -> _Sums:
    """The softmax sums without the target, relative to a running maximum (online softmax). It is a
    maximum of cosines: differences of close cosines are exact at any scale."""
    total = u.new_zeros(len(u), 1)
    top = torch.full_like(total, NO_COSINE)
    values, n_target = torch.zeros_like(u), torch.zeros_like(u)
    cosine_target = torch.full_like(total, -torch.inf)
    n_sum, n_shift = u.new_zeros(u.shape[1]), torch.zeros_like(u)
    for tile in tiles:
        cosines = u @ tile.n.T
        inside, column = tile.locate(targets.target, has_target)
        picked = cosines.gather(1, column)
        cosine_target = torch.where(inside, picked, cosine_target)
        n_target = torch.where(inside, tile.n[column.squeeze(1)], n_target)
        cosines.scatter_(1, column, picked.masked_fill(inside, -torch.inf))

        new_top = torch.maximum(top, cosines.amax(1, keepdim=True))
        rescale = torch.exp(tau * (top - new_top))
        p = cosines.sub_(new_top).mul_(tau).exp_()
        total = total * rescale + p.sum(1, keepdim=True)
        if keep_values:
            values = torch.addmm(values * rescale, p, tile.n)
        n_sum += tile.n.sum(0)
        if targets.shift is not None:
            n_shift = torch.addmm(n_shift, tile.shift(targets), tile.n)
        top = new_top
    return _Sums(top, total, values, cosine_target, n_target, n_sum, n_shift)


def contrastive_ce_backward(
    upstream: Upstream, inputs: Inputs, targets: Targets, plan: Plan, saved: Saved, needs: Needs
) -> Gradients:
    """Reads the bank again for the gradients of weight and bias alone."""
    student, bank, _, _, logit_scale = inputs
    target, label_smoothing = targets.target, targets.label_smoothing
    d_nll, d_lse = upstream
    if d_nll is not None and targets.reduction == "mean":
        d_nll = d_nll / saved.kept
    with _exact(student):
        tau = _positive(logit_scale)
        has_target = _has_target(targets, len(bank)).unsqueeze(1)
        zero = saved.lse.new_zeros(len(student), 1)
        g = zero if d_nll is None else d_nll.to(zero.dtype).unsqueeze(-1)
        g = torch.where(has_target, g, 0)
        h = zero if d_lse is None else d_lse.to(zero.dtype).unsqueeze(1)
        # Rows with zero gradient (ignored ones, say) may hold NaN, and 0 * NaN would be NaN.
        idle = (g == 0) & (h == 0)
        u, inverse_norm = (x.masked_fill(idle, 0) for x in _student_rows(student))

        d_student, d_logit_scale = u.new_empty(0), u.new_empty(0)
        if needs.student or needs.logit_scale:
            slope = torch.zeros_like(u)
            if d_nll is not None:
                slope = slope + g * saved.residual
            if d_lse is not None:
                slope = slope + h * saved.attention
            slope = slope.masked_fill(idle, 0)
            d_student, d_logit_scale = _row_gradients(slope, u, inverse_norm, tau, needs)

        projection = _ProjectionGradient(u, inputs, needs)
        if needs.weight or needs.bias:
            p_other = saved.p_other.unsqueeze(1).masked_fill(idle, 0)
            cosine, beyond = (x.masked_fill(idle, 0) for x in _lse_parts(saved))
            smooth = g * (label_smoothing / len(bank))
            for tile in _tiles(u, inputs):
                p = (u @ tile.n.T).sub_(cosine).mul_(tau).sub_(beyond).exp_()
                inside, column = tile.locate(target, has_target.squeeze(1))
                p_target = p.gather(1, column)
                d_logits = (g + h) * p - smooth
                # At the target, g (p - 1) is computed as -g p_other: nothing cancels for p near 1.
                at_target = h * p_target - g * (p_other - label_smoothing) - smooth
                d_logits.scatter_(
                    1, column, torch.where(inside, at_target, d_logits.gather(1, column))
                )
                if targets.shift is not None:
                    d_logits -= g * tile.shift(targets)
                projection.add(tile, tau * (d_logits.T @ u))
        return Gradients(
            student=d_student.to(student.dtype),
            weight=projection.weight,
            bias=projection.bias,
            logit_scale=d_logit_scale.to(logit_scale.dtype),
        )


def similarity_forward(inputs: Inputs, plan: Plan) -> Tensor:
    """logit_scale u.n for every pair, [B, K]."""
    with _exact(inputs.student):
        u, _ = _student_rows(inputs.student)
        query = _positive(inputs.logit_scale) * u
        out = u.new_empty(len(u), len(inputs.bank))
        for tile in _tiles(u, inputs):
            out[:, tile.start : tile.start + len(tile.n)] = query @ tile.n.T
        return out


def similarity_backward(d_logits: Tensor, inputs: Inputs, plan: Plan, needs: Needs) -> Gradients:
    """Gradients for d_logits [B, K], in one pass over the bank."""
    student, logit_scale = inputs.student, inputs.logit_scale
    with _exact(student):
        u, inverse_norm = _student_rows(student)
        tau = _positive(logit_scale)
        slope = torch.zeros_like(u)
        projection = _ProjectionGradient(u, inputs, needs)
        for tile in _tiles(u, inputs):
            d_tile = d_logits[:, tile.start : tile.start + len(tile.n)].to(u.dtype)
            if needs.student or needs.logit_scale:
                slope = torch.addmm(slope, d_tile, tile.n)
            if needs.weight or needs.bias:
                projection.add(tile, tau * (d_tile.T @ u))
        d_student, d_logit_scale = _row_gradients(slope, u, inverse_norm, tau, needs)
        return Gradients(
            student=d_student.to(student.dtype),
            weight=projection.weight,
            bias=projection.bias,
            logit_scale=d_logit_scale.to(logit_scale.dtype),
        )


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), where that of torch is x itself from 20 on."""
    return torch.logaddexp(x, torch.zeros_like(x))


def _lse_parts(saved: Saved) -> tuple[Tensor, Tensor]:
    """A cosine and a small number, [B, 1] each, with lse = logit_scale cosine + number; 0 and lse
    itself if the forward kept no cache."""
    if len(saved.cache) == 0:
        return torch.zeros_like(saved.lse).unsqueeze(1), saved.lse.unsqueeze(1)
    cosine, beyond = saved.cache.view(saved.lse.dtype).view(2, -1, 1)
    return cosine, beyond


class _Tile(NamedTuple):
    """Consecutive bank rows: t [rows, D] as stored, n [rows, W] and 1/|z| [rows, 1]."""

    start: int
    t: Tensor
    n: Tensor
    inverse_norm: Tensor

    def locate(self, target: Tensor, has_target: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each student's target lies in this tile [B, 1], and its column in it [B, 1].

        For other targets the column is clamped: indexing with it needs no host synchronisation.
        """
        column = target - self.start
        inside = has_target & (column >= 0) & (column < len(self.n))
        return inside.unsqueeze(1), column.clamp(0, len(self.n) - 1).unsqueeze(1)

    def shift(self, targets: Targets) -> Tensor:
        """The targets' shift as a matrix [B, rows]."""
        assert targets.shift_rows is not None
        assert targets.shift is not None
        column = targets.shift_rows - self.start
        inside = (column >= 0) & (column < len(self.n))
        share = self.n.new_zeros(len(column), len(self.n))
        shift = torch.where(inside, targets.shift.to(share.dtype), 0)
        return share.scatter_add_(1, column.clamp(0, len(self.n) - 1), shift)


def _tiles(u: Tensor, inputs: Inputs) -> Iterator[_Tile]:
    """The bank, tile by tile, projected and normalised in the dtype of u."""
    _, bank, weight, bias, _ = inputs
    widest = max(len(u), u.shape[1], bank.shape[1], 1)
    rows = max(MIN_TILE_ROWS, TILE_ELEMENTS // widest)
    p = None if weight is None else weight.to(u.dtype)
    b = None if bias is None else bias.to(u.dtype)
    for start in range(0, len(bank), rows):
        t = bank[start : start + rows].to(u.dtype)
        z = t if p is None else F.linear(t, p, b)
        yield _Tile(start, t, *_unit_rows(z))


class _ProjectionGradient:
    """Accumulates d_weight = dZ^T T and d_bias = sum_k dZ_k tile by tile."""

    def __init__(self, u: Tensor, inputs: Inputs, needs: Needs) -> None:
        _, bank, weight, bias, _ = inputs
        self._weight = u.new_zeros(u.shape[1], bank.shape[1]) if needs.weight else u.new_empty(0)
        self._bias = u.new_zeros(u.shape[1]) if needs.bias else u.new_empty(0)
        self._needs = needs
        self._weight_dtype = u.dtype if weight is None else weight.dtype
        self._bias_dtype = u.dtype if bias is None else bias.dtype

    def add(self, tile: _Tile, d_n: Tensor) -> None:
        d_z = _through_norm(d_n, tile.n, tile.inverse_norm)
        if self._needs.weight:
            self._weight.addmm_(d_z.T, tile.t)
        if self._needs.bias:
            self._bias += d_z.sum(0)

    @property
    def weight(self) -> Tensor:
        return self._weight.to(self._weight_dtype)

    @property
    def bias(self) -> Tensor:
        return self._bias.to(self._bias_dtype)


def _row_gradients(
    slope: Tensor, u: Tensor, inverse_norm: Tensor, tau: Tensor, needs: Needs
) -> tuple[Tensor, Tensor]:
    """d_student and d_logit_scale from slope = d loss / d (logit_scale u)."""
    nothing = u.new_empty(0)
    d_student = _through_norm(tau * slope, u, inverse_norm) if needs.student else nothing
    d_logit_scale = (u * slope).sum() if needs.logit_scale else nothing.clone()
    return d_student, d_logit_scale


def _through_norm(d_unit: Tensor, unit: Tensor, inverse_norm: Tensor) -> Tensor:
    """The gradient of x from d, that of unit = x/|x|: (d - (d.unit) unit) / |x|. Rounded units are
    not exactly of norm 1: division by unit.unit removes all of d along them, however large."""
    squares = unit.square().sum(1, keepdim=True)
    along = (d_unit * unit).sum(1, keepdim=True) / squares.masked_fill(squares == 0, 1)
    return (d_unit - along * unit) * inverse_norm


def _student_rows(student: Tensor) -> tuple[Tensor, Tensor]:
    """u and 1/|s| in the accumulator's dtype. Always row-major: outputs take their strides from u,
    and these must match those of the op's fake."""
    return _unit_rows(student.to(_accumulator(student.dtype)).contiguous())


def _unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x/|x| and 1/|x| [rows, 1] for each row: zeros if |x| < MIN_NORM, NaN if |x| overflows."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    inverse = norm.reciprocal().masked_fill(norm < MIN_NORM, 0).masked_fill(norm.isinf(), torch.nan)
    # A quotient: rows of one element are exactly +-1.
    return (x / norm).masked_fill(inverse == 0, 0).masked_fill(inverse.isnan(), torch.nan), inverse


def _accumulator(student: torch.dtype) -> torch.dtype:
    return torch.float64 if student == torch.float64 else torch.float32


def _positive(logit_scale: Tensor) -> Tensor:
    """The scale, or NaN for one that the op refuses: a GPU reports it without synchronising."""
    return torch.where((logit_scale > 0) & (logit_scale <= MAX_LOGIT_SCALE), logit_scale, torch.nan)


def _has_target(targets: Targets, bank_rows: int) -> Tensor:
    target = targets.target
    return (target != targets.ignore_index) & (target >= 0) & (target < bank_rows)


def _loss_without_target(targets: Targets, like: Tensor) -> Tensor:
    """[B] 0 for ignored rows, NaN for all others: these are used where a target is out of range."""
    nan = torch.full_like(targets.target, torch.nan, dtype=like.dtype)
    return nan.masked_fill(targets.target == targets.ignore_index, 0)


def _exact(student: Tensor) -> torch.autocast:
    """Switches autocast off, so that matrix products stay in the accumulator's dtype."""
    return torch.autocast(student.device.type, enabled=False)
