"""Mean and variance of a bank's rows, with which losses standardise them."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ckd.bank.manifest import BankError

_BLOCK_ROWS = 1024  # whose copy in float64 stays in the cache


class Statistics(NamedTuple):
    """`mean` and `variance` (divided by N) of each dimension over all rows, float64 [D]."""

    mean: Tensor
    variance: Tensor

    @property
    def sigma(self) -> float:
        """The root of the mean variance: the isotropic scale of PHI-S (arXiv 2410.01680)."""
        return self.variance.mean().sqrt().item()


class Moments:
    """Sums of rows and of their squares in float64, in one pass.

    The square of a float16 is exact in float64, and what the sums round is below 2^-53 N of them.
    Shards are added in order, in blocks that begin with a shard, so that a bank has the same sums
    whenever they are computed: in a build, in a resumed one, or from its files.
    """

    def __init__(self, dim: int) -> None:
        self.rows = 0
        self.sums, self.squares = torch.zeros(2, dim, dtype=torch.float64)

    def add(self, shard: Tensor) -> None:
        """Add the rows float16 [n, D] of the next shard."""
        for block in shard.split(_BLOCK_ROWS):
            rows = block.double()
            self.sums += rows.sum(dim=0)
            self.squares += rows.square_().sum(dim=0)
        self.rows += len(shard)

    def statistics(self) -> Statistics:
        """Mean and variance of the rows so far."""
        mean = self.sums / self.rows
        return Statistics(mean, (self.squares / self.rows - mean.square()).clamp_(min=0))


def encode(statistics: Statistics) -> dict[str, str]:
    """The JSON value of a manifest: each tensor as base64 of little-endian float64."""
    return {
        name: base64.b64encode(values.numpy().astype("<f8").tobytes()).decode()
        for name, values in statistics._asdict().items()
    }


def decode(values: Mapping[str, Any], dim: int, path: Path) -> Statistics:
    """The inverse of `encode`, for the manifest at `path`. Raises BankError for other values."""
    mean, variance = (_tensor(values[name]) for name in Statistics._fields)
    for tensor in (mean, variance):
        if tensor.shape != (dim,) or not bool(tensor.isfinite().all()):
            raise BankError(f"{path} is damaged: statistics must be {dim} numbers each")
    if bool((variance < 0).any()):
        raise BankError(f"{path} is damaged: statistics has a negative variance")
    return Statistics(mean, variance)


def _tensor(text: Any) -> Tensor:
    """The numbers; none of them for another value."""
    try:
        data = base64.b64decode(text, validate=True)
        return torch.from_numpy(np.frombuffer(data, "<f8").astype(np.float64))
    except (TypeError, ValueError):
        return torch.empty(0)
