"""The four methods of the paper: they differ only in where the teacher's signal comes from.

A method is a module that turns the student's output for a batch into named loss terms, and holds
the parameters trained beside it (projection, logit scale). To add one, write a class with a
`build` and a `distill`, and put it into METHODS. embed-kd is in `embed_kd.py`.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor

from ckd import models
from ckd.backends import Explanation
from ckd.bank.arrays import half_if_accurate
from ckd.data import Batch, Dataset
from ckd.losses import EmbeddingDistillationLoss, LogitDistillationLoss
from ckd.models import ModelOutput
from ckd.train.config import Config
from ckd.train.embed_kd import EmbedKD
from ckd.train.errors import ConfigError
from ckd.train.evaluation import logit_order
from ckd.train.method import Method, float_logits
from ckd.train.terms import check_classes, contrastive_backend, contrastive_options

# Augmented uint8 images -> the frozen teacher's output.
Teacher = Callable[[Tensor], ModelOutput]


class LogitKD(Method):
    """The teacher's logits of the same images: T² KL(softmax(teacher / T) || softmax(student / T)).

    (Hinton et al. 2015.) Under `paper_compat`, as in the paper's code: the cross-entropy of
    softmax(student), taken as logits, against softmax(teacher).
    """

    needs = "teacher"

    def __init__(self, config: Config, teacher: Teacher) -> None:
        super().__init__(config)
        self.teacher, self.source = teacher, str(config.teacher)
        self.logit_order: Tensor | None = None  # the teacher's logit of each class of the data
        self.loss = LogitDistillationLoss(config.temperature)

    @classmethod
    def trains_class_head(cls, config: Config, dataset: Dataset) -> bool:
        distils = config.distils and len(dataset.class_names) > 0
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
        teacher_logits, student_logits = float_logits(self.teacher(images)), float_logits(output)
        if self.logit_order is not None:
            teacher_logits = teacher_logits[:, self.logit_order]
        if self.softmax_twice:
            probabilities = student_logits.softmax(dim=1)
            return {"kl": F.cross_entropy(probabilities, teacher_logits.softmax(dim=1))}
        return {"kl": self.loss(student_logits, teacher_logits)}

    def term_names(self) -> list[str]:
        return ["kl"]

    def sources(self) -> list[tuple[str, str]]:
        return [("teacher", self.source)]


class TeacherKD(Method):
    """CLIP-Teacher-KD: contrast with the teacher's embeddings of the batch; target i is row i.

    The contrast covers the images of one forward pass; `accumulate` does not widen it.
    """

    needs = "teacher"

    def __init__(
        self, config: Config, teacher: Teacher, student_dim: int, teacher_dim: int
    ) -> None:
        super().__init__(config)
        self.teacher, self.source = teacher, str(config.teacher)
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

    def term_names(self) -> list[str]:
        return ["contrastive"]

    def sources(self) -> list[tuple[str, str]]:
        return [("teacher", self.source)]

    def backends(self, batch: int) -> dict[str, Explanation]:
        weight = self.contrastive.weight
        assert weight is not None
        bank = weight.new_empty(batch, weight.shape[1], dtype=torch.float16)
        return {"contrastive": contrastive_backend(self.contrastive, batch, bank)}

    def numbers(self) -> dict[str, float]:
        return {"logit_scale": self.contrastive.logit_scale.item()}


METHODS: dict[str, type[Method]] = {
    "plain": Method,
    "logit-kd": LogitKD,
    "teacher-kd": TeacherKD,
    "embed-kd": EmbedKD,
}


_SCALE = (Config.logit_scale, Config.learn_logit_scale)  # the defaults


def method_class(config: Config) -> type[Method]:
    """The class of `config.method`, for a checked config. Raises ConfigError if the --bank or
    --teacher that it needs is missing, the batches are too small for it, or a setting of the term
    contrastive would be passed over."""
    method = METHODS[config.method]
    if method.needs == "bank" and not config.bank:
        raise ConfigError(
            f"--method {config.method} needs --bank FOLDER; make one with: "
            "python -m ckd.bank build --teacher SPEC "
            f"--data {shlex.quote(config.data)} --out FOLDER"
        )
    scale = (config.logit_scale, config.learn_logit_scale)
    if method.needs == "bank" and "contrastive" not in config.mix and scale != _SCALE:
        raise ConfigError(
            "--logit-scale and --no-learn-logit-scale go with the term contrastive, which the "
            f"run leaves out (its terms: {', '.join(config.mix)}): name it in --distill"
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
