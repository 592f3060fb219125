"""Counts the calls that change files, and lets the n-th one die or fail."""

from __future__ import annotations

import builtins
import contextlib
import errno
import fcntl
import functools
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ckd import _lock

BY_PATH = ("open", "replace", "rename", "mkdir", "unlink", "remove", "rmdir", "truncate")
BY_DESCRIPTOR = ("write", "fsync", "ftruncate")
DIED = 9  # the exit status of a death
CODES = ("ENOSPC", "EIO", "EROFS", "EACCES", "EDQUOT")
LOCK_CODES = ("EIO", "ENOLCK", "EOPNOTSUPP")
_os = {name: getattr(os, name) for name in ("_exit", "dup", "fstat", "ftruncate")}


class Plan(NamedTuple):
    """What happens at the n-th call; n = 0: nothing."""

    n: int = 0
    code: str = ""  # the error; "": the process dies
    when: str = "before"  # the call, "after" it, or "half": half of a write is done
    forever: bool = False  # later calls fail, too; flock only if this call is one
    no_flock: bool = False  # a file system without flock: the lock is a file
    power: bool = False  # dies with the machine: writes without fsync are lost in part


class Calls:
    """Replaces the functions of this process, for paths below `root`."""

    def __init__(self, root: Path, plan: Plan) -> None:
        self.root, self.plan = str(root), plan
        self.names: list[str] = []  # of the calls so far
        self.quiet = self.lock = False
        self.unsynced: dict[tuple[int, int], int] = {}  # inode -> a descriptor of it
        for name in (*BY_PATH, *BY_DESCRIPTOR):
            setattr(os, name, self._wrapped(getattr(os, name)))
        setattr(fcntl, "flock", self._wrapped(fcntl.flock))  # noqa: B010 (mypy)
        self._open = builtins.open
        builtins.open = io.open = self._opened  # type: ignore[assignment]
        if plan.no_flock:
            _lock.LOCK_PATIENCE_S = 0.0  # deaths leave files; waiting for their owners is no use

    def _wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            releases = function.__name__ == "flock" and args[1] == fcntl.LOCK_UN
            if releases or not self._counts(args[0], options):
                return function(*args, **options)
            if function.__name__ == "flock" and self.plan.no_flock:
                no_flock()
            value = self.step(function.__name__, lambda: function(*args, **options), args)
            if function.__name__ == "fsync":
                self.unsynced.pop(self._inode(args[0]), None)
            return value

        return call

    def _counts(self, path: Any, options: dict[str, Any]) -> bool:
        if isinstance(path, int):
            return path > 2
        inside = os.path.abspath(os.fsdecode(path)).startswith(self.root)
        return inside or options.get("dir_fd") is not None

    def _opened(self, path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if isinstance(path, int) or not self._counts(path, {}):
            return self._open(path, mode, *args, **options)
        file = self.step("open", lambda: self._open(path, mode, *args, **options), (path,))
        return file if set(mode) <= set("rbt") else _File(file, self)

    @staticmethod
    def _inode(descriptor: int) -> tuple[int, int]:
        status = _os["fstat"](descriptor)
        return status.st_dev, status.st_ino

    def step(self, name: str, act: Callable[[], Any], args: Any, half: Any = None) -> Any:
        """A counted call: `act`, or what the plan says."""
        if self.quiet:
            return act()
        self.names.append(name)
        plan, now = self.plan, len(self.names)
        if now == plan.n:
            self.lock = name == "flock"
        elif not plan.n or now < plan.n or not plan.forever or self.lock != (name == "flock"):
            return act()
        if plan.when == "half" and half is not None:
            half()
        elif plan.when == "after":
            with contextlib.suppress(OSError):
                act()
        if not plan.code:
            self._die()
        raise _error(plan.code, *(args if not isinstance(args[0], int) else ())[:2])

    def wrote(self, file: Any) -> None:
        """Note a write that no fsync has followed yet."""
        if self.plan.power:
            descriptor = file.fileno()
            self.unsynced.setdefault(self._inode(descriptor), _os["dup"](descriptor))

    def _die(self) -> None:
        for descriptor in self.unsynced.values():
            _os["ftruncate"](descriptor, _os["fstat"](descriptor).st_size // 2)
        _os["_exit"](DIED)


class _File:
    """A file that is open for writing; its writes and truncations are steps."""

    def __init__(self, file: Any, calls: Calls) -> None:
        self._file, self._calls = file, calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            self._calls.wrote(self._file)

        done = self._calls.step("write", lambda: self._file.write(data), (0,), half)
        self._file.flush()
        self._calls.wrote(self._file)
        return done

    def truncate(self, size: int | None = None) -> int:
        return self._calls.step("truncate", lambda: self._file.truncate(size), (0,))


def _error(code: str, *paths: Any) -> OSError:
    """As the system raises it: with the paths of the call; writes and fsync have none."""
    number = getattr(errno, code)
    if len(paths) == 2 and isinstance(paths[1], (str, os.PathLike)):
        return OSError(number, os.strerror(number), os.fspath(paths[0]), None, os.fspath(paths[1]))
    return OSError(number, os.strerror(number), *(os.fspath(p) for p in paths[:1]))


def no_flock(*args: Any) -> None:
    """flock on a file system without it."""
    raise _error("EOPNOTSUPP")


def plans(names: list[str], *, no_flock: bool) -> list[Plan]:
    """Every disturbance of a process that makes these calls."""
    found = []
    for n, name in enumerate(names, start=1):
        for when in ("before", "after", *(["half"] if name == "write" else [])):
            found += [Plan(n, "", when, no_flock=no_flock, power=power) for power in (False, True)]
        when = "half" if name == "write" else "before"
        for code in LOCK_CODES if name == "flock" else CODES:
            found += [Plan(n, code, when, forever, no_flock) for forever in (False, True)]
    return found
