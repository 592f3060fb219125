"""`ckd COMMAND ...`: the commands by name, and (`command.py`, `status.py`) what they share."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from ckd._errors import CkdError
from ckd._hints import unknown
from ckd.cli.status import exit_status

# name -> (module, summary). The module has `main(argv, prog) -> exit status`, and is imported when
# its command is called.
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("ckd.train.__main__", "train a student, resume or evaluate a run"),
    "demo": ("ckd.train.demo", "train a student with and without a teacher, in two minutes"),
    "bank": ("ckd.bank.__main__", "build, describe or verify a bank of teacher embeddings"),
    "compare": ("ckd.compare", "compare finished runs in a table and a figure"),
    "eval": ("ckd.eval.__main__", "measure what a student is good for: classes and search"),
    "info": ("ckd.info", "show what is installed and which backends work"),
}


def main(argv: Sequence[str] | None = None, prog: str = "ckd") -> int:
    """Run the command line; returns the exit status. A command's --help and bad flags exit."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        return exit_status(lambda: print(_help(prog)))
    if name not in COMMANDS:
        return exit_status(lambda: _refuse(name))
    module, _ = COMMANDS[name]
    return importlib.import_module(module).main(rest, f"{prog} {name}")


def _refuse(name: str) -> NoReturn:
    raise CkdError(unknown("command", name, COMMANDS))


def _help(prog: str) -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {prog} COMMAND ...",
            "",
            "Knowledge distillation from stored teacher embeddings.",
            "",
            *lines,
            "",
            f"{prog} COMMAND --help describes a command.",
        ]
    )
