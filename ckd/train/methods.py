"""The four methods of the paper: they differ only in where the teacher's signal comes from.

A method is a module that turns the student's output for a batch into named loss terms, and holds
the parameters trained beside it (projection, logit scale). To add one, write a class with a
`build` and a `distill`, and put it into METHODS. The terms of embed-kd are in `terms.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn

from ckd import models
from ckd.bank import BankError, EmbeddingBank
from ckd.bank.arrays import half_if_accurate
from ckd.data import Batch, Dataset
from ckd.losses import EmbeddingDistillationLoss, LogitDistillationLoss
from ckd.models import ModelOutput, TeacherMap
from ckd.train.config import Config
from ckd.train.errors import ConfigError
from ckd.train.evaluation import logit_order
from ckd.train.terms import (
    NO_LABEL,
    TERMS,
    Setting,
    Step,
    Term,
    check_classes,
    contrastive_options,
    teacher_space_head,
)

# Augmented uint8 images -> the frozen teacher's output.
Teacher = Callable[[Tensor], ModelOutput]


class Method(nn.Module):
    """`plain`: the cross-entropy against the labels; base class of the other methods.

    loss = label_weight * cross_entropy + sum of weight * term over the terms of `distill`
    """

    needs: str | None = None  # the flag that names the method's teacher signal

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.distill_weight, self.label_weight = config.distill_weight, config.label_weight
        self.label_smoothing = config.label_smoothing
        self.softmax_twice = config.paper_compat
        self.inputs: dict[str, str] = {}  # hash of the teacher or bank, checked on a resume

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
            logits = _logits(output)
            if self.softmax_twice:  # the published student ends in a softmax, beside the loss's own
                logits = logits.softmax(dim=1)
            terms["cross_entropy"] = _cross_entropy(logits, batch.labels, self.label_smoothing)
        terms.update(self.distill(output, batch, images))
        first, *others = (self.weight_of(name) * term for name, term in terms.items())
        return sum(others, start=first), terms


def _cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """The sum over the rows with a label >= 0, divided by the number of all rows.

    So a label weighs the same whatever the share of images with one. Divided by the labels of a
    batch alone, few of them would outweigh the other terms and be learnt by heart.
    """
    known = labels >= 0
    # Without a label the mean over the labels would be 0/0; 0 rows of class 0 have the sum 0.
    labels = torch.where(known.any(), labels, 0)
    mean = F.cross_entropy(logits, labels, ignore_index=NO_LABEL, label_smoothing=label_smoothing)
    # Where all rows have labels the factor is 1, which changes no bit.
    return known.to(mean.dtype).mean() * mean


class LogitKD(Method):
    """The teacher's logits of the same images: T² KL(softmax(teacher / T) || softmax(student / T)).

    (Hinton et al. 2015.) Under `paper_compat`, as in the paper's code: the cross-entropy of
    softmax(student), taken as logits, against softmax(teacher).
    """

    needs = "teacher"

    def __init__(self, config: Config, teacher: Teacher) -> None:
        super().__init__(config)
        self.teacher = teacher
        self.logit_order: Tensor | None = None  # the teacher's logit of each class of the data
        self.loss = LogitDistillationLoss(config.temperature)

    @classmethod
    def trains_class_head(cls, config: Config, dataset: Dataset) -> bool:
        distils = config.distill_weight > 0 and len(dataset.class_names) > 0
        return distils or super().trains_class_head(config, dataset)

    @classmethod
    def build(cls, config: Config, student: Any, dataset: Dataset, device: torch.device) -> Method:
        if not dataset.class_names:
            raise ConfigError(
                f"--method logit-kd compares logits of classes, and {dataset.name} has no classes; "
                "use teacher-kd or embed-kd, which need none"
            )
        model = _load_teacher(config, device)
        remedy = (
            "fine-tune it on this data, or use teacher-kd or embed-kd, which need its embeddings "
            "only"
        )
        source = f"the teacher {config.teacher}"
        check_classes("--method logit-kd needs a teacher", source, model, dataset, remedy)
        assert config.teacher is not None
        method = cls(config, _frozen(model, config))
        method.logit_order = logit_order(config, config.teacher, model, dataset, device)
        order = "" if method.logit_order is None else str(method.logit_order.tolist())
        method.inputs["teacher"] = models.weights_hash(model)
        method.inputs["order of the teacher's classes"] = xxhash.xxh3_64_hexdigest(order.encode())
        return method

    def distill(self, output: ModelOutput, batch: Batch, images: Tensor) -> dict[str, Tensor]:
        teacher_logits, student_logits = _logits(self.teacher(images)), _logits(output)
        if self.logit_order is not None:
            teacher_logits = teacher_logits[:, self.logit_order]
        if self.softmax_twice:
            probabilities = student_logits.softmax(dim=1)
            return {"kl": F.cross_entropy(probabilities, teacher_logits.softmax(dim=1))}
        return {"kl": self.loss(student_logits, teacher_logits)}


class TeacherKD(Method):
    """CLIP-Teacher-KD: contrast with the teacher's embeddings of the batch; target i is row i.

    The contrast covers the images of one forward pass; `accumulate` does not widen it.
    """

    needs = "teacher"

    def __init__(
        self, config: Config, teacher: Teacher, student_dim: int, teacher_dim: int
    ) -> None:
        super().__init__(config)
        self.teacher = teacher
        self.contrastive = EmbeddingDistillationLoss(
            student_dim, teacher_dim, **contrastive_options(config)
        )

    @classmethod
    def build(cls, config: Config, student: Any, dataset: Dataset, device: torch.device) -> Method:
        model = _load_teacher(config, device)
        teacher = _frozen(model, config)
        method = cls(config, teacher, student.embedding_dim, model.embedding_dim)
        method.inputs["teacher"] = models.weights_hash(model)
        return method

    def distill(self, output: ModelOutput, batch: Batch, images: Tensor) -> dict[str, Tensor]:
        bank = half_if_accurate(self.teacher(images).embedding)
        own_row = torch.arange(len(bank), device=bank.device)
        return {"contrastive": self.contrastive(output.embedding, bank, own_row)}

    def numbers(self) -> dict[str, float]:
        return {"logit_scale": self.contrastive.logit_scale.item()}


class EmbedKD(Method):
    """CLIP-Embed-KD: terms against the stored embeddings (`--distill`); no teacher runs."""

    needs = "bank"

    def __init__(self, config: Config, setting: Setting) -> None:
        super().__init__(config)
        self.mix, self.bank = config.mix, setting.bank
        self.terms: dict[str, Term] = {}
        for name in self.mix:
            term = TERMS[name].build(setting)
            self.add_module(name, term)
            self.terms[name] = term
            self.inputs.update(term.inputs)
        shared = any(term.uses_head for term in self.terms.values())
        self.head = teacher_space_head(setting) if shared else None

    @classmethod
    def trains_class_head(cls, config: Config, dataset: Dataset) -> bool:
        distils = "logits" in config.mix and len(dataset.class_names) > 0
        return distils or super().trains_class_head(config, dataset)

    @classmethod
    def build(cls, config: Config, student: Any, dataset: Dataset, device: torch.device) -> Method:
        assert config.bank is not None  # checked by `method_class`
        bank = EmbeddingBank.open(config.bank)
        bank.check(class_names=dataset.class_names, fingerprint=dataset.fingerprint)
        if config.targets != "centroids" or config.mix.keys() != {"contrastive"}:
            _check_rows(bank, dataset)  # fails before training, not in it
        method = cls(config, Setting(config, bank, dataset, student, device))
        shards = json.dumps(bank.meta["shards"], sort_keys=True)  # with their hashes
        method.inputs["bank"] = xxhash.xxh3_64_hexdigest(shards.encode())
        return method

    def distill(self, output: ModelOutput, batch: Batch, images: Tensor) -> dict[str, Tensor]:
        step = Step(output, batch, self.bank, self.head)
        return {name: term.of(step) for name, term in self.terms.items()}

    def weight_of(self, term: str) -> float:
        return self.mix[term] if term in self.mix else super().weight_of(term)

    def numbers(self) -> dict[str, float]:
        return {name: x for term in self.terms.values() for name, x in term.numbers().items()}

    def teachers(self) -> list[TeacherMap]:
        projection = self.terms.get("contrastive")
        if self.head is None and projection is None:
            return []
        weights = {name: getattr(projection, name, None) for name in ("weight", "bias")}
        return [TeacherMap(self.bank.teacher_name, self.bank.dim, head=self.head, **weights)]


def _check_rows(bank: EmbeddingBank, dataset: Dataset) -> None:
    """Raise ConfigError unless every image has a row of its own in the bank, by id and by class."""
    remedy = "--distill contrastive --targets centroids needs no row for every image"
    try:
        positions = bank.positions(dataset.sample_ids)
    except BankError as error:
        raise ConfigError(f"{error}; {remedy}") from error
    labels = bank.labels[positions]
    others = (labels >= 0) & (dataset.labels >= 0) & (labels != dataset.labels)
    if bool(others.any()):
        first = int(others.nonzero()[0])
        raise ConfigError(
            f"the bank {bank.path} has other ids than {dataset.name}: sample_id "
            f"{int(dataset.sample_ids[first])} is of class {int(labels[first])} there and of class "
            f"{int(dataset.labels[first])} in the data; build the bank from this data, or give the "
            f"ids with --ids; {remedy}"
        )


METHODS: dict[str, type[Method]] = {
    "plain": Method,
    "logit-kd": LogitKD,
    "teacher-kd": TeacherKD,
    "embed-kd": EmbedKD,
}


def method_class(config: Config) -> type[Method]:
    """The class of `config.method`, for a checked config. Raises ConfigError if the --bank or
    --teacher that it needs is missing, or the batches are too small for it."""
    method = METHODS[config.method]
    if method.needs == "bank" and config.bank is None:
        raise ConfigError(
            f"--method {config.method} needs --bank FOLDER; make one with: "
            f"python -m ckd.bank build --teacher SPEC --data {config.data} --out FOLDER"
        )
    if config.method == "teacher-kd" and config.batch_size == 1:
        raise ConfigError(
            "--method teacher-kd contrasts the images of a batch: --batch-size must be at least 2"
        )
    if method.needs == "teacher" and config.teacher is None:
        raise ConfigError(
            f"--method {config.method} runs the teacher beside the student: name it with "
            "--teacher (a model spec, a run folder or a .safetensors file)"
        )
    return method


def _load_teacher(config: Config, device: torch.device) -> Any:
    assert config.teacher is not None  # checked by `method_class`
    model: Any = models.load(config.teacher, weights=config.teacher_weights, pool=config.pool)
    return model.to(device, memory_format=torch.channels_last)  # like the student


def _frozen(model: Any, config: Config) -> Teacher:
    """The teacher as a function: a module would add to the method's parameters and state."""
    forward = torch.compile(model) if config.compile else model

    @torch.no_grad()
    def teacher(images: Tensor) -> ModelOutput:
        return forward(models.prepare(model, images))

    return teacher


def _logits(output: ModelOutput) -> Tensor:
    """The logits in float32, whatever dtype autocast gave them: a softmax needs its precision."""
    assert output.logits is not None  # students have a class head, teachers were checked for one
    return output.logits.float()
