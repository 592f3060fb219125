"""What long work shows of itself: lines of notes, and bars with an estimate of the time left."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from tqdm import tqdm

DELAY_S = 2.0  # work that takes less shows no bar


class _Mode(NamedTuple):
    quiet: bool = False
    json: bool = False


_mode: ContextVar[_Mode | None] = ContextVar("console", default=None)
_stage: ContextVar[str] = ContextVar("stage", default="")


class _Bar(tqdm):
    """tqdm with a lock of its own process. tqdm's is a semaphore that forked processes share: one
    that is killed while it holds the semaphore stops the bars, and the work, of all others."""


_Bar.set_lock(threading.RLock())
os.register_at_fork(after_in_child=lambda: _Bar.set_lock(threading.RLock()))


@contextmanager
def console(*, quiet: bool = False, json: bool = False) -> Iterator[None]:
    """Within this block `say` and `bar` show nothing (quiet), or `say` writes to stderr, since
    stdout takes one JSON document (json)."""
    token = _mode.set(_Mode(quiet, json))
    try:
        yield
    finally:
        _mode.reset(token)


def is_quiet() -> bool:
    """Whether notes and progress are silenced, for libraries that print their own."""
    return (_mode.get() or _Mode()).quiet


def say(text: str, *, shown: bool = True) -> None:
    """Print a line on the state of the work, which is not its result."""
    mode = _mode.get() or _Mode()
    if shown and not mode.quiet:
        print(text, file=sys.stderr if mode.json else sys.stdout, flush=True)


def bar(desc: str, *, total: int | None, unit: str, shown: bool = True, **options: Any) -> tqdm:
    """A progress bar with an estimate of the time left, on stderr.

    Shown on a terminal only, and only if the work takes longer than DELAY_S; removed at its end.
    unit: of `total`, in the plural. options: further ones of tqdm.
    """
    mode = _mode.get() or _Mode()
    # None: shown on a terminal only.
    disable = None if shown and not mode.quiet else True
    defaults: dict[str, Any] = {"delay": DELAY_S, "leave": False, "disable": disable}
    return _Bar(
        desc=_stage.get() + desc, total=total, **(defaults | {"unit": f" {unit}"} | options)
    )


def byte_bar(desc: str, *, total: int, shown: bool = True) -> tqdm:
    """A `bar` that counts bytes, in KiB, MiB and GiB."""
    options: dict[str, Any] = {"unit_scale": True, "unit_divisor": 1024}
    form = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}iB/{total_fmt}iB [{elapsed}<{remaining}]"
    return bar(desc, total=total, unit="bytes", shown=shown, bar_format=form, **options)


@contextmanager
def clock(desc: str, *, shown: bool = True) -> Iterator[None]:
    """A `bar` for one call that cannot say how far it is: it shows the time since its start."""
    done = threading.Event()
    progress = bar(desc, total=None, unit="", shown=shown, bar_format="{desc} [{elapsed}]")

    def tick() -> None:
        while not done.wait(0.2):
            progress.update(0)

    thread = threading.Thread(target=tick, daemon=True)
    with progress:
        if not progress.disable:
            thread.start()
        try:
            yield
        finally:
            done.set()
            if thread.is_alive():
                thread.join()


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Within this block, the names of bars begin with `name`.

    Instead of a second bar around them, which needs a terminal whose cursor moves up.
    """
    token = _stage.set(f"{name} ")
    try:
        yield
    finally:
        _stage.reset(token)
