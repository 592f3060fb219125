"""Accuracy and loss of a model on a data set, and `--eval`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ckd import data, models
from ckd._device import pick_device
from ckd.data import Dataset
from ckd.train.config import Config
from ckd.train.errors import ConfigError


class Scores(NamedTuple):
    """`accuracy` in 0..1, the mean cross-entropy `loss`, and `correct` of `images` images."""

    accuracy: float
    loss: float
    correct: int
    images: int


@torch.inference_mode()
def evaluate(
    model: Any,
    dataset: Dataset,
    *,
    batch_size: int,
    device: torch.device,
    workers: int = 0,
) -> Scores:
    """Score the model in evaluation mode and float32; its training mode is restored."""
    was_training = model.training
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    try:
        for batch in dataset.batches(torch.arange(len(dataset)), batch_size, device, workers):
            logits = model(models.prepare(model, batch.images)).logits.float()
            correct += (logits.argmax(dim=1) == batch.labels).sum()
            loss += F.cross_entropy(logits, batch.labels, reduction="sum")
    finally:
        model.train(was_training)
    n = len(dataset)
    return Scores(correct.item() / n, loss.item() / n, int(correct), n)


def evaluate_source(config: Config, source: str) -> str:
    """`--eval`: score a run folder, a .safetensors file or a model spec on config.data's test
    split; returns a line of text. Raises ConfigError, DataError or ModelError."""
    device = pick_device(config.device)
    dataset = data.load(config.data, "test", image_size=config.image_size).to(device)
    model = models.load(source, weights=config.teacher_weights).to(device)
    names = stored_class_names(source)
    if model.num_classes != len(dataset.class_names) or (names and names != dataset.class_names):
        raise ConfigError(
            f"{source} tells {model.num_classes} classes apart, {dataset.name} has "
            f"{len(dataset.class_names)}{' of other names' if names else ''}; "
            "name the data set that it was trained on with --data"
        )
    began = time.perf_counter()
    scores = evaluate(
        model, dataset, batch_size=config.batch_size, device=device, workers=config.workers
    )
    seconds = time.perf_counter() - began
    return (
        f"{source} on {dataset.name} ({dataset.split}): accuracy {scores.accuracy:.2%} "
        f"({scores.correct:,} of {scores.images:,}), loss {scores.loss:.4f}, "
        f"{seconds:.1f} s, {scores.images / seconds:,.0f} images/s"
    )


def stored_class_names(source: str | None) -> tuple[str, ...]:
    """The class names that a run folder or .safetensors file stores; none for a spec."""
    return models.class_names(source) if source and Path(source).exists() else ()
