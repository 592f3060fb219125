"""Turns errors, those of writing the output included, into one line and an exit status."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

from ckd._errors import CkdError, printable

# Errors that a user can cause, whose message explains them; others are bugs and keep the traceback.
USER_ERRORS = (CkdError, ImportError, OSError)
CLOSED_PIPE = 128 + 13  # what a shell reports for a program that SIGPIPE ends


def exit_status(
    command: Callable[[], int | None],
    *,
    interrupted: str = "interrupted",
    interruptions: tuple[type[BaseException], ...] = (KeyboardInterrupt,),
) -> int:
    """Call `command`; returns its exit status (None: 0).

    2 after one of USER_ERRORS, in one line on stderr; 130 after one of `interruptions`, with its
    message or, if it has none, `interrupted`; 141, silently, if the reader of the output has closed
    the pipe. Characters that the output's encoding lacks are written as escapes.
    """
    if sys.stdout is None:  # closed, as by `>&-`; libraries write to it nevertheless
        sys.stdout = os.fdopen(_devnull(), "w")
    if sys.stderr is None:
        sys.stderr = os.fdopen(_devnull(), "w")
    streams = (sys.stdout, sys.stderr)
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return command() or 0
        finally:
            for stream in streams:
                stream.flush()
    except interruptions as stop:
        _print(f"\n{str(stop) or interrupted}")
        return 130
    except BrokenPipeError:
        return CLOSED_PIPE
    except USER_ERRORS as error:
        say_error(str(error))
        return 2
    finally:
        for stream in streams:
            _discard_unwritten(stream)


@contextlib.contextmanager
def printable_output() -> Iterator[None]:
    """Within this block, what is written to stdout and stderr is `printable`."""
    # The progress bar returns to the start of its line.
    replaced: tuple[Any, Any] = (_Printable(sys.stdout), _Printable(sys.stderr, keep="\r"))
    with contextlib.redirect_stdout(replaced[0]), contextlib.redirect_stderr(replaced[1]):
        yield


class _Printable:
    """A text stream to which `write` writes what is `printable`."""

    def __init__(self, stream: TextIO, keep: str = "") -> None:
        self._stream, self._keep = stream, keep

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def write(self, text: str) -> int:
        self._stream.write(printable(text, self._keep))
        return len(text)


def say_error(message: str) -> None:
    """Print an error on stderr, in one line."""
    _print(" ".join(["error:", *filter(None, map(str.strip, message.splitlines()))]))


def _print(message: str) -> None:
    with contextlib.suppress(OSError):  # stderr may be the same closed pipe
        print(printable(message), file=sys.stderr)


def _discard_unwritten(stream: TextIO) -> None:
    """Redirect a stream that cannot be flushed to /dev/null.

    Python flushes it again at exit, and a failure there prints a message and changes the status.
    """
    try:
        stream.flush()
    except OSError:
        os.dup2(_devnull(), stream.fileno())


def _devnull() -> int:
    return os.open(os.devnull, os.O_WRONLY)
