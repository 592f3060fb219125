"""One process at a time: an advisory lock on a folder itself, so that no lock file can stay."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator

# Data workers that a killed process forked share its lock until they notice (they look every
# 5 s), so whoever comes next waits that long before believing in another process.
LOCK_PATIENCE_S = 6.0


@contextlib.contextmanager
def locked_folder(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the lock of an existing folder; the system lets go of it too when the process dies.

    Raises BlockingIOError if another process has it, and OSError as the system gave it.
    """
    owner = os.getpid()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        deadline = time.monotonic() + LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.1)
        yield
    finally:
        # Closing alone would leave the lock with the children that were forked meanwhile. One of
        # those that comes through here must not unlock what its parent still holds.
        if os.getpid() == owner:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)
