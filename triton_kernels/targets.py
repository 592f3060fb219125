"""Weighted targets: sums over the shift of each student's distribution from its target's one-hot.

    forward      sum_m shift_im n_{rows_im}, for every student
    backward     G_ik -= g_i shift_im at k = rows_im, in bank_gradient_kernel

An entry (i, m) has the number i M + m. The backward needs them by bank row: as a matrix where that
is small, else sorted. Blocks are sorted by comparing all pairs, then merged by binary searches:
equal rows stay in order, without atomics. Two short launches, bound by latency up to some 2^16
entries; their work grows with the square of the entries.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The row of entries without a shift, behind all rows of a bank.
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
def load_entry_rows(shift_rows, shift, e, entries):
    """The bank rows of entries e; NOWHERE without a shift and past the end."""
    share = tl.load(shift + e, mask=e < entries, other=0.0)
    return tl.load(shift_rows + e, mask=share != 0, other=NOWHERE).to(tl.int32)


@triton.jit(do_not_specialize=["entries"])
def sort_blocks_kernel(
    shift_rows,  # [entries] int64
    shift,  # [entries] float
    block_rows,  # [blocks, BLOCK] int32: each block's bank rows, sorted
    block_entries,  # [blocks, BLOCK] int32: the entries of these rows
    entries,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    OTHERS: tl.constexpr,  # compared at a time
):
    """A program ranks PART entries among those of their block, by comparison with each."""
    first = tl.program_id(0) * BLOCK
    own = tl.program_id(1) * PART + tl.arange(0, PART)
    row = load_entry_rows(shift_rows, shift, first + own, entries)
    rank = tl.zeros([PART], tl.int32)
    for start in range(0, BLOCK, OTHERS):
        other = start + tl.arange(0, OTHERS)
        theirs = load_entry_rows(shift_rows, shift, first + other, entries)
        # An equal row comes before if its entry does: below row + 1 in place of row.
        limit = row[:, None] + (other[None, :] < own[:, None]).to(tl.int32)
        rank += tl.sum((theirs[None, :] < limit).to(tl.int32), 1)
    tl.store(block_rows + first + rank, row)
    tl.store(block_entries + first + rank, first + own)


@triton.jit(do_not_specialize=["entries", "blocks", "targets"])
def merge_blocks_kernel(
    block_rows,  # [blocks, BLOCK] of sort_blocks_kernel
    block_entries,
    shift,  # [entries] float
    rows,  # [blocks BLOCK] int32: the bank rows of all entries, sorted
    students,  # [blocks BLOCK] int32: their students
    shares,  # [blocks BLOCK] float32: their shifts
    entries,
    blocks,
    targets,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    BLOCKS: tl.constexpr,  # searched at a time
    STEPS: tl.constexpr,  # BLOCK = 2^STEPS
):
    """A program finds the places of PART entries of a block, from their ranks in all blocks."""
    block = tl.program_id(0)
    own = tl.program_id(1) * PART + tl.arange(0, PART)
    row = tl.load(block_rows + block * BLOCK + own)
    rank = own
    for start in range(0, blocks, BLOCKS):
        b = start + tl.arange(0, BLOCKS)
        limit = row[:, None] + (b < block).to(tl.int32)[None, :]  # as in sort_blocks_kernel
        there = ((b < blocks) & (b != block))[None, :]
        at = tl.zeros([PART, BLOCKS], tl.int32)
        for step in tl.static_range(STEPS + 1):
            part = BLOCK >> (step + 1) if step < STEPS else 1
            probe = b[None, :] * BLOCK + at + (part - 1)
            below = tl.load(block_rows + probe, mask=there, other=2**31 - 1) < limit
            at += tl.where(below, part, 0)
        rank += tl.sum(at, 1)
    e = tl.load(block_entries + block * BLOCK + own)
    share = tl.load(shift + e, mask=e < entries, other=0.0).to(tl.float32)
    tl.store(rows + rank, row)
    tl.store(students + rank, e // targets)
    tl.store(shares + rank, share)


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
