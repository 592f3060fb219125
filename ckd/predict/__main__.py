"""`ckd predict RUN IMAGE|FOLDER...`: the classes of images, by a trained student."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
import tyro

from ckd import models
from ckd._console import bar
from ckd._device import pick_device
from ckd._errors import ConfigError, printable
from ckd._files import atomic_file, naming
from ckd._hints import check_choices, flag
from ckd._output import check_output
from ckd.bank import EmbeddingBank
from ckd.cli import command
from ckd.data import MAX_PIXELS, DataError
from ckd.models import Prediction, Student
from ckd.models.student import ranked
from ckd.predict.classify import By, Classifier, by_bank, by_class_head
from ckd.predict.files import decoded, image_files
from ckd.predict.output import Csv, Json, Output, Several, Text

_FILES = (".csv", ".json")


@dataclass(frozen=True)
class Predict(command.Output):
    """Tell the classes of images, by a trained student: class, probability, and those that come
    next.

    Images are prepared as in training: their centre square is scaled to the student's size. A file
    that is no image is named on stderr and passed over; the exit status is then 2.

    Example: ckd predict runs/mine photos holiday.jpg --csv > classes.csv
    """

    student: tyro.conf.Positional[str]
    """A run folder, a student's .safetensors file or a model spec."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files, and folders that are searched for image files at any depth."""
    weights: Path | None = None
    """The weights of a student that is a model's name: a file, or a run folder."""
    top: int = 5
    """How many classes to tell of each image."""
    bank: Path | None = None
    """Predict by the labels of this bank of the student's teacher, not by the class head."""
    by: By = "knn"
    """With --bank: knn, the vote of the 20 nearest rows, or means, the nearest mean row of a class.
    """
    teacher: int | None = None
    """The number, from 0, of the student's teacher whose rows --bank holds; default: by name."""
    csv: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print CSV: image, class, probability, class_2, ..."""
    out: Path | None = None
    """Also write the predictions to this file, named .csv or .json, when all are made."""
    max_image_pixels: int = MAX_PIXELS
    """Refuse encoded images of more pixels than this (default: 2^26) before decoding them."""
    batch_size: int = 256
    """Images per forward pass."""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda, cuda:1, ..."""

    def run(self) -> None:
        self._check()
        paths = image_files(self.images)
        device = pick_device(self.device)
        student = models.load_student(self.student, weights=self.weights).to(device)
        classifier = self._classifier(student)
        failed: list[tuple[str, str]] = []
        with ExitStack() as stack:
            # The file comes first: the reader of the output may close the pipe.
            outputs = []
            if self.out is not None:
                file = stack.enter_context(atomic_file(self.out))
                outputs.append(self._in_file(file, classifier))
            output = Several([*outputs, self._printed(paths, classifier)])
            output.begin()
            for path, result in self._predicted(paths, student, classifier):
                if isinstance(result, str):
                    failed.append((path, result))
                else:
                    output.add(path, result)
            output.end(failed)
        output.raise_closed()
        if failed:
            raise DataError(f"{len(failed):,} of {len(paths):,} files could not be predicted")

    def _check(self) -> None:
        check_choices(self)
        for name in ("top", "batch_size", "max_image_pixels"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{flag(name)} must be at least 1, got {value}")
        if not self.images:
            raise ConfigError("name at least one image or folder: ckd predict RUN IMAGE...")
        if self.csv and self.json:
            raise ConfigError("--csv and --json are two forms of the output; choose one")
        if self.bank is None and (self.by, self.teacher) != ("knn", None):
            raise ConfigError("--by and --teacher say how to use --bank, which is not given")
        if self.out is not None:
            if self.out.suffix.lower() not in _FILES:
                raise ConfigError(f"--out {self.out}: name a file that ends in .csv or .json")
            check_output(self.out)

    def _classifier(self, student: Student) -> Classifier:
        if self.bank is None:
            return by_class_head(student)
        return by_bank(student, EmbeddingBank.open(self.bank), self.by, self.teacher)

    def _predicted(
        self, paths: Sequence[str], student: Student, classifier: Classifier
    ) -> Iterator[tuple[str, list[Prediction] | str]]:
        """Each path with its predictions; or, for a file that is no image, with the reason, which
        is printed to stderr at once."""
        # On a terminal the lines themselves are the progress.
        done = bar("images", total=len(paths), unit="images", shown=not sys.stdout.isatty())
        options: dict[str, Any] = {"batch_size": self.batch_size}
        options["max_pixels"] = self.max_image_pixels
        with done, torch.inference_mode():
            for batch in decoded(paths, student.image_size, student.in_channels, **options):
                failed = list(batch.failed)  # a file may be named twice
                if batch.paths:
                    found = classifier.probabilities(student.preprocess(batch.pixels)).cpu()
                    rows = ranked(found, classifier.class_names, self.top)
                    for path, finite, row in zip(batch.paths, found.isfinite().all(dim=1), rows):
                        if finite:
                            yield path, row
                        else:
                            failed.append((path, f"{path}: the student's output is not finite"))
                for path, reason in failed:
                    done.clear()
                    print(printable(reason), file=sys.stderr, flush=True)
                    yield path, reason
                done.update(len(batch.paths) + len(batch.failed))

    def _printed(self, paths: Sequence[str], classifier: Classifier) -> Output:
        write = partial(print, end="")
        if self.json:
            return Json(write, self._facts(classifier))
        if self.csv:
            return Csv(write, self._told(classifier))
        names = classifier.class_names or [str(classifier.classes - 1)]
        return Text(write, paths, names, self._told(classifier))

    def _in_file(self, file: BinaryIO, classifier: Classifier) -> Output:
        def write(text: str) -> None:
            with naming(file.name):  # paths need not be UTF-8: their bytes are kept
                file.write(text.encode(errors="surrogateescape"))

        if file.name.lower().endswith(".csv"):
            return Csv(write, self._told(classifier))
        return Json(write, self._facts(classifier))

    def _told(self, classifier: Classifier) -> int:
        return min(self.top, classifier.classes)

    def _facts(self, classifier: Classifier) -> dict[str, Any]:
        return {
            "student": self.student,
            "bank": None if self.bank is None else str(self.bank),
            "by": classifier.by,
            "classes": classifier.classes,
        }


COMMAND = Predict


def main(argv: Sequence[str] | None = None, prog: str = "python -m ckd.predict") -> int:
    """Run the command line; returns the exit status."""
    return command.run(
        lambda given: command.parse(Predict, given, prog),
        argv,
        interrupted="interrupted; what --out names is not written",
    )


if __name__ == "__main__":
    sys.exit(main())
