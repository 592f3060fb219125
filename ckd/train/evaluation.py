"""Accuracy and loss of a model on a data set, and `--eval`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ckd import data, models
from ckd._console import bar
from ckd._device import pick_device
from ckd._errors import warn
from ckd._files import read_lines
from ckd.data import Batch, Dataset
from ckd.train.config import Config
from ckd.train.errors import ConfigError
from ckd.train.report import accuracy_words


class Scores(NamedTuple):
    """`accuracy` in 0..1, the mean cross-entropy `loss`, and `correct` of `images` labelled images.

    Without a class head or a labelled image, accuracy and loss are None.
    """

    accuracy: float | None
    loss: float | None
    correct: int
    images: int


class SourceScores(NamedTuple):
    """`--eval`: what was scored on which images, and how long it took."""

    source: str
    data: str
    accuracy: float
    correct: int
    images: int
    loss: float
    time_s: float

    def __str__(self) -> str:
        words = accuracy_words(self.accuracy, self.correct, self.images)
        return (
            f"{self.source} on {self.data} (test): accuracy {words}, loss {self.loss:.4f}, "
            f"{self.time_s:.1f} s, {self.images / self.time_s:,.0f} images/s"
        )


@torch.inference_mode()
def evaluate(
    model: Any,
    dataset: Dataset,
    *,
    batch_size: int,
    device: torch.device,
    workers: int = 0,
    order: Tensor | None = None,
) -> Scores:
    """Score the model on the labelled images, in evaluation mode and float32; its training mode is
    restored.

    order: the logit of each class of the data (see `logit_order`); None: the same order.
    """
    rows = labelled_rows(model, dataset)
    n = len(rows)
    if not n:
        return Scores(None, None, 0, 0)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for batch, logits in scored_batches(model, dataset, rows, batch_size, device, workers):
        if order is not None:
            logits = logits[:, order]
        correct += (logits.argmax(dim=1) == batch.labels).sum()
        loss += F.cross_entropy(logits, batch.labels, reduction="sum")
    return Scores(correct.item() / n, loss.item() / n, int(correct), n)


def labelled_rows(model: Any, dataset: Dataset) -> Tensor:
    """int64 [n]: the positions of the images that can be scored; none without a class head."""
    known = dataset.labels >= 0
    return torch.nonzero(known & (model.num_classes is not None)).flatten()


@torch.inference_mode()
def scored_batches(
    model: Any,
    dataset: Dataset,
    rows: Tensor,
    batch_size: int,
    device: torch.device,
    workers: int = 0,
) -> Iterator[tuple[Batch, Tensor]]:
    """Each batch of the images at `rows` with its logits [B, C], in evaluation mode and float32;
    the model's training mode is restored at the end."""
    was_training = model.training
    model.eval()
    scored = bar(f"scoring {dataset.split} images", total=len(rows), unit="images")
    try:
        for batch in dataset.batches(rows, batch_size, device, workers):
            yield batch, model(models.prepare(model, batch.images)).logits.float()
            scored.update(len(batch.labels))
    finally:
        scored.close()
        model.train(was_training)


def evaluate_source(config: Config, source: str) -> SourceScores:
    """`--eval`: score a run folder, a .safetensors file or a model spec on config.data's test
    split. Raises ConfigError, DataError or ModelError."""
    device = pick_device(config.device)
    dataset = data.load(
        config.data,
        "test",
        image_size=config.image_size,
        max_pixels=config.max_image_pixels,
    ).to(device)
    model = models.load(source, weights=config.teacher_weights).to(device)
    if model.num_classes is None:
        raise ConfigError(f"{source} has no class head, so it has no accuracy")
    if not dataset.labelled:
        raise ConfigError(
            f"no image of {dataset.name} ({dataset.split}) has a label, so there is no accuracy; "
            "name a data set with labels with --data"
        )
    if model.num_classes != len(dataset.class_names):
        raise ConfigError(
            f"{source} tells {model.num_classes} classes apart, {dataset.name} has "
            f"{len(dataset.class_names)}{' of other names' if model.class_names else ''}; "
            "name the data set that it was trained on with --data"
        )
    order = logit_order(config, source, model, dataset, device)
    began = time.perf_counter()
    scores = evaluate(
        model,
        dataset,
        batch_size=config.batch_size,
        device=device,
        workers=config.workers,
        order=order,
    )
    seconds = time.perf_counter() - began
    assert scores.accuracy is not None  # it has a class head, and the images have labels
    assert scores.loss is not None
    return SourceScores(
        source,
        dataset.name,
        scores.accuracy,
        scores.correct,
        scores.images,
        scores.loss,
        seconds,
    )


def logit_order(
    config: Config, source: str, model: Any, dataset: Dataset, device: torch.device
) -> Tensor | None:
    """int64 [C]: the logit of `model`, loaded from `source`, for each class of the data.

    None if the order is the same. If one side has no names, that is assumed, with a warning, since
    another order would make every logit wrong. Raises ConfigError for names that do not match.
    """
    theirs, ours = model.class_names, dataset.class_names
    others = model.other_class_names
    if config.teacher_classes is not None:
        theirs, others = tuple(read_lines(config.teacher_classes, ConfigError)), ()
        if len(theirs) != model.num_classes:
            raise ConfigError(
                f"--teacher-classes {config.teacher_classes} has {len(theirs)} names, {source} "
                f"tells {model.num_classes} classes apart"
            )
    order = models.class_order((theirs, *others), ours)
    if order is not None:
        same = order == list(range(len(order)))
        return None if same else torch.tensor(order, device=device)
    remedy = "give their names in the words of the data with --teacher-classes FILE"
    if config.teacher_classes or (models.are_named(theirs) and models.are_named(ours)):
        raise ConfigError(
            f"the classes of {source} ({few(theirs)}) are not those of {dataset.name} "
            f"({few(ours)}); if only the names differ, {remedy}"
        )
    unnamed = source if models.are_named(ours) else dataset.name
    warn(
        f"{unnamed} does not name its classes: those of {source} are taken to be in the order "
        f"of {dataset.name}, {few(ours)}; if they are not, {remedy}",
        stacklevel=2,
    )
    return None


def few(names: Sequence[str]) -> str:
    """The first names of a list, for messages."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
