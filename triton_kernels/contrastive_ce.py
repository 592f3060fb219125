"""Contrastive cross-entropy, forward: one pass over the bank.

    u = s/|s|    n = z/|z|    l = logit_scale u.n    nll_i = log sum_k exp l_ik - l_iy

The softmax sums leave the target out: with a = log sum_{k != y} exp l_k - l_y,

    nll = softplus(a)    p_other = sigmoid(a)    d nll / d (logit_scale u) = p_other (E'/Z' - n_y)

where Z' = sum_{k != y} exp l_k and E' = sum_{k != y} exp(l_k) n_k. A running maximum is subtracted
from exponents (to base 2) at every scale: with a fixed shift, float16 weights of the values would
underflow. Students and bank are unit rows, in the operands' dtype, rows `width` apart, with zeros
past the student's own width (rows.py, products.py).

The shift of weighted targets is linear in the logits: with d = sum_m shift_m n_{rows_m}
(targets.py) it subtracts logit_scale u.d from nll, and d from its gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import MAX_FLOAT32, add_product, load_scale, load_targets, to_operand

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# With half-precision operands exponentials are multiplied by 2^13: the largest stays in float16's
# range, and underflow starts at 2^-37 of it.
HEADROOM = tl.constexpr(13.0)
# The maximum over no rows: below every cosine, and finite, so that rescaling gives no NaN.
NO_COSINE = tl.constexpr(-2.0)
# Up to this scale the loss takes the target's cosine from a sum in float32. Above it, the target's
# counts as equal to the largest where rounding may be the only difference, so that rows equal to
# the target's share its softmax. ROUNDING is of each product of 16 terms in tensor cores.
MAX_EXACT_SCALE = tl.constexpr(1024.0)
ROUNDING = tl.constexpr(2.0**-23)
MIN_NORMAL = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def softplus_of_minus(x):
    """log(1 + exp(-x)) = 2 atanh(e / (2 + e)) for x >= 0 and e = exp(-x), accurate if tiny too."""
    e = tl.exp2(-x * LOG2E)
    s = e / (2.0 + e)
    q = s * s
    series = 1.0 / 11 + q * (1.0 / 13 + q * (1.0 / 15))
    series = 1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9 + q * series))
    return 2.0 * s * (1.0 + q * (1.0 / 3 + q * series))


@triton.jit
def load_scale_to_base_2(scale):
    """logit_scale log2(e), clamped to normal numbers: times -inf or 0 it is not NaN."""
    to_base_2 = tl.minimum(load_scale(scale) * LOG2E, MAX_FLOAT32, tl.PropagateNan.ALL)
    return tl.where(to_base_2 < MIN_NORMAL, MIN_NORMAL, to_base_2)


@triton.jit(do_not_specialize=["batch", "rows", "first", "bank_rows", "ignore_index"])
def keep_targets_kernel(
    n,  # [rows, width] operand: bank rows first, first + 1, ...
    target,
    n_target,  # [batch, width] operand
    batch,
    rows,
    first,
    bank_rows,
    ignore_index,
    width,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Stores n_y of the students whose target is among these bank rows."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    k = load_targets(target, i, i < batch, ignore_index, bank_rows) - first
    mine = (k >= 0) & (k < rows)
    for start in range(0, width, BLOCK_WIDTH):
        w = start + tl.arange(0, BLOCK_WIDTH)
        inside = mine[:, None] & (w < width)[None, :]
        value = tl.load(n + k[:, None] * width + w[None, :], mask=inside, other=0.0)
        tl.store(n_target + i[:, None] * width + w[None, :], value, mask=inside)


@triton.jit
def logits_tile(
    left,  # [left_rows, width] operand
    right,  # [right_rows, width] operand
    i,
    k,
    left_rows,
    right_rows,
    width,
    PRECISION: tl.constexpr,
    BLOCK_LEFT: tl.constexpr,
    BLOCK_RIGHT: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """Cosines of rows i of left and k of right, in steps of BLOCK_INNER of the width."""
    if PRECISION == "tf32":
        tl.assume(width > 0)  # the loop runs: ptxas serialises wgmma in one that may not
    total = tl.zeros([BLOCK_LEFT, BLOCK_RIGHT], tl.float32)
    for start in range(0, width, BLOCK_INNER):
        w = start + tl.arange(0, BLOCK_INNER)
        x = tl.load(
            left + i[:, None] * width + w[None, :],
            mask=(i < left_rows)[:, None] & (w < width)[None, :],
            other=0.0,
        )
        y = tl.load(
            right + k[None, :] * width + w[:, None],
            mask=(k < right_rows)[None, :] & (w < width)[:, None],
            other=0.0,
        )
        total = tl.dot(x, y, total, input_precision=PRECISION)
    return total


@triton.jit
def softmax_step(
    query,  # [BLOCK_BATCH, BLOCK_WIDTH] with WHOLE, else the pointer u
    n,
    i,
    w,
    k0,  # the tile's first row of the chunk
    end,
    y,  # [BLOCK_BATCH] int32 row of the chunk, -1 where the target is elsewhere
    batch,
    width,
    to_base_2,
    headroom,
    top,
    z,
    e,
    EDGE: tl.constexpr,  # rows of the tile may be past `end`
    KEEP_VALUES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_BANK: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """Returns the state (top, z, e) after one more tile of the bank. `top` is a maximum of cosines,
    not of logits: differences of close cosines are exact, and the largest exponent is `headroom` at
    every scale. Masks compare 32-bit indices within the tile, since these instructions limit the
    loop, beside the tensor cores."""
    column = tl.arange(0, BLOCK_BANK)
    k = (k0 + column).to(tl.int64)
    inside = (w < width)[None, :]
    if EDGE:
        inside = inside & (column < end - k0)[:, None]
    if WHOLE or KEEP_VALUES:
        tile = tl.load(n + k[:, None] * width + w[None, :], mask=inside, other=0.0)
    if WHOLE:
        cosines = tl.dot(query, tl.trans(tile), input_precision=PRECISION)
    else:
        cosines = logits_tile(
            query, n, i, k, batch, end, width, PRECISION, BLOCK_BATCH, BLOCK_BANK, BLOCK_INNER
        )
    other = column[None, :] != (y - k0)[:, None]
    if EDGE:
        other = other & (column < end - k0)[None, :]
    cosines = tl.where(other, cosines, float("-inf"))
    new_top = tl.maximum(top, tl.max(cosines, 1))
    rescale = tl.exp2((top - new_top) * to_base_2)
    p = tl.exp2(tl.fma(cosines - new_top[:, None], to_base_2, headroom))
    z = z * rescale + tl.sum(p, 1)
    if KEEP_VALUES:
        p = to_operand(p, tile.dtype, PRECISION)
        e = add_product(e * rescale[:, None], p, tile, PRECISION)
    return new_top, z, e


@triton.jit(do_not_specialize=["batch", "rows", "first", "bank_rows", "ignore_index"])
def forward_kernel(
    u,  # [batch, width] operand
    n,  # [rows, width] operand: bank rows first, first + 1, ...
    target,  # [batch] int64
    scale,  # [] logit_scale
    top,  # [columns, splits, batch] float32: max over k != y of the cosine u.n
    total,  # [columns, splits, batch] float32: sum over k != y of 2^(headroom + l - its maximum)
    values,  # [splits, batch, width] float32: the same, times n
    arrived,  # [] int32 becomes 0, for combine_kernel
    batch,
    rows,
    first,
    bank_rows,
    ignore_index,
    width,
    KEEP_VALUES: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_BANK: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,  # columns of the values that a program keeps
    WHOLE: tl.constexpr,  # they are the whole width; else program axis 2 has the others
    BLOCK_INNER: tl.constexpr,  # columns of a step of the logits' sums, without WHOLE
):
    """Student-stationary: a program keeps its students and loops over the bank rows of one split
    (axis 1). Programs of axis 2 have a top and a total each, since none may read what another has
    overwritten. If `first` is not 0, top, total and values hold the state after earlier rows."""
    row = tl.program_id(0) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    i = row.to(tl.int64)
    split, splits = tl.program_id(1), tl.num_programs(1)
    w = tl.program_id(2) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    here = row < batch
    y = load_targets(target, i, here, ignore_index, bank_rows)
    y = tl.where((y >= first) & (y - first < rows), y - first, -1).to(tl.int32)
    to_base_2 = load_scale_to_base_2(scale)
    headroom = HEADROOM if HALF else 0.0

    at = (tl.program_id(2) * splits + split).to(tl.int64) * batch + i
    value_at = (split.to(tl.int64) * batch + i)[:, None] * width + w[None, :]
    stored = here[:, None] & (w < width)[None, :]
    has_state = row < tl.where(first > 0, batch, 0)
    t = tl.load(top + at, mask=has_state, other=NO_COSINE)
    z = tl.load(total + at, mask=has_state, other=0.0)
    e = tl.zeros([BLOCK_BATCH, BLOCK_WIDTH], tl.float32)
    if KEEP_VALUES:
        e = tl.load(values + value_at, mask=has_state[:, None] & (w < width)[None, :], other=0.0)
    if tl.program_id(0) + split + tl.program_id(2) == 0:
        tl.store(arrived, 0)

    query = tl.load(u + i[:, None] * width + w[None, :], mask=stored, other=0.0) if WHOLE else u
    split_rows = tl.cdiv(tl.cdiv(rows, splits), BLOCK_BANK) * BLOCK_BANK
    start = split * split_rows
    end = tl.minimum(start + split_rows, rows)
    whole_tiles_end = start + tl.maximum(end - start, 0) // BLOCK_BANK * BLOCK_BANK
    for k0 in range(start, whole_tiles_end, BLOCK_BANK):
        t, z, e = softmax_step(
            query, n, i, w, k0, end, y, batch, width, to_base_2, headroom, t, z, e,
            False, KEEP_VALUES, PRECISION, BLOCK_BATCH, BLOCK_BANK, WHOLE, BLOCK_INNER,
        )  # fmt: skip
    if whole_tiles_end < end:
        t, z, e = softmax_step(
            query, n, i, w, whole_tiles_end, end, y, batch, width, to_base_2, headroom, t, z, e,
            True, KEEP_VALUES, PRECISION, BLOCK_BATCH, BLOCK_BANK, WHOLE, BLOCK_INNER,
        )  # fmt: skip

    tl.store(top + at, t, mask=here)
    tl.store(total + at, z, mask=here)
    if KEEP_VALUES:
        tl.store(values + value_at, e, mask=stored)


@triton.jit
def is_last_program(arrived):
    """Counts finished programs: true in the last one, to which all earlier stores of the others are
    visible."""
    tl.debug_barrier()  # the atomic releases stores of its own thread, and those before a barrier
    return tl.atomic_add(arrived, 1, sem="acq_rel") == tl.num_programs(0) - 1


@triton.jit
def store_mean(nll, target, loss, kept, batch, ignore_index, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for start in range(0, batch, BLOCK):
        i = (start + tl.arange(0, BLOCK)).to(tl.int64)
        here = i < batch
        total += tl.load(nll + i, mask=here, other=0.0, cache_modifier=".cg")
        ignored = tl.load(target + i, mask=here, other=ignore_index) == ignore_index
        count += tl.where(ignored, 0.0, 1.0)
    number = tl.maximum(tl.sum(count, 0), 1.0)
    tl.store(loss, tl.sum(total, 0) / number)
    tl.store(kept, number)


@triton.jit(do_not_specialize=["batch", "splits", "bank_rows", "ignore_index"])
def combine_kernel(
    u,  # [batch, width] operand
    target,
    scale,
    top,  # [splits, batch]
    total,  # [splits, batch]
    values,  # [splits, batch, width]
    n,  # [bank_rows, width] operand with GATHER, else [batch, width]: n_y
    n_sum,  # [width] float32 sum of all n, with SMOOTH
    n_shift,  # [batch, width] float32 of add_shift_kernel, with SHIFTED
    nll,
    lse,
    p_other,
    residual,  # [batch, student_dim]
    attention,  # [batch, student_dim]
    reference,  # [2, batch]: a cosine c, and (lse - logit_scale c) log2(e)
    loss,  # [] with MEAN: the mean nll of students that are not ignored, 0 if all are
    kept,  # [] float32, with MEAN: the number of these students, at least 1
    arrived,  # [] int32, 0: how many programs have stored their nll
    batch,
    splits,
    bank_rows,
    ignore_index,
    label_smoothing,
    width,
    student_dim,
    GATHER: tl.constexpr,
    HALF: tl.constexpr,
    SMOOTH: tl.constexpr,
    SHIFTED: tl.constexpr,
    KEEP_RESIDUAL: tl.constexpr,
    KEEP_ATTENTION: tl.constexpr,
    KEEP_REFERENCE: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_MEAN: tl.constexpr,
):
    """Combines the splits, rescaled to the largest top, and writes the students' results. The last
    program to arrive computes the mean, always in the same order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    here = i < batch
    column = tl.arange(0, BLOCK_WIDTH)
    part = tl.arange(0, BLOCK_SPLITS)
    at_parts = part[:, None].to(tl.int64) * batch + i[None, :]
    there = (part < splits)[:, None] & here[None, :]
    tops = tl.load(top + at_parts, mask=there, other=NO_COSINE)
    highest = tl.max(tops, 0)
    to_base_2 = load_scale_to_base_2(scale)
    z = tl.load(total + at_parts, mask=there, other=0.0)
    z = tl.sum(tl.exp2((tops - highest[None, :]) * to_base_2) * z, 0)
    log_z = (tl.log2(z) - (HEADROOM if HALF else 0.0)) * LN2

    y = load_targets(target, i, here, ignore_index, bank_rows)
    has_target = y >= 0
    n_row = tl.where(has_target, y, 0) if GATHER else i
    along = tl.zeros([BLOCK_BATCH], tl.float32)
    mean = tl.zeros([BLOCK_BATCH], tl.float32)
    shifted = tl.zeros([BLOCK_BATCH], tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        w = start + column
        at_target = has_target[:, None] & (w < width)[None, :]
        query = tl.load(u + i[:, None] * width + w[None, :], mask=at_target, other=0.0)
        n_y = tl.load(n + n_row[:, None] * width + w[None, :], mask=at_target, other=0.0)
        along += tl.sum(query.to(tl.float32) * n_y.to(tl.float32), 1)
        if SMOOTH:
            n_all = tl.load(n_sum + w, mask=w < width, other=0.0)
            mean += tl.sum(query.to(tl.float32) * n_all[None, :], 1)
        if SHIFTED:
            n_more = tl.load(n_shift + i[:, None] * width + w[None, :], mask=at_target, other=0.0)
            shifted += tl.sum(query.to(tl.float32) * n_more, 1)
    factor = load_scale(scale)
    rounding = tl.where(factor > MAX_EXACT_SCALE, ROUNDING, 0.0) * (width // 16 + 8)
    along = tl.where(tl.abs(highest - along) <= rounding, highest, along)
    l_y = along * factor
    odds = (highest - along) * factor + log_z  # -inf if the target is the bank's only row
    distance = tl.abs(odds)
    small = tl.exp2(-distance * LOG2E)
    other = tl.where(has_target, tl.where(odds < 0, small, 1.0) / (1.0 + small), 1.0)
    row_nll = tl.where(odds < 0, 0.0, odds) + softplus_of_minus(distance)
    tl.store(lse + i, tl.where(has_target, l_y + row_nll, highest * factor + log_z), mask=here)
    tl.store(p_other + i, other, mask=here)
    if KEEP_REFERENCE:
        # The lse is as large as the scale, and its rounding error would be that of every p_ik. Its
        # distance from the largest cosine's logit is small, and so is the rounding error.
        beyond = tl.where(odds < 0, -odds, 0.0) + softplus_of_minus(distance)
        beyond = log_z + tl.where(has_target, beyond, 0.0)
        alone = has_target & (z == 0)  # the target is the bank's only row
        tl.store(reference + i, tl.where(alone, along, highest), mask=here)
        tl.store(reference + batch + i, tl.where(alone, 0.0, beyond * LOG2E), mask=here)
    if SMOOTH:
        row_nll += label_smoothing * (l_y - factor * mean / bank_rows)
    if SHIFTED:
        row_nll -= factor * shifted
    raw = tl.load(target + i, mask=here, other=0)
    without = tl.where(raw == ignore_index, 0.0, float("nan"))
    tl.store(nll + i, tl.where(has_target, row_nll, without), mask=here)

    if KEEP_RESIDUAL or KEEP_ATTENTION:
        inverse = tl.where(z == 0, 0.0, 1.0 / z)
        for start in range(0, student_dim, BLOCK_WIDTH):
            w = start + column
            inside = here[:, None] & (w < student_dim)[None, :]
            n_other = tl.zeros([BLOCK_BATCH, BLOCK_WIDTH], tl.float32)
            at = i
            for _ in tl.range(0, splits, loop_unroll_factor=4):
                share = (
                    tl.exp2((tl.load(top + at, mask=here, other=0.0) - highest) * to_base_2)
                    * inverse
                )
                value_at = values + at[:, None] * width + w[None, :]
                n_other += share[:, None] * tl.load(value_at, mask=inside, other=0.0)
                at += batch
            at_target = inside & has_target[:, None]
            n_y = tl.load(n + n_row[:, None] * width + w[None, :], mask=at_target, other=0.0)
            n_y = n_y.to(tl.float32)
            out_at = i[:, None] * student_dim + w[None, :]
            if KEEP_RESIDUAL:
                slope = other[:, None] * (n_other - n_y)
                if SMOOTH:
                    n_all = tl.load(n_sum + w, mask=w < student_dim, other=0.0)
                    slope += label_smoothing * (n_y - n_all[None, :] / bank_rows)
                if SHIFTED:
                    more_at = n_shift + i[:, None] * width + w[None, :]
                    slope -= tl.load(more_at, mask=at_target, other=0.0)
                slope = tl.where(has_target[:, None], slope, 0.0)
                tl.store(residual + out_at, slope, mask=inside)
            if KEEP_ATTENTION:
                average = other[:, None] * n_other + (1.0 - other)[:, None] * n_y
                tl.store(attention + out_at, average, mask=inside)
    if MEAN:  # noqa: SIM102 (a compile-time constant)
        if is_last_program(arrived):
            store_mean(nll, target, loss, kept, batch, ignore_index, BLOCK_MEAN)
