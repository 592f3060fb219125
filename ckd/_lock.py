"""An exclusive flock on a folder: there is no lock file that a killed process could leave."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator

# Forked data workers share the lock and outlive a killed parent by up to 5 s (the interval at which
# they check it), so a process waits longer than that before it reports the lock as taken.
LOCK_PATIENCE_S = 6.0


@contextlib.contextmanager
def locked_folder(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the lock of an existing folder; the system also releases it when the process dies.

    Raises BlockingIOError if another process holds it for LOCK_PATIENCE_S, or the system's OSError.
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
        # Forked children share the open file, so close() alone would not release the lock. A child
        # that leaves this block itself must not release its parent's lock.
        if os.getpid() == owner:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)
