"""Writing files so that a crash at any moment leaves the old or the new content, never a mixture."""

from __future__ import annotations

import os
from pathlib import Path

TEMPORARY_PREFIX = ".tmp-"


def atomic_write(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path`: temporary name, fsync, rename, fsync of the folder.

    Raises OSError as the system gave it (disk full, permission denied); the file that was there
    before stays as it was, and the temporary one is removed.
    """
    path = Path(path)
    temporary = path.with_name(TEMPORARY_PREFIX + path.name)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fsync_folder(path: str | os.PathLike[str]) -> None:
    """Make renames and deletions inside the folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
