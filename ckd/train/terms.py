"""The terms of embed-kd: each a loss of `ckd.losses`, with what it compares of a batch.

To add one, write a class with `build` and `of`, and put it into TERMS, its name into
`ckd.train.mix.TermName` and its weight into `ckd.train.mix.WEIGHTS`. The mean over the batch that
`of` gives is logged under that name.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn

from ckd.backends import Explanation, explain
from ckd.bank import EmbeddingBank, Neighbours
from ckd.bank.arrays import half_if_accurate
from ckd.data import Batch, Dataset
from ckd.losses import (
    CosineDistillationLoss,
    EmbeddingDistillationLoss,
    LogitDistillationLoss,
    MSEDistillationLoss,
    SoftDistillationLoss,
    TeacherSpaceHead,
    TopSoftDistillationLoss,
)
from ckd.models import ModelOutput
from ckd.train.config import Config
from ckd.train.errors import ConfigError
from ckd.train.evaluation import few, logit_order

NO_LABEL = -1


class Setting:
    """What terms are built from."""

    def __init__(
        self,
        config: Config,
        bank: EmbeddingBank,
        dataset: Dataset,
        student: Any,
        device: torch.device,
    ) -> None:
        self.config, self.bank, self.dataset = config, bank, dataset
        self.student, self.device = student, device

    @cached_property
    def rows(self) -> Tensor:
        """Every row of the bank, on the device: one copy for all terms that need it."""
        return self.bank.embeddings().to(self.device)


class Step:
    """A batch as the terms see it; each value is computed once, when a term first asks for it."""

    def __init__(
        self,
        output: ModelOutput,
        batch: Batch,
        bank: EmbeddingBank,
        head: TeacherSpaceHead | None,
    ) -> None:
        self.output, self.batch, self._bank, self._head = output, batch, bank, head

    @property
    def head(self) -> TeacherSpaceHead:
        assert self._head is not None  # made if a term has `uses_head`
        return self._head

    @cached_property
    def positions(self) -> Tensor:
        """The images' own rows in the bank, int64 [B] on the CPU."""
        return self._bank.positions(self.batch.sample_ids.cpu())

    @cached_property
    def teacher(self) -> Tensor:
        """The images' own rows, float16 [B, D]."""
        rows = self._bank.rows(self.batch.sample_ids.cpu())
        return rows.to(self.output.embedding.device)

    @cached_property
    def standardized_teacher(self) -> Tensor:
        return self.head.standardize(self.teacher)

    @cached_property
    def standardized_student(self) -> Tensor:
        return self.head(self.output.embedding)


class Term:
    """What a term has beside its loss, an nn.Module: how it is made, and what it compares."""

    uses_head = False  # whether it needs the head from the student into the teacher's space
    inputs: Mapping[str, str] = {}  # hashes of what it reads beside the rows of the bank

    @classmethod
    def serves(cls, setting: Setting) -> bool:
        """Whether the bank has what the term needs. With several banks, those without are left
        out; `build` refuses them if no bank has it."""
        return True

    @classmethod
    def build(cls, setting: Setting) -> Any:
        """The term for a run; ConfigError or BankError if the bank lacks what it needs."""
        return cls()

    def of(self, step: Step) -> Tensor:
        """The mean loss of a batch, 0-dim, without its weight."""
        raise NotImplementedError

    def served_by(self, batch: int) -> Explanation | None:
        """The backend of the op that the term calls for `batch` images; None: it calls none."""
        return None

    def numbers(self) -> dict[str, float]:
        """Values to log once an epoch beside the loss."""
        return {}


class Contrastive(Term, EmbeddingDistillationLoss):
    """Contrast of the student with the projected bank.

    `--targets samples`: all rows of the bank; the target is the image's own. `centroids`: one row
    per class; the target is the label, and an image without one has no part in it.
    """

    bank: Tensor
    own_rows: bool

    @classmethod
    def build(cls, setting: Setting) -> Contrastive:
        config, bank, dataset = setting.config, setting.bank, setting.dataset
        term = cls(setting.student.embedding_dim, bank.dim, **contrastive_options(config))
        term.own_rows = config.targets != "centroids"
        if term.own_rows:
            rows = setting.rows
        else:
            if not dataset.labelled or config.label_fraction < 1:
                why = (
                    f"--label-fraction {config.label_fraction} leaves labels out that the bank has"
                    if dataset.labelled
                    else f"no label of {dataset.name} is used"
                )
                raise ConfigError(
                    f"--targets centroids takes the classes of the bank's rows and of the images, "
                    f"but {why}; pass --targets samples, where the target is the image's own row"
                )
            centroids = bank.centroids(config.centroids_per_class, seed=config.seed)
            if len(centroids) != len(dataset.class_names):
                raise ConfigError(
                    f"the bank {bank.path} has rows of {len(centroids)} classes, "
                    f"{dataset.name} has {len(dataset.class_names)}; build a bank of this data"
                )
            rows = half_if_accurate(centroids)
        # Not in the checkpoint: a resume reads it from the bank again.
        term.register_buffer("bank", rows, persistent=False)
        return term

    def of(self, step: Step) -> Tensor:
        target = step.batch.labels
        if self.own_rows:
            target = step.positions.to(target.device)
        return self(step.output.embedding, self.bank, target)

    def served_by(self, batch: int) -> Explanation:
        return contrastive_backend(self, batch, self.bank)

    def numbers(self) -> dict[str, float]:
        return {"logit_scale": self.logit_scale.item()}


class Cosine(Term, CosineDistillationLoss):
    """1 - cosine of the student with its own row, both standardised."""

    uses_head = True

    def of(self, step: Step) -> Tensor:
        return self(step.standardized_student, step.standardized_teacher)


class MSE(Term, MSEDistillationLoss):
    """Squared distance of the student to its own row, both standardised."""

    uses_head = True

    def of(self, step: Step) -> Tensor:
        return self(step.standardized_student, step.standardized_teacher)


class Soft(Term, nn.Module):
    """KL between the teacher's and the student's softmax over the rows of the bank: exact where the
    bank's neighbours have mean rows, else over the teacher's k nearest rows."""

    uses_head = True
    bank: Tensor

    def __init__(self, bank: Tensor, neighbours: Neighbours, own: Tensor) -> None:
        """own: the positions of the training images, over which the mass left out is averaged."""
        super().__init__()
        self.register_buffer("bank", bank, persistent=False)
        self.neighbours = neighbours
        self.exact, self.top = None, None
        if neighbours.mean is not None:
            self.exact = SoftDistillationLoss(neighbours.temperature)
        else:
            self.top = TopSoftDistillationLoss(neighbours.temperature)
        self.left_out = neighbours.left_out[own].mean().item()
        self.inputs = {"neighbours of the bank": neighbours.checksum}

    @classmethod
    def build(cls, setting: Setting) -> Soft:
        bank = setting.bank
        own = bank.positions(setting.dataset.sample_ids)
        return cls(setting.rows, bank.neighbours(), own)

    def of(self, step: Step) -> Tensor:
        student = step.head.to_teacher(step.standardized_student)
        own, stored = step.positions, self.neighbours
        if self.exact is not None:
            assert stored.mean is not None
            mean, lse = (rows[own].to(student.device) for rows in (stored.mean, stored.lse))
            return self.exact(student, self.bank, step.teacher, mean, lse)
        assert self.top is not None
        rows, weights = (x[own].to(student.device) for x in (stored.rows, stored.weights))
        return self.top(student, self.bank, rows, weights)

    def served_by(self, batch: int) -> Explanation:
        student = self.bank.new_empty(batch, self.bank.shape[1], dtype=torch.float32)
        return explain(student, self.bank)

    def numbers(self) -> dict[str, float]:
        return {} if self.top is None else {"soft_left_out": self.left_out}


class Logits(Term, LogitDistillationLoss):
    """KL of the student's class logits with those that the bank's class head gives for its row."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def serves(cls, setting: Setting) -> bool:
        return setting.bank.class_head() is not None

    @classmethod
    def build(cls, setting: Setting) -> Logits:
        config, bank, dataset = setting.config, setting.bank, setting.dataset
        if not dataset.class_names:
            raise ConfigError(
                f"--distill logits compares logits of classes, and {dataset.name} has no classes; "
                "leave it out"
            )
        head = bank.class_head()
        if head is None:
            raise ConfigError(
                f"--distill logits needs the teacher's class head, and the bank {bank.path} holds "
                "none; make a bank of a teacher with a linear class head, without --normalize: "
                "python -m ckd.bank build --teacher SPEC "
                f"--data {shlex.quote(config.data)} --out FOLDER"
            )
        source = f"the class head of the bank {bank.path}"
        remedy = "leave logits out, or build a bank of a teacher fine-tuned on this data"
        check_classes("--distill logits needs a class head", source, head, dataset, remedy)
        order: Any = head.order
        if order is None or config.teacher_classes is not None:
            order = logit_order(config, source, head, dataset, torch.device("cpu"))
        rows = slice(None) if order is None else torch.as_tensor(order)
        term = cls(config.temperature)
        term.register_buffer("weight", head.weight[rows], persistent=False)
        term.register_buffer("bias", head.bias[rows], persistent=False)
        digest = xxhash.xxh3_64(term.weight.numpy().tobytes())
        digest.update(term.bias.numpy().tobytes())
        term.inputs = {"class head of the bank": digest.hexdigest()}
        return term

    def of(self, step: Step) -> Tensor:
        assert step.output.logits is not None  # the data has classes
        rows = step.teacher.float()
        with torch.autocast(rows.device.type, enabled=False):
            teacher_logits = F.linear(rows, self.weight, self.bias)
        return self(step.output.logits, teacher_logits)


TERMS: dict[str, type[Term]] = {
    "contrastive": Contrastive,
    "cosine": Cosine,
    "mse": MSE,
    "soft": Soft,
    "logits": Logits,
}


def contrastive_options(config: Config) -> dict[str, Any]:
    """The settings of a contrastive loss; labels of -1 are no target."""
    return {
        "logit_scale": config.logit_scale,
        "learn_logit_scale": config.learn_logit_scale,
        "ignore_index": NO_LABEL,
    }


def contrastive_backend(loss: EmbeddingDistillationLoss, batch: int, bank: Tensor) -> Explanation:
    """The backend of a contrastive loss for `batch` images beside the bank."""
    assert loss.weight is not None  # no term is without a projection
    return explain(loss.weight.new_empty(batch, len(loss.weight)), bank, loss.weight)


def teacher_space_head(setting: Setting) -> TeacherSpaceHead:
    """The head that all terms with `uses_head` share, so that a mix has one embedding there."""
    statistics = setting.bank.statistics()
    if statistics.sigma == 0:
        raise ConfigError(
            f"the rows of the bank {setting.bank.path} are all the same, so that none tells its "
            "image from another; build the bank with another teacher"
        )
    return TeacherSpaceHead(
        setting.student.embedding_dim,
        setting.bank.dim,
        setting.config.head,
        mean=statistics.mean,
        sigma=statistics.sigma,
    )


def check_classes(needs: str, source: str, model: Any, dataset: Dataset, remedy: str) -> None:
    """Raise ConfigError unless `model`, named by `source`, has as many classes as the data."""
    ours, theirs = dataset.class_names, model.class_names
    if model.num_classes != len(ours):
        count = "none" if model.num_classes is None else model.num_classes
        names = "" if model.num_classes is None else f" ({few(theirs) or 'unnamed'})"
        raise ConfigError(
            f"{needs} with the classes of {dataset.name}: the data has {len(ours)} ({few(ours)}), "
            f"{source} has {count}{names}; {remedy}"
        )
