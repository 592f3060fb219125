"""What labels.py trains: settings, cells of a setting, teacher, share of labels and seed; order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

PERCENTS = (0, 1, 5, 25, 100)  # of the training images have a label
# plain-longer trains for this multiple of the epochs: at least as long as any other setting.
LONGER = 2.0
PLAIN = {"plain": 1.0, "plain-longer": LONGER}
# The fields of ckd.train.Config of each setting with a bank.
BANK: Mapping[str, Mapping[str, Any]] = {
    "mse": {"distill": "mse=2"},
    "cosine": {"distill": "cosine=5"},
    "cosine-mlp": {"distill": "cosine=5", "head": "mlp"},
    "contrastive": {"distill": "contrastive=1"},
    "contrastive-0.2": {"distill": "contrastive=0.2"},
    "centroids": {"distill": "contrastive=1", "targets": "centroids"},
    "soft": {"distill": "soft=1"},
    "logits": {"distill": "logits=1"},
    "cosine+contrastive": {"distill": "cosine=5,contrastive=1"},
    "cosine+soft": {"distill": "cosine=5,soft=1"},
    "soft+logits": {"distill": "soft=1,logits=1"},
}
SETTINGS = (*PLAIN, *BANK)
HEADLINE = (*PLAIN, "mse", "cosine", "cosine-mlp", "contrastive", "soft", "logits", "cosine+soft")

# Figures of ckd.eval, and the heads of their columns.
FIGURES = {
    "class_head": "own head",
    "teacher_head": "teacher's head",
    "class_means": "class means",
    "knn_20": "20-NN",
    "asymmetric_recall_10": "recall@10",
}


class Cell(NamedTuple):
    """One training. `teacher` is a model spec; "" for plain ones."""

    teacher: str
    setting: str
    percent: float
    seed: int

    @property
    def name(self) -> str:
        """A name for files."""
        parts = [self.teacher, self.setting, f"{self.percent:g}", f"seed{self.seed}"]
        return re.sub(r"[^\w.+-]", "_", "-".join(filter(None, parts)))

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of ckd.train.Config by which the cell differs from the others."""
        seed = {"seed": self.seed}
        if self.setting in PLAIN:  # its data hold the labelled images only
            return {"method": "plain", **seed}
        return {
            **{"method": "embed-kd", "label_fraction": self.percent / 100},
            **BANK[self.setting],
            **seed,
        }


def possible(cell: Cell, knows_classes: bool) -> bool:
    """knows_classes: the teacher has a class head of the data's classes."""
    if cell.setting in PLAIN:
        return cell.percent > 0
    if cell.setting == "centroids":  # its targets are the labels of all images
        return cell.percent == 100
    return knows_classes or "logits" not in cell.setting


def ordered(
    teachers: Mapping[str, bool],
    settings: Sequence[str],
    percents: Iterable[float],
    seeds: int,
) -> list[tuple[Cell, bool]]:
    """The cells in order of importance, seed by seed; and whether each is of the headline: labels
    for 1 %, none, and plain training with all.

    teachers: by name, whether it has a class head of the data's classes.
    """
    cells = [
        Cell(teacher, setting, percent, seed)
        for seed in range(seeds)
        for percent in percents
        for setting in settings
        for teacher in ([""] if setting in PLAIN else teachers)
    ]
    known = {cell: teachers.get(cell.teacher, False) for cell in cells}
    cells = [cell for cell in cells if possible(cell, known[cell])]
    ranks = {cell: _rank(cell, known[cell]) for cell in cells}
    cells.sort(key=lambda cell: (cell.seed, ranks[cell]))
    return [(cell, ranks[cell] < 3) for cell in cells]


def _rank(cell: Cell, knows_classes: bool) -> int:
    """0 to 2 for the cells of the headline, in order of importance; 3 for the others."""
    if cell.setting in HEADLINE:
        if cell.percent == 1:
            return 0
        if cell.setting in PLAIN and cell.percent == 100:
            return 1
        # Without labels, only the teacher's class head can classify.
        if cell.percent == 0 and knows_classes:
            return 2
    return 3
