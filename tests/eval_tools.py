"""A student whose embedding is its image, small data and banks, and every figure in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ckd.bank import BankWriter, ClassHead, EmbeddingBank
from ckd.data import MemoryImages
from ckd.eval import Report, evaluate_student
from ckd.heads import TeacherSpaceHead
from ckd.models import Model, ModelOutput, Student, TeacherMap

SIDE, DIM = 3, 12  # pixels, width of the teacher's rows
WIDTH = SIDE * SIDE
CLASSES = ("ant", "bee", "cat")
STUDENTS_CLASSES = ("cat", "ant", "bee")  # in the order of its logits


class Pixels(Model):
    """The embedding is the normalised image (its negative in training mode); the logits are its
    first entries."""

    def __init__(self, num_classes: int | None = len(CLASSES)) -> None:
        options: dict[str, Any] = {"mean": [0.5], "std": [0.25], "image_size": SIDE}
        options |= {"in_channels": 1, "embedding_dim": WIDTH, "num_classes": num_classes}
        super().__init__(spec="pixels", **options)
        self.class_names = STUDENTS_CLASSES if num_classes else ()

    def forward(self, images: Tensor) -> ModelOutput:
        x = images.flatten(1) * (-1 if self.training else 1)
        return ModelOutput(x, x[:, : self.num_classes] if self.num_classes else None)


def student_with(kind: str, num_classes: int | None = len(CLASSES), name: str = "t") -> Student:
    """kind: "head", "projection" or "none". Its numbers are small multiples of 1/2, so that equal
    rows stay equal, whatever the order of a sum."""
    generator = torch.Generator().manual_seed(5)

    def halves(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randint(-4, 5, shape, generator=generator) / 2)

    maps = []
    if kind == "head":
        head = TeacherSpaceHead(WIDTH, DIM, mean=halves(DIM).data, sigma=1.5)
        assert isinstance(head.net, nn.Linear)
        head.net.weight, head.net.bias = halves(DIM, WIDTH), halves(DIM)
        maps = [TeacherMap(name, DIM, head=head)]
    elif kind == "projection":
        maps = [TeacherMap(name, DIM, weight=halves(WIDTH, DIM), bias=halves(WIDTH))]
    return Student(Pixels(num_classes), maps).eval()


class Setting(NamedTuple):
    """Two splits, the teacher's rows of both, and its class head."""

    train: MemoryImages
    test: MemoryImages
    bank: EmbeddingBank
    test_bank: EmbeddingBank


def setting(
    folder: Path,
    *,
    train: int = 60,
    test: int = 25,
    distinct: int | None = None,
    train_classes: tuple[int, ...] = (0, 1, 2),
    unlabelled: float = 0.0,
    head: bool = True,
    seed: int = 0,
) -> Setting:
    """Random images; rows of the teacher that depend on them, and so do the labels.

    distinct: draw all images from this many, so that rows tie, also with rows of other classes.
    """
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 256, (distinct or train + test, SIDE * SIDE))
    which = rng.integers(0, len(kinds), train + test) if distinct else np.arange(train + test)
    images = kinds[which].astype(np.uint8)
    mixing = rng.integers(-2, 3, (WIDTH, DIM)) / 64
    rows = np.round(images @ mixing) / 8
    order = rng.permutation(train + test)
    parts = []
    for split, n, at in (("train", train, order[:train]), ("test", test, order[train:])):
        labels = (images[at, :3] + rng.integers(0, 90, (n, 3))).argmax(1)
        if split == "train":
            labels = np.array(train_classes)[labels % len(train_classes)]
        labels[rng.random(n) < unlabelled] = -1
        ids = rng.permutation(10 * n)[:n]
        data = MemoryImages(
            torch.tensor(images[at]).view(n, 1, SIDE, SIDE),
            torch.tensor(labels),
            class_names=CLASSES,
            sample_ids=torch.tensor(ids),
            name="memory",
            split=split,
        )
        parts.append((data, torch.tensor(rows[at])))
    weight = torch.tensor(rng.normal(size=(len(CLASSES), DIM))).float()
    class_head = ClassHead(weight, torch.tensor([0.5, -1.0, 0.0]), CLASSES[::-1], (2, 1, 0))
    banks = []
    for data, values in parts:
        options: dict[str, Any] = {
            "class_names": CLASSES,
            "teacher": "t",
            "rows_per_shard": len(data) // 3 + 1,
        }
        options |= {"fingerprint": data.fingerprint}
        options |= {"class_head": class_head} if head else {}
        path = folder / data.split
        at = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))
        with BankWriter(path, DIM, **options) as writer:
            writer.write(data.sample_ids[at], values[at], data.labels[at])
        banks.append(EmbeddingBank.open(path))
    return Setting(parts[0][0], parts[1][0], *banks)


def evaluated(student: Student, given: Setting, **options: Any) -> Report:
    """The report, in odd batches and without a progress bar."""
    options = {"test_bank": given.test_bank, "batch_size": 7, "progress": False, **options}
    return evaluate_student(student, given.train, given.test, given.bank, **options)


def expected(student: Student, given: Setting, usable: Tensor) -> dict[str, Any]:
    """name -> (value, teacher's value), by their definitions, one query after another in float64.

    Of all figures but the probe's and those of texts.
    """
    train, test, bank, test_bank = given
    own, asked = (_features(data) for data in (train, test))
    rows = bank.rows(train.sample_ids).double().numpy()
    test_rows = test_bank.rows(test.sample_ids).double().numpy()
    labels, used = train.labels.numpy(), usable.numpy()
    known, scored = labels >= 0, test.labels.numpy() >= 0
    wanted = test.labels.numpy()[scored]
    classes = sorted(set(labels[used].tolist()))
    means = np.stack([rows[used & (labels == c)].mean(0) for c in classes])
    z, comparable = _across(student, asked)

    def share(queries: Any, hit: Callable[[Any, int], bool]) -> Any:
        """The share of labelled queries x with hit(x, label of x)."""
        if queries is None:
            return None
        return float(np.mean([hit(x, y) for x, y in zip(queries[scored], wanted)]))

    result: dict[str, Any] = {}

    def across(name: str, measure: Callable[[Any, Any], Any]) -> Any:
        """measure(queries, map of the rows) of student and teacher; returns the latter."""
        result[name] = (measure(z, comparable), measure(test_rows, lambda t: t))
        return result[name][1]

    def by_means(x: Any, y: int, convert: Any) -> bool:
        return classes[_order(x, convert(means))[0]] == y

    across("class_means", lambda q, f: share(q, lambda x, y: by_means(x, y, f)))
    for k in (1, 20):

        def knn(q: Any, f: Any, k: int = k) -> Any:
            return share(q, lambda x, y: _vote(x, f(rows)[used], labels[used], k) == y)

        teacher = across(f"knn_{k}", knn)
        result[f"own_knn_{k}"] = (knn(asked, lambda _: own), teacher)
    for k in (1, 10):

        def recall(q: Any, f: Any, k: int = k) -> Any:
            return share(q, lambda x, y: y in labels[known][_order(x, f(rows)[known])[:k]])

        teacher = across(f"asymmetric_recall_{k}", recall)
        result[f"symmetric_recall_{k}"] = (recall(asked, lambda _: own), teacher)
        hits = [] if z is None else [_order(q, comparable(test_rows))[:k] for q in z]
        value = np.mean([i in near for i, near in enumerate(hits)]) if hits else None
        result[f"own_row_recall_{k}"] = (value, None)

    head = bank.class_head()
    assert head is not None
    weight, bias = (t.double().numpy()[list(head.order or ())] for t in (head.weight, head.bias))

    def by_head(q: Any) -> Any:
        return share(q, lambda x, y: (weight @ x + bias).argmax() == y)

    in_space = z is not None and student.teachers[0].head is not None
    teacher = by_head(test_rows)
    result["teacher_head"] = (by_head(z) if in_space else None, teacher)
    own_head = share(asked, lambda x, y: STUDENTS_CLASSES[x[:3].argmax()] == CLASSES[y])
    result["class_head"] = (own_head, teacher)
    return result


def _across(student: Student, features: Any) -> Any:
    """Queries, and the map of rows that they are compared with; (None, None) without one."""
    if not student.teachers:
        return None, None
    found = student.teachers[0]
    if found.head is None:
        weight, bias = (p.detach().double().numpy() for p in (found.weight, found.bias))
        return features, lambda t: t @ weight.T + bias
    net: Any = found.head.net
    weight, bias = (p.detach().double().numpy() for p in (net.weight, net.bias))
    mean, sigma = found.head.mean.double().numpy(), found.head.sigma.item()
    return mean + sigma * (features @ weight.T + bias), lambda t: t


def _features(data: MemoryImages) -> Any:
    return (data.images.double().flatten(1).numpy() / 255 - 0.5) / 0.25


def _order(query: Any, rows: Any) -> Any:
    """The rows by falling cosine; among equal ones, up to float32's rounding, the first."""
    cosines = _cosines(query, rows)
    return np.argsort(-np.round(cosines, 6), kind="stable")


def _vote(query: Any, rows: Any, labels: Any, k: int) -> int:
    near = _order(query, rows)[:k]
    votes: dict[int, float] = {}
    for row, cosine in zip(near, _cosines(query, rows)[near]):
        votes[labels[row]] = votes.get(labels[row], 0.0) + math.exp(cosine / 0.07)
    most = max(votes.values())
    return min(label for label, value in votes.items() if value > most * (1 - 1e-6))


def _cosines(query: Any, rows: Any) -> Any:
    norms = np.sqrt((rows * rows).sum(1)) * math.sqrt((query * query).sum())
    return np.array([(query * row).sum() for row in rows]) / np.maximum(norms, 1e-12)
