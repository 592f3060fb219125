"""curves.png: loss, accuracy, if there is one, and learning rate of a run over its epochs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ckd.train.figures import (
    BLUE,
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


def draw_curves(records: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw the records of metrics.jsonl. Raises ImportError naming the extra without matplotlib."""
    scored = records[-1]["test_accuracy"] is not None
    columns = 3 if scored else 2
    figure, (loss_axes, *more, rate_axes) = new_figure(11.0 / 3 * columns, 3.4, columns=columns)
    epochs = [record["epoch"] for record in records]
    # A single point draws no line, so mark it.
    style = {"linewidth": 1.8, "marker": "o" if len(epochs) == 1 else None, "markersize": 5}

    terms = [
        (name, label + number.replace("_", " "), colour)
        for term, (label, colour) in _TERMS.items()
        for name, number in _logged(term, records[0])
        if all(name in record for record in records)
    ]
    if [name for name, *_ in terms] == ["loss", "cross_entropy"]:
        del terms[1]  # without distillation both are the same curve
    lines = [(label, colour, [record[name] for record in records]) for name, label, colour in terms]
    if scored:
        lines.append(("test", GREY, [record["test_loss"] for record in records]))
    for label, colour, values in lines:
        dashes = "--" if label == "test" else "-"
        loss_axes.plot(epochs, values, dashes, color=colour, **style)
    label_ends(loss_axes, [(label, colour, values[-1]) for label, colour, values in lines])

    for axes in more:
        accuracy = [100 * record["test_accuracy"] for record in records]
        axes.plot(epochs, accuracy, color=BLUE, **style)
        axes.plot(epochs[-1:], accuracy[-1:], "o", color=BLUE, markersize=5)
        label_ends(axes, [(f"{accuracy[-1]:.2f} %", BLUE, accuracy[-1])])

    rate_axes.plot(epochs, [record["lr"] for record in records], color=BLUE, **style)
    rate_axes.ticklabel_format(axis="y", style="plain")
    rate_axes.set_ylim(bottom=0)

    titles = ["Loss, mean over the epoch", "Test accuracy (%)", "Learning rate at the end of epoch"]
    if not scored:
        del titles[1]
    for axes, title_of_axes in zip((loss_axes, *more, rate_axes), titles):
        axes.set_title(title_of_axes, fontsize=10, loc="left")
        axes.set_xlabel("epoch", fontsize=9)
        if len(epochs) == 1:
            axes.set_xlim(epochs[0] - 1, epochs[0] + 1)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(literal(title), x=0.01, ha="left", fontsize=11, fontweight="bold")
    save_figure(figure, path)


def _logged(term: str, record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The names under which a record has a term, and what they add to its own: "", "_1", "_2"."""
    for name in record:
        number = name.removeprefix(term)
        if name.startswith(term) and re.fullmatch("(_[0-9]+)?", number):
            yield name, number
