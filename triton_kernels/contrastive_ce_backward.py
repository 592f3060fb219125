"""Contrastive cross-entropy, backward of the projection: the second pass over the bank.

With p_ik = exp(l_ik - lse_i), g = d loss / d nll and h = d loss / d lse,

    G_ik = (g_i + h_i) p_ik - g_i ([k = y_i] + shift_ik)      dN_k = logit_scale sum_i G_ik u_i
    dZ_k = (dN_k - (dN_k.n_k) n_k) / |z_k|

At the target G is computed as h p - g p_other, where nothing cancels.
Before it is rounded to half precision, G is divided by its upper bound over all students,
|g| (max(p_other, label_smoothing) + sum_m |shift_m| / 2) + |h|, and multiplied by 2^13, so that it
does not underflow for loss weights and losses of any size. log2 |g + h| is part of the exponent and
the sign of g + h part of u, so that an element of G costs a subtraction, one FMA and one exp2. The
shift's part is added to G from a matrix, or to dN as a product of sparse G, 64 or so entries at a
time (targets.py).
Gradients of students and scale come from the forward (rows.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .contrastive_ce import HEADROOM, LOG2E, load_scale_to_base_2, logits_tile
from .rows import (
    MAX_FLOAT32,
    SMALLEST,
    add_product,
    divide,
    half_scale,
    inverse_norm,
    load_gradients,
    load_scale,
    load_targets,
    through_norm,
    to_operand,
)
from .targets import count_below

# Arrays of students are padded to a multiple of this, so that tiles of whole rows need no masks.
STUDENTS_MULTIPLE = tl.constexpr(128)
PARTS = tl.constexpr(256)  # of a round of count_below


@triton.jit(
    do_not_specialize=["batch", "g_stride", "h_stride", "ignore_index", "bank_rows", "parts"]
)
def student_factors_kernel(
    student,  # [batch, student_dim] any float, rows student_stride apart
    scale,
    target,
    g,  # [batch] float32 d loss / d nll, g_stride apart; None: zeros
    h,  # [batch] float32 d loss / d lse, h_stride apart; None: zeros
    kept,  # [] the divisor of g; None: 1
    lse,  # [batch], without a reference
    reference,  # [2, batch] of combine_kernel: a cosine c, and (lse - logit_scale c) log2(e)
    p_other,
    largest,  # [parts] of student_gradient_kernel
    along,  # [parts], with HAS_SCALE
    u,  # [padded, width] operand: unit rows times the sign of g + h
    column,  # [padded] int32 the target's row of the bank, -1 without a target
    rate,  # [padded] logit_scale log2(e), times the sign, which cancels the sign in u
    cosine,  # [padded] the reference's, times the sign: subtracted from those of the bank
    above,  # [padded] (lse - logit_scale cosine) log2(e) - log2(|g + h| / size) - headroom
    at_target,  # [padded] G / size at the target, times the sign
    by_all,  # [padded] label smoothing's term, subtracted from every G / size, times the sign
    by_shift,  # [padded] -g times the sign, the factor of the shift, with SHIFTED
    size,  # [] the largest of `largest`
    d_scale,  # [] the sum of `along`
    batch,
    parts,
    student_dim,
    student_stride,
    width,
    g_stride,
    h_stride,
    ignore_index,
    bank_rows,
    label_smoothing,
    HAS_G: tl.constexpr,
    HAS_H: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    SHIFTED: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Factors of G for each student. Rows without gradient, even if they hold NaN, and rows of the
    padding become zeros."""
    part = tl.arange(0, BLOCK_PARTS)
    tops = tl.zeros([BLOCK_PARTS], tl.float32)
    for start in range(0, parts, BLOCK_PARTS):
        there = start + part < parts
        tops = tl.maximum(tops, tl.load(largest + start + part, mask=there, other=0.0))
    top = tl.max(tops, 0)
    top = tl.where(top > 0, tl.maximum(top, SMALLEST), top)
    if tl.program_id(0) == 0:
        tl.store(size, top)
        if HAS_SCALE:
            by_scale = tl.zeros([BLOCK_PARTS], tl.float32)
            for start in range(0, parts, BLOCK_PARTS):
                by_scale += tl.load(along + start + part, mask=start + part < parts, other=0.0)
            tl.store(d_scale, tl.sum(by_scale, 0))
    down = tl.where(top > 0, 1.0 / top, 0.0)

    i = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    here = i < batch
    y = load_targets(target, i, here, ignore_index, bank_rows)
    by_g, by_h = load_gradients(
        g, h, kept, i, y >= 0, here, g_stride, h_stride, HAS_G, HAS_H, HAS_KEPT, BLOCK_ROWS
    )
    busy = (by_g != 0) | (by_h != 0)
    other = tl.load(p_other + i, mask=here, other=0.0)
    lift = 8192.0 if HALF else 1.0
    headroom = HEADROOM if HALF else 0.0
    both = (by_g + by_h) * down
    sign = tl.where(both < 0, -1.0, 1.0)
    # Overflows if weights are huge and every row is confident: p is 0 there, and G finite.
    magnitude = tl.minimum(tl.abs(both), MAX_FLOAT32, propagate_nan=tl.PropagateNan.ALL)
    if HAS_REFERENCE:
        row_cosine = tl.load(reference + i, mask=here & busy, other=0.0)
        beyond = tl.load(reference + batch + i, mask=here, other=0.0)
    else:
        row_cosine = tl.zeros([BLOCK_ROWS], tl.float32)
        beyond = tl.load(lse + i, mask=here, other=0.0) * LOG2E
    row_above = (beyond - headroom) - tl.log2(magnitude)
    target_gradient = (by_h * (1.0 - other) - by_g * (other - label_smoothing)) * (down * lift)
    tl.store(column + i, y.to(tl.int32))
    tl.store(rate + i, sign * load_scale_to_base_2(scale))
    tl.store(cosine + i, sign * row_cosine)
    tl.store(above + i, tl.where(busy & (magnitude != 0), row_above, float("inf")))
    tl.store(at_target + i, tl.where(busy, sign * target_gradient, 0.0))
    smoothed = by_g * (label_smoothing / bank_rows) * (down * lift)
    tl.store(by_all + i, tl.where(busy, sign * smoothed, 0.0))
    if SHIFTED:
        tl.store(by_shift + i, -sign * by_g)

    here = here & busy
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, student_dim, BLOCK_WIDTH):
        w = start + tl.arange(0, BLOCK_WIDTH)
        inside = here[:, None] & (w < student_dim)[None, :]
        s = tl.load(student + i[:, None] * student_stride + w[None, :], mask=inside, other=0.0)
        total += tl.sum(s.to(tl.float32) * s.to(tl.float32), 1)
    norm, inverse = tl.sqrt_rn(total), inverse_norm(total) * sign
    for start in range(0, width, BLOCK_WIDTH):
        w = start + tl.arange(0, BLOCK_WIDTH)
        inside = here[:, None] & (w < student_dim)[None, :]
        s = tl.load(student + i[:, None] * student_stride + w[None, :], mask=inside, other=0.0)
        # As unit_rows_kernel computes it: p is exp of a difference from the forward's logits.
        operand: tl.constexpr = u.dtype.element_ty
        signed_norm = (norm * sign)[:, None]
        unit = divide(s.to(tl.float32), signed_norm, inverse[:, None], operand, PRECISION)
        unit = to_operand(unit, operand, PRECISION)
        tl.store(u + i[:, None] * width + w[None, :], unit, mask=(w < width)[None, :])


@triton.jit(do_not_specialize=["batch", "rows", "first", "entries", "rounds"])
def bank_gradient_kernel(
    u,  # [padded, width] operand; this and the following, up to size, of student_factors_kernel
    column,
    rate,
    cosine,
    above,
    at_target,
    by_all,
    by_shift,
    size,
    shift_matrix,  # [bank rows, padded] float32 of shift_matrix_kernel, with MATRIX
    entry_rows,  # [entries] int32, sorted (ckd/backends/triton/targets.py)
    entry_students,  # [entries] int32
    entry_shares,  # [entries] float32
    entries,
    rounds,  # of count_below
    n,  # [rows, width] operand: bank rows first, first + 1, ...
    inverse,  # [rows] 1 / |z|
    scale,
    gradient,  # [rows, width] d z with WHOLE, in half precision times a scale; else d n in float32
    scales,  # [programs] with WHOLE and HALF: the inverse of that scale
    sums,  # [programs, width] float32, with HAS_SUMS: sums of d z over a program's rows
    batch,
    rows,
    first,
    width,
    HAS_SUMS: tl.constexpr,
    SMOOTH: tl.constexpr,
    MATRIX: tl.constexpr,
    ENTRIES: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_BANK: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,  # as in the forward; else program axis 1 has the other columns
    FULL: tl.constexpr,  # width == BLOCK_WIDTH
    BLOCK_INNER: tl.constexpr,
):
    """Bank-stationary: a program keeps its bank rows and loops over the students. It owns these
    rows of dN, and with WHOLE turns them into dZ."""
    tl.assume(batch > 0)  # the loop runs: ptxas serialises wgmma in one that may not
    row = tl.program_id(0) * BLOCK_BANK + tl.arange(0, BLOCK_BANK)
    k = row.to(tl.int64)
    here = row < rows
    own = row + first
    w = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = (w < width)[None, :]
    n_at = n + k[:, None] * width + w[None, :]
    n_mask = here[:, None] if FULL else here[:, None] & inside
    if WHOLE:
        tile = tl.load(n_at, mask=n_mask, other=0.0)
    total = tl.zeros([BLOCK_BANK, BLOCK_WIDTH], tl.float32)
    for i0 in range(0, batch, BLOCK_BATCH):
        i = i0 + tl.arange(0, BLOCK_BATCH)
        i_long = i.to(tl.int64)
        u_at = u + i_long[:, None] * width + w[None, :]
        query = tl.load(u_at) if FULL else tl.load(u_at, mask=inside, other=0.0)
        if WHOLE:
            cosines = tl.dot(tile, tl.trans(query), input_precision=PRECISION)
        else:
            cosines = logits_tile(
                n, u, k, i_long, rows, batch, width, PRECISION, BLOCK_BANK, BLOCK_BATCH, BLOCK_INNER
            )
        difference = cosines - tl.load(cosine + i)[None, :]
        d = tl.exp2(tl.fma(difference, tl.load(rate + i)[None, :], -tl.load(above + i)[None, :]))
        there = tl.load(at_target + i)
        d = tl.where(own[:, None] == tl.load(column + i)[None, :], there[None, :], d)
        if SMOOTH:
            d -= tl.load(by_all + i)[None, :]
        d = to_operand(d, query.dtype, PRECISION)
        total = add_product(total, d, query, PRECISION)
    if MATRIX or ENTRIES:
        start, end = 0, batch
        if ENTRIES:
            limits = tl.minimum((tl.program_id(0) + tl.arange(0, 2)) * BLOCK_BANK, rows) + first
            places = count_below(entry_rows, entries, rounds, limits, PARTS)
            start, end = tl.min(places, 0), tl.max(places, 0)
        top = tl.load(size)
        lift = tl.where(top > 0, (8192.0 if HALF else 1.0) / top, 0.0)
        last = tl.maximum(end, start + 1)
        tl.assume(last > start)
        # One stage: with the next turn's operand in registers, ptxas would serialise all wgmma.
        # Of a matrix half as many students a turn, since its tile is in registers.
        turn: tl.constexpr = BLOCK_BATCH // 2 if MATRIX else BLOCK_BATCH
        for e0 in tl.range(start, last, turn, num_stages=1):
            e = e0 + tl.arange(0, turn)
            # (share by_shift) lift: the product of by_shift and lift may overflow.
            if MATRIX:
                i_long = e.to(tl.int64)
                columns = tl.cdiv(batch, STUDENTS_MULTIPLE) * STUDENTS_MULTIPLE
                share_at = shift_matrix + own[:, None] * columns + e[None, :]
                share = tl.load(share_at, mask=here[:, None], other=0.0)
                d = share * tl.load(by_shift + e)[None, :] * lift
            else:
                i_long = tl.load(entry_students + e, mask=e < end, other=0).to(tl.int64)
                share = tl.load(entry_shares + e, mask=e < end, other=0.0)
                value = share * tl.load(by_shift + i_long) * lift
                entry_row = tl.load(entry_rows + e, mask=e < end, other=-1)
                d = tl.where(own[:, None] == entry_row[None, :], value[None, :], 0.0)
            u_at = u + i_long[:, None] * width + w[None, :]
            query = tl.load(u_at) if FULL else tl.load(u_at, mask=inside, other=0.0)
            total = add_product(total, to_operand(d, query.dtype, PRECISION), query, PRECISION)
    up = load_scale(scale) * tl.load(size) / (8192.0 if HALF else 1.0)
    at = k[:, None] * width + w[None, :]
    if WHOLE:
        # Loaded again: a tile kept in registers would not leave enough of them for the sums.
        tile = tl.load(n_at, mask=n_mask, other=0.0).to(tl.float32)
        along, squares = tl.sum(total * tile, 1), tl.sum(tile * tile, 1)
        scaled = up * tl.load(inverse + k, mask=here, other=0.0)
        d_z = through_norm(total, along, squares, tile) * scaled[:, None]
        # Past the bank cosines are 0, which may exceed a student's reference: p may be infinite.
        d_z = tl.where(here[:, None], d_z, 0.0)
        if HAS_SUMS:
            sums_at = sums + tl.program_id(0).to(tl.int64) * width + w
            # The sums of earlier rows of the bank.
            before = tl.load(sums_at, mask=w < tl.where(first > 0, width, 0), other=0.0)
            tl.store(sums_at, before + tl.sum(d_z, 0), mask=w < width)
        if HALF:
            down, back = half_scale(tl.max(tl.max(tl.abs(d_z), 1), 0))
            tl.store(scales + tl.program_id(0), back)
            d_z *= down
        tl.store(gradient + at, d_z.to(gradient.dtype.element_ty), mask=n_mask)
    else:
        tl.store(gradient + at, total * up, mask=n_mask)
