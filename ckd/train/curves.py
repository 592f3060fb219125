"""curves.png: the loss and, if there is one, the accuracy of a run over its epochs."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ckd.train.figures import (
    BLUE,
    FAINT,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    label_ends,
    literal,
    new_figure,
    save_figure,
)

# Terms of the training loss in the order in which they are drawn. With several banks, the names of
# embed-kd's end in the number of the bank: cosine_1.
_TERMS = {
    "loss": ("total", BLUE),
    "cross_entropy": ("cross-entropy", ORANGE),
    "contrastive": ("contrastive", GREEN),
    "cosine": ("cosine", VERMILION),
    "mse": ("squared error", SKY),
    "soft": ("KL of similarities", PURPLE),
    "logits": ("KL of logits", INK),
    "kl": ("KL to the teacher", PURPLE),
}
_DASHES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))  # of bank 1, 2, 3, 4
_FEW = 15  # epochs, up to which each has a mark
_WIDE = 20  # largest / smallest loss, from which the axis is logarithmic


class Line(NamedTuple):
    """A curve: its label, colour, dashes as matplotlib takes them, and a value for each epoch."""

    label: str
    colour: str
    dashes: Any
    values: list[float]


def draw_curves(records: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw the records of metrics.jsonl; the figures of a single epoch, which is no curve, as bars.

    Raises ImportError naming the extra without matplotlib.
    """
    scored = records[-1]["test_accuracy"] is not None
    losses = _losses(records, scored)
    accuracy = [100 * record["test_accuracy"] for record in records] if scored else []
    heights = {"bars": 1.2 + 0.3 * len(losses), "curves": 3.6}
    wide = False
    kind = "bars" if len(records) == 1 else "curves"
    width, columns = (10.4, 2) if scored else (6.4, 1)
    figure, (loss_axes, *more) = new_figure(width, heights[kind], columns=columns)
    if kind == "bars":
        _bars(loss_axes, losses)
        for axes in more:
            _bars(axes, [Line("test", BLUE, "-", accuracy)], form="{:.2f} %")
            axes.set_xlim(0, 100)
    else:
        epochs = [record["epoch"] for record in records]
        values = [value for line in losses for value in line.values]
        if wide := min(values) > 0 and max(values) > _WIDE * min(values):
            loss_axes.set_yscale("log")
            loss_axes.yaxis.set_major_formatter("{x:g}")
        _lines(loss_axes, epochs, losses)
        _bank_legend(loss_axes, losses)
        for axes in more:
            label = f"{accuracy[-1]:.2f} %"
            _lines(axes, epochs, [Line(label, BLUE, "-", accuracy)])
            axes.plot(epochs[-1:], accuracy[-1:], "o", color=BLUE, markersize=5)
    about = "Loss, mean over the epoch" + ", logarithmic" * wide
    loss_axes.set_title(about, fontsize=10, loc="left")
    for axes in more:
        axes.set_title("Test accuracy (%)", fontsize=10, loc="left")
    words = textwrap.wrap(f"{title}, 1 epoch" if kind == "bars" else title, round(9.5 * width))
    text = literal("\n".join(words))
    figure.suptitle(text, x=0.01, ha="left", fontsize=11, fontweight="bold")
    save_figure(figure, path)


def _losses(records: Sequence[Mapping[str, Any]], scored: bool) -> list[Line]:
    terms = [
        (name, term, number)
        for term in _TERMS
        for name, number in _logged(term, records[0])
        if all(name in record for record in records)
    ]
    if [name for name, *_ in terms] == ["loss", "cross_entropy"]:
        del terms[1]  # without distillation both are the same curve
    lines = []
    for name, term, number in terms:
        label, colour = _TERMS[term]
        bank = int(number[1:] or 1) - 1 if number else 0
        values = [record[name] for record in records]
        words = label + number.replace("_", ", bank ")
        lines.append(Line(words, colour, _DASHES[bank % len(_DASHES)], values))
    if scored:
        test = [record["test_loss"] for record in records]
        lines.append(Line("cross-entropy, test", GREY, "-", test))
    return lines


def _lines(axes: Any, epochs: Sequence[int], lines: Sequence[Line]) -> None:
    """Curves with their labels at the right end, a mark for each epoch if there are few."""
    style = {"marker": "o" if len(epochs) <= _FEW else None, "markersize": 4, "linewidth": 1.8}
    for line in lines:
        axes.plot(epochs, line.values, linestyle=line.dashes, color=line.colour, **style)
    margin = 0.015 * (epochs[-1] - epochs[0]) or 0.5
    axes.set_xlim(epochs[0] - margin, epochs[-1] + margin)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("epoch", fontsize=9)
    label_ends(axes, [(line.label, line.colour, line.values[-1]) for line in lines])


def _bank_legend(axes: Any, lines: Sequence[Line]) -> None:
    """Which dashes are those of which bank, if there are several."""
    banks: dict[str, Any] = {}
    for line in lines:
        if ", bank " in line.label:
            banks.setdefault(line.label.partition(", ")[2], line.dashes)
    for label, dashes in banks.items():
        axes.plot([], [], linestyle=dashes, color=GREY, label=label, linewidth=1.8)
    if banks:
        axes.legend(loc="upper right", frameon=False, fontsize=9, labelcolor=INK, handlelength=3)


def _bars(axes: Any, lines: Sequence[Line], form: str = "{:.3f}") -> None:
    """The first value of each line as a horizontal bar with its number."""
    places, values = range(len(lines)), [line.values[0] for line in lines]
    lengths = [value if math.isfinite(value) else 0.0 for value in values]
    axes.barh(places, lengths, height=0.6, color=[line.colour for line in lines])
    for place, length, value in zip(places, lengths, values):
        axes.annotate(
            form.format(value),
            (max(length, 0.0), place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=INK,
        )
    axes.set_yticks(places, [line.label for line in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xlim(right=1.18 * max(*lengths, 1e-9))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=FAINT, linewidth=0.7)


def _logged(term: str, record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The names under which a record has a term, and what they add to its own: "", "_1", "_2"."""
    for name in record:
        number = name.removeprefix(term)
        if name.startswith(term) and re.fullmatch("(_[0-9]+)?", number):
            yield name, number
