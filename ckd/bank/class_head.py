"""The teacher's class head, stored with a bank: it gives the teacher's logits of a stored row."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import xxhash
from torch import Tensor

from ckd.bank.manifest import BankError, HeadRecord, brief
from ckd.bank.shards import REMEDY, Layout, map_tensors


@dataclass(frozen=True)
class ClassHead:
    """A linear classifier of a bank's rows: logits = weight row + bias.

    weight: float32 [C, D]; bias: float32 [C]. class_names: the teacher's names of the logits, or
    (). order: the logit of each class of the bank's data, where the names match.
    """

    weight: Tensor
    bias: Tensor
    class_names: Sequence[str] = ()
    order: Sequence[int] | None = None
    #: The class names in other vocabularies, as `ckd.models.Model` has them; a bank stores none.
    other_class_names: Sequence[Sequence[str]] = ()

    @property
    def num_classes(self) -> int:
        return len(self.weight)

    def checked(self, dim: int) -> ClassHead:
        """The head as it is stored: float32 on the CPU. BankError if it does not fit the rows."""
        weight, bias = (t.detach().to("cpu", torch.float32) for t in (self.weight, self.bias))
        classes = len(weight)
        if weight.shape != (classes, dim) or bias.shape != (classes,) or classes == 0:
            raise BankError(
                f"class_head must have a weight [C, {dim}] and a bias [C], got "
                f"{list(weight.shape)} and {list(bias.shape)}"
            )
        if not bool(weight.isfinite().all() and bias.isfinite().all()):
            raise BankError("class_head holds NaN or inf")
        if len(self.class_names) not in (0, classes):
            raise BankError(
                f"class_head has {classes} logits and {len(self.class_names)} class names "
                f"({brief(list(self.class_names))})"
            )
        if self.order is not None and sorted(self.order) != list(range(classes)):
            raise BankError(f"the order of class_head must be that of {classes} logits")
        return ClassHead(weight, bias, tuple(self.class_names), self.order)


def encode_head(head: ClassHead) -> tuple[bytes, HeadRecord]:
    """The bytes of the file, and its entry in the manifest; equal heads give equal bytes."""
    data = safetensors.torch.save({"weight": head.weight.contiguous(), "bias": head.bias})
    record = HeadRecord(
        classes=head.num_classes,
        class_names=list(head.class_names),
        order=None if head.order is None else list(head.order),
        bytes=len(data),
        xxh3=xxhash.xxh3_64_hexdigest(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )
    return data, record


def map_head(folder: Path, record: HeadRecord, dim: int, verify: str) -> ClassHead:
    """Map the head's file, checked as `map_shard` checks a shard."""
    layout: Layout = {"weight": ("F32", [record.classes, dim]), "bias": ("F32", [record.classes])}
    weight, bias = map_tensors(folder, record, layout, verify, REMEDY)
    order = None if record.order is None else tuple(record.order)
    return ClassHead(weight, bias, tuple(record.class_names), order)
