"""Accuracy of students with few labels or none, beside a bank of their teacher's rows.

    python benchmarks/labels.py --data cifar10 --teacher resnet56 resnet56.safetensors
    python benchmarks/labels.py --data cifar10 --teacher resnet56 resnet56.safetensors \\
        --teacher efficientnet-lite2 --seeds 3 --jobs 14 --limit-seconds 600 --out runs/labels
    python benchmarks/labels.py --show runs/labels/labels.json --plot labels.png

Every image is trained on, a part of them with labels; plain training sees that part alone. Trains
every setting with every teacher, share of labels and seed, in --jobs processes, and measures each
student by ckd.eval. Finished ones are not trained again, so a stopped command can be repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from ckd import CkdError, data
from ckd.train.config import AMP_MODES
from common import command, machine
from common.report import Record, write_record
from common.workers import Failed, each
from students import cells, table
from students.cells import SETTINGS
from students.material import write_banks, write_images
from students.teachers import EFFICIENTNET
from students.trial import Plan, finished, run

RECORD = "labels.json"
PATIENCE = 3600.0  # seconds for one cell
# Of 2e-3, 4e-3 and 8e-3 the best for plain training of a ResNet-8 on 4,000 labelled images: 54.3,
# 56.7 and 60.4 % (20 epochs of batch 128, one seed, an AMD EPYC, 2026-11-27).
LR = 8e-3
DEFAULTS = [name for name in SETTINGS if name != "plain-longer"]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.show:
        code = command.show(options, table.show)
    else:
        try:
            options.record, code = measure(options), 0
        except (CkdError, Failed, ImportError, OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        table.show(options.record)
        code = 1 if options.record["failed"] else 0
    if options.plot and not code:
        table.draw(options.record, options.plot)
    return code


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__)
    parser.add_argument("--data", help="the data set, as for python -m ckd.train")
    parser.add_argument(
        "--teacher",
        nargs="+",
        action="append",
        default=[],
        metavar=("SPEC", "WEIGHTS"),
        help=f"a model spec with a .safetensors file, or {EFFICIENTNET}; may be repeated",
    )
    for flag, what in (("--images", "training images"), ("--test-images", "test images")):
        parser.add_argument(flag, type=int, metavar="N", help=f"the first N {what} (default: all)")
    for flag, kind, default, words in (
        ("--student", str, "resnet8", "a model spec"),
        ("--epochs", int, 10, f"epochs of each run; x {cells.LONGER:g} for plain-longer"),
        ("--batch-size", int, 128, "images of a step"),
        ("--lr", float, LR, "peak learning rate"),
        ("--settings", str, ",".join(DEFAULTS), "comma-separated"),
        ("--percents", str, "0,1,5,25,100", "of images with a label, comma-separated"),
        ("--seeds", int, 3, "runs of each cell"),
        ("--jobs", int, 1, "processes that train at the same time"),
    ):
        parser.add_argument(
            flag, type=kind, default=default, help=f"{words} (default: %(default)s)"
        )
    parser.add_argument(
        "--amp", choices=AMP_MODES, default="bf16", help="autocast (default: %(default)s)"
    )
    parser.add_argument(
        "--equal-time",
        action="store_true",
        help=f"also train plain for {cells.LONGER:g} times the epochs, at least the time of others",
    )
    parser.add_argument(
        "--headline",
        action="store_true",
        help=f"only {', '.join(cells.HEADLINE)}: with 1 %% of the labels, without any, and plain "
        "with all",
    )
    parser.add_argument(
        "--limit-seconds",
        type=float,
        default=math.inf,
        metavar="S",
        help="begin no further run after this time, banks included",
    )
    command.add_threads(parser)
    command.add_device(parser)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/labels"),
        help="the folder of data, banks, runs and labels.json (default: %(default)s)",
    )
    parser.add_argument("--show", type=Path, help="print the tables of a labels.json, and exit")
    parser.add_argument("--plot", type=Path, help="draw accuracies into this .png file")
    options = parser.parse_args(arguments)
    try:
        if options.plot:
            command.check_output("--plot", options.plot)
        if options.show:
            options.record = command.read_record(options.show, "labels")
        else:
            check(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def check(options: argparse.Namespace) -> None:
    """Fill in defaults. Raises ValueError for what cannot work."""
    if options.data is None or not options.teacher:
        raise ValueError("expected --data and --teacher, or --show")
    options.teacher = [_teacher(words) for words in options.teacher]
    command.check_names("--teacher", [spec for spec, _ in options.teacher])
    options.settings = options.settings.split(",")
    command.check_names("--settings", options.settings)
    for name in options.settings:
        if name not in SETTINGS:
            raise ValueError(f"--settings: {name!r} is none of {', '.join(SETTINGS)}")
    if options.equal_time and "plain-longer" not in options.settings:
        options.settings.insert(1, "plain-longer")
    options.percents = [_percent(word) for word in options.percents.split(",")]
    command.check_names("--percents", [f"{percent:g}" for percent in options.percents])
    command.check_least(options, epochs=1, batch_size=1, seeds=1, jobs=1, threads=1)
    for name in ("images", "test_images"):
        if getattr(options, name) is not None:
            command.check_least(options, **{name: 1})
    command.check_model("--student", options.student, 32)
    command.check_device(options)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: expected a folder, got {options.out}: {error}") from error


def _teacher(words: Sequence[str]) -> tuple[str, Path | None]:
    spec, *weights = words
    if len(weights) > 1:
        raise ValueError(f"--teacher: expected SPEC [WEIGHTS], got {' '.join(words)}")
    return spec, Path(weights[0]) if weights else None


def _percent(word: str) -> float:
    try:
        percent = float(word)
    except ValueError:
        percent = math.nan
    if not 0 <= percent <= 100:
        raise ValueError(f"--percents: expected numbers from 0 to 100, got {word!r}")
    return percent


def measure(options: argparse.Namespace) -> Record:
    """Train and measure what is missing in --out; writes its labels.json after every cell."""
    end = time.time() + options.limit_seconds
    images = write_images(options.data, options.images, options.test_images, options.out)
    # Data that are there stay as they are, whatever is asked for.
    asked = {name: getattr(options, name) for name in ("data", "images", "test_images")}
    keep_settings(options.out / "asked.json", asked)
    knows_classes = dict.fromkeys((spec for spec, _ in options.teacher), False)
    build = partial(write_banks, images, options.device, options.batch_size)
    for (spec, _), knows in each(build, options.teacher, options.jobs, PATIENCE):
        if isinstance(knows, Failed):
            raise knows
        knows_classes[spec] = knows
    shared = ("student", "epochs", "batch_size", "lr", "amp")
    settings = {name: getattr(options, name) for name in ("data", *shared)}
    settings |= {
        name: len(data.load(images, split))
        for name, split in (("images", "train"), ("test_images", "test"))
    }
    keep_settings(options.out / "settings.json", settings)
    how = ("device", "threads")
    (options.out / "cells").mkdir(exist_ok=True)
    reference = next((name for name in options.settings if name in cells.BANK), "")
    same = {name: getattr(options, name) for name in (*shared, *how)}
    plan = Plan(options.out, end=end, reference=reference, **same)
    record: Record = {
        "benchmark": "labels",
        "machine": machine.describe(options.threads, options.device),
        "settings": {**settings, "jobs": options.jobs, "teachers": list(knows_classes)},
        "cells": [],
        "failed": [],
    }
    every = cells.ordered(knows_classes, options.settings, options.percents, options.seeds)
    chosen = [cell for cell, headline in every if headline or not options.headline]
    missing = []
    for cell in chosen:
        done = finished(plan, cell)
        missing.append(cell) if done is None else record["cells"].append(done)
    with tqdm(total=len(chosen), initial=len(record["cells"]), unit="cell", disable=None) as bar:
        for cell, result in each(partial(run, plan), missing, options.jobs, PATIENCE):
            if isinstance(result, Failed):
                record["failed"].append({"name": cell.name, "reason": result.result})
            else:
                record["cells"].append(result)
            write_record(options.out / RECORD, record)
            bar.update()
    write_record(options.out / RECORD, record)
    return record


def keep_settings(path: Path, settings: Record) -> None:
    """Write the settings; ValueError if the folder has others."""
    if path.exists():
        before = json.loads(path.read_text())
        for name, value in settings.items():
            if before[name] != value:
                raise ValueError(
                    f"{path.parent} has runs with {name} {before[name]}, not {value}; "
                    "choose another --out"
                )
    write_record(path, settings)


if __name__ == "__main__":
    command.run(main)
