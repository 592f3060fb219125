"""The figure of `ckd compare --out`: memory, time and accuracy of runs, like the paper's."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ckd.compare.table import memory_mib
from ckd.report.words import short_all
from ckd.train.figures import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    VERMILION,
    literal,
    new_figure,
    save_figure,
)

METHOD_COLOURS = {
    "plain": GREY,
    "logit-kd": ORANGE,
    "teacher-kd": VERMILION,
    "embed-kd": BLUE,
}
LONGEST = 48  # characters of a name beside its bar
TALLEST = 60.0  # inches; more runs have thinner bars


def draw(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Memory and time per epoch of each run, and accuracy if any run has one.

    Raises ImportError that names the extra if matplotlib is missing.
    """
    draw_groups([(_label(result), [result]) for result in results], path)


def draw_groups(groups: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], path: Path) -> None:
    """The same of named groups of runs that differ in their seed: the mean of a group, its sample
    standard deviation as an error bar, and a dot for each run."""
    names, members = zip(*groups)
    panels: list[tuple[str, list[list[float]], str]] = [
        ("Peak memory (MiB)", [[memory_mib(r) for r in group] for group in members], "{:,.0f}"),
        (
            "Training time per epoch (s)",
            [[r["time_per_epoch_s"] for r in group] for group in members],
            "{:.2f}",
        ),
    ]
    scores = [
        [100 * a for r in group if (a := r["test_accuracy"]) is not None] for group in members
    ]
    if any(scores):
        panels.append(("Test accuracy (%)", scores, "{:.2f}"))
    height = min(0.9 + 0.5 * len(groups), TALLEST)
    figure, axes = new_figure(11.0 / 3 * len(panels), height, columns=len(panels), sharey=True)
    colours = [METHOD_COLOURS.get(group[0]["method"], GREEN) for group in members]
    for one, (title, values, form) in zip(axes, panels):
        _panel(one, values, colours, form, bars=not title.startswith("Test accuracy"))
        one.set_title(title, fontsize=10, loc="left")
        one.grid(axis="y", visible=False)
        one.grid(axis="x", color="#DDDDDD", linewidth=0.7)
        one.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(names)), [*map(literal, short_all(names, LONGEST))])
    axes[0].set_ylim(len(names) - 0.5, -0.5)  # the first at the top
    save_figure(figure, path)


def _panel(
    axes: Any, values: Sequence[Sequence[float]], colours: Sequence[str], form: str, *, bars: bool
) -> None:
    """The values of each group at its place; accuracies, of which only differences matter, as dots
    on an axis that need not begin at 0."""
    known = [value for group in values for value in group]
    if bars:
        means = [statistics.mean(group) for group in values]
        axes.barh(range(len(values)), means, height=0.62, color=colours)
        axes.set_xlim(0, (1.22 if len(known) == len(values) else 1.45) * max(*known, 1e-9))
    else:
        spread = max(max(known) - min(known), 1.0)
        axes.set_xlim(min(known) - 0.25 * spread, max(known) + 0.45 * spread)
        axes.set_xticks([tick for tick in axes.get_xticks()[1:-1] if tick <= 100])
    for place, (group, colour) in enumerate(zip(values, colours)):
        if not group:
            continue
        mean, several = statistics.mean(group), len(group) > 1
        if not bars:
            axes.scatter([mean], [place], s=70, color=colour, zorder=3)
        text = form.format(mean)
        if several:
            deviation = statistics.stdev(group)
            axes.errorbar(mean, place, xerr=deviation, color=INK, capsize=3, linewidth=1, zorder=4)
            axes.scatter(
                group,
                [place] * len(group),
                s=12,
                color="white",
                edgecolor=INK,
                linewidth=0.7,
                zorder=5,
            )
            text += f" ± {form.format(deviation)}"
        axes.annotate(
            text,
            (max(max(group), mean + (deviation if several else 0)), place),
            xytext=(4 if bars else 9, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=INK,
        )


def _label(result: Mapping[str, Any]) -> str:
    run, method = result["run"], result["method"]
    return run if method in run else f"{run} ({method})"
