"""The figures of an evaluation, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ckd.train.report import markdown

SCHEMA_VERSION = 1

#: Each figure's name, and how the table calls it; docs/evaluation.md defines them.
FIGURES: Mapping[str, str] = {
    "class_head": "student's class head",
    "teacher_head": "teacher's class head",
    "class_means": "nearest class mean of teacher rows",
    "texts": "nearest class text (zero-shot)",
    "knn_1": "1-NN among teacher rows",
    "knn_20": "20-NN among teacher rows",
    "own_knn_1": "1-NN in its own space",
    "own_knn_20": "20-NN in its own space",
    "linear_probe": "linear probe",
    "asymmetric_recall_1": "class recall@1, teacher rows",
    "asymmetric_recall_10": "class recall@10, teacher rows",
    "symmetric_recall_1": "class recall@1, own space",
    "symmetric_recall_10": "class recall@10, own space",
    "own_row_recall_1": "recall@1 of the image's own row",
    "own_row_recall_10": "recall@10 of the image's own row",
}


@dataclass(frozen=True)
class Figure:
    """One figure: a fraction of the queries, or the reason why there is none.

    name: a key of FIGURES. value, reason: of the student; one of them is None. teacher: the same
    figure of the teacher's own rows in place of the student's embeddings; None without a test bank.
    queries: test images that are scored. gallery: rows that each is compared with. labels: labels
    of training images that the prediction uses.
    """

    name: str
    value: float | None
    reason: str | None
    teacher: float | None
    queries: int
    gallery: int
    labels: int

    @property
    def quotient(self) -> float | None:
        """The student's figure divided by the teacher's."""
        return self.value / self.teacher if self.value is not None and self.teacher else None


@dataclass(frozen=True)
class Report:
    """The figures of one student, in the order of FIGURES, and what they were measured on.

    facts: data, its fingerprints, bank, test bank, texts, label_fraction, seed and settings, as
    plain JSON values.
    """

    figures: Sequence[Figure]
    facts: Mapping[str, Any]

    def __getitem__(self, name: str) -> Figure:
        """The figure of this name. Raises KeyError."""
        for figure in self.figures:
            if figure.name == name:
                return figure
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; equal evaluations give equal ones."""
        figures = [{**asdict(figure), "quotient": figure.quotient} for figure in self.figures]
        return {"schema_version": SCHEMA_VERSION, **self.facts, "figures": figures}

    def table(self) -> str:
        """A Markdown table of the figures, and the reasons for those that are missing."""
        heads = ["figure", "student", "teacher", "quotient", "queries", "gallery", "labels"]
        rows = [
            [
                FIGURES[figure.name],
                _percent(figure.value),
                _percent(figure.teacher),
                "-" if figure.quotient is None else f"{figure.quotient:.3f}",
                *(f"{n:,}" if n else "-" for n in (figure.queries, figure.gallery, figure.labels)),
            ]
            for figure in self.figures
            if figure.value is not None or figure.teacher is not None
        ]
        if all(figure.teacher is None for figure in self.figures):
            for row in (heads, *rows):
                del row[2:4]
        table = markdown(heads, rows) if rows else "there is no figure"
        return "\n".join([table, *self._missing()])

    def _missing(self) -> list[str]:
        """A line for each reason, with the figures that lack for it."""
        by_reason: dict[str, list[str]] = {}
        for figure in self.figures:
            if figure.reason is not None:
                by_reason.setdefault(figure.reason, []).append(FIGURES[figure.name])
        return [f"\nwithout {'; '.join(names)}: {why}" for why, names in by_reason.items()]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
