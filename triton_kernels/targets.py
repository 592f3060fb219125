"""Weighted targets: sums over the shift of each student's distribution from its target's one-hot.

    forward      sum_m shift_im n_{rows_im}, for every student
    backward     G_ik -= g_i shift_im at k = rows_im, in bank_gradient_kernel

The backward needs the entries (i, m) by bank row: as a matrix where that is small, else sorted.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The row of entries whose shift is 0, behind all rows of a bank.
NOWHERE = tl.constexpr(2**31 - 2)


@triton.jit(do_not_specialize=["rows", "first", "targets"])
def add_shift_kernel(
    n,  # [rows, width] operand: bank rows first, first + 1, ...
    shift_rows,  # [batch, targets] int64
    shift,  # [batch, targets] float
    n_shift,  # [batch, width] float32: the sums over earlier rows, if first is not 0
    rows,
    first,
    targets,
    width,
    BLOCK_TARGETS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Adds shift n_k of one student's entries among these bank rows. Reads a row of n an entry."""
    i = tl.program_id(0).to(tl.int64)
    w = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    at = n_shift + i * width + w
    total = tl.load(at, mask=w < tl.where(first > 0, width, 0), other=0.0)
    for start in range(0, targets, BLOCK_TARGETS):
        m = start + tl.arange(0, BLOCK_TARGETS)
        share = tl.load(shift + i * targets + m, mask=m < targets, other=0.0).to(tl.float32)
        k = tl.load(shift_rows + i * targets + m, mask=m < targets, other=-1) - first
        mine = (k >= 0) & (k < rows) & (share != 0)
        inside = mine[:, None] & (w < width)[None, :]
        value = tl.load(n + k[:, None] * width + w[None, :], mask=inside, other=0.0)
        total += tl.sum(tl.where(mine, share, 0.0)[:, None] * value.to(tl.float32), 0)
    tl.store(at, total, mask=w < width)


@triton.jit(do_not_specialize=["bank_rows", "targets", "columns"])
def shift_matrix_kernel(
    shift_rows,  # [batch, targets] int64
    shift,  # [batch, targets] float
    matrix,  # [bank_rows, columns] float32 zeros; column i becomes the shift of student i
    bank_rows,
    targets,
    columns,
    BLOCK: tl.constexpr,
):
    """A student is a program. Entries that repeat a row store the same sum, in any order."""
    i = tl.program_id(0).to(tl.int64)
    first = i * targets
    for start in range(0, targets, BLOCK):
        m = start + tl.arange(0, BLOCK)
        k = tl.load(shift_rows + first + m, mask=m < targets, other=-1)
        total = tl.zeros([BLOCK], tl.float32)
        for other_start in range(0, targets, BLOCK):
            o = other_start + tl.arange(0, BLOCK)
            same = (
                k[:, None] == tl.load(shift_rows + first + o, mask=o < targets, other=-2)[None, :]
            )
            share = tl.load(shift + first + o, mask=o < targets, other=0.0).to(tl.float32)
            total += tl.sum(tl.where(same, share[None, :], 0.0), 1)
        inside = (k >= 0) & (k < bank_rows)
        tl.store(matrix + k * columns + i, total, mask=inside)


@triton.jit
def count_below(rows, entries, rounds, limits, PARTS: tl.constexpr):
    """How many of the sorted rows are below each of the limits; PARTS^rounds >= entries. Each round
    reads the last row of every part, so that a search takes two or three loads one after another.
    """
    first = limits * 0
    end = first + entries
    for _ in range(rounds):
        size = tl.maximum(tl.cdiv(end - first, PARTS), 1)
        last = first[:, None] + (tl.arange(0, PARTS) + 1)[None, :] * size[:, None] - 1
        below = tl.load(rows + last, mask=last < end[:, None], other=2**31 - 1) < limits[:, None]
        first += tl.sum(below.to(tl.int32), 1) * size
        end = tl.minimum(first + size - 1, end)
    return first
