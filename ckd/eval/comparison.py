"""One encoder's test images against rows of training images: every figure that this gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ckd._errors import CkdError
from ckd.eval.probe import linear_probe
from ckd.eval.rows import Rows, nearest
from ckd.eval.scores import accuracy, largest_logit, nearest_class, recall, vote
from ckd.ops import TopK

NEIGHBOURS = (1, 20)  # k of the votes
RECALLS = (1, 10)  # k of the recalls


class Missing(CkdError):
    """There is no such figure; the message says why."""


@dataclass(frozen=True)
class Labels:
    """The known labels, int64 on the CPU.

    queries: of the test images. gallery: of the training images. usable: which of the latter a
    prediction may use, bool; the others only tell whether a retrieved row is of the right class.
    """

    queries: Tensor
    gallery: Tensor
    usable: Tensor

    @property
    def used(self) -> Tensor:
        return self.gallery[self.usable]

    def check_queries(self) -> None:
        """Raise Missing without a labelled test image."""
        if not len(self.queries):
            raise Missing("no test image has a label")

    def check(self) -> None:
        """Raise Missing unless test and training images have labels."""
        self.check_queries()
        if not len(self.gallery):
            raise Missing("no training image has a label")

    def check_used(self) -> None:
        """Raise Missing unless predictions may use a label."""
        self.check()
        if not self.usable.any():
            raise Missing("no label of a training image is used")


@dataclass(frozen=True)
class Comparison:
    """Embeddings [Q, D] of the labelled test images, and what is compared with them by cosine.

    rows: of the labelled training images. comparable: maps rows of the teacher to those that the
    queries are compared with. in_teacher_space: whether the queries are like the teacher's rows.
    """

    queries: Tensor
    rows: Rows
    labels: Labels
    progress: bool
    comparable: Callable[[Tensor], Tensor] | None = None
    in_teacher_space: bool = False

    def knn(self, k: int) -> float:
        """Accuracy of the vote of the k nearest rows with a usable label."""
        self.labels.check_used()
        found = self._nearest_labelled
        near = self.labels.used[found.rows]
        return accuracy(vote(found.values[:, :k], near[:, :k]), self.labels.queries)

    def recall(self, k: int) -> float:
        """The fraction of queries with a row of their own class among the k nearest."""
        self.labels.check()
        return recall(self.labels.gallery[self._nearest.rows], self.labels.queries, k)

    def probe(self) -> float:
        """Accuracy of logistic regression on the rows with a usable label."""
        self.labels.check_used()
        rows = self.rows.where(self.labels.usable)
        found = linear_probe(rows, self.labels.used, progress=self.progress)
        place = largest_logit(self.queries, found.weight, found.bias)
        return accuracy(found.classes[place], self.labels.queries)

    def nearest_class(self, means: Tensor, classes: Tensor) -> float:
        """Accuracy of the class of the nearest row of `means` [C, D], rows of the teacher."""
        self.labels.check_queries()
        assert self.comparable is not None
        predicted = nearest_class(self.queries, self.comparable(means), classes)
        return accuracy(predicted, self.labels.queries)

    def head(self, weight: Tensor, bias: Tensor) -> float:
        """Accuracy of the teacher's linear classifier."""
        self.labels.check_queries()
        if not self.in_teacher_space:
            raise Missing(
                "the student has no embedding in the teacher's space: its rows are projected to "
                "the student's own; train with --distill cosine, mse or soft"
            )
        return accuracy(largest_logit(self.queries, weight, bias), self.labels.queries)

    @cached_property
    def _nearest(self) -> TopK:
        k = max(*NEIGHBOURS, *RECALLS)
        return nearest(self.queries, self.rows, k, progress=self.progress)

    @cached_property
    def _nearest_labelled(self) -> TopK:
        if self.labels.usable.all():
            return self._nearest
        rows = self.rows.where(self.labels.usable)
        return nearest(self.queries, rows, max(NEIGHBOURS), progress=self.progress)
