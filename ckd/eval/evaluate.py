"""Every figure of a student on a data set, beside a bank of its teacher's rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor

from ckd._errors import ConfigError
from ckd._hints import unknown
from ckd.bank import EmbeddingBank
from ckd.data import DataError, Dataset, keep_labels
from ckd.eval.comparison import NEIGHBOURS, RECALLS, Comparison, Labels, Missing
from ckd.eval.features import Outputs, outputs_of
from ckd.eval.inputs import (
    about_bank,
    about_data,
    check_fits,
    check_rows,
    class_order,
    class_texts,
    map_number,
)
from ckd.eval.report import FIGURES, Figure, Report
from ckd.eval.rows import Rows, nearest
from ckd.eval.scores import TEMPERATURE, accuracy, class_means, recall
from ckd.models import Student


def evaluate_student(
    student: Student,
    train: Dataset,
    test: Dataset,
    bank: EmbeddingBank | None = None,
    *,
    test_bank: EmbeddingBank | None = None,
    texts: EmbeddingBank | None = None,
    teacher: int | None = None,
    figures: Collection[str] = tuple(FIGURES),
    label_fraction: float = 1.0,
    seed: int = 0,
    batch_size: int = 256,
    workers: int = 0,
    progress: bool = True,
) -> Report:
    """The figures that docs/evaluation.md defines, computed on the device of the student.

    train: the images whose rows are searched, with all labels that are known. test: the images
    that are classified and searched for. bank: the teacher's rows of `train`; without it, the
    student is compared with itself alone.

    test_bank: the teacher's rows of `test`, for the teacher's own figures and for recall of the
    image's own row. texts: the teacher's rows of class texts, by label in the order of its class
    names, or one for each class without labels.

    teacher: the number of the student's map to the bank's teacher; default: the map of the bank's
    teacher's name, or the only one of its width.

    figures: the names of those to measure, of `ckd.eval.report.FIGURES`.

    label_fraction, seed: the labels of `train` that a prediction may use, drawn by
    `ckd.data.keep_labels` as in training. All known ones tell whether a retrieved row is of the
    right class.

    A figure that these do not give is None in the report, with the reason. Memory: the features of
    both sets and the rows of `test_bank` in float32, and tiles; never an array [queries, gallery].
    Equal arguments give equal reports.

    Raises BankError for a bank of other data, other classes or another width; ConfigError for the
    number of no map, if several maps fit, or for the name of no figure; DataError if the two sets
    have other classes; ModelError for images that the student does not take.

    >>> student = ckd.load_student("runs/embed-kd")
    >>> train, test = ckd.data.load("cifar10", "train"), ckd.data.load("cifar10", "test")
    >>> bank = ckd.EmbeddingBank.open("banks/cifar10")
    >>> report = evaluate_student(student, train, test, bank, label_fraction=0.01)
    >>> report["class_means"].value
    """
    for name in figures:
        if name not in FIGURES:
            raise ConfigError(unknown("figure", name, FIGURES))
    if train.class_names != test.class_names:
        raise DataError(
            f"{train.name} ({train.split}) and {test.name} ({test.split}) have other classes; "
            "evaluate on two splits of one data set"
        )
    for rows, dataset in ((bank, train), (test_bank, test)):
        if rows is not None:
            check_rows(rows, dataset)
    check_fits(bank, test_bank, texts)
    if (own := test_bank if bank is None else bank) is not None:
        teacher = map_number(student, own, teacher)
    evaluation = _Evaluation(
        student,
        train,
        test,
        bank,
        test_bank,
        None if texts is None else class_texts(texts, test.class_names),
        teacher,
        keep_labels(train, label_fraction, seed).labels >= 0,
        {"batch_size": batch_size, "workers": workers, "progress": progress},
    )
    facts = {
        "train": about_data(train),
        "test": about_data(test),
        "bank": about_bank(bank),
        "test_bank": about_bank(test_bank),
        "texts": about_bank(texts),
        "label_fraction": label_fraction,
        "seed": seed,
        "knn_temperature": TEMPERATURE,
    }
    with torch.no_grad(), _float32(student.model.channel_mean.device):
        return Report(tuple(evaluation.figures(figures)), facts)


@dataclass
class _Evaluation:
    """The figures, and the parts from which they are computed once the first of them needs it."""

    student: Student
    train: Dataset
    test: Dataset
    bank: EmbeddingBank | None
    test_bank: EmbeddingBank | None
    texts: Tensor | None  # float32 [C, D]
    map: int | None  # number of the student's map to the bank's teacher
    usable: Tensor  # bool [N]: whether predictions may use the label of a training image
    options: dict[str, Any]  # of `outputs_of`

    def figures(self, names: Collection[str]) -> Iterator[Figure]:
        """The figures of these names, in the order of `ckd.eval.report.FIGURES`."""
        for name, make in self._all():
            if name in names:
                yield make(name)

    def _all(self) -> Iterator[tuple[str, Callable[[str], Figure]]]:
        """Each figure's name, and a function that measures it."""
        known, used = len(self.labels.gallery), len(self.labels.used)
        classes = len(self.labels.used.unique())
        texts = 0 if self.texts is None else len(self.texts)

        def figure(
            space: str, measure: Callable[[Comparison], float], gallery: int = 0, labels: int = 0
        ) -> Callable[[str], Figure]:
            return partial(
                self._figure, space=space, measure=measure, gallery=gallery, labels=labels
            )

        yield "class_head", self._class_head_figure
        yield "teacher_head", figure("across", self._by_head)
        yield "class_means", figure("across", self._by_means, classes, used)
        yield "texts", figure("across", self._by_texts, texts)
        for name, space in (("knn", "across"), ("own_knn", "own")):
            for k in NEIGHBOURS:
                yield f"{name}_{k}", figure(space, methodcaller("knn", k), used, used)
        yield "linear_probe", figure("own", methodcaller("probe"), 0, used)
        for name, space in (("asymmetric", "across"), ("symmetric", "own")):
            for k in RECALLS:
                yield f"{name}_recall_{k}", figure(space, methodcaller("recall", k), known)
        for k in RECALLS:
            yield f"own_row_recall_{k}", partial(self._own_row_figure, k=k)

    def _class_head_figure(self, name: str) -> Figure:
        by_head = self._figure("teacher_head", "across", self._by_head)
        value, reason = _attempt(self._by_class_head)
        return dataclasses.replace(by_head, name=name, value=value, reason=reason)

    def _own_row_figure(self, name: str, k: int) -> Figure:
        value, reason = _attempt(partial(self._own_row_recall, k))
        n = len(self.test)
        return Figure(name, value, reason, None, n, n, 0)

    def _figure(
        self,
        name: str,
        space: str,
        measure: Callable[[Comparison], float],
        gallery: int = 0,
        labels: int = 0,
    ) -> Figure:
        """`measure` of the student in this space ("own" or "across"), and of the teacher."""
        value, reason = _attempt(lambda: measure(getattr(self, space)))
        teacher, _ = _attempt(lambda: measure(self.teacher))
        return Figure(name, value, reason, teacher, len(self.labels.queries), gallery, labels)

    @cached_property
    def own(self) -> Comparison:
        """The student's test images and its training images, by its features."""
        self.labels.check()
        features = self._outputs(self.train, self._known).features
        return self._comparison(self._features[self._asked], Rows.of(features))

    @cached_property
    def across(self) -> Comparison:
        """The student's test images and the teacher's rows of the training images."""
        bank, number = self._bank, self._map
        self.labels.check_queries()
        comparable = partial(self.student.comparable, teacher=number)
        queries = self.student.to_embedding(self._features[self._asked], number).float()
        rows = _rows_of(bank, self.train, self._known, comparable)
        has_head = self.student.teachers[number].head is not None
        return self._comparison(queries, rows, comparable, has_head)

    @cached_property
    def teacher(self) -> Comparison:
        """The teacher's rows of the test images, and of the training images."""
        if self.test_bank is None:
            raise Missing("there is no test bank")
        rows = _rows_of(self._bank, self.train, self._known, self._here)
        queries = self.test_bank.rows(self.test.sample_ids[self._asked])
        return self._comparison(self._here(queries), rows, self._here, True)

    def _comparison(self, queries: Tensor, rows: Rows, *teacher: Any) -> Comparison:
        return Comparison(queries, rows, self.labels, self.options["progress"], *teacher)

    def _by_class_head(self) -> float:
        self.labels.check_queries()
        self._class_logits()
        logit = self._test_outputs.logit
        assert logit is not None
        return accuracy(logit[self._asked], self.labels.queries)

    def _class_logits(self) -> Tensor:
        """The student's logit of each class of the data. Raises Missing."""
        model = self.student.model
        if model.num_classes is None:
            raise Missing("the student has no class head: it was trained without labels")
        return class_order("the student's class head", model, self.test.class_names)

    def _by_head(self, side: Comparison) -> float:
        head = self._bank.class_head()
        if head is None:
            raise Missing("the bank holds no class head of the teacher")
        order: Any = head.order
        if order is None:
            order = class_order("the teacher's class head", head, self.test.class_names)
        order = torch.as_tensor(order)
        return side.head(head.weight[order], head.bias[order])

    def _by_means(self, side: Comparison) -> float:
        return side.nearest_class(*self._means)

    @cached_property
    def _means(self) -> tuple[Tensor, Tensor]:
        """The mean of the teacher's rows of each class with a usable label, and these classes."""
        self.labels.check_used()
        rows = _rows_of(self._bank, self.train, self._known, lambda rows: rows)
        return class_means(rows.where(self.labels.usable), self.labels.used)

    def _by_texts(self, side: Comparison) -> float:
        if self.texts is None:
            raise Missing("there is no bank of class texts")
        return side.nearest_class(self.texts, torch.arange(len(self.texts)))

    def _own_row_recall(self, k: int) -> float:
        return recall(self._nearest_test_rows, torch.arange(len(self.test)), k)

    @cached_property
    def _nearest_test_rows(self) -> Tensor:
        """The teacher's rows of test images that are nearest to the student's of each test image,
        by their positions."""
        if self.test_bank is None:
            raise Missing("there is no test bank")
        number, every = self._map, torch.arange(len(self.test))
        comparable = partial(self.student.comparable, teacher=number)
        queries = self.student.to_embedding(self._features, number).float()
        rows = _rows_of(self.test_bank, self.test, every, comparable)
        return nearest(queries, rows, max(RECALLS), progress=self.options["progress"]).rows

    @cached_property
    def labels(self) -> Labels:
        queries = self.test.labels[self.test.labels >= 0]
        return Labels(queries, self.train.labels[self._known], self.usable[self._known])

    @property
    def _known(self) -> Tensor:
        """The positions of the training images with a known label."""
        return (self.train.labels >= 0).nonzero().flatten()

    @property
    def _asked(self) -> Tensor:
        """Which test images have a label."""
        return self.test.labels >= 0

    @property
    def _features(self) -> Tensor:
        """Of all test images."""
        return self._test_outputs.features

    @cached_property
    def _test_outputs(self) -> Outputs:
        """Of all test images; the class that the student's head gives is one of the data's."""
        try:
            logits = self._class_logits()
        except Missing:
            logits = None
        return self._outputs(self.test, torch.arange(len(self.test)), logits)

    def _outputs(self, dataset: Dataset, which: Tensor, logits: Tensor | None = None) -> Outputs:
        return outputs_of(self.student, dataset, which, logits=logits, **self.options)

    def _here(self, rows: Tensor) -> Tensor:
        return rows.to(self.student.model.channel_mean.device, torch.float32)

    @property
    def _bank(self) -> EmbeddingBank:
        if self.bank is None:
            raise Missing("there is no bank of the teacher's rows")
        return self.bank

    @property
    def _map(self) -> int:
        if self.map is None:
            raise Missing(
                "the student has no map between its space and the teacher's: only --method "
                "embed-kd trains one, by the terms contrastive, cosine, mse and soft"
            )
        return self.map


def _rows_of(
    bank: EmbeddingBank, dataset: Dataset, which: Tensor, convert: Callable[[Tensor], Tensor]
) -> Rows:
    """The bank's rows of the images at these positions."""
    return Rows(lambda places: convert(bank.rows(dataset.sample_ids[places])), which)


@contextmanager
def _float32(device: torch.device) -> Iterator[None]:
    """Within this block, networks compute in float32 and, on a GPU, by deterministic kernels."""
    exact = {"enabled": True, "benchmark": False, "deterministic": True, "allow_tf32": False}
    with torch.autocast(device.type, enabled=False), torch.backends.cudnn.flags(**exact):
        yield


def _attempt(measure: Callable[[], float]) -> tuple[float | None, str | None]:
    """The figure, or why it is missing."""
    try:
        return measure(), None
    except Missing as why:
        return None, str(why)
