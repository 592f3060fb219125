"""Rows as tuples of blocks of columns, so that a width need not be a power of two, nor one tile."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_blocks(x, row, there, width, first, BLOCKS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Rows of x [, width] as a tuple of blocks of BLOCK_WIDTH columns, from column `first` on."""
    w = first + tl.arange(0, BLOCK_WIDTH)
    at = x + row[:, None] * width + w[None, :]
    blocks = (tl.load(at, mask=there[:, None] & (w < width)[None, :], other=0.0),)
    for block in tl.static_range(1, BLOCKS):
        offset = block * BLOCK_WIDTH
        inside = there[:, None] & (w + offset < width)[None, :]
        blocks = blocks + (tl.load(at + offset, mask=inside, other=0.0),)
    return blocks


@triton.jit
def store_blocks(
    x, blocks, row, there, width, first, BLOCKS: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    w = first + tl.arange(0, BLOCK_WIDTH)
    for block in tl.static_range(BLOCKS):
        offset = block * BLOCK_WIDTH
        inside = there[:, None] & (w + offset < width)[None, :]
        tl.store(x + row[:, None] * width + (w + offset)[None, :], blocks[block], mask=inside)


@triton.jit
def zero_blocks(ROWS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    blocks = (tl.zeros([ROWS, BLOCK_WIDTH], tl.float32),)
    for _ in tl.static_range(1, BLOCKS):
        blocks = blocks + (tl.zeros([ROWS, BLOCK_WIDTH], tl.float32),)
    return blocks


@triton.jit
def cosines_of_blocks(left, right, BLOCKS: tl.constexpr, PRECISION: tl.constexpr):
    total = tl.dot(left[0], tl.trans(right[0]), input_precision=PRECISION)
    for block in tl.static_range(1, BLOCKS):
        total = tl.dot(left[block], tl.trans(right[block]), total, input_precision=PRECISION)
    return total


@triton.jit
def add_to_blocks(total, left, right, BLOCKS: tl.constexpr, PRECISION: tl.constexpr):
    """total + left right, by blocks of right's columns."""
    left = left.to(right[0].dtype)
    blocks = (tl.dot(left, right[0], total[0], input_precision=PRECISION),)
    for block in tl.static_range(1, BLOCKS):
        blocks = blocks + (tl.dot(left, right[block], total[block], input_precision=PRECISION),)
    return blocks


@triton.jit
def scale_blocks(blocks, factor, BLOCKS: tl.constexpr):
    scaled = (blocks[0] * factor,)
    for block in tl.static_range(1, BLOCKS):
        scaled = scaled + (blocks[block] * factor,)
    return scaled
