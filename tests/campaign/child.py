"""Runs a task in a forked child, with limits on its time and its memory."""

from __future__ import annotations

import gc
import os
import pickle
import resource
import select
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# A child would import these anew: the optimizer and modes of torch do, and readers of JSON.
import typeguard  # noqa: F401

from ckd import CkdError

ROOM = 1 << 30  # bytes of address space that a child may add
_exit, _write, _close = os._exit, os.write, os.close  # a task may replace those of os


class Result(NamedTuple):
    """What a case came to: a kind of outcome, and the fault, if it is one."""

    kind: str
    fault: str = ""


class Failure(NamedTuple):
    """An exception, in a form that can be pickled."""

    typed: bool
    text: str
    trace: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        typed = isinstance(error, (CkdError, OSError))
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return cls(typed, f"{type(error).__name__}: {error}", where)

    def __str__(self) -> str:
        return f"{self.text[:300]} ({self.trace})"


class Ended(NamedTuple):
    """How a child ended: with a value, a failure, or a death ("hang", "signal 11", "exit 9")."""

    value: Any = None
    failure: Failure | None = None
    death: str = ""
    growth: int = 0  # of its peak resident memory, in bytes


def in_child(
    task: Callable[..., Any], *args: Any, seconds: float = 20.0, kill_after: float | None = None
) -> Ended:
    """Run `task(*args)` in a forked child; kill it after `seconds` (a hang) or `kill_after`."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _child(lambda: task(*args), writing)
    os.close(writing)
    deadline = time.monotonic() + (seconds if kill_after is None else kill_after)
    data, late = b"", False
    while True:
        ready = select.select([reading], [], [], max(0.0, deadline - time.monotonic()))[0]
        if not ready:
            os.kill(child, signal.SIGKILL)
            late = True
            break
        part = os.read(reading, 1 << 16)
        if not part:
            break
        data += part
    os.close(reading)
    status = os.waitpid(child, 0)[1]
    if late and kill_after is None:
        return Ended(death="hang")
    if os.WIFSIGNALED(status):
        return Ended(death=f"signal {os.WTERMSIG(status)}")
    if os.WEXITSTATUS(status):
        return Ended(death=f"exit {os.WEXITSTATUS(status)}")
    return Ended(*pickle.loads(data))


def _child(task: Callable[[], Any], writing: int) -> None:
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        os.close(null)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
        os.fsync = fsync
        gc.freeze()  # a collection would touch, and so copy, every page of the parent
        before = _peak()
        value = failure = None
        try:
            value = task()
        except BaseException as error:  # noqa: BLE001 (the campaign judges it)
            failure = Failure.of(error)
        data = pickle.dumps((value, failure, "", _peak() - before))
        while data:
            data = data[_write(writing, data) :]
        _exit(0)
    finally:
        _exit(70)  # a failure of the campaign itself


def fsync(descriptor: int) -> None:
    """Checks its argument. The machine does not crash in a campaign, so the disk need not turn."""
    os.fstat(descriptor)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def descriptors(root: Path) -> set[str]:
    """The files below `root` that this process has open."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if target.startswith(str(root)):
            found.add(f"{name} -> {target}")
    return found
