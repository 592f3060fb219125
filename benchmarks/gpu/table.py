"""What gpu_check.py prints last: one table of all rungs that fits a screen."""

from __future__ import annotations

from collections.abc import Mapping

from gpu.job import Record

MOST_LINES, MOST_COLUMNS = 50, 150
HEAD = 34  # columns before a rung's lines


def table(records: Mapping[str, Record], files: Mapping[str, str], seconds: float) -> str:
    """A row for each rung, with its lines beside and below. Where there are too many, numbers give
    way to what is wrong."""
    blocks = {name: _block(name, record, files[name]) for name, record in records.items()}
    over = 1 + sum(len(block) for block in blocks.values()) - MOST_LINES
    while over > 0 and (longest := max(blocks.values(), key=len, default=[])) and len(longest) > 2:
        # The last number before what is wrong, or else the last of what is wrong.
        numbers = [i for i, line in enumerate(longest) if i > 0 and "WRONG" not in line]
        del longest[numbers[-1] if numbers else -2]
        over -= 1
    count = sum(len(record.get("wrong", [])) for record in records.values())
    found = f"{count} WRONG" if count else "nothing wrong"
    ended = [name for name, record in records.items() if record["status"] != "ok"]
    title = f"gpu_check: {found}, {len(records)} rungs in {seconds:.0f} s"
    title += f"; not ok: {', '.join(ended)}" if ended else ""
    lines = [title, *(line for block in blocks.values() for line in block)]
    return "\n".join(line[:MOST_COLUMNS].rstrip() for line in lines)


def _block(name: str, record: Record, file: str) -> list[str]:
    texts = list(record.get("lines", []))
    if record.get("reason"):
        texts.insert(0, record["reason"])
    texts += _packed(record.get("wrong", []))
    head = f"{name:<10} {record['status']:<12} {record.get('seconds', 0):>4.0f} s"
    heads = [head, *[""] * (len(texts) - 1)]
    return [f"{head:<{HEAD - 2}}{text}" for head, text in zip(heads, texts or [f"see {file}"])]


def _packed(wrong: list[str]) -> list[str]:
    """As many to a line as fit."""
    lines: list[str] = []
    for text in wrong:
        joined = f"{lines[-1]}; {text}" if lines else ""
        if joined and len(joined) <= MOST_COLUMNS - HEAD:
            lines[-1] = joined
        else:
            lines.append(f"WRONG {text}")
    return lines
