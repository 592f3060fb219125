"""The rows of a bank with the largest cosines, found in one pass with memory bounded by a tile."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ckd.backends.interface import BackendName, Inputs
from ckd.ops import _arguments
from ckd.ops.similarity import normalized_similarity

# Cosines in a tile. On the CPU 8 MiB, which stay in the L3 cache between the passes over them.
TILE_ELEMENTS = {"cpu": 1 << 21}
TILE_ELEMENTS_ELSEWHERE = 1 << 24
# Students in a tile: the fewer, the wider it is, and the fewer the merges. With a projection more,
# since each tile projects its bank rows anew.
STUDENTS, STUDENTS_PROJECTED = 256, 512
MAX_COLUMNS = 1 << 16


class TopK(NamedTuple):
    """The k largest cosines of each student, and the rows of the bank that have them."""

    values: Tensor  # [B, k] float32 (float64 for a float64 student), descending
    rows: Tensor  # [B, k] int64


@torch.no_grad()
def top_k(
    student: Tensor,
    bank: Tensor,
    k: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    backend: BackendName = "auto",
) -> TopK:
    """The k rows of the bank with the largest u_i.n_k, with u = s/|s| and n = z/|z|, z = P t + b.

    Streams: the cosines are those of `normalized_similarity` at scale 1, a tile at a time, and
    nothing of size [B, K] is held for any B and K. The result has no gradient; for one, compute the
    cosines of `bank[rows]` again.

    Args:
        student: [B, W] float16, bfloat16, float32 or float64, on any device.
        bank: [K, D] on the same device, in one of these dtypes (float64 for a float64 student
            only). weight: [W, D] or None; bias: [W] or None.
        k: 1 <= k <= K.
        backend: as for `contrastive_cross_entropy`.

    Returns:
        TopK(values, rows): [B, k] cosines, descending, float32 (float64 for a float64 student), and
        [B, k] int64. Among equal cosines the smaller row comes first, at the k-th place too. Equal
        rows of the bank have equal cosines on the `cpu` backend; on others they may differ by a
        rounding.

        A student or bank row whose norm is below 1e-6 has cosine 0 with everything. A cosine with a
        row whose norm is NaN or infinite is NaN, and ranks after every number: such rows come last,
        with the value NaN, where k reaches them; a student of that kind gets rows 0 to k - 1, all
        NaN.

        A half-precision student or autocast permits rounding the operands to half precision: the
        values are float32 but have errors of about 2^-9, and rows that are closer than that may
        change places. Pass `student.float()`, outside of autocast, to rank by float32 cosines.

    Raises:
        TypeError, ValueError: k, or the other arguments as `contrastive_cross_entropy` says.

    >>> values, rows = ckd.top_k(student, bank, 5)
    """
    scale = _arguments.scale_tensor(1.0, student)
    _arguments.check_inputs(Inputs(student, bank, weight, bias, scale))
    k = _checked(k, len(bank))
    most = STUDENTS if weight is None else STUDENTS_PROJECTED
    found = []
    for part in student.split(most):
        running = RunningTopK(k)
        for _, cosines in tiles(part, [bank], weight, bias, backend=backend):
            running.add(cosines)
        found.append(running.result())
    return TopK(*map(torch.cat, zip(*found)))


def tiles(
    student: Tensor,
    chunks: Iterable[Tensor],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    backend: BackendName = "auto",
) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows [n, D], their cosines [B, n] with the students) for all rows of a bank, in order.

    chunks: the bank in parts of any sizes. How it is cut into tiles does not depend on them. Where
    they are on another device than the students, each tile is copied there. The caller may
    overwrite the cosines.
    """
    elements = TILE_ELEMENTS.get(student.device.type, TILE_ELEMENTS_ELSEWHERE)
    columns = min(MAX_COLUMNS, max(1, elements // max(1, len(student))))
    for rows in _regrouped(chunks, columns):
        rows = rows.to(student.device)
        yield rows, normalized_similarity(student, rows, weight, bias, backend=backend)


def _regrouped(chunks: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """The rows of all chunks, `size` at a time; copied only where chunks meet."""
    held: list[Tensor] = []
    missing = size
    for chunk in chunks:
        while len(chunk):
            held.append(chunk[:missing])
            chunk = chunk[missing:]
            missing -= len(held[-1])
            if not missing:
                yield held[0] if len(held) == 1 else torch.cat(held)
                held, missing = [], size
    if held:
        yield held[0] if len(held) == 1 else torch.cat(held)


class RunningTopK:
    """The k largest of the cosines [B, n] that `add` has seen, which come in the bank's order."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.seen = 0  # columns
        self._best: TopK | None = None

    def add(self, cosines: Tensor) -> None:
        """Add the cosines [B, n] of the next n rows of the bank."""
        new = self._largest(cosines)
        rows, order = new.rows.sort(dim=1)
        values, rows = new.values.gather(1, order), rows + self.seen
        if self._best is not None:
            values = torch.cat([self._best.values, values], dim=1)
            rows = torch.cat([self._best.rows, rows], dim=1)
        # Stable: equal values stay in the order of their rows.
        values, order = values.sort(dim=1, descending=True, stable=True)
        self._best = TopK(values[:, : self.k], rows.gather(1, order[:, : self.k]))
        self.seen += cosines.shape[1]

    def result(self) -> TopK:
        """The k largest so far; ValueError if fewer than k were added."""
        if self._best is None or self.seen < self.k:
            raise ValueError(f"{self.k} rows were asked for, and {self.seen} were added")
        values, rows = self._best
        return TopK(values.masked_fill(values == -torch.inf, torch.nan), rows.contiguous())

    def _largest(self, cosines: Tensor) -> TopK:
        """The k largest of each row, in any order; of equal ones at the k-th place the first."""
        # One more than k shows whether the k-th place is tied.
        wanted = min(self.k + 1, cosines.shape[1])
        values, columns = cosines.topk(wanted, dim=1)
        if values[:, 0].isnan().any():  # torch ranks NaN first
            cosines = cosines.nan_to_num(nan=-torch.inf)
            values, columns = cosines.topk(wanted, dim=1)
        if wanted <= self.k:
            return TopK(values, columns)
        last = values[:, self.k - 1]
        tied = last == values[:, self.k]
        if self._best is not None and self.seen >= self.k:
            # Else the rows before are preferred to all of these.
            tied &= last > self._best.values[:, -1]
        values, columns = values[:, : self.k], columns[:, : self.k]
        if tied.any():
            columns[tied] = _first_of_equal(cosines[tied], values[tied], columns[tied])
        return TopK(values, columns)


def _first_of_equal(cosines: Tensor, values: Tensor, columns: Tensor) -> Tensor:
    """The columns [R, k] of the k largest cosines [R, n], of which `values` (descending) and
    `columns` are a choice, but those at the value of the k-th place are the first that have it."""
    n, k = cosines.shape[1], values.shape[1]
    last = values[:, -1:]
    from_end = n - torch.arange(n, dtype=torch.int32, device=cosines.device)
    first = n - torch.where(cosines == last, from_end, 0).topk(k, dim=1).values.long()
    place = torch.arange(k, device=cosines.device) - (values > last).sum(1, keepdim=True)
    return torch.where(place < 0, columns, first.gather(1, place.clamp(min=0)))


def _checked(k: Any, bank_rows: int) -> int:
    """k as an int. Raises TypeError or ValueError."""
    try:
        number = operator.index(k)
    except TypeError:
        raise TypeError(f"k must be an int, got {type(k).__name__}") from None
    if isinstance(k, bool) or not 1 <= number <= bank_rows:
        raise ValueError(f"k must be from 1 to the {bank_rows} rows of the bank, got {k}")
    return number
