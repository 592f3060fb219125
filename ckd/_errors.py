"""The base class of the package's errors, and ConfigError, which several parts raise."""

from __future__ import annotations

import re
import warnings

# Control characters less tab and newline; the marks of Unicode that separate lines or reorder text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str, keep: str = "") -> str:
    """`text` with control characters, other than those in `keep`, as escapes.

    Files choose the names of classes and teachers, and such a name must not command the terminal.
    """
    return _CONTROL.sub(
        lambda found: found[0] if found[0] in keep else found[0].encode("unicode_escape").decode(),
        text,
    )


def one_line(text: str) -> str:
    """`printable` text for a cell or a line: its tabs and newlines are escapes too."""
    return printable(text).replace("\t", "\\t").replace("\n", "\\n")


def warn(message: str, stacklevel: int) -> None:
    """`warnings.warn` of a printable message; the stack is counted from the caller."""
    warnings.warn(printable(message), stacklevel=stacklevel + 1)


class CkdError(Exception):
    """Base class of the errors that ckd defines, each of which is also a ValueError or a
    RuntimeError. The caller can correct the cause; the message, which is printable, says how."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(printable(a) if isinstance(a, str) else a for a in arguments))


class ConfigError(CkdError, ValueError):
    """An invalid setting; the message names the flag, the expected values and the given one."""
