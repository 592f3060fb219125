"""The tables of `ckd compare`: one row per run, or per group of runs that differ in their seed."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ckd.report.words import peak_mib as memory_mib
from ckd.report.words import short
from ckd.train.report import markdown
from ckd.train.stored import read_result, stored_config


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table, one row per run, and a line that names the machine."""
    backends = any(result.get("backend") for result in results)
    rows = [
        [
            result["run"],
            result["method"],
            result["student"],
            short(result["data"], 32),
            *([result.get("backend") or "-"] if backends else []),
            _images(result),
            f"{result['parameters']:,}",
            "-" if result["test_accuracy"] is None else f"{result['test_accuracy']:.2%}",
            f"{result['time_per_epoch_s']:.2f}",
            f"{result['images_per_s']:,.0f}",
            f"{memory_mib(result):,.0f}",
        ]
        for result in results
    ]
    heads = ["run", "method", "student", "data", *(["backend"] if backends else [])]
    text_columns = len(heads)
    heads += ["test images", "parameters", "test accuracy", "s / epoch", "images / s", "peak MiB"]
    return f"{markdown(heads, rows, text_columns)}\n\n{footnote(results)}"


def seed_table(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A Markdown table, one row for the runs of one setting under several seeds.

    The spread is the sample standard deviation, over the runs that have an accuracy; times are
    medians over the runs.
    """
    rows = []
    for name, results in groups.items():
        figures = group_figures(results)
        accuracies = figures["test_accuracies"]
        mean = f"{100 * statistics.mean(accuracies):.2f}" if accuracies else "-"
        spread = f" ± {100 * statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
        low, high = (100 * one(accuracies, default=0.0) for one in (min, max))
        rows.append(
            [
                name,
                results[0]["method"],
                short(results[0]["data"], 32),
                str(len(results)),
                f"{mean}{spread}",
                f"{low:.2f} to {high:.2f}" if accuracies else "-",
                f"{figures['time_per_epoch_s']:.2f}",
                f"{figures['train_time_s']:,.0f}",
                f"{figures['peak_mib']:,.0f}",
                _images(results[0]),
            ]
        )
    heads = ["runs", "method", "data", "seeds", "test accuracy (%)", "range", "s / epoch"]
    heads += ["s in all", "peak MiB", "test images"]
    every = [result for results in groups.values() for result in results]
    return f"{markdown(heads, rows, text_columns=3)}\n\n{footnote(every)}"


def _images(result: Mapping[str, Any]) -> str:
    """The number of test images, which results of earlier versions do not tell."""
    images = result.get("test_images")
    return "-" if images is None else f"{images:,}"


def group_figures(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of one group: its accuracies, their mean and sample standard deviation (None
    where there are too few), medians of the times, and the largest memory."""
    scored = [result["test_accuracy"] for result in results]
    known = [accuracy for accuracy in scored if accuracy is not None]
    return {
        "test_accuracies": known,
        "test_accuracy": statistics.mean(known) if known else None,
        "test_accuracy_std": statistics.stdev(known) if len(known) > 1 else None,
        "time_per_epoch_s": statistics.median(r["time_per_epoch_s"] for r in results),
        "train_time_s": statistics.median(r["train_time_s"] for r in results),
        "peak_mib": max(map(memory_mib, results)),
    }


def group_seeds(runs: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    """Group results by their settings without seed and run folder; a group is named after its first
    run, without the seed. Raises TrainError for a folder that is no finished run."""
    groups: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for folder in runs:
        result = read_result(folder)
        settings = {**stored_config(folder).to_dict(), "seed": None, "out": None}
        member = (folder.name, {**result, "folder": str(folder)})
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(member)
    named: dict[str, list[dict[str, Any]]] = {}
    for members in groups.values():
        name = _without_seed(members[0][0])
        while name in named:  # other settings under the same name
            name += "'"
        named[name] = [result for _, result in members]
    return named


def _without_seed(name: str) -> str:
    """NAME-0 or NAME-seed0 -> NAME."""
    return re.sub(r"[-_.]?(seed)?[-_]?\d+$", "", name) or name


def footnote(results: Sequence[Mapping[str, Any]]) -> str:
    """What peak MiB is, and where it was measured."""
    kinds = {"peak_cuda_mib" in result for result in results}
    memory = " / ".join(
        "allocated on the GPU" if cuda else "of the whole process, PyTorch included"
        for cuda in sorted(kinds)
    )
    return f"Peak MiB: {memory}. {machines(results)}"


def machines(results: Sequence[Mapping[str, Any]]) -> str:
    """What the times are, and the machines, with a warning if there are several; another if the
    accuracies are those of several data sets."""
    where = {
        f"{r['hardware']['device']}, CPU threads: {r['hardware']['threads']}, "
        f"torch {r['hardware']['torch']}"
        for r in results
    }
    text = f"Times: median over the epochs, training only. {'; '.join(sorted(where))}."
    if len(where) > 1:
        text += " Times of different machines do not compare."
    if len({data_set(result) for result in results}) > 1:
        text += " Accuracies on different data do not compare."
    return text


def data_set(result: Mapping[str, Any]) -> tuple[str, int | None]:
    """Which test images were scored: the data, and how many, as far as it is known."""
    return result["data"], result.get("test_images")
