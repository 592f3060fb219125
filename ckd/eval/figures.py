"""The figures of one evaluation, and what they are computed from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor

from ckd._console import stage
from ckd.bank import EmbeddingBank
from ckd.data import Dataset
from ckd.eval.comparison import NEIGHBOURS, RECALLS, Comparison, Labels, Missing
from ckd.eval.features import Outputs, check_finite, outputs_of
from ckd.eval.inputs import class_order
from ckd.eval.report import Figure
from ckd.eval.rows import Rows, nearest
from ckd.eval.scores import accuracy, class_means, recall
from ckd.models import Student


@dataclass
class Evaluation:
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
        asked = [(name, make) for name, make in self._all() if name in names]
        for number, (name, make) in enumerate(asked, start=1):
            with stage(f"figure {number} of {len(asked)}:"):
                figure = make(name)
            yield figure

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
        queries = self._embeddings[self._asked]
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
        progress = self.options["progress"]
        return class_means(rows.where(self.labels.usable), self.labels.used, progress=progress)

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
        rows = _rows_of(self.test_bank, self.test, every, comparable)
        return nearest(self._embeddings, rows, max(RECALLS), progress=self.options["progress"]).rows

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
    def _embeddings(self) -> Tensor:
        """Of all test images, as they are compared with the teacher's rows."""
        embeddings = self.student.to_embedding(self._features, self._map).float()
        check_finite(embeddings, self.test, torch.arange(len(self.test)))
        return embeddings

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


def _attempt(measure: Callable[[], float]) -> tuple[float | None, str | None]:
    """The figure, or why it is missing."""
    try:
        return measure(), None
    except Missing as why:
        return None, str(why)
