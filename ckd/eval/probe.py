"""The linear probe: logistic regression on frozen embeddings."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ckd._console import bar
from ckd.eval.rows import CHUNK, Rows

TOLERANCE = 1e-5  # of the largest entry of the gradient
MAX_STEPS = 1000
FLOAT32 = 2**-23  # a smaller deviation, relative to the mean, is rounding


class Probe(NamedTuple):
    """Logits weight x + bias of `classes` int64 [C]; `steps` of L-BFGS ended at a gradient whose
    largest entry is `gradient`."""

    weight: Tensor  # [C, D] float32
    bias: Tensor  # [C]
    classes: Tensor
    steps: int
    gradient: float


@torch.no_grad()
def linear_probe(rows: Rows, labels: Tensor, *, progress: bool = False) -> Probe:
    """Multinomial logistic regression of `labels` [n] on the rows, by L-BFGS from zero in float64.

    Each dimension is standardised by its mean and deviation over the rows (a constant one becomes
    0); then (1/n) sum_i CE_i + 1/(2 n) |W|^2 is minimised: scikit-learn's LogisticRegression at its
    default C = 1 (for two classes, which have one row of weights there, at C = 2). It is convex, so
    the result does not depend on a start or a step size. Every step reads the rows in chunks, and
    no array has a number for each row and class.
    """
    classes, target = labels.unique(return_inverse=True)
    mean, deviation = _moments(rows)
    constant = deviation <= FLOAT32 * mean.abs()
    inverse = torch.where(constant, 0.0, 1 / deviation)
    parameters = torch.zeros(len(classes), len(mean) + 1, dtype=torch.float64, device=mean.device)
    weight, bias = parameters[:, :-1], parameters[:, -1]
    optimizer = torch.optim.LBFGS(
        [parameters],
        max_iter=MAX_STEPS,
        max_eval=2 * MAX_STEPS,
        tolerance_grad=TOLERANCE,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )
    passes = bar("linear probe", total=None, unit="passes", shown=progress)

    def loss() -> float:
        """The objective; its gradient goes to the parameters."""
        total = 0.5 * weight.square().sum()
        gradient = torch.cat([weight, torch.zeros_like(bias)[:, None]], dim=1)
        for chunk, places in zip(rows.chunks(), target.split(CHUNK)):
            x = (chunk.double() - mean) * inverse
            places = places.to(x.device)
            logits = F.linear(x, weight, bias)
            total += F.cross_entropy(logits, places, reduction="sum")
            error = logits.softmax(dim=1) - F.one_hot(places, len(classes))
            gradient += torch.cat([error.T @ x, error.sum(dim=0)[:, None]], dim=1)
        parameters.grad = gradient / len(rows)
        passes.update()
        return total.item() / len(rows)

    with passes:
        optimizer.step(loss)
        loss()
    assert parameters.grad is not None
    scaled = weight * inverse
    return Probe(
        scaled.float(),
        (bias - scaled @ mean).float(),
        classes,
        optimizer.state[parameters]["n_iter"],
        parameters.grad.abs().max().item(),
    )


def _moments(rows: Rows) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each dimension, float64 [D]."""
    mean = torch.stack([chunk.double().sum(dim=0) for chunk in rows.chunks()]).sum(0) / len(rows)
    squares = [(chunk.double() - mean).square().sum(dim=0) for chunk in rows.chunks()]
    return mean, (torch.stack(squares).sum(0) / len(rows)).sqrt()
