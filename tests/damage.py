"""Damaged files, and .npy files whose header says what it likes."""

from __future__ import annotations

import random
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager


def npy(descr: object, shape: object, data: bytes = b"", *, fortran: bool = False) -> bytes:
    """An .npy file of any header and any data."""
    header = f"{{'descr': {descr!r}, 'fortran_order': {fortran}, 'shape': {shape!r}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def damaged(data: bytes, draw: random.Random) -> bytes:
    """`data` with a part changed, lost or added; half of the time near an end, where the structure
    of most formats is."""
    end = draw.choice([60, 900, len(data), len(data)])
    at = draw.randrange(min(end, len(data)))
    at = draw.choice([at, len(data) - 1 - at])
    some = draw.choice([1, 2, 4, 8])
    part = draw.choice(
        [draw.randbytes(some), b"\xff" * some, bytes(some), bytes([data[at] ^ 1 << some - 1])]
    )
    kind = draw.choice(["changed", "changed", "changed", "cut", "lost", "more"])
    if kind == "cut":
        return data[:at]
    skipped = {"changed": len(part), "lost": some, "more": 0}[kind]
    return data[:at] + (b"" if kind == "lost" else part) + data[at + skipped :]


@contextmanager
def deadline(seconds: int = 10) -> Iterator[None]:
    """Interrupt the tests if the block takes longer: it hangs, in no code that catches errors."""

    def late(*_: object) -> None:
        raise KeyboardInterrupt(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
