"""Sizes of the cache that the forward leaves for the backward; importable without Triton."""

from __future__ import annotations

WIDTH_MULTIPLE = 16  # a projected row fills whole sectors of 32 bytes


def padded(student_dim: int) -> int:
    """The row length of workspaces, in elements."""
    return -(-student_dim // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def reference_bytes(batch: int) -> int:
    """Bytes of two float32 numbers for each student, padded to the alignment of the projected bank,
    which follows them in the cache."""
    return -(-8 * batch // 256) * 256


def cache_bytes(batch: int, bank_rows: int, student_dim: int, half: bool, limit: int) -> int:
    """The size of the cache: with the whole projected bank and its inverse norms if these take at
    most `limit` bytes, else with none of it."""
    bank = bank_rows * (padded(student_dim) * (2 if half else 4) + 4)
    return reference_bytes(batch) + (bank if bank <= limit else 0)
