"""Time of each part of a training step, and the cost of loading images one by one.

    python benchmarks/bench_trainer.py                     embed-kd, the paper's student, 32 px
    python benchmarks/bench_trainer.py --student resnet20 --threads 1
    python benchmarks/bench_trainer.py --steps 5 --out mine.json
    python benchmarks/bench_trainer.py --show mine.json

The first table splits a step of the trainer's own loop: the student's forward, the loss, the
backward, the optimizer, and everything else (data, augmentation, checks, reading the loss). The
second compares two ways to make augmented float batches from the same uint8 images, without a
student: the trainer's, and that of the published implementation of CLIP-Embed-KD, per-sample
transforms of PIL images in the workers of a DataLoader. CPU only: a GPU needs a profiler.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils import data as torch_data

from ckd import data, models
from ckd._console import console
from ckd.train.device import torch_state
from ckd.train.loop import train_epoch
from ckd.train.methods import method_class
from ckd.train.run import Run, set_up
from common import command, machine
from common.report import Record, duration, show_machine, write_record
from training.gauge import Enough
from training.tasks import Setting, config_of, write_bank, write_images

PARTS = ("forward", "loss", "backward", "optimizer")
PIL_WORKERS = 2
TEACHER_DIM = 1024
BATCHES = 40  # per turn of a loader
TURNS = 5
REST = 0.3  # seconds before a turn, in which the workers prefetch
IN_ADVANCE = 2 * PIL_WORKERS  # batches that a DataLoader prefetches; not timed


class Clock:
    """Seconds spent in each part of a step."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments, **options)
            self.seconds[part] += time.perf_counter() - start
            return result

        return timed


def measure_step(setting: Setting, method: str) -> Record:
    """Median and mean seconds of the steps after the first, and the mean seconds of each part."""
    write_images(setting)
    write_bank(Path(setting.folder) / "bank", TEACHER_DIM)
    config = config_of(method, setting)
    device, clock = torch.device("cpu"), Clock()
    ends = [time.perf_counter()]

    def after_step() -> bool:
        ends.append(time.perf_counter())
        if len(ends) == 2:
            clock.seconds = dict.fromkeys(PARTS, 0.0)  # the first step warms up
        if len(ends) == setting.steps + 2:
            raise Enough
        return False

    with torch_state(config, device):
        run = set_up(config, device, method_class(config))
        with console(quiet=True), watched(run, clock), contextlib.suppress(Enough):
            train_epoch(run, after_step)
    steps = [end - start for start, end in itertools.pairwise(ends[1:])]
    parts = {part: spent / len(steps) for part, spent in clock.seconds.items()}
    mean = statistics.mean(steps)
    parts["everything else"] = mean - sum(parts.values())
    return {"median": statistics.median(steps), "mean": mean, "parts": parts}


@contextlib.contextmanager
def watched(run: Run, clock: Clock) -> Iterator[None]:
    """Wrap the run's functions in the clock."""
    run.forward = clock.wrap("forward", run.forward)
    with contextlib.ExitStack() as stack:
        for part, owner, name in (
            ("loss", run.method, "forward"),
            ("optimizer", run.optimizer, "step"),
            ("backward", Tensor, "backward"),
        ):
            timed = clock.wrap(part, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, timed))
        yield


class PilImages(torch_data.Dataset[tuple[Tensor, int]]):
    """One image at a time: flipped at random as a PIL image, then a normalised float tensor."""

    def __init__(self, images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> None:
        self._images, self._labels = images, labels
        self._mean, self._std = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.5)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self._images[index])
        if torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        array = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255
        return (torch.from_numpy(array) - self._mean) / self._std, int(self._labels[index])


def pil_batches(path: Path, batch_size: int) -> Iterator[Tensor]:
    arrays = np.load(path)
    images = PilImages(arrays["train_images"], arrays["train_labels"])
    loader = torch_data.DataLoader(
        images, batch_size, shuffle=True, num_workers=PIL_WORKERS, persistent_workers=True
    )
    while True:
        for batch, _ in loader:
            yield batch


def trainer_batches(path: Path, batch_size: int, student: Any) -> Iterator[Tensor]:
    dataset, device = data.load(str(path), "train"), torch.device("cpu")
    augment, epoch, step = data.Augment(), 0, 0
    while True:
        order = data.epoch_order(len(dataset), seed=0, epoch=epoch)
        for batch in dataset.batches(order, batch_size, device, 0):
            images = augment(batch.images, data.step_generator(0, step, device))
            yield models.prepare(student, images)
            step += 1
        epoch += 1


def measure_loading(setting: Setting) -> Record:
    """Images per second of both loaders, medians over alternating turns."""
    write_images(setting)
    student = models.create(
        setting.student, num_classes=2, image_size=setting.image_size, in_channels=3
    )
    ways = {
        "trainer": trainer_batches(setting.images, setting.batch_size, student),
        f"PIL, {PIL_WORKERS} workers": pil_batches(setting.images, setting.batch_size),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(TURNS + 1):
        for name, batches in ways.items():
            time.sleep(REST)
            for _ in range(IN_ADVANCE):
                next(batches)
            start = time.perf_counter()
            count = sum(len(next(batches)) for _ in range(BATCHES))
            if turn > 0:  # the workers start in the first turn
                rates[name].append(count / (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in rates.items()}


def show(record: Record) -> None:
    about, setting, step = record["machine"], record["setting"], record["step"]
    show_machine(about)
    print()
    print(
        f"### {setting['method']}, {setting['student']}, {setting['image_size']} px, batch "
        f"{setting['batch_size']}: a step of {duration(step['median'])}\n"
    )
    print("| part of a step | mean | share |\n|---|---:|---:|")
    for part, spent in step["parts"].items():
        print(f"| {part} | {duration(spent)} | {spent / step['mean']:.1%} |")
    print("\n| batches by | images / s | / last row |\n|---|---:|---:|")
    *_, last = record["loading"].values()
    for name, rate in record["loading"].items():
        print(f"| {name} | {rate:,.0f} | {rate / last:.1f} |")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__)
    parser.add_argument("--student", default="vit", help="a model spec (default: vit, the paper's)")
    parser.add_argument(
        "--method",
        choices=("plain", "embed-kd"),
        default="embed-kd",
        help="the trainer's method (default: %(default)s)",
    )
    parser.add_argument(
        "--image-size", type=int, default=32, metavar="PIXELS", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=64, help="images per step (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=10, help="steps to measure (default: %(default)s)"
    )
    parser.add_argument(
        "--amp", choices=("off", "bf16"), default="off", help="(default: %(default)s)"
    )
    command.add_threads(parser)
    command.add_files(parser)
    return command.parse(parser, arguments, check, "trainer")


def check(options: argparse.Namespace) -> None:
    """Raise ValueError that names the argument and the values it takes."""
    command.check_least(options, image_size=1, batch_size=1, steps=1, threads=1)
    command.check_model("--student", options.student, options.image_size)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.show:
        return command.show(options, show)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(
            folder=folder,
            student=options.student,
            teacher="resnet20",  # a placeholder: neither method runs a teacher
            image_size=options.image_size,
            batch_size=options.batch_size,
            steps=options.steps,
            seconds=0.0,
            amp=options.amp,
            compile=False,
            threads=options.threads,
            device="cpu",
        )
        record = {
            "benchmark": "trainer",
            "machine": machine.describe(options.threads),
            "setting": {
                "method": options.method,
                "student": options.student,
                "image_size": options.image_size,
                "batch_size": options.batch_size,
                "amp": options.amp,
            },
            "step": measure_step(setting, options.method),
            "loading": measure_loading(setting),
        }
    show(record)
    if options.out:
        write_record(options.out, record)
    return 0


if __name__ == "__main__":
    command.run(main)
