"""The tables and the figure of labels.py."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ckd.train import figures
from ckd.train.report import markdown
from common.report import Record, show_machine
from students.cells import BANK, FIGURES, PLAIN, SETTINGS

COLOURS = (
    *(figures.GREY, figures.BLUE, figures.ORANGE, figures.GREEN, figures.VERMILION),
    *(figures.PURPLE, figures.SKY, figures.INK),
)


def show(record: Record) -> None:
    """Print the tables of each teacher: figures over the shares of labels, and all figures of each
    share."""
    show_machine(record["machine"])
    print(settings_line(record["settings"]))
    cells = record["cells"]
    percents = sorted({cell["percent"] for cell in cells})
    for teacher in record["settings"]["teachers"]:
        for key, head in FIGURES.items() if len(percents) > 1 else ():
            rows = over_shares(teacher, key, cells)
            if rows:
                print(f"\n### {teacher}, {head}\n\n{rows}")
        for percent in percents:
            rows = table(teacher, percent, cells)
            if rows:
                print(f"\n### {teacher}, labels of {percent:g} % of the images\n\n{rows}")
    for failed in record["failed"]:
        print(f"\n{failed['name']} failed: {failed['reason']}")


def settings_line(settings: Record) -> str:
    return (
        f"{settings['images']:,} images of {settings['data']}, {settings['test_images']:,} to "
        f"test; student {settings['student']}, {settings['epochs']} epochs, batch "
        f"{settings['batch_size']}, lr {settings['lr']:g}, amp {settings['amp']}, "
        f"{settings['jobs']} at a time"
    )


def table(teacher: str, percent: float, cells: Sequence[Record]) -> str:
    """The settings with this teacher and share of labels, plain ones first; "" if there are none.

    Percentages are means over the seeds, with the sample standard deviation.
    """
    rows = []
    own = [cell for cell in cells if cell["teacher"] == teacher and cell["percent"] == percent]
    if not own:
        return ""
    plain = [cell for cell in cells if cell["setting"] in PLAIN and cell["percent"] == percent]
    for setting in SETTINGS:
        same = [cell for cell in (*plain, *own) if cell["setting"] == setting]
        if same:
            seconds = statistics.median(cell["train_s"] for cell in same)
            rows.append([setting, str(len(same)), *_means(same, "figures"), f"{seconds:,.0f}"])
    # By seed: commands with other settings measure the same in cells of another setting.
    measured = {cell["seed"]: cell for cell in own if cell["teachers_own"]}
    if measured:
        means = _means(measured.values(), "teachers_own")
        rows.append(["the teacher itself", str(len(measured)), *means, ""])
    return markdown(["setting", "seeds", *FIGURES.values(), "s"], rows)


def over_shares(teacher: str, key: str, cells: Sequence[Record]) -> str:
    """A figure of the settings with this teacher, and of plain ones, by the share of labels; "" if
    no student of the teacher has it.

    Percentages are means over the seeds, with the sample standard deviation, and with their number
    in parentheses where it is less than the record's.
    """
    seeds = len({cell["seed"] for cell in cells})
    found: dict[str, dict[float, dict[int, float]]] = {}  # by setting, share and seed
    for cell in cells:
        if cell["teacher"] in ("", teacher):
            where = cell["percent"], cell["seed"]
            _put(found, cell["setting"], *where, cell["figures"].get(key))
            _put(found, "the teacher itself", *where, cell["teachers_own"].get(key))
    if not any(setting in BANK for setting in found):
        return ""
    percents = sorted({percent for shares in found.values() for percent in shares})
    rows = []
    for setting in (*SETTINGS, "the teacher itself"):
        row = [setting]
        for percent in percents:
            values = found.get(setting, {}).get(percent, {})
            fewer = f" ({len(values)})" if 0 < len(values) < seeds else ""
            row.append(spread([*values.values()]) + fewer)
        if setting in found:
            rows.append(row)
    return markdown(["setting", *(f"{percent:g} %" for percent in percents)], rows)


def _put(found: Any, setting: str, percent: float, seed: int, value: float | None) -> None:
    if value is not None:
        found.setdefault(setting, {}).setdefault(percent, {})[seed] = value


def _means(cells: Iterable[Record], of: str) -> list[str]:
    return [
        spread([cell[of][key] for cell in cells if cell[of].get(key) is not None])
        for key in FIGURES
    ]


def spread(values: Sequence[float]) -> str:
    """The mean and the sample standard deviation of shares, in percent; "-" without any."""
    if not values:
        return "-"
    percents = [100 * value for value in values]
    text = f"{statistics.mean(percents):.1f}"
    return f"{text} ± {statistics.stdev(percents):.1f}" if len(percents) > 1 else text


def best(figures_: Record) -> float | None:
    """The accuracy that counts in the figure: by the teacher's class means, else by its head, else
    by the student's own."""
    found = (figures_.get(key) for key in ("class_means", "teacher_head", "class_head"))
    return next((value for value in found if value is not None), None)


def draw(record: Record, path: Path) -> None:
    """Accuracy over the share of labels, a panel for each teacher with a student. Raises
    ImportError that names the extra if matplotlib is missing."""
    cells = record["cells"]
    teachers = [t for t in record["settings"]["teachers"] if any(c["teacher"] == t for c in cells)]
    if not teachers:
        print(f"no student of a teacher is measured yet: {path} is not drawn")
        return
    percents = sorted({cell["percent"] for cell in cells})
    shown = [name for name in SETTINGS if any(cell["setting"] == name for cell in cells)]
    styles = dict(zip(shown, itertools.product(("-", "--"), COLOURS)))
    figure, axes = figures.new_figure(5.6 * len(teachers), 4.0, columns=len(teachers), sharey=True)
    for one, teacher in zip(axes, teachers):
        ends = []
        own = [cell for cell in cells if cell["teacher"] in ("", teacher)]
        for setting, (dashes, colour) in styles.items():
            means = [_accuracy(setting, percent, own) for percent in percents]
            points = [(place, mean) for place, mean in enumerate(means) if mean is not None]
            if points:
                style = {"marker": "o", "markersize": 4, "linewidth": 1.6}
                one.plot(*zip(*points), dashes, color=colour, **style)
                ends.append((setting, colour, points[-1][1]))
        figures.label_ends(one, ends, gap=0.06)
        one.set_xticks(range(len(percents)), [f"{percent:g}" for percent in percents])
        one.set_xlabel("labelled images (%)", fontsize=9)
        one.set_title(f"Test accuracy (%), teacher {teacher}", fontsize=10, loc="left")
    figures.save_figure(figure, path)


def _accuracy(setting: str, percent: float, cells: Iterable[Record]) -> float | None:
    """The mean over the seeds, in percent; None without any."""
    same = [cell for cell in cells if (cell["setting"], cell["percent"]) == (setting, percent)]
    values = [value for cell in same if (value := best(cell["figures"])) is not None]
    return 100 * statistics.mean(values) if values else None
