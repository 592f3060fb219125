"""The results of bench_kd.py: derived figures, tables, CSV rows and the paper's figure."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ckd.train import figures
from common import report as common_report
from common.report import Record

EMBED = "embed-kd"

# From the figure of CLIP-Embed-KD (arXiv 2404.06170): MiB and seconds per epoch on its GPU, for
# students at 32 px.
PAPER = {
    "teacher-kd": ("CLIP-Teacher-KD, ViT-B", 1.24e9 / 2**20, 0.16 * 3600),
    EMBED: ("CLIP-Embed-KD, ViT-L", 0.13e9 / 2**20, 0.015 * 3600),
}
PAPER_SIZE = 32


def derive(case: Record, settings: Record) -> None:
    """Add figures derived from the measured steps: rates, epochs, ratios and break-even points.

    An epoch is extrapolated: epoch_images / batch_size median steps. The bank pays for itself
    against a method after bank_s / (t_method - t_embed) epochs, where that is positive.
    """
    images, batch = settings["epoch_images"], settings["batch_size"]
    parts = [case["bank"], *case["rows"]]
    for part in parts:
        if "failed" in part:
            continue
        part["images_per_s"] = batch / part["step_s"]["p50"]
        part["epoch_s_extrapolated"] = images / part["images_per_s"]
        joules = part["image_j"]
        part["epoch_j_extrapolated"] = None if joules is None else joules * images
    absent: Record = {"failed": "not measured"}
    embed = next((row for row in case["rows"] if row["method"] == EMBED), absent)
    for row in case["rows"]:
        if "failed" in row or "failed" in embed:
            continue
        mine, other = row["epoch_s_extrapolated"], embed["epoch_s_extrapolated"]
        row["time_of_embed"] = mine / other
        row["memory_of_embed"] = _ratio(row["peak_mib"], embed["peak_mib"])
        row["energy_of_embed"] = _ratio(row["epoch_j_extrapolated"], embed["epoch_j_extrapolated"])
        row["break_even_epochs"] = None
        if "failed" not in case["bank"] and needs_teacher(row) and mine > other:
            row["break_even_epochs"] = case["bank"]["epoch_s_extrapolated"] / (mine - other)


def _ratio(mine: float | None, other: float | None) -> float | None:
    return mine / other if mine is not None and other else None


def needs_teacher(row: Record) -> bool:
    return row["method"] in ("logit-kd", "teacher-kd")


def show(record: Record) -> None:
    show_machine(record)
    for case in record["cases"]:
        show_case(case, record["settings"])


def show_machine(record: Record) -> None:
    about, settings = record["machine"], record["settings"]
    common_report.show_machine(about)
    compiled = ", compiled" if settings["compile"] else ""
    print(
        f"batch {settings['batch_size']}, amp {settings['amp']}{compiled}; "
        f"images: {settings['images']}"
    )


def show_case(case: Record, settings: Record) -> None:
    teacher, size, images = case["teacher"], case["image_size"], settings["epoch_images"]
    print(f"\n### {settings['student']} at {size} px, teacher {teacher}\n")
    if "failed" in case["about"]:
        print(f"no teacher: {case['about']['failed']}\n")
    else:
        about = case["about"]
        print(
            f"The teacher sees {about['image_size']} px, has {about['parameters'] / 1e6:,.1f} M "
            f"parameters and {about['weights']} weights.\n"
        )
    print(
        "| method | step p50 (p20 to p80) | steps | images/s "
        f"| epoch of {images:,}, extrapolated | of {EMBED} | extra MiB | of {EMBED} "
        f"| kJ an epoch, extrapolated | of {EMBED} | bank pays after, epochs |"
    )
    print("|---|" + "---:|" * 10)
    for row in case["rows"]:
        print("| " + " | ".join(_cells(row)) + " |")
    print(f"\n{bank_line(case['bank'], images)}")
    sys.stdout.flush()


def _cells(row: Record) -> list[str]:
    if "failed" in row:
        return [row["method"], row["failed"], *[""] * 9]
    step, joules = row["step_s"], row["epoch_j_extrapolated"]
    pays = ""
    if needs_teacher(row) and "break_even_epochs" in row:
        pays = _number(row["break_even_epochs"], "{:,.2f}") or "unknown or never"
    return [
        row["method"],
        f"{duration(step['p50'])} ({duration(step['p20'])} to {duration(step['p80'])})",
        str(step["steps"]),
        f"{row['images_per_s']:,.4g}",
        duration(row["epoch_s_extrapolated"]),
        _number(row.get("time_of_embed"), "{:,.2f}"),
        _number(row["peak_mib"], "{:,.0f}"),
        _number(row.get("memory_of_embed"), "{:,.2f}"),
        _number(None if joules is None else joules / 1e3, "{:,.4g}"),
        _number(row.get("energy_of_embed"), "{:,.2f}"),
        pays,
    ]


def bank_line(bank: Record, images: int) -> str:
    if "failed" in bank:
        return f"Bank: {bank['failed']}"
    memory = "" if bank["peak_mib"] is None else f", in {bank['peak_mib']:,.0f} extra MiB"
    return (
        f"Bank, once: the teacher embeds {bank['images_per_s']:,.4g} images/s "
        f"({bank['step_s']['steps']} batches measured), {images:,} in "
        f"{duration(bank['epoch_s_extrapolated'])}, extrapolated{memory}."
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:,.3g} ms"
    return f"{seconds:,.3g} s" if seconds < 100 else f"{seconds / 60:,.1f} min"


FIELDS = [
    *("teacher", "teacher_weights", "image_size", "student", "batch_size", "amp", "compile"),
    *("method", "p20", "p50", "p80", "steps", "images_per_s", "epoch_images"),
    *("epoch_s_extrapolated", "time_of_embed", "peak_mib", "memory_of_embed"),
    *("epoch_j_extrapolated", "energy_of_embed", "break_even_epochs", "failed"),
]
ABOUT = ["processor", "gpu", "threads", "torch", "ckd", "commit", "date"]


def write_csv(record: Record, path: Path) -> None:
    """A line for each method, and one called `bank`; times in seconds."""
    common_report.write_csv(path, [*FIELDS, *ABOUT], csv_lines(record))


def csv_lines(record: Record) -> Iterator[Record]:
    shared = record["settings"] | record["machine"]
    for case in record["cases"]:
        weights = case["about"].get("weights", "")
        for row in (*case["rows"], case["bank"] | {"method": "bank"}):
            yield shared | case | row | row.get("step_s", {}) | {"teacher_weights": weights}


MARKS = {
    "plain": (figures.GREY, "o"),
    "logit-kd": (figures.ORANGE, "s"),
    "teacher-kd": (figures.VERMILION, "^"),
    EMBED: (figures.BLUE, "D"),
}


def plot(record: Record, path: Path) -> None:
    """The paper's figure from these measurements: memory and time per epoch, a column per teacher.

    The paper's own numbers are hollow marks beside them. Raises ImportError without matplotlib.
    """
    sizes = list(dict.fromkeys(case["image_size"] for case in record["cases"]))
    figure, axes = figures.new_figure(5.0 * 2 * len(sizes), 4.6, 2 * len(sizes))
    for index, size in enumerate(sizes):
        cases = [case for case in record["cases"] if case["image_size"] == size]
        for axis, key, label in (
            (axes[2 * index], "peak_mib", "peak memory, MiB"),
            (axes[2 * index + 1], "epoch_s_extrapolated", "time an epoch, s (extrapolated)"),
        ):
            _draw(axis, cases, key)
            if size == PAPER_SIZE:
                _draw_paper(axis, len(cases), key)
            axis.set(yscale="log", title=f"student at {size} px", ylabel=label)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(MARKS), frameon=False)
    about = record["machine"]
    weights = "random weights; " if _any_random(record) else ""
    paper = "; hollow: the paper's own GPU numbers" if PAPER_SIZE in sizes else ""
    figure.suptitle(
        f"{about.get('gpu') or about['processor']}, {about['threads']} threads\n"
        f"{about['date'][:10]}, {weights}batch {record['settings']['batch_size']}{paper}",
        fontsize="medium",
    )
    figures.save_figure(figure, path)


def _any_random(record: Record) -> bool:
    return any(case["about"].get("weights") == "random" for case in record["cases"])


def _draw(axis: Any, cases: list[Record], key: str) -> None:
    for index, (method, (colour, marker)) in enumerate(MARKS.items()):
        beside = 0.1 * (index - (len(MARKS) - 1) / 2)  # so that marks of equal value do not overlap
        points = [
            (column + beside, row[key])
            for column, case in enumerate(cases)
            for row in case["rows"]
            if row["method"] == method and row.get(key)
        ]
        if points:
            xs, ys = zip(*points)
            axis.plot(xs, ys, marker, color=colour, label=method, markersize=8)
    axis.set_xticks(range(len(cases)), [case["teacher"] for case in cases])
    axis.set_xlim(-0.6, len(cases) - 0.4)


def _draw_paper(axis: Any, column: int, key: str) -> None:
    for method, (label, mib, seconds) in PAPER.items():
        colour, marker = MARKS[method]
        value = mib if key == "peak_mib" else seconds
        axis.plot(column, value, marker, color=colour, fillstyle="none", markersize=8)
        axis.annotate(
            label,
            (column, value),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=figures.INK,
        )
    axis.set_xticks([*axis.get_xticks(), column])
    labels = [text.get_text() for text in axis.get_xticklabels()]
    axis.set_xticklabels([*labels[:-1], "the paper\n(GPU)"])
    axis.set_xlim(-0.6, column + 0.8)
