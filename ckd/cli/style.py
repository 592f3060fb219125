"""Bold text on terminals whose user has not asked for plain text."""

from __future__ import annotations

import os
import sys


def styled() -> bool:
    """Whether stdout is a terminal that shows styles, and NO_COLOR (no-color.org) is not set."""
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM", "dumb") == "dumb"
    return not plain and sys.stdout.isatty()


def bold(text: str) -> str:
    """`text` in bold, if stdout is `styled`."""
    return f"\x1b[1m{text}\x1b[0m" if styled() else text
