"""Sizes of what the forward leaves for the backward; no Triton is needed to know them."""

from __future__ import annotations

WIDTH_MULTIPLE = 16  # rows of the projected bank are whole 32-byte sectors


def padded(student_dim: int) -> int:
    """The row length of workspaces."""
    return -(-student_dim // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def reference_bytes(batch: int) -> int:
    """Two float32 numbers for each student, at the start of the cache; a multiple of the alignment
    of the bank behind them."""
    return -(-8 * batch // 256) * 256


def cache_bytes(batch: int, bank_rows: int, student_dim: int, half: bool, limit: int) -> int:
    """With room for the whole projected bank and its inverse norms, or for none of it."""
    bank = bank_rows * (padded(student_dim) * (2 if half else 4) + 4)
    return reference_bytes(batch) + (bank if bank <= limit else 0)
