"""What the commands share: flags and help from a dataclass (`status.py`: errors and statuses)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from ckd._console import console
from ckd._files import user_path
from ckd.cli.status import exit_status, printable_output


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
    """Print the result as one JSON document; notes go to stderr."""
    quiet: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the result and errors only: no notes, no progress."""


def run(
    parse: Callable[[Sequence[str]], Command], argv: Sequence[str] | None, **interruption: Any
) -> int:
    """Parse `argv` (None: that of the process) and run the command; returns the exit status.

    interruption: the keyword arguments of `exit_status`.
    """

    def call() -> None:
        command = parse(sys.argv[1:] if argv is None else argv)  # prints --help, in colours
        quiet, as_json = (getattr(command, name, False) for name in ("quiet", "json"))
        with printable_output(), console(quiet=quiet, json=as_json):
            command.run()

    return exit_status(call, **interruption)


def parse(command: Any, argv: Sequence[str], prog: str, **options: Any) -> Any:
    """An instance of `command`, a dataclass or a union of dataclasses (subcommands), whose fields
    are the flags and whose docstrings are the help.

    prog: the command's name in the help. options: further ones of `tyro.cli`, such as `default`, an
    instance that holds the flags' defaults. Values of Literal fields are not checked here: the
    command calls `ckd._hints.check_choices`, which suggests the nearest choice.

    Raises SystemExit: status 0 after --help, 2 after tyro's message on stderr.
    """
    registry = ConstructorRegistry()
    registry.primitive_rule(_choice)
    registry.primitive_rule(_path)
    with registry:
        return tyro.cli(command, prog=prog, args=argv, **options)


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
