"""The page of `ckd compare --html`: a table, accuracy by training time, and the runs' curves."""

from __future__ import annotations

import itertools
import os
import statistics
import urllib.parse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ckd._files import atomic_write
from ckd._version import __version__
from ckd.compare.find import read_curves
from ckd.compare.table import data_set, footnote, group_figures
from ckd.report import render
from ckd.report.charts import COLOURS, Series, chart
from ckd.report.words import duration, percent, short, short_all
from ckd.train.page import REPORT

_OWN_COLOURS = 7  # runs or groups, at most, that have a colour each; more are coloured by method
_DATA_SETS = 12  # sections of charts, at most

Groups = Sequence[tuple[str, Sequence[Mapping[str, Any]]]]


def write_page(groups: Groups, path: Path, *, seeds: bool) -> None:
    """Write the page of named groups of results, which have `run` and `folder`.

    seeds: whether a group is one row of several runs. Raises OSError.
    """
    names = short_all([name for name, _ in groups])
    groups = [(name, members) for name, (_, members) in zip(names, groups)]
    runs = [result for _, members in groups for result in members]
    shown = short_all([str(result["run"]) for result in runs])
    runs = [{**result, "run": name} for result, name in zip(runs, shown)]
    curves = [read_curves(Path(result["folder"])) for result in runs]
    without = [r["run"] for r, records in zip(runs, curves) if not records]
    page = render(
        "compare.html",
        count=len(runs),
        groups=len(groups) if seeds else None,
        columns=_columns(seeds),
        rows=[_row(name, members, path, seeds) for name, members in groups],
        sections=_sections(runs, curves, _keys(groups)),
        without_curves=without[:10],
        footnote=footnote(runs),
        version=__version__,
    )
    atomic_write(path, page)


def _keys(groups: Groups) -> list[tuple[str, int]]:
    """What the colour of each run stands for, and its number: the group, or, where there are too
    many groups, the method."""
    if len(groups) <= _OWN_COLOURS:
        keys = [name for name, members in groups for _ in members]
    else:
        keys = [result["method"] for _, members in groups for result in members]
    places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    return [(key, places[key] % COLOURS) for key in keys]


def _columns(seeds: bool) -> list[tuple[str, bool]]:
    """(head, whether a number) of each column."""
    heads = [("runs" if seeds else "run", False), ("method", False), ("test accuracy", True)]
    if seeds:
        heads.append(("seeds", True))
    heads += [("training time", True), ("s / epoch", True), ("images / s", True)]
    heads += [("peak MiB", True), ("parameters", True), ("test images", True)]
    return [*heads, ("data", False), ("student", False)]


def _row(
    name: str, members: Sequence[Mapping[str, Any]], path: Path, seeds: bool
) -> dict[str, Any]:
    """The name of a row, (name, URL) of its runs, and (text, key for sorting) of each cell."""
    first, figures = members[0], group_figures(members)
    images = first.get("test_images")
    accuracy, spread = figures["test_accuracy"], figures["test_accuracy_std"]
    shown = percent(accuracy) if spread is None else f"{100 * accuracy:.2f} ± {100 * spread:.2f} %"
    rate = statistics.median(r["images_per_s"] for r in members)
    cells: list[tuple[str, Any]] = [
        (short(first["method"]), first["method"]),
        (shown, accuracy),
        *([(str(len(members)), len(members))] if seeds else []),
        (duration(figures["train_time_s"]), figures["train_time_s"]),
        (f"{figures['time_per_epoch_s']:.2f}", figures["time_per_epoch_s"]),
        (f"{rate:,.0f}", rate),
        (f"{figures['peak_mib']:,.0f}", figures["peak_mib"]),
        (f"{first['parameters']:,}", first["parameters"]),
        ("–" if images is None else f"{images:,}", images),
        (short(first["data"], 40), first["data"]),
        (short(first["student"], 40), first["student"]),
    ]
    return {
        "name": name,
        "links": [(short(str(r["run"])), _link(Path(r["folder"]), path)) for r in members],
        "cells": [(text, "" if key is None else key) for text, key in cells],
    }


def _link(folder: Path, page: Path) -> str | None:
    """The relative URL of a run's report.html, seen from the page; None if there is none."""
    report = folder / REPORT
    if not report.is_file():
        return None
    relative = os.path.relpath(report.resolve(), page.absolute().parent.resolve())
    return urllib.parse.quote(os.fsencode(relative))


def _sections(
    runs: Sequence[Mapping[str, Any]],
    curves: Sequence[Sequence[Mapping[str, Any]]],
    keys: Sequence[tuple[str, int]],
) -> list[dict[str, Any]]:
    """The charts of each data set, whose accuracies and losses compare."""
    sets = list(dict.fromkeys(map(data_set, runs)))
    sections = []
    for one in sets[:_DATA_SETS]:
        members = [
            _Drawn(result["run"], result, records, *key)
            for result, records, key in zip(runs, curves, keys)
            if data_set(result) == one
        ]
        images = "" if one[1] is None else f" ({one[1]:,} test images)"
        if charts := _charts(members):
            sections.append({"title": f"{short(one[0])}{images}", "charts": charts})
    return sections


class _Drawn(NamedTuple):
    """A run in the charts."""

    name: str
    result: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    key: str
    colour: int


def _charts(members: Sequence[_Drawn]) -> list[dict[str, Any]]:
    """Accuracy by training time, and accuracy and test loss over training time, which is what
    methods are compared by; the training loss where nothing is scored."""
    counts = Counter((member.key, member.colour) for member in members)
    legend = [
        (f"{key} ({n} runs)" if n > 1 else key, colour, False)
        for (key, colour), n in counts.items()
    ]
    by_time: dict[str, Any] = {"x_label": "training time (s)", "legend": legend}
    ends = [
        Series(m.name, [m.result["train_time_s"]], [m.result["test_accuracy"]], m.colour)
        for m in members
    ]
    title, several = "Test accuracy (%)", len(members) > 1
    lines = [member for member in members if len(member.records) > 1]
    times = [list(itertools.accumulate(x["time_s"] for x in m.records)) for m in lines]

    def series(value: str) -> list[Series]:
        return [
            Series(m.name, time, [record[value] for record in m.records], m.colour)
            for m, time in zip(lines, times)
        ]

    drawn = [
        chart(f"{title} at the end", ends, kind="points", x_log=True, percent=True, **by_time)
        if several
        else None,
        chart(title, series("test_accuracy"), kind="curves", percent=True, **by_time),
        chart("Test loss", series("test_loss"), kind="curves", **by_time),
    ]
    if not any(drawn):
        note = (
            "Methods sum different terms." if len({m.result["method"] for m in lines}) > 1 else ""
        )
        drawn = [chart("Training loss", series("loss"), kind="curves", note=note, **by_time)]
    return [one for one in drawn if one is not None]
