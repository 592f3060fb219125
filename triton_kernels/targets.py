"""Weighted targets: sums over the shift of each student's distribution from its target's one-hot.

    before      target, total and shift from the weights (ckd/backends/targets.py)
    forward      sum_m shift_im n_{rows_im}, for every student
    backward     G_ik -= g_i shift_im at k = rows_im, in bank_gradient_kernel

The backward needs the entries (i, m) by bank row: as a matrix where that is small, else sorted.
"""

from __future__ import annotations

import triton
import triton.language as tl

INVALID_WEIGHT = tl.constexpr(-(2**63))  # ckd.backends.interface
# The row of entries whose shift is 0, behind all rows of a bank.
NOWHERE = tl.constexpr(2**31 - 2)


@triton.jit
def load_weights(target, weight, m, targets, bank_rows, ignore_index, inverse):
    """The targets m of a student, whether each has a part in it, whether it is out of range, and
    its weight; without a tensor of weights that is `inverse`, one over their number."""
    y = tl.load(target + m, mask=m < targets, other=0)
    valid = (m < targets) & (y != ignore_index)
    outside = valid & ((y < 0) | (y >= bank_rows))
    if weight is None:
        w = tl.where(valid, inverse, 0.0)
    else:
        w = tl.load(weight + m, mask=valid, other=0.0).to(tl.float32)
    return y, valid, outside, w


@triton.jit(do_not_specialize=["bank_rows", "targets", "ignore_index"])
def split_kernel(
    target,  # [batch, targets] int64
    weight,  # [batch, targets] any float; None: equal weights
    main,  # [batch] int64: the row with the largest weight, or one that the backends refuse
    rows,  # [batch, targets] int64: targets, clamped to the bank; None: no shift is wanted
    shift,  # [batch, targets] float32
    total,  # [batch] float32: the sum of the weights
    kept,  # [batch] float32: 1 for a student with a target, else 0
    bank_rows,
    targets,
    ignore_index,
    keep,  # 1 - label_smoothing
    BLOCK: tl.constexpr,
):
    """A student is a program. Reads the weights once for their sum, and again for the shift."""
    i = tl.program_id(0).to(tl.int64)
    target += i * targets
    if weight is not None:
        weight += i * targets
    inverse = 1.0
    if weight is None:
        number = 0
        for start in range(0, targets, BLOCK):
            m = start + tl.arange(0, BLOCK)
            y, valid, outside, w = load_weights(
                target, weight, m, targets, bank_rows, ignore_index, 1.0
            )
            number += tl.sum(valid.to(tl.int32), 0)
        inverse = 1.0 / tl.maximum(number, 1).to(tl.float32)

    sum_of_weights, largest = 0.0, -1.0
    first, some, invalid = 0, 0, 0
    for start in range(0, targets, BLOCK):
        m = start + tl.arange(0, BLOCK)
        y, valid, outside, w = load_weights(
            target, weight, m, targets, bank_rows, ignore_index, inverse
        )
        some = tl.maximum(some, tl.max(valid.to(tl.int32), 0))
        invalid = tl.maximum(invalid, tl.max((~(w >= 0) & ~outside).to(tl.int32), 0))
        w = tl.where(outside, float("inf"), w)
        sum_of_weights += tl.sum(w, 0)
        best, at = tl.max(tl.where(m < targets, w, -1.0), 0, return_indices=True)
        first = tl.where(best > largest, start + at, first)
        largest = tl.maximum(best, largest)
    y_main = tl.load(target + first)
    valid_main = y_main != ignore_index
    outside_main = valid_main & ((y_main < 0) | (y_main >= bank_rows))
    wrong = (invalid > 0) | ~(sum_of_weights < float("inf"))
    refused = tl.where(outside_main & (invalid == 0), y_main, INVALID_WEIGHT)
    tl.store(main + i, tl.where(wrong, refused, y_main))
    tl.store(total + i, tl.where(wrong, 1.0, sum_of_weights))
    tl.store(kept + i, tl.where(some > 0, 1.0, 0.0))
    if rows is not None:
        divisor = tl.where(wrong | (sum_of_weights == 0), 1.0, sum_of_weights)
        moved = 0.0  # from the main row to others
        for start in range(0, targets, BLOCK):
            m = start + tl.arange(0, BLOCK)
            y, valid, outside, w = load_weights(
                target, weight, m, targets, bank_rows, ignore_index, inverse
            )
            # Entries of the main row have no shift, exactly.
            moved += tl.sum(tl.where(wrong | (y == y_main), 0.0, w / divisor), 0)
        for start in range(0, targets, BLOCK):
            m = start + tl.arange(0, BLOCK)
            y, valid, outside, w = load_weights(
                target, weight, m, targets, bank_rows, ignore_index, inverse
            )
            share = tl.where(wrong | (y == y_main), 0.0, w / divisor)
            share = tl.where(m == first, -moved, share) * keep
            tl.store(shift + i * targets + m, share, mask=m < targets)
            clamped = tl.minimum(tl.maximum(y, 0), bank_rows - 1)
            tl.store(rows + i * targets + m, clamped, mask=m < targets)


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
