"""Contrastive cross-entropy: one pass over the bank forward, one more for the projection.

    u = s/|s|    n = z/|z|    l = logit_scale u.n    nll_i = log sum_k exp l_ik - l_iy

The softmax sums leave the target out: with a = log sum_{k != y} exp l_k - l_y,

    nll = softplus(a)    p_other = sigmoid(a)    d nll / d (logit_scale u) = p_other (E'/Z' - n_y)

where Z' = sum_{k != y} exp l_k and E' = sum_{k != y} exp(l_k) n_k. Exponentials stand under a
running maximum ("shift", to base 2), whatever the scale: float16 weights of the values would
underflow under a fixed one. Students and bank come as unit rows, in the operands' dtype, rows
`width` apart, with zeros behind the student's own width (rows.py, products.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import (
    add_to_blocks,
    cosines_of_blocks,
    load_blocks,
    scale_blocks,
    store_blocks,
    zero_blocks,
)
from .rows import MAX_FLOAT32, SMALLEST, load_scale, load_targets, load_weights

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# With half-precision operands exponentials are multiplied by 2^13: the largest stays in float16's
# range, and what is lost below it is 2^-37 of it.
HEADROOM = tl.constexpr(13.0)


@triton.jit
def softplus_of_minus(x):
    """log(1 + exp(-x)) = 2 atanh(e / (2 + e)) for x >= 0 and e = exp(-x), exact when tiny too."""
    e = tl.exp2(-x * LOG2E)
    s = e / (2.0 + e)
    q = s * s
    series = 1.0 / 11 + q * (1.0 / 13 + q * (1.0 / 15))
    series = 1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9 + q * series))
    return 2.0 * s * (1.0 + q * (1.0 / 3 + q * series))


@triton.jit
def targets_kernel(
    u,  # [batch, width] operand
    n,  # [rows, width] operand: bank rows first, first + 1, ...
    target,
    scale,
    l_target,  # [batch] float32
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
    """l_y and n_y of the students whose target is among these bank rows."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    k = load_targets(target, i, i < batch, ignore_index, bank_rows) - first
    mine = (k >= 0) & (k < rows)
    total = tl.zeros([BLOCK_BATCH], tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        w = start + tl.arange(0, BLOCK_WIDTH)
        inside = mine[:, None] & (w < width)[None, :]
        at = i[:, None] * width + w[None, :]
        value = tl.load(n + k[:, None] * width + w[None, :], mask=inside, other=0.0)
        tl.store(n_target + at, value, mask=inside)
        query = tl.load(u + at, mask=inside, other=0.0)
        total += tl.sum(query.to(tl.float32) * value.to(tl.float32), 1)
    tl.store(l_target + i, total * load_scale(scale), mask=mine)


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
def forward_kernel(
    u,  # [batch, width] operand
    n,  # [rows, width] operand: bank rows first, first + 1, ...
    target,  # [batch] int64
    scale,  # [] logit_scale
    shift,  # [splits, batch] float32: of the exponentials, to base 2
    total,  # [splits, batch] float32: sum over k != y of 2^(l - shift)
    values,  # [splits, batch, width] float32: the same, times n
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
    BLOCK_WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,  # of BLOCK_WIDTH columns, of which a program keeps values
    WHOLE: tl.constexpr,  # they are the whole width; else program axis 2 has the others
    BLOCK_INNER: tl.constexpr,  # steps of the logits' sums, where they are not
):
    """Students stand still and the bank passes: sums over the rows of one split (axis 1)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    split = tl.program_id(1).to(tl.int64)
    w0 = tl.program_id(2) * (BLOCKS * BLOCK_WIDTH)
    here = i < batch
    y = load_targets(target, i, here, ignore_index, bank_rows) - first
    to_base_2 = load_scale(scale) * LOG2E
    headroom = HEADROOM if HALF else 0.0

    top = tl.zeros([BLOCK_BATCH], tl.float32) - to_base_2  # l >= -logit_scale
    z = tl.zeros([BLOCK_BATCH], tl.float32)
    if KEEP_VALUES:
        e = zero_blocks(BLOCK_BATCH, BLOCKS, BLOCK_WIDTH)

    split_rows = tl.cdiv(tl.cdiv(rows, tl.num_programs(1)), BLOCK_BANK) * BLOCK_BANK
    start = split * split_rows
    end = tl.minimum(start + split_rows, rows)
    if WHOLE:
        query = load_blocks(u, i, here, width, 0, BLOCKS, BLOCK_WIDTH)
    for k0 in range(start, end, BLOCK_BANK):
        k = k0 + tl.arange(0, BLOCK_BANK)
        if WHOLE:
            tile = load_blocks(n, k, k < end, width, 0, BLOCKS, BLOCK_WIDTH)
            cosines = cosines_of_blocks(query, tile, BLOCKS, PRECISION)
        else:
            cosines = logits_tile(
                u, n, i, k, batch, end, width, PRECISION, BLOCK_BATCH, BLOCK_BANK, BLOCK_INNER
            )
        other = (k < end)[None, :] & (k[None, :] != y[:, None])
        logits = tl.where(other, cosines * to_base_2, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        rescale = tl.exp2(top - new_top)
        p = tl.exp2(logits - (new_top - headroom)[:, None])
        z = z * rescale + tl.sum(p, 1)
        top = new_top
        if KEEP_VALUES:
            if not WHOLE:
                tile = load_blocks(n, k, k < end, width, w0, BLOCKS, BLOCK_WIDTH)
            e = scale_blocks(e, rescale[:, None], BLOCKS)
            e = add_to_blocks(e, p, tile, BLOCKS, PRECISION)

    at = split * batch + i
    if tl.program_id(2) == 0:
        tl.store(shift + at, top - headroom, mask=here)
        tl.store(total + at, z, mask=here)
    if KEEP_VALUES:
        store_blocks(values, e, at, here, width, w0, BLOCKS, BLOCK_WIDTH)


@triton.jit
def joint_shift(shift, i, here, batch, parts, BLOCK_BATCH: tl.constexpr):
    """The largest of the parts' shifts, and so a finite one."""
    top = tl.load(shift + i, mask=here, other=0.0)
    for part in range(1, parts):
        top = tl.maximum(top, tl.load(shift + part * batch + i, mask=here, other=0.0))
    return top


@triton.jit
def joint_total(shift, total, top, i, here, batch, parts, BLOCK_BATCH: tl.constexpr):
    z = tl.zeros([BLOCK_BATCH], tl.float32)
    for part in range(0, parts):
        at = part * batch + i
        factor = tl.exp2(tl.load(shift + at, mask=here, other=0.0) - top)
        z += factor * tl.load(total + at, mask=here, other=0.0)
    return z


@triton.jit
def joint_values(
    shift, values, top, i, here, w, inside, batch, parts, width,
    BLOCK_BATCH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    e = tl.zeros([BLOCK_BATCH, BLOCK_WIDTH], tl.float32)
    for part in range(0, parts):
        at = part * batch + i
        factor = tl.exp2(tl.load(shift + at, mask=here, other=0.0) - top)
        e += factor[:, None] * tl.load(
            values + at[:, None] * width + w[None, :], mask=inside, other=0.0
        )
    return e


@triton.jit
def join_kernel(
    shift,  # [parts + 1, batch]
    total,
    values,  # [parts + 1, batch, width]
    batch,
    parts,
    width,
    HAS_STATE: tl.constexpr,  # the last part holds what earlier parts of the bank left
    KEEP_VALUES: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """The parts become the last one, so that the others are free for the next rows of the bank."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    here = i < batch
    known = parts + 1 if HAS_STATE else parts
    top = joint_shift(shift, i, here, batch, known, BLOCK_BATCH)
    z = joint_total(shift, total, top, i, here, batch, known, BLOCK_BATCH)
    at = parts * batch + i
    if KEEP_VALUES:
        for start in range(0, width, BLOCK_WIDTH):
            w = start + tl.arange(0, BLOCK_WIDTH)
            inside = here[:, None] & (w < width)[None, :]
            e = joint_values(
                shift, values, top, i, here, w, inside, batch, known, width,
                BLOCK_BATCH, BLOCK_WIDTH,
            )  # fmt: skip
            tl.store(values + at[:, None] * width + w[None, :], e, mask=inside)
    tl.debug_barrier()  # every thread has read the shift of the last part
    tl.store(shift + at, top, mask=here)
    tl.store(total + at, z, mask=here)


@triton.jit
def combine_kernel(
    u,  # [batch, width] operand
    target,
    scale,
    shift,  # [splits, batch]
    total,  # [splits, batch]
    values,  # [splits, batch, width]
    l_target,
    n_target,
    n_sum,  # [width] float32 sum of all n, with SMOOTH
    nll,
    lse,
    p_other,
    residual,  # [batch, student_dim]
    attention,  # [batch, student_dim]
    batch,
    splits,
    bank_rows,
    ignore_index,
    label_smoothing,
    width,
    student_dim,
    SMOOTH: tl.constexpr,
    KEEP_RESIDUAL: tl.constexpr,
    KEEP_ATTENTION: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """The splits become one, and the students' results."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    here = i < batch
    column = tl.arange(0, BLOCK_WIDTH)
    top = joint_shift(shift, i, here, batch, splits, BLOCK_BATCH)
    z = joint_total(shift, total, top, i, here, batch, splits, BLOCK_BATCH)
    log_other = (top + tl.log2(z)) * LN2

    raw = tl.load(target + i, mask=here, other=0)
    has_target = here & (raw != ignore_index) & (raw >= 0) & (raw < bank_rows)
    l_y = tl.load(l_target + i, mask=has_target, other=0.0)
    odds = log_other - l_y  # -inf where the target is the whole bank
    distance = tl.abs(odds)
    small = tl.exp2(-distance * LOG2E)
    other = tl.where(has_target, tl.where(odds < 0, small, 1.0) / (1.0 + small), 1.0)
    loss = tl.where(odds < 0, 0.0, odds) + softplus_of_minus(distance)
    tl.store(lse + i, tl.where(has_target, l_y + loss, log_other), mask=here)
    tl.store(p_other + i, other, mask=here)
    if SMOOTH:
        mean = tl.zeros([BLOCK_BATCH], tl.float32)
        for start in range(0, width, BLOCK_WIDTH):
            w = start + column
            inside = here[:, None] & (w < width)[None, :]
            query = tl.load(u + i[:, None] * width + w[None, :], mask=inside, other=0.0)
            n_all = tl.load(n_sum + w, mask=w < width, other=0.0)
            mean += tl.sum(query.to(tl.float32) * n_all[None, :], 1)
        loss += label_smoothing * (l_y - load_scale(scale) * mean / bank_rows)
    without = tl.where(raw == ignore_index, 0.0, float("nan"))
    tl.store(nll + i, tl.where(has_target, loss, without), mask=here)

    if KEEP_RESIDUAL or KEEP_ATTENTION:
        inverse = tl.where(z == 0, 0.0, 1.0 / z)
        for start in range(0, student_dim, BLOCK_WIDTH):
            w = start + column
            inside = here[:, None] & (w < student_dim)[None, :]
            n_other = inverse[:, None] * joint_values(
                shift, values, top, i, here, w, inside, batch, splits, width,
                BLOCK_BATCH, BLOCK_WIDTH,
            )  # fmt: skip
            at_target = inside & has_target[:, None]
            n_y = tl.load(n_target + i[:, None] * width + w[None, :], mask=at_target, other=0.0)
            n_y = n_y.to(tl.float32)
            out_at = i[:, None] * student_dim + w[None, :]
            if KEEP_RESIDUAL:
                slope = other[:, None] * (n_other - n_y)
                if SMOOTH:
                    n_all = tl.load(n_sum + w, mask=w < student_dim, other=0.0)
                    slope += label_smoothing * (n_y - n_all[None, :] / bank_rows)
                slope = tl.where(has_target[:, None], slope, 0.0)
                tl.store(residual + out_at, slope, mask=inside)
            if KEEP_ATTENTION:
                average = other[:, None] * n_other + (1.0 - other)[:, None] * n_y
                tl.store(attention + out_at, average, mask=inside)


@triton.jit
def student_factors_kernel(
    target,
    g,  # [batch] float32 d loss / d nll, g_stride apart; None: zeros
    h,  # [batch] float32 d loss / d lse, h_stride apart; None: zeros
    lse,
    p_other,
    busy,  # [batch] bool: some gradient comes from this student
    column,  # [batch] int32 the target's row of the bank, -1 where there is none
    log2_sum,  # [batch] lse to base 2
    by_p,  # [batch] G_ik / size is by_p p_ik - by_all, and at_target - by_all at the target
    at_target,  # [batch]
    by_all,  # [batch]
    size,  # [1] the largest that G may be but at the target: |g| p_other + |h|
    batch,
    g_stride,
    h_stride,
    ignore_index,
    bank_rows,
    label_smoothing,
    HAS_G: tl.constexpr,
    HAS_H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What the bank's gradient needs of each student, zeros where no gradient comes from: such rows
    may hold NaN. At the target G is h p - g p_other, where nothing cancels."""
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, batch, BLOCK):
        i = (start + tl.arange(0, BLOCK)).to(tl.int64)
        y = load_targets(target, i, i < batch, ignore_index, bank_rows)
        by_g = load_weights(g, i * g_stride, y >= 0, HAS_G, BLOCK)
        by_h = load_weights(h, i * h_stride, i < batch, HAS_H, BLOCK)
        other = tl.load(p_other + i, mask=i < batch, other=0.0)
        of_g = tl.abs(by_g) * tl.maximum(other, label_smoothing)
        largest = tl.maximum(largest, of_g + tl.abs(by_h))
    top = tl.max(largest, 0)
    top = tl.where(top > 0, tl.maximum(top, SMALLEST), top)
    if tl.program_id(0) == 0:
        tl.store(size, top)
    down = tl.where(top > 0, 1.0 / top, 0.0)

    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = i < batch
    y = load_targets(target, i, here, ignore_index, bank_rows)
    by_g = load_weights(g, i * g_stride, y >= 0, HAS_G, BLOCK)
    by_h = load_weights(h, i * h_stride, here, HAS_H, BLOCK)
    is_busy = (by_g != 0) | (by_h != 0)
    other = tl.load(p_other + i, mask=here, other=0.0)
    row_lse = tl.load(lse + i, mask=here, other=0.0)
    target_gradient = (by_h * (1.0 - other) - by_g * (other - label_smoothing)) * down
    tl.store(busy + i, is_busy, mask=here)
    tl.store(column + i, y.to(tl.int32), mask=here)
    tl.store(log2_sum + i, tl.where(is_busy, row_lse * LOG2E, 0.0), mask=here)
    # Large where every row is confident: then it meets probabilities of 0, and 0 inf would be NaN.
    both = (by_g + by_h) * down
    both = tl.where(both > MAX_FLOAT32, MAX_FLOAT32, both)
    both = tl.where(both < -MAX_FLOAT32, -MAX_FLOAT32, both)
    tl.store(by_p + i, both, mask=here)
    tl.store(at_target + i, tl.where(is_busy, target_gradient, 0.0), mask=here)
    tl.store(by_all + i, by_g * (label_smoothing / bank_rows) * down, mask=here)


@triton.jit
def bank_gradient_kernel(
    u,  # [batch, width] operand; zeros where no gradient comes from
    n,  # [rows, width] operand: bank rows first, first + 1, ...
    inverse,  # [rows] 1 / |z|
    scale,
    column,  # [batch], as student_factors_kernel leaves it, and so on
    log2_sum,
    by_p,
    at_target,
    by_all,
    size,
    gradient,  # [rows, width] float32: d z with WHOLE, else d n
    largest_row,  # [rows] max |d z|, with WHOLE
    batch,
    rows,
    first,
    width,
    SMOOTH: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_BANK: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    WHOLE: tl.constexpr,  # as in the forward; else program axis 1 has the other blocks
    BLOCK_INNER: tl.constexpr,
):
    """Bank rows stand still and the students pass: dN = logit_scale sum_i G_i u_i, each row of it
    owned by one program, and with the whole of it at hand dZ = (dN - (dN.n) n) / |z|. G is at most
    2^13 when it becomes half precision, or some row's G would be lost in float16."""
    k = tl.program_id(0).to(tl.int64) * BLOCK_BANK + tl.arange(0, BLOCK_BANK)
    w0 = tl.program_id(1) * (BLOCKS * BLOCK_WIDTH)
    here = k < rows
    factor = load_scale(scale)
    to_base_2 = factor * LOG2E
    headroom = HEADROOM if HALF else 0.0
    lift = 8192.0 if HALF else 1.0
    own = (k + first).to(tl.int32)

    if WHOLE:
        tile = load_blocks(n, k, here, width, 0, BLOCKS, BLOCK_WIDTH)
    total = zero_blocks(BLOCK_BANK, BLOCKS, BLOCK_WIDTH)
    for i0 in range(0, batch, BLOCK_BATCH):
        i = i0 + tl.arange(0, BLOCK_BATCH)
        in_batch = i < batch
        i_long = i.to(tl.int64)
        query = load_blocks(u, i_long, in_batch, width, w0, BLOCKS, BLOCK_WIDTH)
        if WHOLE:
            cosines = cosines_of_blocks(tile, query, BLOCKS, PRECISION)
        else:
            cosines = logits_tile(
                n, u, k, i_long, rows, batch, width, PRECISION, BLOCK_BANK, BLOCK_BATCH, BLOCK_INNER
            )
        above = tl.load(log2_sum + i, mask=in_batch, other=0.0) - headroom
        by = tl.load(by_p + i, mask=in_batch, other=0.0)
        there = tl.load(at_target + i, mask=in_batch, other=0.0) * lift
        y = tl.load(column + i, mask=in_batch, other=-1)
        p = tl.exp2(cosines * to_base_2 - above[None, :])
        d = tl.where(own[:, None] == y[None, :], there[None, :], by[None, :] * p)
        if SMOOTH:
            d -= (tl.load(by_all + i, mask=in_batch, other=0.0) * lift)[None, :]
        total = add_to_blocks(total, d, query, BLOCKS, PRECISION)
    up = factor * tl.load(size) / lift
    if WHOLE:
        # Read again: kept in registers all along, the tile would not leave enough for the sums.
        tile = load_blocks(n, k, here, width, 0, BLOCKS, BLOCK_WIDTH)
        along = tl.sum(total[0] * tile[0].to(tl.float32), 1)
        for block in tl.static_range(1, BLOCKS):
            along += tl.sum(total[block] * tile[block].to(tl.float32), 1)
        scaled = up * tl.load(inverse + k, mask=here, other=0.0)
        w = tl.arange(0, BLOCK_WIDTH)
        highest = tl.zeros([BLOCK_BANK], tl.float32)
        for block in tl.static_range(BLOCKS):
            d_z = total[block] - along[:, None] * tile[block].to(tl.float32)
            d_z *= scaled[:, None]
            highest = tl.maximum(highest, tl.max(tl.abs(d_z), 1))
            at = block * BLOCK_WIDTH + w
            stored = here[:, None] & (at < width)[None, :]
            tl.store(gradient + k[:, None] * width + at[None, :], d_z, mask=stored)
        tl.store(largest_row + k, highest, mask=here)
    else:
        total = scale_blocks(total, up, BLOCKS)
        store_blocks(gradient, total, k, here, width, w0, BLOCKS, BLOCK_WIDTH)
