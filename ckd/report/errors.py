"""What a student gets wrong: the confusion matrix, its worst classes and pairs, and images."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ckd.report.words import short_all

MATRIX_CLASSES = 50  # more are told in words only
NUMBERED_CLASSES = 16  # more are a heat map without numbers
LISTED = 10  # worst classes, and pairs
IMAGES = 24
PIXELS = 56  # the side of a stored image: 24 of 56 x 56 x 3 take 300 KB as text at most


@dataclass(frozen=True)
class Outcomes:
    """What a student says of n labelled images, by position.

    rows, labels, predicted: int64 [n]; `rows` are positions in the data set. probability: float [n]
    of the predicted class. log_true: float [n], the logarithm of that of the label: many
    probabilities round to 0, which would be no order.
    """

    rows: Tensor
    labels: Tensor
    predicted: Tensor
    probability: Tensor
    log_true: Tensor

    @property
    def worst(self) -> Tensor:
        """int64 [at most IMAGES]: which of the n are wrong with the lowest probability of their
        label, the lowest first."""
        wrong = torch.nonzero(self.predicted != self.labels).flatten()
        order = self.log_true[wrong].argsort(stable=True)
        return wrong[order[:IMAGES]]


def confusion(outcomes: Outcomes, names: Sequence[str]) -> dict[str, Any]:
    """The context of the template: `matrix` (None beyond MATRIX_CLASSES), `classes`, `pairs`."""
    count, names = len(names), short_all(names)
    totals = torch.bincount(outcomes.labels, minlength=count)
    hits = outcomes.labels[outcomes.labels == outcomes.predicted]
    right = torch.bincount(hits, minlength=count)
    seen = torch.nonzero(totals).flatten()
    worst = seen[(right[seen] / totals[seen]).argsort(stable=True)[:LISTED]].tolist()
    # Pairs that occur: all count x count cells of 20,000 classes would not fit the memory.
    codes, times = torch.unique(outcomes.labels * count + outcomes.predicted, return_counts=True)
    cells = [(*divmod(code, count), n) for code, n in zip(codes.tolist(), times.tolist())]
    wrong = sorted((cell for cell in cells if cell[0] != cell[1]), key=lambda cell: -cell[2])
    return {
        "matrix": _matrix(cells, names) if 2 <= count <= MATRIX_CLASSES else None,
        "count": count,
        "classes": [
            (names[c], int(right[c]), int(totals[c]), int(right[c]) / int(totals[c])) for c in worst
        ],
        "pairs": [
            (names[true], names[predicted], n, int(totals[true]))
            for true, predicted, n in wrong[:LISTED]
        ],
    }


def _matrix(cells: Sequence[tuple[int, int, int]], names: Sequence[str]) -> dict[str, Any]:
    """Rows of a name and, for each cell, the count and its share of the row in tenths, rounded
    up."""
    dense = [[0] * len(names) for _ in names]
    for true, predicted, n in cells:
        dense[true][predicted] = n
    shown = short_all(names, 40)
    rows = [
        (name, [(n, math.ceil(10 * n / max(sum(row), 1))) for n in row])
        for name, row in zip(shown, dense)
    ]
    return {"names": shown, "rows": rows, "numbered": len(names) <= NUMBERED_CLASSES}


def png_uri(pixels: Tensor) -> str:
    """uint8 [C, H, W] as the data URI of a PNG of at most PIXELS a side: gray for one channel, RGB
    for three and more, of two the first."""
    pixels = pixels.cpu()
    if len(pixels) >= 3:
        image = Image.fromarray(pixels[:3].permute(1, 2, 0).contiguous().numpy())
    else:
        image = Image.fromarray(pixels[0].contiguous().numpy())
    image.thumbnail((PIXELS, PIXELS))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
