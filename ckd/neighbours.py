"""Computes the nearest rows of each row of a bank, and stores them with the bank."""

from __future__ import annotations

import os
from typing import NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from ckd._console import bar, say
from ckd.backends.reference import MIN_NORM
from ckd.bank import EmbeddingBank, Neighbours
from ckd.bank.neighbours import ROWS_PER_PART, Manifest, new_manifest
from ckd.bank.neighbours_writer import NeighboursWriter
from ckd.bank.summary import human_bytes, percent
from ckd.ops.top_k import STUDENTS, RunningTopK, tiles


def build_neighbours(
    path: str | os.PathLike[str],
    *,
    k: int = 32,
    temperature: float = 0.07,
    exact: bool = False,
    device: str | torch.device = "cpu",
    replace: bool = False,
    rows_per_part: int = ROWS_PER_PART,
    progress: bool = True,
) -> Neighbours:
    """Store the k nearest rows of each row of the bank in the folder `path`, with softmax weights.

    What is stored is described by `ckd.bank.Neighbours`; cosines are float32, on `device`. Memory
    beside the bank's pages is bounded by a tile of cosines and the results of one part.

    exact: also store the mean of all unit rows under each row's softmax, float16 [N, D].
    replace: discard neighbours that were made with other settings or of another bank, or that are
        damaged; else these are a BankError.
    progress: print the estimate and the outcome, and show a progress bar.

    Safe to kill: the same call goes on after the last stored part, to the same bytes. Complete ones
    are opened unchanged. Raises BankError as `EmbeddingBank.open` does, for k beyond the rows of
    the bank, for a temperature that is not above 0, and while another process writes them; and the
    system's OSError.
    """
    bank = EmbeddingBank.open(path)
    manifest = new_manifest(
        bank.checksum,
        len(bank),
        bank.dim,
        k,
        temperature,
        exact=exact,
        rows_per_part=rows_per_part,
    )
    writer = NeighboursWriter(bank.path, manifest, replace=replace)
    if writer.is_complete():
        say(
            f"{writer.path} is complete already, with the same settings: nothing to do",
            shown=progress,
        )
    else:
        _compute(bank, writer, device, progress=progress)
    found = bank.neighbours()
    say(
        f"the {found.k} rows nearest to a row leave out {percent(found.left_out_mean)} of its "
        f"softmax on average, at most {percent(found.left_out_max)}",
        shown=progress,
    )
    return found


def _compute(
    bank: EmbeddingBank, writer: NeighboursWriter, device: str | torch.device, *, progress: bool
) -> None:
    manifest = writer.manifest
    size = len(bank) * (6 * manifest.k + 4 + 2 * bank.dim * manifest.exact)
    say(
        f"{writer.path}: the nearest of {len(bank):,} rows to each, {manifest.settings}, about "
        f"{human_bytes(size)}",
        shown=progress,
    )
    with writer:
        done, step = writer.manifest.rows_done, writer.manifest.rows_per_part
        if done:
            say(f"resuming: {done:,} rows are stored already", shown=progress)
        pairs = bar(
            "nearest rows",
            total=len(bank) ** 2,
            initial=done * len(bank),
            unit="pairs",
            unit_scale=True,
            shown=progress,
            leave=True,
        )
        with pairs:
            for first in range(done, len(bank), step):
                part = bank.rows(bank.sample_ids[first : first + step])
                blocks = [
                    _nearest(block.to(device, torch.float32), bank, manifest, pairs)
                    for block in part.split(STUDENTS)
                ]
                rows, weights, lse, mean, left_out = map(torch.cat, zip(*blocks))
                writer.write(rows, weights, lse, mean if manifest.exact else None, left_out)


def _nearest(
    block: Tensor, bank: EmbeddingBank, manifest: Manifest, pairs: tqdm[NoReturn]
) -> tuple[Tensor, ...]:
    """rows, weights, lse, mean (empty unless exact) and left_out of a block [B, D] of the bank."""
    scale = 1 / manifest.temperature
    # The largest cosine, up to rounding, is that with itself: 1, or 0 for a row of zeros.
    largest = (block.norm(dim=1, keepdim=True) >= MIN_NORM).float()
    total = block.new_zeros(len(block), 1, dtype=torch.float64)
    mean = block.new_zeros(len(block), bank.dim if manifest.exact else 0, dtype=torch.float64)
    running = RunningTopK(manifest.k)
    for rows, cosines in tiles(block, (embedding for _, embedding in bank.shards())):
        running.add(cosines)
        # In place, while the tile is in the cache. The difference of close cosines is exact.
        odds = cosines.sub_(largest).mul_(scale).exp_()
        total += odds.sum(1, keepdim=True)
        if manifest.exact:
            mean += odds @ _unit(rows)
        pairs.update(odds.numel())
    best = running.result()
    weights = ((best.values - largest).double() * scale).exp() / total
    lse = scale * largest + total.log()
    left_out = (1 - weights.sum(1)).clamp(0, 1)
    return best.rows.int(), weights.half(), lse.squeeze(1), mean / total, left_out


def _unit(rows: Tensor) -> Tensor:
    """The rows scaled to length 1, as the ops do it: zeros stay zeros."""
    rows = rows.float()
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return (rows / norm).masked_fill(norm < MIN_NORM, 0)
