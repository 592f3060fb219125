"""Accuracy of students by each method: three seeds, at equal epochs and at equal wall-clock time.

    python benchmarks/accuracy.py --data cifar10-10k --teacher resnet56 \\
        --teacher-weights resnet56.safetensors --out runs/accuracy

Builds the teacher's bank and trains every setting below with every seed, one after the other, each
by `python -m ckd.train` in a process of its own. Finished runs are not trained again, so a stopped
command can be repeated. Then it prints the table of `python -m ckd.compare --seeds`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ckd.compare import group_seeds, seed_table
from common import command

LONGER = 11 / 6  # about the time of a step with a ResNet-56 teacher / that of one without
TEACHER = ("--teacher", "{teacher}", "--teacher-weights", "{weights}")
EMBED = ("--method", "embed-kd", "--bank", "{bank}")
CENTROIDS = (*EMBED, "--targets", "centroids")
SAMPLES = (*EMBED, "--targets", "samples")
SETTINGS: dict[str, tuple[str, ...]] = {
    "plain": ("--method", "plain"),
    "logit-kd": ("--method", "logit-kd", *TEACHER),
    "teacher-kd": ("--method", "teacher-kd", *TEACHER),
    "centroids": CENTROIDS,
    "samples": SAMPLES,
    "mse": (*EMBED, "--distill", "mse=2"),
    "scale-1": (*CENTROIDS, "--logit-scale", "1", "--no-learn-logit-scale"),
    "scale-14": (*CENTROIDS, "--logit-scale", "14.2857", "--no-learn-logit-scale"),
    "published": (*CENTROIDS, "--paper-compat"),
    # For about the wall-clock time of teacher-kd.
    "plain-longer": ("--method", "plain"),
    "centroids-longer": CENTROIDS,
    "samples-longer": SAMPLES,
    "mse-longer": (*EMBED, "--distill", "mse=2"),
}
COMMON = [
    *("--batch-size", "128", "--lr", "2e-3", "--weight-decay", "0.05"),
    *("--warmup-epochs", "0.5", "--amp", "bf16"),
]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        return measure(options)
    except subprocess.CalledProcessError as error:
        return error.returncode if error.returncode > 0 else 1  # the process printed the reason


def measure(options: argparse.Namespace) -> int:
    bank = options.out / "bank"
    of_teacher = ["--teacher", options.teacher, "--teacher-weights", options.teacher_weights]
    run("ckd.bank", "build", "--data", options.data, *of_teacher, "--out", str(bank))
    folders = []
    for seed in range(options.seeds):
        for name in options.settings:
            folders.append(options.out / f"{name}-seed{seed}")
            train(name, seed, folders[-1], bank, options)
    print(seed_table(group_seeds(folders)))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__)
    parser.add_argument("--data", required=True, help="the data set, as for python -m ckd.train")
    parser.add_argument("--teacher", required=True, help="a model spec, such as resnet56")
    parser.add_argument("--teacher-weights", required=True, help="a .safetensors file")
    parser.add_argument("--student", default="resnet20", help="a model spec (default: %(default)s)")
    parser.add_argument(
        "--epochs",
        type=int,
        default=6,
        help=f"epochs of each run; x {LONGER:.2f} for *-longer (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="runs of each setting (default: %(default)s)"
    )
    parser.add_argument(
        "--settings", default=",".join(SETTINGS), help="comma-separated (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/accuracy"),
        help="the folder of the bank and the runs (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    options.settings = options.settings.split(",")
    unknown = [name for name in options.settings if name not in SETTINGS]
    if unknown:
        parser.error(f"--settings: {unknown[0]!r} is none of {', '.join(SETTINGS)}")
    for name in ("epochs", "seeds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: expected a folder that can be made, got {options.out}: {error}")
    return options


def train(name: str, seed: int, out: Path, bank: Path, options: argparse.Namespace) -> None:
    values = {"teacher": options.teacher, "weights": options.teacher_weights, "bank": bank}
    own = [argument.format(**values) for argument in SETTINGS[name]]
    epochs = round(options.epochs * LONGER) if name.endswith("-longer") else options.epochs
    sizes = ["--epochs", str(epochs), "--seed", str(seed), "--student", options.student]
    # --resume begins a run, goes on with one that was stopped, or leaves a finished one as it is.
    run("ckd.train", "--data", options.data, *COMMON, *sizes, *own, "--out", str(out), "--resume")


def run(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)


if __name__ == "__main__":
    command.run(main)
