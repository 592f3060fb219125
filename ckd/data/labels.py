"""Labels for a part of the images."""

from __future__ import annotations

import torch
import xxhash

from ckd.data.dataset import DataError, Dataset


def keep_labels(dataset: Dataset, fraction: float, seed: int) -> Dataset:
    """The data set with the labels of this fraction of its labelled images; others become -1.

    Of each class the same number is kept, at least one unless `fraction` is 0, and all of a class
    that has fewer. Which ones is a function of (seed, sample id), and a larger fraction keeps those
    of a smaller one. Raises DataError for a fraction that is not from 0 to 1.
    """
    if not 0 <= fraction <= 1:
        raise DataError(f"fraction must be from 0 to 1, got {fraction}")
    counts = dataset.labels[dataset.labels >= 0].bincount()
    if fraction == 1 or not len(counts):
        return dataset
    labels = torch.full_like(dataset.labels, -1)
    if fraction > 0:
        per_class = _per_class(counts.tolist(), fraction)
        for label in range(len(counts)):
            rows = (dataset.labels == label).nonzero().flatten()
            ids = dataset.sample_ids[rows].tolist()
            order = sorted(range(len(ids)), key=lambda place: (_draw(seed, ids[place]), ids[place]))
            labels[rows[order[:per_class]]] = label
    return dataset.with_labels(labels)


def _per_class(counts: list[int], fraction: float) -> int:
    """The number of labels a class, of which the total is nearest to `fraction` of all."""
    wanted, low, high = fraction * sum(counts), 1, max(counts)

    def total(per_class: int) -> int:
        return sum(min(count, per_class) for count in counts)

    while low < high:  # the least number with at least the wanted total
        middle = (low + high) // 2
        low, high = (low, middle) if total(middle) >= wanted else (middle + 1, high)
    less = max(low - 1, 1)
    return less if wanted - total(less) <= total(low) - wanted else low


def _draw(seed: int, sample_id: int) -> int:
    return xxhash.xxh3_64_intdigest(f"label {seed} {sample_id}".encode())
