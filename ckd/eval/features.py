"""The embeddings of a data set's images, without augmentation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ckd._console import bar
from ckd.data import Dataset
from ckd.models import ModelError, Student


class Outputs(NamedTuple):
    """`features` float32 [n, W] on the student's device; `logit` int64 [n] on the CPU, the number
    of the largest logit, or None without a class head."""

    features: Tensor
    logit: Tensor | None


@torch.no_grad()
def outputs_of(
    student: Student,
    dataset: Dataset,
    positions: Tensor,
    *,
    logits: Tensor | None = None,
    batch_size: int = 256,
    workers: int = 0,
    progress: bool = False,
) -> Outputs:
    """The student's outputs for the images at these positions, in evaluation mode.

    logits: int64 [C], the logits to choose from, in this order; `logit` is a place in it. The
    result is a function of student, images and batch size. Raises ModelError for an embedding that
    is not finite.
    """
    model = student.model
    device = model.channel_mean.device
    features = torch.empty(len(positions), model.embedding_dim, device=device)
    chosen, done = [], 0
    images_done = bar(
        f"{dataset.split} images", total=len(positions), unit="images", shown=progress
    )
    was_training = student.training
    student.eval()
    try:
        with images_done:
            for batch in dataset.batches(positions, batch_size, device, workers):
                images = student.preprocess(batch.images)
                # Faster for convolutions on the CPU, as in training.
                output = model(images.contiguous(memory_format=torch.channels_last))
                features[done : done + len(images)] = output.embedding
                if logits is not None:
                    chosen.append(output.logits[:, logits.to(device)].argmax(dim=1))
                done += len(images)
                images_done.update(len(images))
    finally:
        student.train(was_training)
    check_finite(features, dataset, positions)
    return Outputs(features, torch.cat(chosen).cpu() if chosen else None)


def check_finite(embeddings: Tensor, dataset: Dataset, positions: Tensor) -> None:
    """Raise ModelError that names the first image whose embedding is not finite."""
    finite = embeddings.isfinite().all(dim=1)
    if not bool(finite.all()):
        first = int(dataset.sample_ids[positions[int((~finite).nonzero()[0])]])
        raise ModelError(
            f"the student's embedding of sample_id {first} of {dataset.name} ({dataset.split}) is "
            f"not finite, like those of {int((~finite).sum())} images; it cannot be compared"
        )
