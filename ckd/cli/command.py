"""What the commands share: flags and help from a dataclass (`status.py`: errors and statuses)."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol, get_args

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from ckd._console import console
from ckd._files import user_path
from ckd._hints import unknown
from ckd.cli import ENTRIES
from ckd.cli.flags import Flag, flags, subcommands
from ckd.cli.headings import HEADINGS, command_name
from ckd.cli.help import HELP, command_help, union_help
from ckd.cli.status import exit_status, printable_output, say_error


class Command(Protocol):
    """A parsed command line."""

    def run(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Output:
    """The flags of every command on what it prints; a command's dataclass derives from it.

    Notes are printed by `ckd._console.say`, progress is shown by `ckd._console.bar`, and the result
    by `print`: one JSON document if `json`.
    """

    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the result as one JSON document; notes, and an error as one line, go to stderr."""
    quiet: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the result and errors only: no notes, no progress."""


def run(
    parse: Callable[[Sequence[str]], Command], argv: Sequence[str] | None, **interruption: Any
) -> int:
    """Parse `argv` (None: that of the process) and run the command; returns the exit status.

    interruption: the keyword arguments of `exit_status`.
    """

    def call() -> None:
        command = parse(sys.argv[1:] if argv is None else argv)  # may print --help
        quiet, as_json = (getattr(command, name, False) for name in ("quiet", "json"))
        with printable_output(), console(quiet=quiet, json=as_json):
            command.run()

    return exit_status(call, **interruption)


def parse(
    command: Any, argv: Sequence[str], prog: str, *, description: str = "", default: Any = None
) -> Any:
    """An instance of `command`, a dataclass or a union of dataclasses (subcommands), whose fields
    are the flags and whose docstrings are the help.

    prog: the command's name in help and errors. description: that of a union. default: an instance
    that holds the flags' defaults. Values of Literal fields are not checked here: the command calls
    `ckd._hints.check_choices`, which suggests the nearest choice.

    Raises SystemExit: status 0 after --help, 2 after a line on stderr that says what is wrong.
    """
    argv = list(argv)
    if commands := subcommands(command):
        name = argv.pop(0) if argv else ""
        if name in HELP.names:
            print(union_help(command, prog, description))
            raise SystemExit(0)
        if name not in commands:
            given = unknown("command", name, commands) if name else f"it takes {_any_of(commands)}"
            _misuse(prog, given)
        command, prog = commands[name], f"{prog} {name}"
    flagged = argv[: argv.index("--")] if "--" in argv else argv
    if not {*HELP.names}.isdisjoint(flagged):
        name = command_name(prog)
        example = ENTRIES[name].example if name in ENTRIES else ""
        print(
            command_help(command, prog, default=default, groups=HEADINGS.get(name), example=example)
        )
        raise SystemExit(0)
    known = flags(command, default)
    names = [name for one in known for name in one.names]
    for given in flagged:
        if given.startswith("--") and given.partition("=")[0].replace("_", "-") not in names:
            _misuse(prog, _few(unknown("flag", given.partition("=")[0], names)))
    return _parsed(command, argv, prog, default, known)


def _parsed(command: Any, argv: list[str], prog: str, default: Any, known: list[Flag]) -> Any:
    """What tyro makes of flags that are known."""
    registry = ConstructorRegistry()
    registry.primitive_rule(_choice)
    registry.primitive_rule(_path)
    options = {} if default is None else {"default": default}
    said = io.StringIO()  # tyro prints several lines in a frame
    try:
        with registry, redirect_stdout(said), redirect_stderr(said):
            return tyro.cli(command, prog=prog, args=argv, **options)
    except SystemExit:
        text = said.getvalue()
    missing = [one for one in known if one.required and not {*one.names} & {*argv}]
    if "equired option" in text and missing:
        _misuse(prog, f"{missing[0].usage} is missing: {missing[0].text}")
    _misuse(prog, _first_sentence(text))


def _misuse(prog: str, what: str) -> NoReturn:
    """End the program with status 2 and one line on stderr."""
    what = what if what.endswith("...") else what.removesuffix(".")
    say_error(f"{prog}: {what}; see {prog} --help")
    raise SystemExit(2)


def _few(text: str, names: int = 3) -> str:
    """A list without those of its names that are less near."""
    head, colon, listed = text.rpartition(": ")
    nearest = listed.split(", ")
    return head + colon + ", ".join([*nearest[:names], *["..."] * (len(nearest) > names)])


def _any_of(names: Iterable[str]) -> str:
    *some, last = names
    return f"{', '.join(some)} or {last}"


def _first_sentence(text: str) -> str:
    """What stands in a frame of tyro's between its title and the next ruler, on one line."""
    lines: list[str] = []
    for line in text.strip().splitlines()[1:]:
        inner = line.strip().strip("│|").strip()
        if inner.strip("─-"):
            lines.append(inner)
        elif lines:
            break
    what = " ".join(lines).removeprefix("Error parsing ")
    for theirs, ours in _PLAINER.items():
        what = re.sub(theirs, ours, what)
    return what or "its arguments could not be parsed"


# tyro's words -> plainer ones.
_PLAINER = {
    r"invalid literal for int\(\) with base 10:": "expected an integer, got",
    r"could not convert string to float:": "expected a number, got",
    r"Could not find valid parse for arguments: \[(.*)\]": r"cannot be read: \1",
    r"Missing value for argument '(?:\(')?(.*?)(?:',\))?'\. Expected .*": r"\1 needs a value",
    r"no type matching .*INT could be instantiated from \[(.*)\]": r"expected an integer, got \1",
    r"no type matching .*FLOAT could be instantiated from \[(.*)\]": r"expected a number, got \1",
    r"Unrecognized options?:": "unexpected",
}


def _choice(type_info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """A rule of tyro for a Literal of strings: help lists the choices, parsing takes any string."""
    if type_info.type_origin is not Literal:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(get_args(type_info.type))}}}",
        instance_from_str=lambda given: given[0],
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
    )


def _path(type_info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """A rule of tyro for paths: a leading `~`, which shells leave in `--out=~/x`, is expanded."""
    if type_info.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda given: user_path(given[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    )
