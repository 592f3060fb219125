"""The last output of gpu_check.py: one table of all rungs that fits a screen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gpu.job import LINE, Record

MOST_LINES, MOST_COLUMNS = 50, 150
HEAD = MOST_COLUMNS - LINE - 2  # columns before a rung's lines


@dataclass
class Block:
    """The lines of one rung."""

    head: str
    numbers: list[str]
    wrong: list[str]
    file: str
    cut: int = 0  # lines of failures that had no room

    def __len__(self) -> int:
        return max(1, len(self.numbers) + len(self.wrong) + bool(self.cut))

    def lines(self) -> list[str]:
        more = [f"WRONG, {self.cut} lines more in {self.file}"] * bool(self.cut)
        texts = [*self.numbers, *self.wrong, *more] or [f"see {self.file}"]
        heads = [self.head, *[""] * (len(texts) - 1)]
        return [f"{head:<{HEAD}}{text}" for head, text in zip(heads, texts)]


def table(records: Mapping[str, Record], files: Mapping[str, str], seconds: float) -> str:
    """A row for each rung, with its lines beside and below. If they are too many, measurements are
    cut before failures."""
    blocks = [_block(name, record, files[name]) for name, record in records.items()]
    _shorten(blocks, MOST_LINES - 1)
    count = sum(len(record.get("wrong", [])) for record in records.values())
    title = f"gpu_check: {f'{count} WRONG' if count else 'nothing wrong'}, "
    title += f"{len(records)} rungs in {seconds:.0f} s"
    ended = [name for name, record in records.items() if record["status"] != "ok"]
    title += f"; not ok: {', '.join(ended)}" if ended else ""
    lines = [title, *(line for block in blocks for line in block.lines())]
    return "\n".join(line[:MOST_COLUMNS].rstrip() for line in lines)


def _block(name: str, record: Record, file: str) -> Block:
    numbers = list(record.get("lines", []))
    if record.get("reason"):
        numbers.insert(0, record["reason"])
    head = f"{name:<10} {record['status']:<11} {record.get('seconds', 0):>4.0f} s"
    return Block(head, numbers, _packed(record.get("wrong", [])), file)


def _packed(wrong: list[str]) -> list[str]:
    """Lines of failures, as many per line as fit."""
    lines: list[str] = []
    for text in wrong:
        joined = f"{lines[-1]}; {text}" if lines else ""
        if joined and len(joined) <= MOST_COLUMNS - HEAD:
            lines[-1] = joined
        else:
            lines.append(f"WRONG {text}")
    return lines


def _shorten(blocks: list[Block], most: int) -> None:
    """Cut last lines of the longest blocks: measurements but each block's first, then failures."""
    while sum(map(len, blocks)) > most:
        numbers = [block for block in blocks if len(block.numbers) > 1]
        if numbers:
            max(numbers, key=lambda block: len(block.numbers)).numbers.pop()
            continue
        longest = max(blocks, key=lambda block: len(block.wrong))
        if len(longest.wrong) < 2:
            return
        longest.cut += 1 + (longest.cut == 0)  # the line that reports the cut takes one more
        del longest.wrong[-1 - (longest.cut == 2) :]
