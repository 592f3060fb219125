"""An exclusive lock of a folder: flock, or a lock file on file systems without flock."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ckd._files import naming, read_regular

# Forked data workers share the lock and outlive a killed parent by up to 5 s (the interval at which
# they check it), so a process waits longer than that before it reports the lock as taken.
LOCK_PATIENCE_S = 6.0

LOCK_FILE = ".ckd-lock"
# Errors of file systems without flock (Lustre and NFS by their mount options, some SMB and FUSE).
_NO_FLOCK = {
    *(errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP),
    *(errno.ENOLCK, errno.EINVAL, errno.EBADF),
}


@contextlib.contextmanager
def locked_folder(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the lock of a folder, which is made if it is missing.

    flock leaves nothing behind: the system releases it when the process dies. On a file system
    without flock, the lock is the file LOCK_FILE, which names its process; if that process ran on
    this machine and has died, its lock is taken over.

    Raises BlockingIOError, whose `strerror` is the remedy, if another process holds the lock for
    LOCK_PATIENCE_S; FileExistsError if `path` is a file; the system's OSError, which names the
    folder. Then, and after an exception in the block, folders that were made are removed if they
    are empty.
    """
    owner = os.getpid()
    folder = Path(path).absolute()
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            release = _acquire(folder, descriptor)
            try:
                yield
            finally:
                # Forked children share the open file, so close() alone would not release flock. A
                # child that leaves this block itself must not release its parent's lock.
                if os.getpid() == owner:
                    release()
        finally:
            os.close(descriptor)
    except BaseException:
        for place in made if os.getpid() == owner else ():
            with contextlib.suppress(OSError):  # never made, or another process uses it already
                place.rmdir()
        raise


def _acquire(folder: Path, descriptor: int) -> Callable[[], None]:
    """Take the lock of `folder`, open as `descriptor`; returns the function that releases it."""
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            return _try_once(folder, descriptor)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.1)


def _try_once(folder: Path, descriptor: int) -> Callable[[], None]:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(error.errno, "wait for it to end", str(folder)) from None
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise OSError(error.errno, error.strerror, str(folder)) from error
    else:
        return functools.partial(fcntl.flock, descriptor, fcntl.LOCK_UN)
    file = folder / LOCK_FILE
    if not _create(file) and not (_remove_stale(file) and _create(file)):
        raise BlockingIOError(
            errno.EWOULDBLOCK,
            f"wait for it to end (its lock is {file}, of {_owner(file)}; "
            f"if that process is dead, delete the files {LOCK_FILE}* there)",
            str(folder),
        )
    return functools.partial(file.unlink, missing_ok=True)


def _create(file: Path) -> bool:
    """Create the lock file, with this process as its owner; False if it exists."""
    try:
        with naming(file), open(file, "x") as created:
            created.write(f"process {os.getpid()} on {_machine()}")
    except FileExistsError:
        return False
    except OSError:  # disk full: a file without an owner would never be stale
        file.unlink(missing_ok=True)
        raise
    return True


def _owner(file: Path) -> str:
    try:
        owner = read_regular(file, 1 << 16).decode(errors="replace")
    except FileNotFoundError:
        return "a process that has just ended"
    except OSError as error:
        return f"an unknown process ({error.strerror})"
    return owner or "a process that has not written its name yet"


def _machine() -> str:
    """Where a process id is unique: the host, and on Linux its boot and the pid namespace.

    Machines may share a host name, and each has the same name for its first namespace.
    """
    place = socket.gethostname()
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        place += f", boot {boot}, {os.readlink('/proc/self/ns/pid')}"
    return place


def _remove_stale(file: Path) -> bool:
    """Delete the lock file if its process ran on this machine and has died; whether it did.

    A second file guards the deletion, and its holder checks the owner again: otherwise two
    processes might find the same dead owner, and the slower one would delete the new lock of the
    faster one.
    """
    guard = file.with_name(f"{LOCK_FILE}.stale")
    if not (_owner_died(file) and _create(guard)):
        return False
    try:
        died = _owner_died(file)
        if died:
            file.unlink()
        return died
    finally:
        guard.unlink()


def _owner_died(file: Path) -> bool:
    process, _, machine = _owner(file).removeprefix("process ").partition(" on ")
    if machine != _machine() or not process.isdecimal():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # a process of another user; a number that is none
        return False
    return False
