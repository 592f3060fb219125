"""Run a teacher over a data set once and keep its embeddings."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ckd import models
from ckd._console import bar, say
from ckd.bank.class_head import ClassHead
from ckd.bank.reader import EmbeddingBank
from ckd.bank.summary import human_bytes
from ckd.bank.writer import BankWriter
from ckd.data import Batch, Dataset

Prepare = Callable[[Any, Tensor], Tensor]

# Label and sample id of a row, int64 each.
_BYTES_BESIDE_A_ROW = 16


def build_bank(
    dataset: Dataset,
    model: models.Model,
    path: str | os.PathLike[str],
    *,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    workers: int = 0,
    normalize: bool = False,
    rows_per_shard: int = 8192,
    prepare: Prepare = models.prepare,
    progress: bool = True,
) -> EmbeddingBank:
    """Store `model(prepare(model, images)).embedding` of every image, in the data set's order, and
    the model's class head, if it is linear in the embedding (`ckd.models.class_head`).

    model: the teacher. It is moved to `device` (on the CPU, to the memory format channels_last)
        and runs in evaluation mode, without augmentation.
    prepare: from uint8 images [B, C, H, W] to the model's input.
    workers: processes that decode images in advance, if the data set is not in memory.
    progress: print the estimate and the outcome, and show a progress bar.

    Safe to kill: the same call resumes after the last stored shard. No batch crosses a shard
    boundary, so the resumed bank has the same bytes as an uninterrupted one. A complete bank is
    opened unchanged. Raises ModelError for a model whose embedding of an image is random or depends
    on the other images of a batch; BankError as `BankWriter` does; and OSError before it starts if
    the disk has too little space for the bank.
    """
    models.check_teacher(model)
    head = None if normalize else _class_head(model, dataset)
    writer = BankWriter(
        path,
        model.embedding_dim,
        teacher=describe_teacher(model),
        preprocessing=describe_preprocessing(dataset, model, prepare),
        fingerprint=dataset.fingerprint,
        dataset=f"{dataset.name} ({dataset.split})",
        class_names=dataset.class_names,
        normalize=normalize,
        class_head=head,
        rows_per_shard=rows_per_shard,
        rows=len(dataset),
    )
    if writer.is_complete():
        say(
            f"{writer.path} is complete already, with the same settings: nothing to do",
            shown=progress,
        )
        return EmbeddingBank.open(writer.path)
    bytes_per_row = 2 * model.embedding_dim + _BYTES_BESIDE_A_ROW
    some = "" if dataset.labelled == len(dataset) else f", {dataset.labelled:,} labelled"
    say(
        f"{writer.path}: {len(dataset):,} rows x {model.embedding_dim} float16 of {dataset.name} "
        f"({dataset.split}){some}, about {human_bytes(len(dataset) * bytes_per_row)}",
        shown=progress,
    )
    if model.num_classes is not None and head is None:
        why = (
            "rows scaled to length 1 do not give its logits"
            if normalize
            else "its logits are not known to be a linear map of the embedding"
        )
        say(f"the teacher's class head is not stored: {why}", shown=progress)
    model.to(device)
    if torch.device(device).type == "cpu":
        # ResNet-56 at 32 px on one core (AMD EPYC): 280 images/s instead of 180.
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = dataset.to(device)
    with writer, _evaluation_mode(model):
        done = writer.rows_done
        if done:
            say(f"resuming: {done:,} rows are stored already", shown=progress)
        _check_space(writer.path, (len(dataset) - done) * bytes_per_row)
        order = _class_order(model, dataset)
        correct = counted = 0
        images_done = bar(
            "teacher", total=len(dataset), initial=done, unit="images", shown=progress, leave=True
        )
        with images_done:
            for batch in _batches(images, done, rows_per_shard, batch_size, device, workers):
                embedding, logits = _forward(model, prepare(model, batch.images))
                writer.write(batch.sample_ids, embedding, batch.labels)
                if logits is not None and order is not None:
                    correct += int((logits[:, order].argmax(1) == batch.labels).sum())
                    counted += int((batch.labels >= 0).sum())
                images_done.update(len(batch.labels))
    if counted:
        share = 100 * correct / counted
        which = "labelled rows" if some else "rows"
        say(
            f"the teacher's own accuracy on the {counted:,} {which} of this run: {share:.2f} %",
            shown=progress,
        )
    return EmbeddingBank.open(writer.path)


def describe_teacher(model: models.Model) -> dict[str, Any]:
    """The manifest's record of a teacher: name, pooling, weights (sha256, bytes), parameters,
    FLOPs."""
    return {
        "name": model.spec,
        **({} if model.pool is None else {"pool": model.pool}),
        "weights_sha256": models.weights_hash(model),
        "weights_bytes": sum(tensor.nbytes for tensor in model.state_dict().values()),
        "parameters": models.parameter_count(model),
        "flops_per_image": models.flops_per_image(model),
    }


def describe_preprocessing(
    dataset: Dataset, model: models.Model, prepare: Prepare
) -> dict[str, Any]:
    """The manifest's record of the steps from stored pixels to the teacher's input."""
    return {
        "dataset_image_shape": list(dataset.image_shape),
        "model_channels": model.in_channels,
        "model_image_size": model.image_size,
        "mean": list(model.mean),
        "std": list(model.std),
        "flip_channels": model.flip_channels,
        "resize": asdict(model.resize),
        "prepare": getattr(prepare, "__qualname__", type(prepare).__qualname__),
    }


def _class_head(model: models.Model, dataset: Dataset) -> ClassHead | None:
    """The model's class head with the order of the data's classes, where their names match."""
    found = models.class_head(model)
    if found is None:
        return None
    vocabularies = (model.class_names, *model.other_class_names)
    order = models.class_order(vocabularies, dataset.class_names)
    return ClassHead(*found, model.class_names, order)


def _class_order(model: models.Model, dataset: Dataset) -> list[int] | None:
    """The logit of each class of the data; None if the model has other classes or none."""
    theirs, ours = model.class_names, dataset.class_names
    order = models.class_order((theirs, *model.other_class_names), ours)
    if order is not None or (models.are_named(theirs) and models.are_named(ours)):
        return order
    return list(range(len(ours))) if model.num_classes == len(ours) else None


def _batches(
    dataset: Dataset,
    first_row: int,
    rows_per_shard: int,
    batch_size: int,
    device: str | torch.device,
    workers: int,
) -> Iterator[Batch]:
    """Batches of all rows from `first_row` (the first row of a shard), cut at shard boundaries.

    An embedding's rounding may depend on its batch. A resumed build starts at a shard boundary, so
    it runs the same batches as an uninterrupted build.
    """
    for start in range(first_row, len(dataset), rows_per_shard):
        order = torch.arange(start, min(start + rows_per_shard, len(dataset)))
        yield from dataset.batches(order, batch_size, device, workers)


@torch.inference_mode()
def _forward(model: models.Model, images: Tensor) -> tuple[Tensor, Tensor | None]:
    output = model(images)
    return output.embedding, output.logits


@contextmanager
def _evaluation_mode(model: models.Model) -> Iterator[None]:
    """Evaluation mode inside the block, then the previous mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _check_space(folder: os.PathLike[str], needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"the bank needs {human_bytes(needed)} more, the disk has {human_bytes(free)} left",
            os.fspath(folder),
        )
