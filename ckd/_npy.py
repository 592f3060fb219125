"""Checks the header of an array in NumPy's .npy format, which numpy trusts when it allocates."""

from __future__ import annotations

import io
import math
import struct
import tokenize

from numpy.lib import format as npy

HEAD_BYTES = 16 << 10  # more than the longest header that numpy reads
# Errors of numpy's reader on damaged and foreign files. A header is a Python literal.
DAMAGE = (
    *(OSError, EOFError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError),
    *(RuntimeError, SyntaxError, struct.error, tokenize.TokenError),
)


def check_header(head: bytes, size: int) -> None:
    """Raise one of DAMAGE unless an .npy file of `size` bytes, which begins with `head`, may hold
    the array that its header declares."""
    file = io.BytesIO(head[:HEAD_BYTES])
    old = npy.read_magic(file) == (1, 0)
    shape, _, dtype = (npy.read_array_header_1_0 if old else npy.read_array_header_2_0)(file)
    if dtype.hasobject:
        return  # refused by numpy, which says so
    if any(length < 0 for length in shape) or dtype.itemsize == 0:
        raise ValueError(f"its header declares the shape {shape} of {dtype}, which is impossible")
    needed = file.tell() + math.prod(shape) * dtype.itemsize
    if needed > size:
        raise ValueError(
            f"its header declares {dtype} of shape {shape}, {needed:,} bytes, but it has {size:,}"
        )
