"""Scores of queries against rows: nearest neighbours, recall, class means and class heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ckd._console import bar
from ckd.eval.rows import CHUNK, Rows, nearest

TEMPERATURE = 0.07  # of the votes, as in Wu et al. 2018 and DINO
_ROUNDING = 1e-12  # of a sum of votes in another order, with room
_BLOCK = 1024  # queries whose votes or logits are computed together


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """The fraction of equal entries."""
    return (predicted == labels).double().mean().item()


def vote(cosines: Tensor, labels: Tensor) -> Tensor:
    """The class [B] with the most votes of the neighbours, whose cosines and labels are [B, k]:
    each votes for its own class with the weight exp(cosine / 0.07). Among equals, up to the
    rounding of a sum, the smaller one.
    """
    predicted = []
    for cosine, label in zip(cosines.double().split(_BLOCK), labels.split(_BLOCK)):
        # The factor exp(-largest / 0.07) changes no order, and keeps the weights in range.
        weight = ((cosine - cosine[:, :1]) / TEMPERATURE).exp()
        same = label[:, :, None] == label[:, None, :]
        votes = (same * weight[:, None, :]).sum(dim=2)  # [b, k], of each neighbour's class
        most = votes >= (1 - _ROUNDING) * votes.amax(dim=1, keepdim=True)
        predicted.append(label.masked_fill(~most, torch.iinfo(label.dtype).max).amin(dim=1))
    return torch.cat(predicted)


def recall(found: Tensor, wanted: Tensor, k: int) -> float:
    """The fraction of queries with the wanted entry [B] among the first k found ones [B, n]."""
    return (found[:, :k] == wanted[:, None]).any(dim=1).double().mean().item()


def class_means(rows: Rows, labels: Tensor, *, progress: bool = False) -> tuple[Tensor, Tensor]:
    """(means float32 [C, D] of the rows of each class that occurs, these classes int64 [C]).

    Sums are float64, on the CPU, in the order of the rows.
    """
    classes, place = labels.unique(return_inverse=True)
    sums = None
    with bar("class means", total=len(rows), unit="rows", shown=progress) as rows_done:
        for chunk, places in zip(rows.chunks(), place.split(CHUNK)):
            if sums is None:
                sums = torch.zeros(len(classes), chunk.shape[1], dtype=torch.float64)
            sums.index_add_(0, places, chunk.cpu().double())
            rows_done.update(len(chunk))
    assert sums is not None  # the caller has a row
    return (sums / place.bincount()[:, None]).float(), classes


def nearest_class(queries: Tensor, means: Tensor, classes: Tensor) -> Tensor:
    """The class [B] of the row of `means` [C, D] with the largest cosine."""
    return classes[nearest(queries, Rows.of(means), 1).rows[:, 0]]


@torch.no_grad()
def largest_logit(queries: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """argmax of weight q + bias: the class [B] of each query [B, D], on the CPU."""
    weight, bias = weight.to(queries), bias.to(queries)
    return torch.cat([F.linear(q, weight, bias).argmax(dim=1) for q in queries.split(_BLOCK)]).cpu()
