"""Matrix products around the loss: the bank through the projection, and sums over many rows.

Operands of the matrix units are half precision where the caller allows it, else float32 with
PRECISION "ieee" or "tf32"; sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import SMALLEST, inverse_norm

# A float32 operand is scaled so that its largest element is this before it becomes half precision:
# 34 binary orders of magnitude then lie between it and the smallest float16.
HALF_TOP = tl.constexpr(1024.0)


@triton.jit
def project_kernel(
    bank,  # [rows, dim] rows bank_stride apart
    weight,  # [width, dim] operand
    bias,  # [width] float32
    z,  # [rows, z_width] float32; with FUSED n = z / |z| in its own dtype, zeros behind width
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
        total = tl.dot(t.to(p.dtype), p, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + w, mask=inside, other=0.0)[None, :]
    if FUSED:
        scale = inverse_norm(tl.sum(total * total, 1))
        tl.store(inverse + k, scale, mask=here)
        total *= scale[:, None]
    at = z + k[:, None] * z_width + w[None, :]
    stored = here[:, None] & (w < z_width)[None, :]
    tl.store(at, total.to(z.dtype.element_ty), mask=stored)


@triton.jit
def product_kernel(
    a,  # float32, element (m, s) at m a_m + s a_s
    b,  # [sums, columns] rows b_stride apart
    largest,  # float32 max |a| of each row, largest_stride apart: by it a becomes half precision
    out,  # [splits, rows, columns] float32; added to, but by the first call
    rows,
    columns,
    sums,
    a_m,
    a_s,
    b_stride,
    largest_stride,  # 0: one for all rows
    ADD: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_SUMS: tl.constexpr,
):
    """out = a b, with the sum cut into parts that each program owns: no atomics."""
    m = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    c = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    split = tl.program_id(2).to(tl.int64)
    split_sums = tl.cdiv(tl.cdiv(sums, tl.num_programs(2)), BLOCK_SUMS) * BLOCK_SUMS
    first = split * split_sums
    end = tl.minimum(first + split_sums, sums)
    m_long = m.to(tl.int64)
    if HALF:
        top = tl.load(largest + m_long * largest_stride, mask=m < rows, other=1.0)
        top = tl.where(top > 0, tl.maximum(top, SMALLEST), top)
        down = tl.where(top > 0, HALF_TOP / top, 0.0)
        up = top / HALF_TOP
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(first, end, BLOCK_SUMS):
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
        total = tl.dot(left.to(OPERAND), right.to(OPERAND), total, input_precision=PRECISION)
    if HALF:
        total *= up[:, None]
    at = out + (split * rows + m_long[:, None]) * columns + c[None, :]
    stored = (m < rows)[:, None] & (c < columns)[None, :]
    if ADD:
        total += tl.load(at, mask=stored, other=0.0)
    tl.store(at, total, mask=stored)
