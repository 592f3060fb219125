"""A method of training: `plain`, which the others extend by terms of a teacher."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ckd.backends import Explanation
from ckd.data import Batch, Dataset
from ckd.models import ModelOutput, TeacherMap
from ckd.train.config import Config
from ckd.train.terms import NO_LABEL


class Method(nn.Module):
    """`plain`: the cross-entropy against the labels; base class of the other methods.

    loss = label_weight * cross_entropy + sum of weight * term over the terms of `distill`
    """

    needs: str | None = None  # the flag that names the method's teacher signal

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.distill_weight, self.label_weight = config.term_weight, config.label_weight
        self.label_smoothing = config.label_smoothing
        self.softmax_twice = config.paper_compat
        self.inputs: dict[str, str] = {}  # hash of the teacher or bank, checked on a resume
        self.notes: list[str] = []  # for the terminal

    @classmethod
    def trains_class_head(cls, config: Config, dataset: Dataset) -> bool:
        """Whether a term of the loss depends on the student's logits; without one the student has
        no class head, which would keep its random weights."""
        return config.label_weight > 0 and dataset.labelled > 0

    @classmethod
    def build(cls, config: Config, student: Any, dataset: Dataset, device: torch.device) -> Method:
        """The method for a student and a training set; opens the bank or loads the teacher."""
        return cls(config)

    def distill(self, output: ModelOutput, batch: Batch, images: Tensor) -> dict[str, Tensor]:
        """The loss terms beside the cross-entropy, by name: means over the batch, unweighted."""
        return {}

    def weight_of(self, term: str) -> float:
        """The weight of a term in the loss."""
        return self.label_weight if term == "cross_entropy" else self.distill_weight

    def term_names(self) -> list[str]:
        """The names of the terms that `distill` gives."""
        return []

    def sources(self) -> list[tuple[str, str]]:
        """Where the teacher's signal comes from, for the terminal: ("bank", its path and shape)."""
        return []

    def backends(self, batch: int) -> dict[str, Explanation]:
        """The backend of each term that calls an op, by the term's name, for `batch` images."""
        return {}

    def numbers(self) -> dict[str, float]:
        """Values to log once an epoch beside the loss terms."""
        return {}

    def teachers(self) -> list[TeacherMap]:
        """The maps between the student and its teachers, which are saved with it."""
        return []

    def forward(
        self, output: ModelOutput, batch: Batch, images: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise and its terms, all 0-dim.

        `images` are the augmented uint8 images [B, C, H, W] that the student saw.
        """
        terms: dict[str, Tensor] = {}
        if self.label_weight > 0 and output.logits is not None:
            logits = float_logits(output)
            if self.softmax_twice:  # the published student ends in a softmax, beside the loss's own
                logits = logits.softmax(dim=1)
            terms["cross_entropy"] = cross_entropy(logits, batch.labels, self.label_smoothing)
        terms.update(self.distill(output, batch, images))
        first, *others = (self.weight_of(name) * term for name, term in terms.items())
        return sum(others, start=first), terms


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """The sum over the rows with a label >= 0, divided by the number of all rows.

    So a label weighs the same whatever the share of images with one. Divided by the labels of a
    batch alone, few of them would outweigh the other terms, and the student would overfit them.
    """
    known = labels >= 0
    # Without a label the mean over the labels would be 0/0; 0 rows of class 0 have the sum 0.
    labels = torch.where(known.any(), labels, 0)
    mean = F.cross_entropy(logits, labels, ignore_index=NO_LABEL, label_smoothing=label_smoothing)
    # A quotient of two tensors is exactly 1 where all rows have labels, which changes no bit. CUDA
    # multiplies by a rounded reciprocal in `mean`, and in a division by a number.
    return known.sum() / torch.ones_like(known).sum() * mean


def float_logits(output: ModelOutput) -> Tensor:
    """The logits in float32, whatever dtype autocast gave them: a softmax needs its precision."""
    assert output.logits is not None  # students have a class head, teachers were checked for one
    return output.logits.float()
