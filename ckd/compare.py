"""python -m ckd.compare RUN...: a table of finished runs, and a figure like the paper's. With
--seeds, runs that differ only in their seed become one row: mean and spread."""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from ckd.cli.command import parse, run
from ckd.train.errors import TrainError
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
from ckd.train.report import markdown
from ckd.train.stored import read_result, stored_config

METHOD_COLOURS = {
    "plain": GREY,
    "logit-kd": ORANGE,
    "teacher-kd": VERMILION,
    "embed-kd": BLUE,
}


def memory_mib(result: Mapping[str, Any]) -> float:
    """Peak memory: on CUDA the allocator's; on the CPU the peak resident size minus the size before
    the run, which is mostly PyTorch's libraries."""
    if "peak_cuda_mib" in result:
        return result["peak_cuda_mib"]
    return result["peak_rss_mib"] - result["start_rss_mib"]


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table, one row per run, and a line that names the machine."""
    rows = [
        [
            result["run"],
            result["method"],
            result["student"],
            f"{result['parameters']:,}",
            "-" if result["test_accuracy"] is None else f"{result['test_accuracy']:.2%}",
            f"{result['time_per_epoch_s']:.2f}",
            f"{result['images_per_s']:,.0f}",
            f"{memory_mib(result):,.0f}",
        ]
        for result in results
    ]
    heads = ["run", "method", "student", "parameters", "test accuracy"]
    heads += ["s / epoch", "images / s", "peak MiB"]
    return f"{markdown(heads, rows, text_columns=3)}\n\n{_footnote(results)}"


def seed_table(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A Markdown table, one row for the runs of one setting under several seeds.

    The spread is the sample standard deviation, over the runs that have an accuracy; times are
    medians over the runs.
    """
    rows = []
    for name, results in groups.items():
        scored = [result["test_accuracy"] for result in results]
        accuracies = [accuracy for accuracy in scored if accuracy is not None]
        mean = f"{100 * statistics.mean(accuracies):.2f}" if accuracies else "-"
        spread = f" ± {100 * statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
        low, high = (100 * one(accuracies, default=0.0) for one in (min, max))
        rows.append(
            [
                name,
                results[0]["method"],
                str(len(results)),
                f"{mean}{spread}",
                f"{low:.2f} to {high:.2f}" if accuracies else "-",
                f"{statistics.median(r['time_per_epoch_s'] for r in results):.2f}",
                f"{statistics.median(r['train_time_s'] for r in results):,.0f}",
            ]
        )
    heads = ["runs", "method", "seeds", "test accuracy (%)", "range", "s / epoch", "s in all"]
    every = [result for results in groups.values() for result in results]
    return f"{markdown(heads, rows, text_columns=2)}\n\n{_machines(every)}"


def group_seeds(runs: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    """Group results by their settings without seed and run folder; a group is named after its first
    run, without the seed. Raises TrainError for a folder that is no finished run."""
    groups: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for folder in runs:
        result = read_result(folder)
        settings = {**stored_config(folder).to_dict(), "seed": None, "out": None}
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append((folder.name, result))
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


def draw(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The paper's figure: memory and time per epoch of each run, and accuracy if any run has one.

    Raises ImportError that names the extra if matplotlib is missing.
    """
    places = list(range(len(results)))
    colours = [METHOD_COLOURS.get(result["method"], GREEN) for result in results]
    accuracies = [math.nan if (a := r["test_accuracy"]) is None else 100 * a for r in results]
    known = [value for value in accuracies if not math.isnan(value)]
    panels = [
        ("Peak memory of the run (MiB)", [memory_mib(r) for r in results], "{:,.0f}"),
        ("Training time per epoch (s)", [r["time_per_epoch_s"] for r in results], "{:.2f}"),
    ]
    if known:
        panels.append(("Test accuracy (%)", accuracies, "{:.2f}"))
    columns = len(panels)
    figure, axes = new_figure(
        11.0 / 3 * columns, 0.9 + 0.5 * len(results), columns=columns, sharey=True
    )
    for one, (title, values, form) in zip(axes, panels):
        accuracy = title.startswith("Test accuracy")
        if accuracy:  # only differences matter: dots, on an axis that need not begin at 0
            one.scatter(values, places, s=70, color=colours, zorder=3)
            spread = max(max(known) - min(known), 1.0)
            one.set_xlim(min(known) - 0.25 * spread, max(known) + 0.45 * spread)
            one.set_xticks([tick for tick in one.get_xticks()[1:-1] if tick <= 100])
        else:
            one.barh(places, values, height=0.62, color=colours)
            one.set_xlim(0, 1.22 * max(*values, 1e-9))
        for place, value in zip(places, values):
            if math.isnan(value):
                continue
            one.annotate(
                form.format(value),
                (value, place),
                xytext=(9 if accuracy else 4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color=INK,
            )
        one.set_title(title, fontsize=10, loc="left")
        one.grid(axis="y", visible=False)
        one.grid(axis="x", color="#DDDDDD", linewidth=0.7)
        one.tick_params(axis="y", length=0)
    axes[0].set_yticks(places, [literal(_label(result)) for result in results])
    axes[0].invert_yaxis()
    save_figure(figure, path)


def _label(result: Mapping[str, Any]) -> str:
    run, method = result["run"], result["method"]
    return run if method in run else f"{run} ({method})"


def _footnote(results: Sequence[Mapping[str, Any]]) -> str:
    kinds = {"peak_cuda_mib" in result for result in results}
    memory = " / ".join(
        "allocated on the GPU" if cuda else "resident memory above the idle process"
        for cuda in sorted(kinds)
    )
    return f"Peak MiB: {memory}. {_machines(results)}"


def _machines(results: Sequence[Mapping[str, Any]]) -> str:
    machines = {
        f"{r['hardware']['device']}, CPU threads: {r['hardware']['threads']}, "
        f"torch {r['hardware']['torch']}"
        for r in results
    }
    where = "; ".join(sorted(machines))
    warning = " Times of different machines do not compare." if len(machines) > 1 else ""
    return f"Times: median over the epochs, training only. {where}.{warning}"


@dataclass(frozen=True)
class Command:
    """Compare finished runs: a table, and with --out a figure."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FIGURE.png")] = None
    """Draw memory, time per epoch and accuracy of the runs into this file."""
    seeds: tyro.conf.FlagCreatePairsOff[bool] = False
    """One row for runs that differ only in their seed: mean and spread."""

    def run(self) -> None:
        if not self.runs:
            raise TrainError("name at least one run folder: python -m ckd.compare RUN...")
        if self.seeds:
            if self.out is not None:
                raise TrainError("--out draws single runs; leave out --seeds")
            print(seed_table(group_seeds(self.runs)))
            return
        results = [{**read_result(folder), "run": folder.name} for folder in self.runs]
        print(table(results))
        if self.out is not None:
            draw(results, self.out)
            print(f"\nfigure: {self.out}")


COMMAND = Command


def main(argv: Sequence[str] | None = None, prog: str = "python -m ckd.compare") -> int:
    """Run the command line; returns the exit status."""
    return run(lambda given: parse(Command, given, prog), argv)


if __name__ == "__main__":
    sys.exit(main())
