"""The page of commands, from their own help."""

from __future__ import annotations

import contextlib
import io
import os
import re
from unittest import mock

from ckd.cli import COMMANDS, main

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_SUBCOMMANDS = re.compile(r"^usage:[^\n]*(?:\n +[^\n]*)*?\{([a-z-]+(?:,[a-z-]+)+)\}", re.M)

HEAD = """# Commands

What `ckd COMMAND --help` prints. `python -m ckd COMMAND` is the same, for where the folder of
scripts is not on the `PATH`.
"""


def commands_page() -> str:
    """The page: the help of `ckd`, of each command and of each subcommand."""
    parts = [HEAD, _block(help_of())]
    for name in COMMANDS:
        text = help_of(name)
        parts += [f"## ckd {name}\n", _block(text)]
        for sub in subcommands(text):
            parts += [f"### ckd {name} {sub}\n", _block(help_of(name, sub))]
    return "\n".join(parts)


def subcommands(text: str) -> list[str]:
    """The names that the usage of a help text lists."""
    found = _SUBCOMMANDS.search(text)
    return found[1].split(",") if found else []


def help_of(*command: str) -> str:
    """What `ckd COMMAND --help` prints, in 84 columns and without colours."""
    printed = io.StringIO()
    plain = {"COLUMNS": "84", "NO_COLOR": "1", "TERM": "dumb"}
    with (
        mock.patch.dict(os.environ, plain),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        main([*command, "--help"])
    return _ANSI.sub("", printed.getvalue()).strip()


def _block(text: str) -> str:
    return f"```text\n{text}\n```\n"
