"""embed-kd: the terms of `--distill` (`terms.py`) against one bank or several."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from ckd.backends import Explanation
from ckd.bank import BankError, EmbeddingBank
from ckd.data import Batch, Dataset
from ckd.losses import TeacherSpaceHead
from ckd.models import ModelOutput, TeacherMap
from ckd.models.teacher_map import NAME_LIMIT
from ckd.train.config import Config
from ckd.train.errors import ConfigError
from ckd.train.method import Method
from ckd.train.terms import TERMS, Setting, Step, teacher_space_head


class Against(NamedTuple):
    """The terms against one bank, and the head that they share. Each logged name ends in `suffix`:
    "", or the number of the bank if there are several."""

    bank: EmbeddingBank
    terms: dict[str, Any]
    head: TeacherSpaceHead | None
    suffix: str


class EmbedKD(Method):
    """CLIP-Embed-KD: terms against the stored embeddings (`--distill`); no teacher runs.

    With several banks each has terms, head and projection of its own: `cosine_1`, `cosine_2`.
    """

    needs = "bank"

    def __init__(self, config: Config, settings: Sequence[Setting]) -> None:
        super().__init__(config)
        self.against: list[Against] = []
        self.weights: dict[str, float] = {}
        # A term that no bank serves is built for all of them: `build` says what they lack.
        acting = {
            name: [one for one in settings if TERMS[name].serves(one)] or settings
            for name in config.mix
        }
        weights = config.bank_weights or (1.0,) * len(settings)
        for number, (setting, weight) in enumerate(zip(settings, weights), 1):
            suffix = f"_{number}" if len(settings) > 1 else ""
            names = [name for name in config.mix if setting in acting[name]]
            terms = {name: TERMS[name].build(setting) for name in names}
            if not terms:
                raise ConfigError(
                    f"the bank {setting.bank.path} holds no class head, so that it has no part in "
                    "--distill logits; leave out this --bank, or name a further term"
                )
            self.notes += [
                f"{name} leaves out {setting.bank.path}, which lacks what it needs"
                for name in config.mix.keys() - terms.keys()
            ]
            shared = any(term.uses_head for term in terms.values())
            head = teacher_space_head(setting) if shared else None
            for name, module in (*terms.items(), ("head", head)):
                self.add_module(name + suffix, module)
            shards = json.dumps(setting.bank.meta["shards"], sort_keys=True)  # with their hashes
            hashes = {"bank": xxhash.xxh3_64_hexdigest(shards.encode())}
            for name, term in terms.items():
                self.weights[name + suffix] = weight * config.mix[name]
                hashes |= term.inputs
            of = suffix.replace("_", " ")
            self.inputs |= {what + of: digest for what, digest in hashes.items()}
            self.against.append(Against(setting.bank, terms, head, suffix))

    @classmethod
    def trains_class_head(cls, config: Config, dataset: Dataset) -> bool:
        distils = "logits" in config.mix and len(dataset.class_names) > 0
        return distils or super().trains_class_head(config, dataset)

    @classmethod
    def build(cls, config: Config, student: Any, dataset: Dataset, device: torch.device) -> Method:
        settings = []
        for path in config.bank:
            bank = EmbeddingBank.open(path)
            bank.check(class_names=dataset.class_names, fingerprint=dataset.fingerprint)
            if config.targets != "centroids" or config.mix.keys() != {"contrastive"}:
                _check_rows(bank, dataset)  # fails before training, not in it
            settings.append(Setting(config, bank, dataset, student, device))
        return cls(config, settings)

    def distill(self, output: ModelOutput, batch: Batch, images: Tensor) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for bank, terms, head, suffix in self.against:
            step = Step(output, batch, bank, head)
            values |= {name + suffix: term.of(step) for name, term in terms.items()}
        return values

    def weight_of(self, term: str) -> float:
        return self.weights[term] if term in self.weights else super().weight_of(term)

    def term_names(self) -> list[str]:
        return [*self.weights]

    def sources(self) -> list[tuple[str, str]]:
        found = []
        for bank, *_, suffix in self.against:
            teacher = f" of {bank.teacher_name}" * bool(bank.teacher_name)
            words = f"{bank.path}: {len(bank):,} x {bank.dim} float16{teacher}"
            found.append(("bank" + suffix.replace("_", " "), words))
        return found

    def backends(self, batch: int) -> dict[str, Explanation]:
        return {
            name + one.suffix: choice
            for one in self.against
            for name, term in one.terms.items()
            if (choice := term.served_by(batch)) is not None
        }

    def numbers(self) -> dict[str, float]:
        return {
            name + one.suffix: value
            for one in self.against
            for term in one.terms.values()
            for name, value in term.numbers().items()
        }

    def teachers(self) -> list[TeacherMap]:
        maps = []
        for bank, terms, head, _ in self.against:
            parts: dict[str, Any] = {} if head is None else {"head": head}
            if (contrastive := terms.get("contrastive")) is not None:
                parts |= {"weight": contrastive.weight, "bias": contrastive.bias}
            if parts:
                name = bank.teacher_name[:NAME_LIMIT]  # a longer one would be refused at the end
                maps.append(TeacherMap(name, bank.dim, **parts))
        return maps


def _check_rows(bank: EmbeddingBank, dataset: Dataset) -> None:
    """Raise ConfigError unless every image has a row of its own in the bank, by id and by class."""
    try:
        bank.check_rows(dataset.sample_ids, dataset.labels, dataset.name)
    except BankError as error:
        remedy = "--distill contrastive --targets centroids needs no row for every image"
        raise ConfigError(f"{error}; {remedy}") from error
