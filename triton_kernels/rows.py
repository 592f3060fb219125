"""Kernels over rows: norms, and gradients through them. All are bound by memory.

A row whose norm is below MIN_NORM counts as zero, one whose norm overflows float32 is NaN; 1/norm
is 0 and NaN for them. Row numbers are 64-bit before they are multiplied by a stride.
"""

from __future__ import annotations

import triton
import triton.language as tl

MIN_NORM = tl.constexpr(1e-6)
SMALLEST = tl.constexpr(1e-30)  # the least scale of a float16 operand: its inverse is finite
MAX_LOGIT_SCALE = tl.constexpr(2.0**100)
MAX_FLOAT32 = tl.constexpr(3.4028234663852886e38)  # in float32; a larger literal would be float64


@triton.jit
def load_scale(scale):
    """The scale; NaN for one that the op refuses: an error would need a synchronisation."""
    value = tl.load(scale).to(tl.float32)
    return tl.where((value > 0) & (value <= MAX_LOGIT_SCALE), value, float("nan"))


@triton.jit
def load_targets(target, i, here, ignore_index, bank_rows):
    """The targets' bank rows; -1 for a target that is ignored or out of range."""
    y = tl.load(target + i, mask=here, other=-1)
    return tl.where((y != ignore_index) & (y >= 0) & (y < bank_rows), y, -1)


@triton.jit
def load_gradients(
    g, h, kept, i, has_target, here, g_stride, h_stride,
    HAS_G: tl.constexpr, HAS_H: tl.constexpr, HAS_KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d loss / d nll, 0 without a target, and d loss / d lse, of students i. `g` is d loss / d nll,
    or with HAS_KEPT d loss / d mean, where the mean is over `kept` students."""
    by_g = tl.zeros([BLOCK], tl.float32)
    by_h = tl.zeros([BLOCK], tl.float32)
    if HAS_G:
        by_g = tl.load(g + i * g_stride, mask=has_target, other=0.0).to(tl.float32)
        if HAS_KEPT:
            by_g = tl.div_rn(by_g, tl.load(kept))
    if HAS_H:
        by_h = tl.load(h + i * h_stride, mask=here, other=0.0).to(tl.float32)
    return by_g, by_h


@triton.jit
def round_to_tf32(x):
    """The nearest float32 with 10 bits of mantissa, ties to even; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)


@triton.jit
def to_operand(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Rounds float32 to an operand of tensor cores. They truncate float32 to tf32: without rounding
    first, every product would be biased towards zero."""
    if PRECISION == "tf32" and dtype == tl.float32:
        return round_to_tf32(x)
    else:
        return x.to(dtype)


@triton.jit
def add_product(total, left, right, PRECISION: tl.constexpr):
    """total + left right. In float32 the product is computed by itself and then added: a sum over n
    rows in blocks of BLOCK rounds the total n / BLOCK times, not n times."""
    if PRECISION == "ieee" and right.dtype == tl.float32:
        return total + tl.dot(left, right, input_precision=PRECISION)
    else:
        return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def half_scale(largest):
    """A power of two that scales `largest` to between 2^10 and 2^11, 2^34 times the smallest
    float16, and its inverse."""
    exponent = tl.floor(tl.log2(tl.maximum(largest, SMALLEST)))
    down = tl.exp2(10.0 - exponent)
    # 1 for infinity and NaN, which must stay as they are.
    finite = largest <= MAX_FLOAT32
    return tl.where(finite, down, 1.0), tl.where(finite, tl.exp2(exponent - 10.0), 1.0)


@triton.jit
def inverse_norm(sum_of_squares):
    norm = tl.sqrt_rn(sum_of_squares)
    inverse = tl.where(norm < MIN_NORM, 0.0, tl.div_rn(1.0, norm))
    return tl.where(norm > MAX_FLOAT32, float("nan"), inverse)


@triton.jit
def divide(x, norm, inverse, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """x / norm for a float32 operand, so that rows of one element are exactly +-1; an operand that
    is rounded further is x inverse."""
    quotient = x * inverse
    if PRECISION == "ieee" and dtype == tl.float32:
        return tl.fma(tl.fma(-quotient, norm, x), inverse, quotient)
    else:
        return quotient


@triton.jit
def through_norm(d, along, squares, unit):
    """d - (d.unit) unit, for the rows' sums along = d.unit and squares = unit.unit. Division by
    squares, which rounding keeps from 1, removes all of d along unit, however large."""
    along = tl.div_rn(along, tl.where(squares == 0, 1.0, squares))
    return d - along[:, None] * unit


@triton.jit(do_not_specialize=["rows"])
def unit_rows_kernel(
    x,  # [rows, width] any float, rows x_stride apart
    unit,  # [rows, unit_width] x / |x|, zeros past width
    inverse,  # [rows] float32 1 / |x|
    rows,
    width,
    x_stride,
    unit_width,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    here = i < rows
    column = tl.arange(0, BLOCK_WIDTH)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        w = start + column
        inside = here[:, None] & (w < width)[None, :]
        value = tl.load(x + i[:, None] * x_stride + w[None, :], mask=inside, other=0.0)
        value = value.to(tl.float32)
        total += tl.sum(value * value, 1)
    norm, scale = tl.sqrt_rn(total), inverse_norm(total)
    tl.store(inverse + i, scale, mask=i < rows)
    for start in range(0, unit_width, BLOCK_WIDTH):
        w = start + column
        inside = here[:, None] & (w < width)[None, :]
        value = tl.load(x + i[:, None] * x_stride + w[None, :], mask=inside, other=0.0)
        operand: tl.constexpr = unit.dtype.element_ty
        value = divide(value.to(tl.float32), norm[:, None], scale[:, None], operand, PRECISION)
        stored = (i < rows)[:, None] & (w < unit_width)[None, :]
        at = unit + i[:, None] * unit_width + w[None, :]
        tl.store(at, to_operand(value, operand, PRECISION), mask=stored)


@triton.jit(do_not_specialize=["rows"])
def bank_norm_backward_kernel(
    d_n,  # [rows, width] float32 d loss / d n; overwritten with d loss / d z
    n,  # [rows, width] z / |z|
    inverse,  # [rows] 1 / |z|
    largest,  # [rows] max |d z|
    rows,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    here = k < rows
    column = tl.arange(0, BLOCK_WIDTH)
    along = tl.zeros([BLOCK_ROWS], tl.float32)
    squares = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        w = start + column
        inside = here[:, None] & (w < width)[None, :]
        at = k[:, None] * width + w[None, :]
        unit = tl.load(n + at, mask=inside, other=0.0).to(tl.float32)
        along += tl.sum(tl.load(d_n + at, mask=inside, other=0.0) * unit, 1)
        squares += tl.sum(unit * unit, 1)
    scale = tl.load(inverse + k, mask=here, other=0.0)
    top = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        w = start + column
        inside = here[:, None] & (w < width)[None, :]
        at = k[:, None] * width + w[None, :]
        unit = tl.load(n + at, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(d_n + at, mask=inside, other=0.0)
        d_z = through_norm(d, along, squares, unit) * scale[:, None]
        top = tl.maximum(top, tl.max(tl.abs(d_z), 1))
        tl.store(d_n + at, d_z, mask=inside)
    tl.store(largest + k, top, mask=here)


@triton.jit(do_not_specialize=["rows"])
def half_tiles_kernel(
    x,  # [rows, width] float32
    largest,  # [rows] max |x|
    half,  # [rows, width] half precision: x times a power of two for each tile of BLOCK_ROWS
    scales,  # [tiles]: the inverse of that power
    rows,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    w = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = (k < rows)[:, None] & (w < width)[None, :]
    down, back = half_scale(tl.max(tl.load(largest + k, mask=k < rows, other=0.0), 0))
    if tl.program_id(1) == 0:
        tl.store(scales + tl.program_id(0), back)
    at = k[:, None] * width + w[None, :]
    value = tl.load(x + at, mask=inside, other=0.0) * down
    tl.store(half + at, value.to(half.dtype.element_ty), mask=inside)


@triton.jit
def load_slope(
    residual, attention, by_g, by_h, i, w, width, inside,
    HAS_G: tl.constexpr, HAS_H: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """by_g residual + by_h attention, of rows i and columns w."""
    at = i[:, None] * width + w[None, :]
    slope = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    if HAS_G:
        slope += by_g[:, None] * tl.load(residual + at, mask=inside, other=0.0)
    if HAS_H:
        slope += by_h[:, None] * tl.load(attention + at, mask=inside, other=0.0)
    return slope


@triton.jit(
    do_not_specialize=["rows", "g_stride", "h_stride", "ignore_index", "bank_rows", "targets"]
)
def student_gradient_kernel(
    student,  # [rows, width]
    scale,  # [] logit_scale
    target,  # [rows]: g applies only to rows with a valid target; None: to all rows
    g,  # [rows], g_stride apart; None: zeros
    h,  # [rows], h_stride apart; None: zeros
    kept,  # [] the divisor of g; None: 1
    residual,  # [rows, width] float32: slope = g residual + h attention
    attention,
    p_other,  # [rows]
    shift,  # [rows, targets] float, whose rows sum to 0, with SHIFTED
    d_student,  # [rows, width] logit_scale (slope - (slope.u) u) / |s|, with HAS_STUDENT
    along,  # [programs] float32 sums of slope.u over a program's rows; their sum is d logit_scale
    largest,  # [programs] a bound on |G| (contrastive_ce_backward.py), of a program's rows
    rows,
    width,
    student_stride,
    g_stride,
    h_stride,
    ignore_index,
    bank_rows,
    targets,
    label_smoothing,
    HAS_TARGET: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_H: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    HAS_SLOPE: tl.constexpr,  # d_student or along is needed
    HAS_STUDENT: tl.constexpr,
    HAS_BOUND: tl.constexpr,  # largest is needed
    SHIFTED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Rows whose g and h are zero get zeros, even if they hold NaN. A grid-stride loop over blocks
    of rows bounds the number of programs, and so of partial sums and maxima, for any batch."""
    column = tl.arange(0, BLOCK_WIDTH)
    top = tl.zeros([BLOCK_ROWS], tl.float32)
    by_scale = tl.zeros([BLOCK_ROWS], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0)):
        i = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        here = i < rows
        has_target = here
        if HAS_TARGET:
            has_target = load_targets(target, i, here, ignore_index, bank_rows) >= 0
        by_g, by_h = load_gradients(
            g, h, kept, i, has_target, here, g_stride, h_stride, HAS_G, HAS_H, HAS_KEPT, BLOCK_ROWS
        )
        if HAS_BOUND:
            other = tl.load(p_other + i, mask=here, other=0.0)
            share = tl.maximum(other, label_smoothing)
            if SHIFTED:  # entries of one row add up to at most half of all magnitudes
                magnitudes = tl.zeros([BLOCK_ROWS, 32], tl.float32)
                for start in range(0, targets, 32):
                    m = start + tl.arange(0, 32)
                    there = here[:, None] & (m < targets)[None, :]
                    at = shift + i[:, None] * targets + m[None, :]
                    magnitudes += tl.abs(tl.load(at, mask=there, other=0.0).to(tl.float32))
                share += 0.5 * tl.sum(magnitudes, 1)
            bound = tl.abs(by_g) * share + tl.abs(by_h)
            top = tl.maximum(top, bound)
        busy = here & ((by_g != 0) | (by_h != 0))
        total = tl.zeros([BLOCK_ROWS], tl.float32)
        product = tl.zeros([BLOCK_ROWS], tl.float32)
        if HAS_SLOPE:
            for start in range(0, width, BLOCK_WIDTH):
                w = start + column
                inside = busy[:, None] & (w < width)[None, :]
                s_at = student + i[:, None] * student_stride + w[None, :]
                s = tl.load(s_at, mask=inside, other=0.0).to(tl.float32)
                slope = load_slope(
                    residual, attention, by_g, by_h, i, w, width, inside,
                    HAS_G, HAS_H, BLOCK_ROWS, BLOCK_WIDTH,
                )  # fmt: skip
                total += tl.sum(s * s, 1)
                product += tl.sum(s * slope, 1)
        inverse = inverse_norm(total)
        by_u = product * inverse
        by_scale += by_u
        if HAS_STUDENT:
            factor = load_scale(scale) * inverse
            for start in range(0, width, BLOCK_WIDTH):
                w = start + column
                inside = busy[:, None] & (w < width)[None, :]
                s_at = student + i[:, None] * student_stride + w[None, :]
                s = tl.load(s_at, mask=inside, other=0.0).to(tl.float32)
                slope = load_slope(
                    residual, attention, by_g, by_h, i, w, width, inside,
                    HAS_G, HAS_H, BLOCK_ROWS, BLOCK_WIDTH,
                )  # fmt: skip
                d = through_norm(slope, product, total, s) * factor[:, None]
                stored = here[:, None] & (w < width)[None, :]
                at = i[:, None] * width + w[None, :]
                tl.store(d_student + at, d.to(d_student.dtype.element_ty), mask=stored)
    if HAS_SLOPE:
        tl.store(along + tl.program_id(0), tl.sum(by_scale, 0))
    if HAS_BOUND:
        tl.store(largest + tl.program_id(0), tl.max(top, 0))
