"""How predictions are written: as text, as CSV or as one JSON document, each as it comes."""

from __future__ import annotations

import csv
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ckd._errors import one_line
from ckd.models import Prediction

SCHEMA_VERSION = 1
_WIDEST = 60  # characters of a path or class name that others are aligned with

Write = Callable[[str], Any]


class Output(ABC):
    """Writes the predictions of one image after another by `write`, which takes text."""

    def __init__(self, write: Write) -> None:
        self._write = write

    def begin(self) -> None:  # noqa: B027
        """Before the first image."""

    @abstractmethod
    def add(self, path: str, predictions: Sequence[Prediction]) -> None:
        """The classes of an image, the most probable first."""

    def end(self, failed: Sequence[tuple[str, str]]) -> None:  # noqa: B027
        """After the last image; failed: the paths that are no images, and why."""


class Text(Output):
    """Aligned columns: image, class, its probability, and the classes that come next.

    paths and class_names: all that may come, whose widths the columns have.
    """

    def __init__(
        self, write: Write, paths: Sequence[str], class_names: Sequence[str], top: int
    ) -> None:
        super().__init__(write)
        self._widths = [_width("image", paths), _width("class", class_names)]
        self._top = top

    def begin(self) -> None:
        then = "  then" if self._top > 1 else ""
        self._line("image", "class", "probability", then)

    def add(self, path: str, predictions: Sequence[Prediction]) -> None:
        first, *others = predictions
        then = ", ".join(f"{one_line(one.class_name)} {one.probability:.1%}" for one in others)
        told = f"{first.probability:.1%}"
        self._line(one_line(path), one_line(first.class_name), told, f"  {then}" if then else "")

    def _line(self, image: str, name: str, probability: str, rest: str) -> None:
        image, name = (text.ljust(w) for text, w in zip((image, name), self._widths))
        self._write(f"{image}  {name}  {probability:>11}{rest}\n")


class Csv(Output):
    """A row for each image: image, class, probability, class_2, probability_2, ..."""

    def __init__(self, write: Write, top: int) -> None:
        super().__init__(write)
        self._top = top

    def begin(self) -> None:
        ranks = ["", *(f"_{rank}" for rank in range(2, self._top + 1))]
        names = [f"{name}{rank}" for rank in ranks for name in ("class", "probability")]
        self._row(["image", *names])

    def add(self, path: str, predictions: Sequence[Prediction]) -> None:
        values = [(one.class_name, f"{one.probability:.6g}") for one in predictions]
        self._row([path, *(value for pair in values for value in pair)])

    def _row(self, values: Sequence[str]) -> None:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(values)
        self._write(line.getvalue())


class Json(Output):
    """One document: `facts`, `predictions` (image, class, label, probability, top) and `failed`."""

    def __init__(self, write: Write, facts: Mapping[str, Any]) -> None:
        super().__init__(write)
        self._facts = {"schema_version": SCHEMA_VERSION, **facts}
        self._separator = "\n    "

    def begin(self) -> None:
        head = json.dumps(self._facts, indent=2).removesuffix("}").rstrip()
        self._write(f'{head},\n  "predictions": [')

    def add(self, path: str, predictions: Sequence[Prediction]) -> None:
        top = [_entry(one) for one in predictions]
        self._write(f"{self._separator}{json.dumps({'image': path, **top[0], 'top': top})}")
        self._separator = ",\n    "

    def end(self, failed: Sequence[tuple[str, str]]) -> None:
        told = [{"image": path, "reason": reason} for path, reason in failed]
        self._write(f'\n  ],\n  "failed": {json.dumps(told)}\n}}\n')


class Several(Output):
    """All of these; when the reader of one closes its pipe, the others are written to the end."""

    def __init__(self, outputs: Sequence[Output]) -> None:
        self._outputs = list(outputs)
        self._closed: BrokenPipeError | None = None

    def begin(self) -> None:
        self._each(lambda output: output.begin())

    def add(self, path: str, predictions: Sequence[Prediction]) -> None:
        self._each(lambda output: output.add(path, predictions))

    def end(self, failed: Sequence[tuple[str, str]]) -> None:
        self._each(lambda output: output.end(failed))

    def raise_closed(self) -> None:
        """Raise the BrokenPipeError of the output that was closed, if one was."""
        if self._closed is not None:
            raise self._closed

    def _each(self, call: Callable[[Output], None]) -> None:
        for output in tuple(self._outputs):
            try:
                call(output)
            except BrokenPipeError as error:
                self._closed = error
                self._outputs.remove(output)
                if not self._outputs:
                    raise


def _entry(one: Prediction) -> dict[str, Any]:
    return {"class": one.class_name, "label": one.label, "probability": one.probability}


def _width(head: str, texts: Sequence[str]) -> int:
    longest = max((len(one_line(text)) for text in texts), default=0)
    return max(len(head), min(longest, _WIDEST))
