"""Rows that are read a chunk at a time, and the nearest of them to each query."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ckd._console import bar
from ckd.ops import TopK, normalized_similarity
from ckd.ops.top_k import STUDENTS, RunningTopK

CHUNK = 8192  # rows; their cosines with STUDENTS queries are a tile of 8 MiB, which stays in cache


@dataclass(frozen=True)
class Rows:
    """Rows [n, D], of which `read` gives those at any positions (int64 [m]) -> [m, D].

    positions: int64 [n], the places of these rows in what `read` reads.
    """

    read: Callable[[Tensor], Tensor]
    positions: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Rows:
        """Rows that are in memory."""
        return cls(rows.__getitem__, torch.arange(len(rows)))

    def __len__(self) -> int:
        return len(self.positions)

    def where(self, mask: Tensor) -> Rows:
        """The rows at which `mask`, bool [n], is true."""
        return Rows(self.read, self.positions[mask])

    def chunks(self) -> Iterator[Tensor]:
        """All rows in order, at most CHUNK at a time."""
        return map(self.read, self.positions.split(CHUNK))


@torch.no_grad()
def nearest(queries: Tensor, rows: Rows, k: int, *, progress: bool = False) -> TopK:
    """The k rows (all, if there are fewer) with the largest cosines, as `ckd.top_k` defines them.

    Reads every row once, whatever the number of queries [B, D]; beside these and the result [B, k]
    it holds a chunk of rows and a tile of cosines. The result is on the CPU.
    """
    blocks = queries.split(STUDENTS)
    best = [RunningTopK(min(k, len(rows))) for _ in blocks]
    pairs = bar(
        "nearest rows",
        total=len(queries) * len(rows),
        unit="pairs",
        unit_scale=True,
        shown=progress,
    )
    with pairs:
        for chunk in rows.chunks():
            chunk = chunk.to(queries.device)
            for block, running in zip(blocks, best):
                running.add(normalized_similarity(block, chunk))
                pairs.update(len(block) * len(chunk))
    found = [running.result() for running in best]
    return TopK(*(torch.cat(parts).cpu() for parts in zip(*found)))
