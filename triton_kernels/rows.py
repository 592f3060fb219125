"""Row by row: norms, and gradients through them. All bound by memory.

A row whose norm is below MIN_NORM counts as zero, one whose norm overflows float32 is NaN; 1/norm
is 0 and NaN for them. Row numbers are 64-bit before they are multiplied by a stride.
"""

from __future__ import annotations

import triton
import triton.language as tl

MIN_NORM = tl.constexpr(1e-6)
SMALLEST = tl.constexpr(1e-30)  # that a float16 operand's scale may be: its inverse is finite
MAX_FLOAT32 = tl.constexpr(3.4028234663852886e38)  # in float32; a larger literal would be float64


@triton.jit
def load_scale(scale):
    """NaN in place of a scale that the op refuses: the GPU says so without a synchronisation."""
    value = tl.load(scale).to(tl.float32)
    return tl.where((value > 0) & (value < float("inf")), value, float("nan"))


@triton.jit
def load_targets(target, i, here, ignore_index, bank_rows):
    """Bank rows, -1 where there is no target: it is ignored, or out of range."""
    y = tl.load(target + i, mask=here, other=-1)
    return tl.where((y != ignore_index) & (y >= 0) & (y < bank_rows), y, -1)


@triton.jit
def load_weights(x, at, there, HAS_X: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros where there is nothing."""
    weights = tl.zeros([BLOCK], tl.float32)
    if HAS_X:
        weights = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    return weights


@triton.jit
def round_to_tf32(x):
    """The nearest float32 with 10 bits of mantissa, ties to even; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)


@triton.jit
def to_operand(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """float32 as an operand of the matrix units. In tf32 they cut off what does not fit: unrounded,
    every product would be biased towards zero."""
    if PRECISION == "tf32" and dtype == tl.float32:
        return round_to_tf32(x)
    else:
        return x.to(dtype)


@triton.jit
def add_product(total, left, right, PRECISION: tl.constexpr):
    """total + left right. In float32 the product begins at zero: a sum over n rows then has the
    rounding of n / BLOCK additions, not of n."""
    if PRECISION == "ieee" and right.dtype == tl.float32:
        return total + tl.dot(left, right, input_precision=PRECISION)
    else:
        return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def half_scale(largest):
    """A power of two that brings numbers of at most `largest` below 2^11, and its inverse; the
    smallest float16 is 34 binary orders of magnitude below."""
    exponent = tl.floor(tl.log2(tl.maximum(largest, SMALLEST)))
    down = tl.exp2(10.0 - exponent)
    # What is not finite stays so: it meets a scale of 1.
    finite = largest <= MAX_FLOAT32
    return tl.where(finite, down, 1.0), tl.where(finite, tl.exp2(exponent - 10.0), 1.0)


@triton.jit
def inverse_norm(sum_of_squares):
    norm = tl.sqrt(sum_of_squares)
    inverse = tl.where(norm < MIN_NORM, 0.0, 1.0 / norm)
    return tl.where(norm > MAX_FLOAT32, float("nan"), inverse)


@triton.jit(do_not_specialize=["rows"])
def unit_rows_kernel(
    x,  # [rows, width] any float, rows x_stride apart
    unit,  # [rows, unit_width] x / |x|, zeros behind width
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
    scale = inverse_norm(total)
    tl.store(inverse + i, scale, mask=i < rows)
    for start in range(0, unit_width, BLOCK_WIDTH):
        w = start + column
        inside = here[:, None] & (w < width)[None, :]
        value = tl.load(x + i[:, None] * x_stride + w[None, :], mask=inside, other=0.0)
        value = value.to(tl.float32) * scale[:, None]
        stored = (i < rows)[:, None] & (w < unit_width)[None, :]
        at = unit + i[:, None] * unit_width + w[None, :]
        tl.store(at, to_operand(value, unit.dtype.element_ty, PRECISION), mask=stored)


@triton.jit(do_not_specialize=["rows"])
def bank_norm_backward_kernel(
    d_n,  # [rows, width] float32 d loss / d n; becomes d loss / d z
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
    for start in range(0, width, BLOCK_WIDTH):
        w = start + column
        inside = here[:, None] & (w < width)[None, :]
        at = k[:, None] * width + w[None, :]
        unit = tl.load(n + at, mask=inside, other=0.0).to(tl.float32)
        along += tl.sum(tl.load(d_n + at, mask=inside, other=0.0) * unit, 1)
    scale = tl.load(inverse + k, mask=here, other=0.0)
    top = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        w = start + column
        inside = here[:, None] & (w < width)[None, :]
        at = k[:, None] * width + w[None, :]
        unit = tl.load(n + at, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(d_n + at, mask=inside, other=0.0)
        d_z = (d - along[:, None] * unit) * scale[:, None]
        top = tl.maximum(top, tl.max(tl.abs(d_z), 1))
        tl.store(d_n + at, d_z, mask=inside)
    tl.store(largest + k, top, mask=here)


@triton.jit(do_not_specialize=["batch", "ignore_index"])
def mean_kernel(
    nll,  # [batch] float32
    target,
    loss,  # [] the mean over the rows that are not ignored, 0 of none
    kept,  # [] float32: how many they are, at least 1
    batch,
    ignore_index,
    BLOCK: tl.constexpr,
):
    """One program: a step of a small bank is bound by its launches."""
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for start in range(0, batch, BLOCK):
        i = (start + tl.arange(0, BLOCK)).to(tl.int64)
        here = i < batch
        total += tl.load(nll + i, mask=here, other=0.0)
        ignored = tl.load(target + i, mask=here, other=ignore_index) == ignore_index
        count += tl.where(ignored, 0.0, 1.0)
    number = tl.maximum(tl.sum(count, 0), 1.0)
    tl.store(loss, tl.sum(total, 0) / number)
    tl.store(kept, number)


@triton.jit(do_not_specialize=["rows"])
def half_tiles_kernel(
    x,  # [rows, width] float32
    largest,  # [rows] max |x|
    half,  # [rows, width] half precision: x times a power of two for each tile of BLOCK_ROWS
    scales,  # [tiles]: what to multiply `half` with
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


@triton.jit(do_not_specialize=["rows", "g_stride", "h_stride", "ignore_index", "bank_rows"])
def student_gradient_kernel(
    student,  # [rows, width]
    scale,  # [] logit_scale
    target,  # [rows]: g is of account where there is one; None: everywhere
    g,  # [rows], g_stride apart; None: zeros
    h,  # [rows], h_stride apart; None: zeros
    residual,  # [rows, width] float32: slope = g residual + h attention
    attention,
    d_student,  # [rows, width] logit_scale (slope - (slope.u) u) / |s|; None: not asked for
    along,  # [rows] float32 slope.u, whose sum is d logit_scale
    rows,
    width,
    student_stride,
    g_stride,
    h_stride,
    ignore_index,
    bank_rows,
    HAS_TARGET: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_H: tl.constexpr,
    HAS_STUDENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Rows that neither g nor h reaches get zeros, whatever they hold."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    here = i < rows
    has_target = here
    if HAS_TARGET:
        has_target = load_targets(target, i, here, ignore_index, bank_rows) >= 0
    by_g = load_weights(g, i * g_stride, has_target, HAS_G, BLOCK_ROWS)
    by_h = load_weights(h, i * h_stride, here, HAS_H, BLOCK_ROWS)
    busy = here & ((by_g != 0) | (by_h != 0))
    column = tl.arange(0, BLOCK_WIDTH)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    product = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        w = start + column
        inside = busy[:, None] & (w < width)[None, :]
        at = i[:, None] * width + w[None, :]
        s = tl.load(student + i[:, None] * student_stride + w[None, :], mask=inside, other=0.0)
        s = s.to(tl.float32)
        slope = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
        if HAS_G:
            slope += by_g[:, None] * tl.load(residual + at, mask=inside, other=0.0)
        if HAS_H:
            slope += by_h[:, None] * tl.load(attention + at, mask=inside, other=0.0)
        total += tl.sum(s * s, 1)
        product += tl.sum(s * slope, 1)
    inverse = inverse_norm(total)
    by_u = product * inverse
    tl.store(along + i, by_u, mask=here)
    if HAS_STUDENT:
        factor = load_scale(scale) * inverse
        for start in range(0, width, BLOCK_WIDTH):
            w = start + column
            inside = busy[:, None] & (w < width)[None, :]
            at = i[:, None] * width + w[None, :]
            s = tl.load(student + i[:, None] * student_stride + w[None, :], mask=inside, other=0.0)
            u = s.to(tl.float32) * inverse[:, None]
            slope = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
            if HAS_G:
                slope += by_g[:, None] * tl.load(residual + at, mask=inside, other=0.0)
            if HAS_H:
                slope += by_h[:, None] * tl.load(attention + at, mask=inside, other=0.0)
            d = (slope - by_u[:, None] * u) * factor[:, None]
            stored = here[:, None] & (w < width)[None, :]
            tl.store(d_student + at, d.to(d_student.dtype.element_ty), mask=stored)
