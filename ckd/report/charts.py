"""Line charts and scatter plots as geometry that the template `chart.html` writes as SVG.

They are drawn here, so that a page reads without JavaScript; the script adds values under the
pointer, for which `data` has the series.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ckd._errors import printable
from ckd.report.words import number

COLOURS = 8  # of style.css: .c0 to .c7
POINTS = 240  # of a line, at most
LARGEST = 1e300  # of what is drawn: sums and percentages of it are finite
WIDTH, HEIGHT = 360, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 38

Kind = Literal["lines", "curves", "points"]


@dataclass(frozen=True)
class Series:
    """A line, or the points of one run; y is None or not finite where there is no value."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: int = 0
    dashed: bool = False

    def thinned(self) -> Series:
        """At most POINTS points, evenly spread, with the last; without those whose x is too large
        for an axis, and None for each such y, and for NaN."""
        n = len(self.x)
        kept = list(range(n))
        if n > POINTS:
            kept = sorted({round(i * (n - 1) / (POINTS - 1)) for i in range(POINTS)})
        points = [(self.x[i], self.y[i]) for i in kept if abs(self.x[i]) <= LARGEST]
        y = [y if y is not None and abs(y) <= LARGEST else None for _, y in points]
        return Series(self.label, [x for x, _ in points], y, self.colour, self.dashed)


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis from `low` to `high`, which lie at pixels `start` and `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    ticks: list[tuple[float, str]] = field(default_factory=list)  # pixel, text

    def at(self, value: float) -> float:
        low, high, value = (
            (math.log10(v) if self.log else v) for v in (self.low, self.high, value)
        )
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def chart(
    title: str,
    series: Sequence[Series],
    *,
    kind: Kind,
    x_label: str,
    x_whole: bool = False,
    x_log: bool = False,
    percent: bool = False,
    legend: Sequence[tuple[str, int, bool]] | None = None,
    note: str = "",
) -> dict[str, Any] | None:
    """The context of the template; None if there is nothing to draw.

    kind: lines share their x, which the pointer selects; curves have an x each, and the pointer
    selects the nearest point, as in points (scatter). percent: y is a share, shown in %. legend:
    (label, colour, dashed), if not one entry a series.
    """
    lines = [one.thinned() for one in series]
    factor = 100.0 if percent else 1.0
    known = [(x, factor * y) for one in lines for x, y in zip(one.x, one.y) if y is not None]
    if not known:
        return None
    xs, ys = [x for x, _ in known], [y for _, y in known]
    x_log = x_log and min(xs) > 0 and max(xs) > 20 * min(xs)
    padded = kind == "points"
    x_axis = _axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, whole=x_whole, log=x_log, padded=padded)
    most = 100.0 if percent else math.inf
    y_axis = _axis(min(ys), max(ys), HEIGHT - BOTTOM, TOP, padded=True, least=0.0, most=most)
    drawn = [_drawn(one, kind, x_axis, y_axis, percent, factor) for one in lines]
    ends = [f"{one['label']} ends at {one['last']}" for one in drawn if one["last"]]
    many = kind == "points" or len(ends) > 8
    return {
        "title": title,
        "alt": "; ".join([f"{title} by {x_label}", *([] if many else ends)]),
        "kind": kind,
        "x_label": x_label + (" (logarithmic)" if x_log else ""),
        "note": note,
        "x_axis": x_axis,
        "y_axis": y_axis,
        "series": drawn,
        "legend": [
            {"label": label, "colour": colour % COLOURS, "dashed": dashed, "last": None}
            for label, colour, dashed in legend
        ]
        if legend is not None
        else drawn,
        "size": (WIDTH, HEIGHT),
        "frame": (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM),
        "data": _data(lines, kind, x_axis, y_axis, x_label, percent, factor),
    }


def _drawn(
    one: Series, kind: Kind, x_axis: Axis, y_axis: Axis, percent: bool, factor: float
) -> dict[str, Any]:
    """The path and the dots of a series, and its entry in the legend."""
    points = [
        None if y is None else (x_axis.at(x), y_axis.at(factor * y)) for x, y in zip(one.x, one.y)
    ]
    last = next((y for y in reversed(one.y) if y is not None), None)
    return {
        "label": one.label,
        "colour": one.colour % COLOURS,
        "dashed": one.dashed,
        "path": "" if kind == "points" else _path(points),
        "marks": _marks(points, kind),
        "last": None if last is None else _value(last, percent),
    }


def _data(
    lines: Sequence[Series],
    kind: Kind,
    x_axis: Axis,
    y_axis: Axis,
    x_label: str,
    percent: bool,
    factor: float,
) -> dict[str, Any]:
    """What the script needs: values as they are shown, and where they lie."""
    series = []
    for one in lines:
        # Places without a value matter where lines share them; 0 has none on a logarithmic axis.
        places = [
            round(x_axis.at(x), 1) if kind == "lines" or y is not None else None
            for x, y in zip(one.x, one.y)
        ]
        series.append(
            {
                "label": printable(one.label),
                "x": places,
                "y": [None if y is None else round(y_axis.at(factor * y), 1) for y in one.y],
                "text": ["–" if y is None else _value(y, percent) for y in one.y],
                "at": [number(x) for x in one.x],
            }
        )
    if kind == "lines":  # which share their x
        for later in series[1:]:
            later["x"] = later["at"] = []
    return {"kind": kind, "xLabel": x_label, "series": series}


def _value(y: float, percent: bool) -> str:
    return f"{100 * y:.2f} %" if percent else number(y)


def _path(points: Sequence[tuple[float, float] | None]) -> str:
    """The line through the points, with gaps where there is none."""
    parts, pen = [], "M"
    for point in points:
        if point is not None:
            parts.append(f"{pen}{point[0]:.1f} {point[1]:.1f}")
        pen = "M" if point is None else "L"
    return "".join(parts)


def _marks(points: Sequence[tuple[float, float] | None], kind: Kind) -> list[tuple[float, float]]:
    """Dots: of a scatter plot all; of a line its last point, and points without neighbours."""
    marks = []
    for i, point in enumerate(points):
        if point is None:
            continue
        alone = all(points[j] is None for j in (i - 1, i + 1) if 0 <= j < len(points))
        if kind == "points" or alone or (kind == "lines" and i == len(points) - 1):
            marks.append((round(point[0], 1), round(point[1], 1)))
    return marks


def _axis(
    low: float,
    high: float,
    start: float,
    end: float,
    *,
    whole: bool = False,
    log: bool = False,
    padded: bool = False,
    least: float = -math.inf,
    most: float = math.inf,
) -> Axis:
    """An axis that holds both ends. padded: with room beside them, within `least` and `most`."""
    if log:
        return _log_axis(low, high, start, end)
    room = 0.06 * (high - low) if padded else 0.0
    largest = max(abs(low), abs(high))
    if high - low <= 1e-6 * largest:  # a difference that labels would not show
        room = largest / 10 or 1.0
    floor, ceiling = (least if low >= least else -math.inf), (most if high <= most else math.inf)
    low, high = max(low - room, floor), min(high + room, ceiling)
    step = _step(high - low, 5)
    if whole:
        step = max(1.0, round(step))
    first = math.ceil(low / step - 1e-9)
    values = [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]
    axis = Axis(low, high, start, end)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    size = max(map(abs, values), default=0.0) or 1.0
    form = f",.{digits}f"
    if digits > 5 or size >= 1e7:
        form = f".{max(0, math.floor(math.log10(size)) - math.floor(math.log10(step)))}e"
    # + 0.0: no "-0"
    axis.ticks.extend((round(axis.at(value), 1), format(value + 0.0, form)) for value in values)
    return axis


def _log_axis(low: float, high: float, start: float, end: float) -> Axis:
    axis = Axis(low / 1.25, high * 1.25, start, end, log=True)
    decades = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
    wide = len(decades) > 4
    values = [m * 10.0**d for d in decades for m in ((1,) if wide else (1, 3))]
    axis.ticks.extend(
        (round(axis.at(v), 1), number(v)) for v in values if axis.low <= v <= axis.high
    )
    return axis


def _step(span: float, count: int) -> float:
    """1, 2 or 5 times a power of ten, of which about `count` fit the span."""
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
