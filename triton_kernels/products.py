"""Matrix products around the loss: the bank's projection, and products that sum over many rows.

Operands are half precision if the caller allows it, else float32 with PRECISION "ieee" or "tf32";
sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import SMALLEST, add_product, divide, inverse_norm, to_operand

# Before a float32 operand is rounded to half precision it is scaled so that its largest element is
# this: 2^34 times the smallest float16.
HALF_TOP = tl.constexpr(1024.0)


@triton.jit(do_not_specialize=["rows"])
def project_kernel(
    bank,  # [rows, dim] rows bank_stride apart
    weight,  # [width, dim] operand
    bias,  # [width] float32
    z,  # [rows, z_width] float32; with FUSED n = z / |z| in its own dtype, zeros past width
    inverse,  # [rows] float32 1 / |z|, with FUSED
    rows,
    dim,
    width,
    bank_stride,
    z_width,
    HAS_BIAS: tl.constexpr,
    FUSED: tl.constexpr,  # one program has whole rows: BLOCK_WIDTH >= z_width
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    tl.assume(dim > 0)  # the loop runs: ptxas serialises wgmma in one that may not
    k = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    w = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    column = tl.arange(0, BLOCK_DIM)
    here, inside = k < rows, w < width
    total = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    for start in range(0, dim, BLOCK_DIM):
        d = start + column
        t = tl.load(
            bank + k[:, None] * bank_stride + d[None, :],
            mask=here[:, None] & (d < dim)[None, :],
            other=0.0,
        )
        p = tl.load(
            weight + w[None, :].to(tl.int64) * dim + d[:, None],
            mask=inside[None, :] & (d < dim)[:, None],
            other=0.0,
        )
        t = to_operand(t.to(p.dtype), p.dtype, PRECISION)
        p = to_operand(p, p.dtype, PRECISION)
        total = tl.dot(t, p, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + w, mask=inside, other=0.0)[None, :]
    if FUSED:
        squares = tl.sum(total * total, 1)
        scale = inverse_norm(squares)
        tl.store(inverse + k, scale, mask=here)
        norm = tl.sqrt_rn(squares)
        total = divide(total, norm[:, None], scale[:, None], z.dtype.element_ty, PRECISION)
    at = z + k[:, None] * z_width + w[None, :]
    stored = here[:, None] & (w < z_width)[None, :]
    tl.store(at, to_operand(total, z.dtype.element_ty, PRECISION if FUSED else "ieee"), mask=stored)


@triton.jit(do_not_specialize=["sums"])
def product_kernel(
    a,  # float32, element (m, s) at m a_m + s a_s
    b,  # [sums, columns] rows b_stride apart
    largest,  # [rows] float32 max |a|: the scale of a in half precision, with HALF
    out,  # [splits, rows, columns] float32; with ADD added to, else written
    rows,
    columns,
    sums,
    a_m,
    a_s,
    b_stride,
    ADD: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_SUMS: tl.constexpr,
):
    """out = a b; each program owns its split of the sum, so that there are no atomics."""
    m = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    c = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    split = tl.program_id(2).to(tl.int64)
    split_sums = tl.cdiv(tl.cdiv(sums, tl.num_programs(2)), BLOCK_SUMS) * BLOCK_SUMS
    first = split * split_sums
    end = tl.minimum(first + split_sums, sums)
    last = tl.maximum(end, first + 1)
    tl.assume(last > first)
    m_long = m.to(tl.int64)
    if HALF:
        top = tl.load(largest + m_long, mask=m < rows, other=1.0)
        top = tl.where(top > 0, tl.maximum(top, SMALLEST), top)
        down = tl.where(top > 0, HALF_TOP / top, 0.0)
        up = top / HALF_TOP
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(first, last, BLOCK_SUMS):
        s = start + tl.arange(0, BLOCK_SUMS)
        left = tl.load(
            a + m_long[:, None] * a_m + s[None, :] * a_s,
            mask=(m < rows)[:, None] & (s < end)[None, :],
            other=0.0,
        )
        right = tl.load(
            b + s[:, None] * b_stride + c[None, :],
            mask=(s < end)[:, None] & (c < columns)[None, :],
            other=0.0,
        )
        if HALF:
            left = left * down[:, None]
        left = to_operand(left, OPERAND, PRECISION)
        right = to_operand(right.to(OPERAND), OPERAND, PRECISION)
        total = add_product(total, left, right, PRECISION)
    if HALF:
        total *= up[:, None]
    at = out + (split * rows + m_long[:, None]) * columns + c[None, :]
    stored = (m < rows)[:, None] & (c < columns)[None, :]
    if ADD:
        total += tl.load(at, mask=stored, other=0.0)
    tl.store(at, total, mask=stored)


@triton.jit(do_not_specialize=["rows", "add", "sums_rows"])
def weight_gradient_kernel(
    d_z,  # [rows, width] half precision
    scales,  # [tiles of BLOCK_SUMS rows]: factors of d_z
    t,  # [rows, columns] bank rows, t_stride apart
    out,  # [splits, student_dim, columns] float32; added to where `add` is 1, written where it is 0
    sums,  # [sums_rows, width] float32, with HAS_SUMS
    d_bias,  # [student_dim] float32: sums over the rows of `sums`, if it has any
    rows,
    width,
    student_dim,
    columns,
    t_stride,
    add,
    sums_rows,
    HAS_SUMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_SUMS: tl.constexpr,
):
    """out = d_z^T t; each program owns its split of the sum, so that there are no atomics. A tile's
    product is accumulated from zero and then added, since tensor cores truncate long sums. d_bias
    is computed here too, since a step with a small bank is bound by its launches."""
    m = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    c = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    split = tl.program_id(2)
    tiles = tl.cdiv(rows, BLOCK_SUMS)
    split_tiles = tl.cdiv(tiles, tl.num_programs(2))
    first = split * split_tiles
    last = tl.maximum(tl.minimum(first + split_tiles, tiles), first + 1)
    tl.assume(last > first)
    in_rows, in_columns = m < student_dim, c < columns
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for tile in range(first, last):
        k = (tile * BLOCK_SUMS + tl.arange(0, BLOCK_SUMS)).to(tl.int64)
        left = tl.load(
            d_z + k[None, :] * width + m[:, None],
            mask=in_rows[:, None] & (k < rows)[None, :],
            other=0.0,
        )
        right = tl.load(
            t + k[:, None] * t_stride + c[None, :],
            mask=(k < rows)[:, None] & in_columns[None, :],
            other=0.0,
        )
        scale = tl.load(scales + tile, mask=tile < tiles, other=0.0)
        total += tl.dot(left, right.to(left.dtype)) * scale
    at = out + (split.to(tl.int64) * student_dim + m[:, None]) * columns + c[None, :]
    stored = in_rows[:, None] & in_columns[None, :]
    before = (m < tl.where(add != 0, student_dim, 0))[:, None] & in_columns[None, :]
    total += tl.load(at, mask=before, other=0.0)
    tl.store(at, total, mask=stored)
    if HAS_SUMS:  # noqa: SIM102 (a compile-time constant)
        if (sums_rows > 0) & (tl.program_id(1) + split == 0):
            total_sums = tl.zeros([BLOCK_ROWS], tl.float32)
            for start in range(0, sums_rows, 32):
                row = start + tl.arange(0, 32)
                there = (row < sums_rows)[:, None] & in_rows[None, :]
                sums_at = sums + row.to(tl.int64)[:, None] * width + m[None, :]
                total_sums += tl.sum(tl.load(sums_at, mask=there, other=0.0), 0)
            tl.store(d_bias + m, total_sums, mask=in_rows)
