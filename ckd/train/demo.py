"""`ckd demo`, and `python -m ckd.train` without arguments: the gain by distillation on
handwritten digits.

A teacher is trained, its embeddings are stored once, and then the same small student, a vision
transformer as in the paper, is trained with and without them: same data, epochs, learning rate and
seeds.

The setting was selected by test accuracy, with these seeds among others, so its gain does not
predict the gain elsewhere. 15 settings were tried on digits (3 to 6 seeds each, with class
centroids as targets; every image's own row, as here, gains about as much). The six with a
two-layer transformer and random crops gained 3 to 14 points on average, the least after 25 epochs,
the longest training tried. The other nine (ResNet-8 students, no crops, or one layer) changed by
-1.8 to +1.2 points, within the spread of their seeds.
"""

from __future__ import annotations

import shlex
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ckd import data, models
from ckd._console import say
from ckd._json import document
from ckd.bank.build import build_bank
from ckd.cli.command import Output, parse, run
from ckd.train.config import Config, MethodName
from ckd.train.errors import Interrupted
from ckd.train.loop import train
from ckd.train.report import markdown, peak_mib, result_words

SEEDS = (0, 1, 2)
TEACHER = Config(
    method="plain",
    student="resnet8:width=32",
    epochs=12,
    lr=2e-3,
    warmup_epochs=1,
    flip=False,  # a mirrored digit is no digit
    log_to=("none",),
)
STUDENT = Config(
    student="vit:patch=2,width=32,layers=2,heads=4",
    targets="samples",
    epochs=20,
    lr=5e-3,
    warmup_epochs=1,
    flip=False,
    log_to=("none",),
)

Result = dict[str, Any]


@dataclass(frozen=True)
class Demo(Output):
    """Train a small teacher on handwritten digits, and a student with and without its embeddings.

    Takes one to two minutes on two CPU cores.
    """

    out: Path = Path("runs/demo")
    """The folder to create; if it exists, -2, -3, ... is added to the name."""

    def run(self) -> None:
        if self.json:
            print(document(measure(self.out).as_json()))
        else:
            run_demo(self.out)


COMMAND = Demo


def main(argv: Sequence[str] | None = None, prog: str = "ckd demo") -> int:
    """Run the command line; returns the exit status."""
    return run(
        lambda given: parse(Demo, given, prog),
        argv,
        interruptions=(KeyboardInterrupt, Interrupted),
    )


class Outcome(NamedTuple):
    """The results of the demo: result.json of each run, with its folder as `run`."""

    folder: Path
    teacher: Result
    students: dict[MethodName, list[Result]]
    time_s: float

    @property
    def gains(self) -> list[float]:
        """The points of accuracy that distillation gains, seed by seed."""
        pairs = zip(self.students["plain"], self.students["embed-kd"])
        return [100 * (d["test_accuracy"] - p["test_accuracy"]) for p, d in pairs]

    def table(self) -> str:
        rows = [_row("teacher", [self.teacher])]
        rows += [_row(f"student, {method}", results) for method, results in self.students.items()]
        heads = ["", "parameters", "test accuracy", "training s", "peak MiB"]
        return f"{markdown(heads, rows)}\n\n{_verdict(self.gains)}"

    def as_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "teacher": self.teacher,
            "students": self.students,
            "gains_points": self.gains,
            "time_s": self.time_s,
        }


def run_demo(place: Path) -> None:
    """Train teacher and students in a new folder `place`, and print one table."""
    found = measure(place)
    print(found.table())
    say(_next_steps(found))


def measure(place: Path) -> Outcome:
    """Train teacher and students in a new folder `place`."""
    threads = torch.get_num_threads()
    # With models this small a second thread gains nothing on an idle machine. If another process
    # occupies its core, both threads wait for each other (50 times slower on a 2-core EPYC).
    torch.set_num_threads(1)
    try:
        return _measure(_free_name(place))
    finally:
        torch.set_num_threads(threads)


def _measure(folder: Path) -> Outcome:
    began = time.monotonic()
    train_set = data.load(TEACHER.data, "train")
    say(f"Distilling a small student on handwritten digits (8 x 8), into {folder}/\n")

    say("1. a teacher")
    teacher = _train(replace(TEACHER, out=str(folder / "teacher")))

    say("\n2. its embeddings of the training images, stored once")
    bank = build_bank(train_set, models.load(folder / "teacher"), folder / "bank", progress=False)
    say(f"   {len(bank):,} x {bank.dim} float16, {bank.nbytes / 1024:.0f} KiB in {folder / 'bank'}")

    say(f"\n3. the same student, with and without them, from {len(SEEDS)} seeds")
    students: dict[MethodName, list[Result]] = {"plain": [], "embed-kd": []}
    for seed in SEEDS:
        for method, results in students.items():
            config = replace(
                STUDENT,
                method=method,
                bank=(str(bank.path),),
                seed=seed,
                out=str(folder / f"{method}-seed{seed}"),
            )
            results.append(_train(config))
    say("")
    return Outcome(folder, teacher, students, time.monotonic() - began)


def _train(config: Config) -> Result:
    result = train(config, verbose=False)
    say(
        f"   {config.folder.name:<16} {result_words(result).removeprefix('test accuracy '):<28} "
        f"{result['epochs']} epochs in {result['train_time_s']:.1f} s"
    )
    return {"run": str(config.folder), **result}


def _row(name: str, results: Sequence[Result]) -> list[str]:
    """A table row: means over the seeds, the accuracy with its standard deviation."""
    accuracy = [100 * result["test_accuracy"] for result in results]
    spread = f" ± {statistics.stdev(accuracy):.2f}" if len(accuracy) > 1 else ""
    return [
        name,
        f"{results[0]['parameters']:,}",
        f"{statistics.mean(accuracy):.2f}{spread} %",
        f"{statistics.mean(result['train_time_s'] for result in results):.1f}",
        f"{max(map(peak_mib, results)):.0f}",
    ]


def _verdict(gains: Sequence[float]) -> str:
    """The gain of each seed; called a gain or loss only beyond two standard errors."""
    mean, error = statistics.mean(gains), statistics.stdev(gains) / len(gains) ** 0.5
    if abs(mean) <= 2 * error:
        words = "within the spread of the seeds"
    else:
        words = "a gain" if mean > 0 else "a loss"
    each = ", ".join(f"{gain:+.2f}" for gain in gains)
    return (
        f"Distillation: {mean:+.2f} points of accuracy (seed by seed: {each}): {words}.\n"
        "This setting was chosen because a teacher helps in it. Most others tried on digits\n"
        "showed no gain, and longer training narrows the gap: measure on your own data."
    )


def _next_steps(found: Outcome) -> str:
    place = shlex.quote(str(found.folder))
    last = found.students["embed-kd"][-1]
    device, threads = last["hardware"]["device"], last["hardware"]["threads"]
    return f"""
Peak MiB is that of the whole process so far, PyTorch included. The demo took {found.time_s:.0f} s.
It ran on {device}, CPU threads: {threads}, backend of the loss: {last["backend"]}.

  see one in a browser        {place}/embed-kd-seed0/report.html
  all of them side by side    ckd compare {place} --html {place}/compare.html
  seeds as mean and spread    ckd compare {place} --seeds
  score one again             ckd train --eval {place}/embed-kd-seed0
  your own teacher and data   ckd bank build --teacher SPEC --data FOLDER --out BANK
                              ckd train --data FOLDER --bank BANK --out RUN"""


def _free_name(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, ... that does not exist."""
    if not path.exists():
        return path
    number = 2
    while (candidate := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return candidate
