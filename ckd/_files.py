"""Writing files so that a crash at any moment leaves the old or the new content, no mixture."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
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
        durable_write(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder that appears at `path`, with all that the block put into it, or not at all.

    Yields the folder to fill, beside `path` under a temporary name; fill it with `durable_write`.
    Raises OSError as the system gave it, also if `path` exists and is not empty; what was there
    before stays as it was, and the temporary folder is removed.
    """
    path = Path(path)
    temporary = path.with_name(TEMPORARY_PREFIX + path.name)
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    try:
        temporary.mkdir()
        yield temporary
        fsync_folder(temporary)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_folder(path.parent)


def durable_write(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` and fsync it: for files under a name that nothing reads yet."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def fsync_folder(path: str | os.PathLike[str]) -> None:
    """Make renames and deletions inside the folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
