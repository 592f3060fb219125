"""The style of all figures: plain axes, direct labels, colours safe for colour blindness."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ckd._files import atomic_write
from ckd._hints import require

# Okabe and Ito (2008): distinct under the common kinds of colour blindness.
BLUE, ORANGE, GREEN = "#0072B2", "#D98800", "#009E73"
VERMILION, PURPLE, GREY, SKY = "#D55E00", "#B0578D", "#6E6E6E", "#56B4E9"
INK, FAINT = "#222222", "#DDDDDD"


def new_figure(width: float, height: float, columns: int, **options: Any) -> tuple[Any, list[Any]]:
    """A figure of `width` x `height` inches with `columns` axes side by side, and those axes.

    Made without pyplot, so that its global state and windows are not touched. Raises ImportError
    that names the extra if matplotlib is missing.
    """
    module = require("matplotlib.figure", extra="plots", purpose="drawing figures")
    figure = module.Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False, **options)[0])
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.spines[["left", "bottom"]].set_color(GREY)
        one.tick_params(colors=INK, labelsize=9)
        one.grid(axis="y", color=FAINT, linewidth=0.7)
        one.set_axisbelow(True)
    return figure, axes


def literal(text: str) -> str:
    """Text for matplotlib that it draws as it is: dollar signs begin no formula, and bytes of a
    path that are not UTF-8 are escaped."""
    return text.encode(errors="backslashreplace").decode().replace("$", r"\$")


def label_ends(axes: Any, ends: Sequence[tuple[str, str, float]], gap: float = 0.07) -> None:
    """Write each (label, colour, y) at the right edge at height y, moved apart where they overlap:
    by at least `gap`, a fraction of the axes' height."""
    placed = -gap
    ordered = sorted(ends, key=lambda end: end[2])
    fraction = axes.transScale + axes.transLimits  # of the axes' height, on a logarithmic axis too
    heights = [float(fraction.transform((1.0, y))[1]) for _, _, y in ordered]
    for index, height in enumerate(heights):
        heights[index] = placed = max(height, placed + gap)
    ceiling = 1.0 + gap
    for index in reversed(range(len(heights))):
        heights[index] = ceiling = min(heights[index], ceiling - gap)
    for (label, colour, _), height in zip(ordered, heights):
        axes.annotate(
            label,
            (1.0, height),
            xycoords="axes fraction",
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=9,
        )


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG, atomically."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    atomic_write(path, image.getvalue())
