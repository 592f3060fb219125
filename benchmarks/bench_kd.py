"""Time, memory and energy of training a student by each of the trainer's methods.

    python benchmarks/bench_kd.py                        four ViTs at 32 and 64 px
    python benchmarks/bench_kd.py --quick                a small teacher, under two minutes
    python benchmarks/bench_kd.py --teacher ViT-B/16 --image-size 32 --amp bf16
    python benchmarks/bench_kd.py --out kd.json --csv kd.csv --plot kd.png
    python benchmarks/bench_kd.py --show kd.json

CLIP-Embed-KD (arXiv 2404.06170) says that a student takes 9 times less memory and 8 times less time
when it learns from stored embeddings (`embed-kd`) than beside a running teacher (`teacher-kd`).
Here the trainer's own loop trains by each method, each in a process of its own. The processes of a
table take turns, so that changes in the machine's speed affect all alike. Values that do not change
the cost are random: the images, the bank's rows and, unless --teacher is a path, the teachers'
weights. Epochs are extrapolated from the measured steps. On a CPU the default takes an hour or
more, nearly all of it for the teachers.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ckd.train.config import AMP_MODES
from ckd.train.methods import METHODS
from common import command, machine
from common.report import Record, write_record
from common.workers import NO_MEMORY
from training import report
from training.case import measure_case, settings_of
from training.tasks import VITS, Setting

QUICK_TEACHER = "resnet56"
IMAGE_SIZES = (32, 64)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.show:
        status = command.show(options, report.show)
        if status == 0:
            write_files(options.record, options)
        return status
    record: Record = {
        "benchmark": "kd",
        "machine": machine.describe(options.threads, options.device),
        "settings": settings_of(options, options.epoch_images),
        "cases": [],
    }
    report.show_machine(record)
    for size in options.image_size:
        for teacher in options.teacher:
            record["cases"].append(run_case(teacher, size, options))
            report.show_case(record["cases"][-1], record["settings"])
            write_files(record, options)
    return 1 if any(broken(case) for case in record["cases"]) else 0


def broken(case: Record) -> bool:
    """Whether a measurement failed, other than by a lack of memory, which is a result."""
    failures = [part["failed"] for part in (*case["rows"], case["bank"]) if "failed" in part]
    return any(failure not in NO_MEMORY for failure in failures)


def write_files(record: Record, options: argparse.Namespace) -> None:
    if options.out:
        write_record(options.out, record)
    if options.csv:
        report.write_csv(record, options.csv)
    if options.plot:
        report.plot(record, options.plot)


def run_case(teacher: str, size: int, options: argparse.Namespace) -> Record:
    names = ("student", "batch_size", "steps", "seconds", "amp", "compile", "threads", "device")
    shared = {name: getattr(options, name) for name in names}
    with tempfile.TemporaryDirectory(prefix="bench_kd-") as folder:
        setting = Setting(folder=folder, teacher=teacher, image_size=size, **shared)
        return measure_case(options.methods, setting, options.epoch_images)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__)
    parser.add_argument(
        "--teacher",
        action="append",
        metavar="TEACHER",
        help=f"{', '.join(VITS)} (random weights, 224 px), a model spec such as resnet56 (random "
        "weights), a run folder or a .safetensors file; may be repeated (default: the four ViTs)",
    )
    parser.add_argument(
        "--image-size",
        action="append",
        type=int,
        metavar="PIXELS",
        help="image size of the student; may be repeated (default: 32 and 64)",
    )
    parser.add_argument("--student", default="vit", help="a model spec (default: %(default)s)")
    parser.add_argument(
        "--methods",
        default=",".join(METHODS),
        help="comma-separated methods (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=int, help="images per step (default: 64; quick: 16)")
    parser.add_argument(
        "--steps", type=int, help="most steps to measure, at least 2 (default: 100; quick: 20)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help="stop measuring after this time, once 2 steps are done (default: 20; quick: 4)",
    )
    parser.add_argument("--amp", choices=AMP_MODES, default="off", help="(default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile student and teacher")
    command.add_threads(parser)
    command.add_device(parser)
    parser.add_argument(
        "--quick", action="store_true", help=f"teacher {QUICK_TEACHER}, 32 px, few small steps"
    )
    parser.add_argument(
        "--epoch-images",
        type=int,
        default=50_000,
        help="images of the extrapolated epoch (default: %(default)s)",
    )
    command.add_files(
        parser, csv="write a CSV line per method", plot="draw memory and time per epoch (PNG)"
    )
    return command.parse(parser, arguments, check, "kd")


def check(options: argparse.Namespace) -> None:
    """Fill in defaults. Raises ValueError that names the argument and the values it takes."""
    quick = options.quick
    options.teacher = options.teacher or ([QUICK_TEACHER] if quick else list(VITS))
    options.image_size = options.image_size or list(IMAGE_SIZES[:1] if quick else IMAGE_SIZES)
    options.batch_size = (16 if quick else 64) if options.batch_size is None else options.batch_size
    options.steps = (20 if quick else 100) if options.steps is None else options.steps
    options.seconds = (4.0 if quick else 20.0) if options.seconds is None else options.seconds
    options.methods = options.methods.split(",")
    for method in options.methods:
        if method not in METHODS:
            raise ValueError(f"--methods: one of {', '.join(METHODS)} each, got {method!r}")
    command.check_least(options, batch_size=2, steps=2, threads=1, epoch_images=1)
    command.check_seconds(options.seconds)
    command.check_names("--methods", options.methods)
    command.check_names("--teacher", options.teacher)
    command.check_device(options)
    for size in options.image_size:
        command.check_model("--student", options.student, size)
        for teacher in options.teacher:
            if teacher not in VITS and not Path(teacher).exists():
                command.check_model(
                    "--teacher", teacher, size, f"one of {', '.join(VITS)}, a path, or "
                )


if __name__ == "__main__":
    command.run(main)
