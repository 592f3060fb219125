"""The help of a command: usage, what it does, an example, and its flags under headings."""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ckd._errors import printable
from ckd.cli.flags import Flag, flags, subcommands
from ckd.cli.headings import OUTPUT, OUTPUT_FLAGS
from ckd.cli.style import bold

_TEXT_COLUMN = 26
_WIDEST, _NARROWEST = 100, 40

HELP = Flag("help", ("-h", "--help"), "", "Show this help.", False)


def command_help(
    command: Any,
    prog: str,
    *,
    default: Any = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    example: str = "",
) -> str:
    """The help of one dataclass.

    groups: heading -> fields; fields in no group come last. example: one for a docstring without
    a paragraph that begins with "Example:".
    """
    found = flags(command, default)
    about, own_example = _about(command)
    text = [f"{bold('usage:')} {usage(found, prog)}", "", _wrapped(about)]
    if example := own_example or example:
        text += ["", bold("example:"), *(f"  {line}" for line in example.splitlines())]
    for heading, members in _grouped(found, groups or {}).items():
        text += ["", bold(f"{heading}:"), *map(_entry, members)]
    return "\n".join(text)


def union_help(command: Any, prog: str, about: str) -> str:
    """The help of a union of dataclasses: a line and an example for each."""
    commands = subcommands(command)
    text = [f"{bold('usage:')} {prog} [-h] {{{','.join(commands)}}} ...", "", _wrapped(about), ""]
    text.append(bold("commands:"))
    width = max(map(len, commands))
    for name, one in commands.items():
        summary, example = _about(one)
        head = f"  {name:{width}}  "
        text.append(_wrapped(summary.partition("\n\n")[0], head, " " * len(head)))
        text += [f"{' ' * (len(head) + 2)}{line}" for line in example.splitlines()]
    return "\n".join([*text, "", f"{prog} COMMAND --help describes a command."])


def usage(found: Iterable[Flag], prog: str) -> str:
    """The line of usage: flags that must be given, then positional arguments."""
    found = list(found)
    required = [one.usage for one in found if one.required and one.names]
    places = [one for one in found if not one.names]
    shown = [one.usage if one.required else f"[{one.usage}]" for one in places]
    return " ".join([prog, "[-h]", *required, "[OPTIONS]", *shown])


def _grouped(
    found: Sequence[Flag], groups: Mapping[str, Sequence[str]]
) -> dict[str, Sequence[Flag]]:
    places = [one for one in found if not one.names]
    by_field = {one.field: one for one in found if one.names}
    sections = {"arguments": places}
    for heading, fields in groups.items():
        sections[heading] = [by_field.pop(name) for name in fields if name in by_field]
    output = [by_field.pop(name) for name in OUTPUT_FLAGS if name in by_field]
    rest = list(by_field.values())
    # Few flags need no second heading.
    sections["options"] = rest if groups else [*rest, *output, HELP]
    sections[OUTPUT] = [*output, HELP] if groups else []
    return {heading: members for heading, members in sections.items() if members}


def _entry(one: Flag) -> str:
    text = one.text + _default(one)
    head = f"  {one.usage}"
    if len(head) > _TEXT_COLUMN - 2:
        return head + "\n" + _wrapped(text, " " * _TEXT_COLUMN, " " * _TEXT_COLUMN)
    return _wrapped(text, f"{head:{_TEXT_COLUMN}}", " " * _TEXT_COLUMN)


def _default(one: Flag) -> str:
    """The default in parentheses, where there is one that the text does not name."""
    value = one.default
    if one.required:
        return " (required)" if one.names else ""
    if value is None or value is False or value in ((), "") or "efault:" in one.text:
        return ""
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    # The defaults of a stored run are a file's.
    return f" (default: {'on' if value is True else printable(shown)})"


def _about(command: Any) -> tuple[str, str]:
    """The docstring of a command, and its paragraph "Example:"."""
    doc = inspect.cleandoc(command.__doc__ or "")
    if doc.startswith(f"{command.__name__}("):  # written by dataclass under python -OO
        doc = ""
    about, _, example = doc.partition("\n\nExample:")
    return about, inspect.cleandoc(example)


def _wrapped(text: str, first: str = "", other: str = "") -> str:
    """The paragraphs of `text` in lines that fit the terminal; a word is never broken."""
    width = min(max(shutil.get_terminal_size().columns, _NARROWEST), _WIDEST)
    lines = []
    for number, paragraph in enumerate(text.split("\n\n")):
        lines.append(
            textwrap.fill(
                paragraph,
                width,
                initial_indent=other if number else first,
                subsequent_indent=other,
                break_long_words=False,
                break_on_hyphens=False,
            )
        )
    return "\n\n".join(lines) if text else first
