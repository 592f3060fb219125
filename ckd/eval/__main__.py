"""`ckd eval RUN --bank BANK`: what a trained student is good for, in one table and one JSON."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from ckd import data, models
from ckd._device import pick_device
from ckd._errors import ConfigError
from ckd._files import atomic_write, user_path
from ckd._json import document, sealed
from ckd._output import check_output
from ckd.bank import EmbeddingBank
from ckd.cli.command import Output, parse, run
from ckd.data import MAX_PIXELS
from ckd.eval.evaluate import evaluate_student
from ckd.eval.report import FIGURES
from ckd.train.config import Config
from ckd.train.stored import is_run, stored_config


@dataclass(frozen=True, kw_only=True)
class Eval(Output):
    """Measure what a trained student is good for: classification, search and a linear probe, in its
    own space and in its teacher's.

    A figure that needs what is not given is left out, with the reason.
    """

    student: tyro.conf.Positional[str]
    """A run folder, a student's .safetensors file or a model spec."""
    weights: Path | None = None
    """The weights of a student that is a model's name: a file, or a run folder."""
    bank: Path | None = None
    """The teacher's rows of the training images, made by `ckd bank build`."""
    test_bank: Path | None = None
    """The teacher's rows of the test images (`ckd bank build --split test`): adds the teacher's own
    figures, and how often an image finds its own row."""
    texts: Path | None = None
    """The teacher's rows of class texts (`ckd bank build --from-npy`), one for each class."""
    teacher: int | None = None
    """The number, from 0, of the student's teacher whose rows --bank holds; default: by name."""
    data: str | None = None
    """The data set: digits, an image folder, parquet file(s) or .npz; default: the run's own."""
    image_size: int | None = None
    """Resize and centre-crop the images to this many pixels; default: as the run did."""
    max_image_pixels: int = MAX_PIXELS
    """Refuse encoded images of more pixels than this (default: 2^26) before decoding them."""
    figures: tuple[str, ...] = ()
    """Measure these figures only, by their names in the JSON file; default: all."""
    label_fraction: float = 1.0
    """Predict with this fraction of the training images' labels, drawn as in training."""
    seed: int | None = None
    """Seed of that draw; default: the run's own, else 0."""
    out: Path | None = None
    """Also write the figures to this JSON file."""
    batch_size: int = 256
    """Images per forward pass."""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda, cuda:1, ..."""
    workers: int = 0
    """Processes that decode images; a data set in memory needs none."""

    def run(self) -> None:
        if self.out is not None:
            check_output(self.out)
        device = pick_device(self.device)
        student = models.load_student(self.student, weights=self.weights).to(device)
        banks = [
            None if path is None else EmbeddingBank.open(path)
            for path in (self.bank, self.test_bank, self.texts)
        ]
        source, size, seed = self._defaults()
        train, test = (
            data.load(source, split, image_size=size, max_pixels=self.max_image_pixels)
            for split in ("train", "test")
        )
        report = evaluate_student(
            student,
            train.to(device),
            test.to(device),
            banks[0],
            test_bank=banks[1],
            texts=banks[2],
            teacher=self.teacher,
            figures=self.figures or tuple(FIGURES),
            label_fraction=self.label_fraction,
            seed=seed,
            batch_size=self.batch_size,
            workers=self.workers,
        )
        values = {"student": self.student, **report.to_dict()}
        if self.out is not None:  # before the table, whose reader may close the pipe
            atomic_write(self.out, sealed(values))
        if self.json:
            print(document(values))
        else:
            print(f"{self.student} on {test.name}\n\n{report.table()}")

    def _defaults(self) -> tuple[str, int | None, int]:
        """Data, image size and seed: those that are given, else those of the run."""
        folder = user_path(self.student)
        stored = stored_config(folder) if is_run(folder) else Config()
        if self.data is None and not is_run(folder):
            raise ConfigError(
                f"{self.student} does not say on which data it was trained; name them with --data"
            )
        size = self.image_size
        if size is None and not self.data:
            size = stored.image_size
        return self.data or stored.data, size, stored.seed if self.seed is None else self.seed


COMMAND = Eval


def main(argv: Sequence[str] | None = None, prog: str = "python -m ckd.eval") -> int:
    """Run the command line; returns the exit status."""
    return run(lambda given: parse(Eval, given, prog), argv)


if __name__ == "__main__":
    sys.exit(main())
