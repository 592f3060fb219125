"""logit_scale u.n for every pair, as a matrix; its gradients are products (products.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from .contrastive_ce import logits_tile
from .rows import load_scale


@triton.jit
def similarity_kernel(
    u,  # [batch, width] operand
    n,  # [rows, width] operand
    scale,
    out,  # [batch, rows] float32, rows out_stride apart
    batch,
    rows,
    width,
    out_stride,
    PRECISION: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_BANK: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    tl.assume(width > 0)  # the loop runs: ptxas serialises wgmma in one that may not
    i = tl.program_id(0).to(tl.int64) * BLOCK_BATCH + tl.arange(0, BLOCK_BATCH)
    k = tl.program_id(1).to(tl.int64) * BLOCK_BANK + tl.arange(0, BLOCK_BANK)
    cosines = logits_tile(
        u, n, i, k, batch, rows, width, PRECISION, BLOCK_BATCH, BLOCK_BANK, BLOCK_INNER
    )
    at = out + i[:, None] * out_stride + k[None, :]
    tl.store(at, cosines * load_scale(scale), mask=(i < batch)[:, None] & (k < rows)[None, :])
