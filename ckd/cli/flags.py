"""What help and completion know of a command: its flags, read from the fields of its dataclass."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from ckd._hints import flag

NO_DEFAULT = dataclasses.MISSING
_POSITIONAL, _SWITCH = (
    get_args(marked)[1]
    for marked in (tyro.conf.Positional[int], tyro.conf.FlagCreatePairsOff[bool])
)


@dataclass(frozen=True)
class Flag:
    """A flag or a positional argument.

    names: ("--lr",), ("--flip", "--no-flip"), () for a positional argument. metavar: of its value;
    "" for a switch. choices: the only values; () for any. files: whether a value may name a file.
    default: NO_DEFAULT if it must be given.
    """

    field: str
    names: tuple[str, ...]
    metavar: str
    text: str
    default: Any
    choices: tuple[str, ...] = ()
    files: bool = False

    @property
    def required(self) -> bool:
        return self.default is NO_DEFAULT

    @property
    def usage(self) -> str:
        """As help shows it: `--lr X`, or `RUN`."""
        return " ".join(filter(None, [", ".join(self.names), self.metavar]))


def subcommands(command: Any) -> dict[str, Any]:
    """The dataclasses of a union by their names on the command line; {} for one dataclass."""
    if get_origin(command) not in (Union, types.UnionType):
        return {}
    return {_hyphenated(one.__name__): one for one in get_args(command)}


def flags(command: Any, default: Any = None) -> list[Flag]:
    """The flags of a dataclass, in the order of its fields.

    default: an instance that holds their defaults. A field that is a dataclass itself and has the
    flag's name "" gives the flags of its own fields.
    """
    return list(_flags(command, default))


def _flags(command: Any, default: Any) -> Iterator[Flag]:
    texts, hints = _field_texts(command), get_type_hints(command, include_extras=True)
    for field in dataclasses.fields(command):
        given = _default(field) if default is None else getattr(default, field.name)
        kind, marks = _unwrap(hints[field.name])
        if dataclasses.is_dataclass(kind):
            yield from _flags(kind, None if given is NO_DEFAULT else given)
        else:
            yield _flag(field.name, kind, marks, texts.get(field.name, ""), given)


def _flag(name: str, kind: Any, marks: tuple[Any, ...], text: str, default: Any) -> Flag:
    if _POSITIONAL in marks:
        many = "..." if get_origin(kind) is tuple else ""
        choices = _choices(kind)
        metavar = name.rstrip("s").upper() + many
        return Flag(name, (), metavar, text, default, choices, files=not choices)
    names = (flag(name),)
    if kind is bool:
        pair = () if _SWITCH in marks else ("--no-" + names[0][2:],)
        return Flag(name, names + pair, "", text, default)
    choices = _choices(kind)
    metavar = next((m for m in (getattr(mark, "metavar", None) for mark in marks) if m), "")
    if not metavar:
        metavar = f"{{{','.join(choices)}}}" if choices else _metavar(name, kind)
    numbers = {*_leaves(kind)} <= {int, float, type(None)}
    return Flag(name, names, metavar, text, default, choices, not choices and not numbers)


def _metavar(name: str, kind: Any) -> str:
    leaves = [leaf for leaf in _leaves(kind) if leaf is not type(None)]
    words = {int: "N", float: "X", Path: "PATH"}
    word = words.get(leaves[0], name.rpartition("_")[2].upper())
    repeated = get_origin(kind) is tuple and word == "X"
    return f"{word} [{word} ...]" if repeated else word


def _choices(kind: Any) -> tuple[str, ...]:
    """The strings of a Literal, with None where it may be left out."""
    parts = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    literals = [
        choice for part in parts if get_origin(part) is Literal for choice in get_args(part)
    ]
    return ("None", *literals) if literals and type(None) in parts else tuple(literals)


def _leaves(kind: Any) -> Iterator[Any]:
    """The types in a union or tuple."""
    inner = [part for part in get_args(kind) if part is not Ellipsis]
    if get_origin(kind) in (Union, types.UnionType, tuple):
        for part in inner:
            yield from _leaves(part)
    else:
        yield kind


def _unwrap(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """The type in an Annotated, also one beside None, and what annotates it."""
    marks: list[Any] = []
    while get_origin(hint) is Annotated:
        hint, *more = get_args(hint)
        marks += more
    if get_origin(hint) in (Union, types.UnionType):
        for part in get_args(hint):
            if get_origin(part) is Annotated:
                inner, more_marks = _unwrap(part)
                return inner, (*marks, *more_marks)
    return hint, tuple(marks)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _field_texts(command: type) -> Mapping[str, str]:
    """The string that follows each field in the source, on one line, by the field's name."""
    texts: dict[str, str] = {}
    for base in reversed(command.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            source = inspect.getsource(base)
        except OSError:  # installed without it
            continue
        (tree,) = ast.parse(inspect.cleandoc("\n" + source)).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:]):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                texts[field.target.id] = " ".join(str(below.value.value).split())
    return texts


def _hyphenated(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()
