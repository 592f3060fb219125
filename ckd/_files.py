"""Paths, guarded reads, files of names, and atomic, durable writes: a crash leaves the old or the
new content."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

TEMPORARY_PREFIX = ".tmp-"
# Errors of file systems that cannot open or sync a folder (vboxsf, some SMB and FUSE mounts).
_NO_FOLDER_SYNC = {
    *(errno.EINVAL, errno.EBADF, errno.EACCES, errno.EISDIR),
    *(errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP),
}
_LFS_START = b"version https://git-lfs"
LFS_POINTER = "it is a Git LFS pointer, not the file itself: fetch the file with git lfs pull"
_LINES_LIMIT = 64 << 20  # bytes of a file of names: a million names of 64 bytes
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}


def user_path(path: str | os.PathLike[str]) -> Path:
    """`path` with a leading `~` or `~user` replaced by the home folder, as a shell does it.

    A shell leaves `--out=~/x` as it is, and Python never expands it. Raises FileNotFoundError for
    a user who does not exist; a file whose name begins so is `./~name`.
    """
    expanded = os.path.expanduser(path)
    if os.fsdecode(expanded).startswith("~"):
        raise FileNotFoundError(errno.ENOENT, "this user has no home folder", os.fspath(path))
    return Path(expanded)


def open_regular(path: str | os.PathLike[str], *, follow: bool = False) -> BinaryIO:
    """Open a regular file for reading.

    Reading a FIFO blocks, and a device may never end. follow: whether `path` may be a symbolic
    link, as a path that the user names may; a file that belongs to a bank, a run or a checkpoint
    must lie in its folder. Raises OSError that names the path, also for other kinds of files.
    """
    # O_NONBLOCK: opening a FIFO does not wait for its writer. Regular files ignore it.
    flags = os.O_RDONLY | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if not follow and os.path.islink(path):
            reason = "it is a symbolic link; put the file itself in its place"
            raise OSError(error.errno, reason, os.fspath(path)) from None
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = _KINDS.get(stat.S_IFMT(mode), "a device")
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", os.fspath(path))
    return os.fdopen(descriptor, "rb")


def check_regular(path: str | os.PathLike[str], *, follow: bool = False) -> None:
    """`open_regular`, for a library that opens the path itself."""
    open_regular(path, follow=follow).close()


def read_regular(path: str | os.PathLike[str], limit: int, *, follow: bool = False) -> bytes:
    """The content of a regular file of at most `limit` bytes. Errors as in `open_regular`."""
    with open_regular(path, follow=follow) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            reason = f"it has {size:,} bytes; such a file has at most {limit:,}"
            raise OSError(errno.EFBIG, reason, os.fspath(path))
        return file.read(size)  # not limit, which would be allocated


def is_lfs_pointer(start: bytes) -> bool:
    """Whether a file that begins with these bytes is a pointer of Git LFS; see LFS_POINTER."""
    return start.startswith(_LFS_START)


def holds_lfs_pointer(path: Path) -> bool:
    """`is_lfs_pointer` of a file; False if it cannot be read."""
    try:
        with open_regular(path, follow=True) as file:
            return is_lfs_pointer(file.read(len(_LFS_START)))
    except OSError:
        return False


def read_lines(path: str | os.PathLike[str], error: type[Exception]) -> list[str]:
    """The lines of a UTF-8 text file of names, without a byte order mark.

    Lines end with LF, CR LF or CR alone: a name may hold U+2028 or a form feed. Raises `error`,
    naming the file, for a blank line, an empty file, another encoding and a Git LFS pointer, and
    the system's OSError.
    """
    path = user_path(path)
    with path.open("rb") as file:  # may be a pipe: --class-names <(ls images)
        data = file.read(_LINES_LIMIT + 1)
    if len(data) > _LINES_LIMIT:
        raise error(f"{path} has more than {_LINES_LIMIT:,} bytes; it must hold one name per line")
    if is_lfs_pointer(data):
        raise error(f"{path}: {LFS_POINTER}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        raise error(f"{path} is not UTF-8 text: {reason}; save it as UTF-8") from reason
    if "\0" in text:  # UTF-16 without a byte order mark
        raise error(f"{path} is not UTF-8 text: it holds zero bytes; save it as UTF-8")
    if not text:
        raise error(f"{path} is empty; it must hold one name per line")
    lines = re.split("\r\n|\r|\n", text)
    if not lines[-1]:  # after the end of the last line
        lines.pop()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise error(f"{path}, line {number} is blank; each line must hold a name")
    return lines


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Add the path to an OSError without one: failed writes and syncs (disk full) carry none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise


def atomic_write(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path`: temporary name, fsync, rename, fsync of the folder.

    Raises the system's OSError (disk full, permission denied) with the temporary name; an existing
    file then keeps its content, and the temporary file is removed. Raises OSError for the path of a
    folder, a device or a FIFO: renaming would put a file in the place of /dev/null.
    """
    path = Path(path)
    with atomic_file(path) as file, naming(path.with_name(TEMPORARY_PREFIX + path.name)):
        file.write(data)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file that appears at `path` after the block, whole, as `atomic_write` writes it; not at
    all if the block raises. Errors are those of `atomic_write`; writes of the block that fail carry
    no name (see `naming`)."""
    path = Path(path)
    if path.exists() and not path.is_file():
        kind = _KINDS.get(stat.S_IFMT(path.stat().st_mode), "a device")
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", os.fspath(path))
    temporary = path.with_name(TEMPORARY_PREFIX + path.name)
    try:
        temporary.unlink(missing_ok=True)  # left by a killed process
        with _durable_file(temporary) as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error says more
            temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Create a folder at `path` atomically: with everything that the block wrote, or not at all.

    Yields a temporary folder beside `path`; fill it with `durable_write`. It is renamed to `path`
    after the block. Raises the system's OSError, also if `path` exists and is not empty; an
    existing folder then stays unchanged, and the temporary folder is removed.
    """
    path = Path(path)
    temporary = path.with_name(TEMPORARY_PREFIX + path.name)
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process
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
    """Create a file and fsync it, not atomically: under a name that nothing reads yet.

    Raises the system's OSError, also if the name is taken: a link would lead elsewhere.
    """
    with naming(path), _durable_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def _durable_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file that is synced to the disk after the block."""
    with open(path, "xb") as file:
        yield file
        with naming(path):
            file.flush()
            os.fsync(file.fileno())


def fsync_folder(path: str | os.PathLike[str]) -> None:
    """Make renames and deletions inside the folder durable, where the file system can.

    Elsewhere a crash of the machine may undo the last of them. Raises the system's OSError for a
    sync that failed (disk full, I/O error).
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            error.filename = error.filename or os.fspath(path)
            raise
