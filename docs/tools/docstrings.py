"""An extension of griffe: the forms of ckd's docstrings that are not Google's, as Markdown.

name: text            a line that starts with a parameter or attribute: an item of a list
>>> code              a fenced block, without prompts
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ENTRY = re.compile(r"([a-z_]\w*(?:, [a-z_]\w*)*): (?=\S)")
_PROMPT = re.compile(r"( *)(>>>|\.\.\.)(?: (.*))?$")


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            # An attribute's docstring has no entries: "plain: no teacher" is a sentence.
            entries = obj.is_function or obj.is_class
            obj.docstring.value = as_markdown(obj.docstring.value, entries=entries)


def as_markdown(text: str, *, entries: bool) -> str:
    """The docstring with code blocks of its examples and, if `entries`, lists of its entries."""
    parts = _examples(text).split("\n\n")
    return "\n\n".join(_paragraph(part) if entries else part for part in parts)


def _paragraph(text: str) -> str:
    """A paragraph that begins with an entry becomes a list; any other stays."""
    if not _ENTRY.match(text):
        return text
    items: list[str] = []
    for line in text.splitlines():
        entry = _ENTRY.match(line)
        if entry:
            names = ", ".join(f"`{name}`" for name in entry[1].split(", "))
            items.append(f"- {names}: {line[entry.end() :]}")
        else:  # on the same line: one that begins with a minus would be an item
            items[-1] += f" {line.strip()}"
    return "\n".join(items)


def _examples(text: str) -> str:
    """Runs of lines with prompts become fenced blocks."""
    lines: list[str] = []
    indent = None
    for line in text.splitlines():
        prompt = _PROMPT.match(line)
        if prompt and indent is None:
            indent = prompt[1]
            if lines and lines[-1].strip() and not lines[-1].endswith(":"):
                lines.append("")
            lines.append(f"{indent}```python")
        if not prompt and indent is not None:
            lines.append(f"{indent}```")
            indent = None
        lines.append(f"{indent}{prompt[3] or ''}" if prompt else line)
    if indent is not None:
        lines.append(f"{indent}```")
    return "\n".join(lines)
