"""The probabilities of classes: by a student's class head, or by a bank's labelled rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

from torch import Tensor

from ckd.bank import BankError, EmbeddingBank
from ckd.eval.inputs import map_number
from ckd.eval.rows import Rows, nearest
from ckd.eval.scores import TEMPERATURE, class_means
from ckd.models import ModelError, Student

By = Literal["knn", "means"]
NEIGHBOURS = 20  # as in the figure knn_20 of `ckd eval`


class Classifier(NamedTuple):
    """`probabilities(x)` of preprocessed images [B, C, S, S] are float32 or float64 [B, classes].

    class_names: of all classes, () where they are not known. by: "class head", "knn" or "means".
    """

    probabilities: Callable[[Tensor], Tensor]
    class_names: tuple[str, ...]
    classes: int
    by: str


def by_class_head(student: Student) -> Classifier:
    """The softmax of the logits. Raises ModelError without a class head."""
    if student.num_classes is None:
        raise ModelError(
            f"the student {student.spec} has no class head: it was trained without labels. Name a "
            "bank of its teacher with --bank: its labels tell the classes of the nearest rows"
        )

    def probabilities(x: Tensor) -> Tensor:
        return student.logits(x).float().softmax(dim=1)

    return Classifier(probabilities, student.class_names, student.num_classes, "class head")


def by_bank(student: Student, bank: EmbeddingBank, by: By, teacher: int | None) -> Classifier:
    """The classes of a bank of the student's teacher; rows without a label are not used.

    knn: each of the 20 rows with the largest cosines votes for its class with the weight
        exp(cosine / 0.07); the probability of a class is its share of the votes. The first class
        is that of the figure "20-NN among teacher rows" of `ckd eval`.
    means: the softmax of cosine / 0.07 with the mean row of each class. The first class is that of
        the figure "nearest class mean of teacher rows".

    Either is a measure of confidence, not calibrated. knn reads all rows for each batch of images,
    in chunks; means once. Raises BankError for a bank without labels or of another width, and as
    `map_number` does.
    """
    number = map_number(student, bank, teacher)
    if number is None:
        raise ModelError(
            f"the student {student.spec} has no map between its space and the teacher's, so rows "
            "of a bank tell nothing of its images: only --method embed-kd trains one; leave out "
            "--bank"
        )
    known = (bank.labels >= 0).nonzero().flatten()
    if not len(known):
        raise BankError(f"no row of the bank {bank.path} has a label; build it from labelled data")
    labels = bank.labels[known]
    classes = len(bank.class_names) or int(labels.max()) + 1
    rows = Rows(lambda places: bank.rows(bank.sample_ids[places]), known)
    comparable = partial(student.comparable, teacher=number)
    votes = _knn(rows, labels, comparable) if by == "knn" else _means(rows, labels, comparable)

    def probabilities(x: Tensor) -> Tensor:
        of, place = votes(student.embedding(x, number).float())  # [B, n], [B, n] or [n]
        out = of.new_zeros(len(x), classes)
        return out.scatter_add_(1, place.to(of.device).expand_as(of), of)

    return Classifier(probabilities, bank.class_names, classes, by)


_Votes = Callable[[Tensor], tuple[Tensor, Tensor]]  # queries -> shares and the classes they are of


def _knn(rows: Rows, labels: Tensor, comparable: Callable[[Tensor], Tensor]) -> _Votes:
    compared = Rows(lambda places: comparable(rows.read(places)), rows.positions)

    def votes(queries: Tensor) -> tuple[Tensor, Tensor]:
        found = nearest(queries, compared, NEIGHBOURS)
        return (found.values.double() / TEMPERATURE).softmax(dim=1), labels[found.rows]

    return votes


def _means(rows: Rows, labels: Tensor, comparable: Callable[[Tensor], Tensor]) -> _Votes:
    means, classes = class_means(rows, labels)
    compared = Rows.of(comparable(means))

    def votes(queries: Tensor) -> tuple[Tensor, Tensor]:
        found = nearest(queries, compared, len(classes))
        return (found.values.double() / TEMPERATURE).softmax(dim=1), classes[found.rows]

    return votes
