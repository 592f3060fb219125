"""From a command line to a dataclass, and its help."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo


def parse(command: Any, argv: Sequence[str], prog: str, **options: Any) -> Any:
    """An instance of `command`, a dataclass or a union of dataclasses (subcommands), whose fields
    are the flags and whose docstrings are the help.

    prog: how the command was called, for the help. options: those of `tyro.cli` (default: an
    instance whose values hold where no flag is given). Values of Literal fields are not checked:
    the command calls `ckd._hints.check_choices`, which suggests the nearest choice.

    Raises SystemExit: status 0 after --help, 2 after a line on stderr for what cannot be parsed.
    """
    registry = ConstructorRegistry()
    registry.primitive_rule(_choice)
    with registry:
        return tyro.cli(command, prog=prog, args=argv, **options)


def _choice(type_info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """tyro's rule for a Literal of strings: the choices stand in the help, any string is taken."""
    if type_info.type_origin is not Literal:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(get_args(type_info.type))}}}",
        instance_from_str=lambda given: given[0],
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
    )
