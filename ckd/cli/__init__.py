"""`ckd COMMAND ...`: the commands by name, and (`command.py`, `status.py`) what they share."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

from ckd._errors import CkdError
from ckd._hints import unknown
from ckd._version import __version__
from ckd.cli.status import exit_status
from ckd.cli.style import bold


class Entry(NamedTuple):
    """A command: its module, which is imported when it is called, a line on what it does, and a
    call of it. The module has `main(argv, prog) -> exit status`, and `COMMAND`, the dataclass of
    its flags or a union of them."""

    module: str
    summary: str
    example: str


# Heading of the help -> command -> what there is to know of it.
GROUPS: Mapping[str, Mapping[str, Entry]] = {
    "make a student": {
        "train": Entry(
            "ckd.train.__main__",
            "train a student, resume or evaluate a run",
            "ckd train --data photos --bank bank --out run",
        ),
        "demo": Entry(
            "ckd.train.demo",
            "train a student with and without a teacher, in two minutes",
            "ckd demo --out runs/demo",
        ),
        "bank": Entry(
            "ckd.bank.__main__",
            "build, describe or verify a bank of teacher embeddings",
            "ckd bank build --data photos --teacher timm:resnet50 --out bank",
        ),
    },
    "use it": {
        "eval": Entry(
            "ckd.eval.__main__",
            "measure what a student is good for: classes and search",
            "ckd eval run --bank bank",
        ),
        "predict": Entry(
            "ckd.predict.__main__",
            "tell the classes of images, by a trained student",
            "ckd predict run photo.jpg",
        ),
        "export": Entry(
            "ckd.export.__main__",
            "write a student for programs without ckd: ONNX, PyTorch, timm",
            "ckd export run --out student.onnx",
        ),
    },
    "look": {
        "compare": Entry(
            "ckd.compare.__main__",
            "compare finished runs in a table, a figure and a page",
            "ckd compare runs --html runs.html",
        ),
        "info": Entry(
            "ckd.info",
            "show what is installed and which backends work",
            "ckd info",
        ),
        "completion": Entry(
            "ckd.cli.completion",
            "print a script that completes commands and flags in your shell",
            "source <(ckd completion bash)",
        ),
    },
}
ENTRIES = {name: entry for group in GROUPS.values() for name, entry in group.items()}
COMMANDS = {name: (entry.module, entry.summary) for name, entry in ENTRIES.items()}


def main(argv: Sequence[str] | None = None, prog: str = "ckd") -> int:
    """Run the command line; returns the exit status. A command's --help and bad flags exit."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name == "help":  # `help train` is `train --help`
        name, *rest = [*rest, "--help"]
    if name in ("-h", "--help"):
        return exit_status(lambda: print(_help(prog)))
    if name in ("-V", "--version"):
        return exit_status(lambda: print(f"ckd {__version__}"))
    if name not in COMMANDS:
        return exit_status(lambda: _refuse(name))
    module, _ = COMMANDS[name]
    return importlib.import_module(module).main(rest, f"{prog} {name}")


def _refuse(name: str) -> NoReturn:
    kind = "option" if name.startswith("-") else "command"
    known = ("--help", "--version") if kind == "option" else COMMANDS
    raise CkdError(unknown(kind, name, known))


def _help(prog: str) -> str:
    lines = [
        f"{bold('usage:')} {prog} COMMAND ...",
        "",
        "Knowledge distillation from stored teacher embeddings.",
    ]
    width = max(map(len, COMMANDS))
    for heading, group in GROUPS.items():
        lines += ["", bold(f"{heading}:")]
        for name, entry in group.items():
            lines.append(f"  {name:{width}}  {entry.summary}")
            lines.append(f"{' ' * (width + 6)}{entry.example}")
    lines += [
        "",
        f"{prog} COMMAND --help describes a command; {prog} --version prints the version.",
    ]
    return "\n".join(lines)
