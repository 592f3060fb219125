"""Knowledge distillation from stored teacher embeddings, with a fused contrastive loss."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ckd import backends
from ckd._errors import CkdError
from ckd._version import __version__
from ckd.bank import BankError, BankWriter, EmbeddingBank
from ckd.losses import EmbeddingDistillationLoss
from ckd.ops import TopK, contrastive_cross_entropy, normalized_similarity, top_k

if TYPE_CHECKING:
    from ckd.models import Student, load_student

__all__ = [
    "BankError",
    "BankWriter",
    "CkdError",
    "EmbeddingBank",
    "EmbeddingDistillationLoss",
    "Student",
    "TopK",
    "__version__",
    "backends",
    "contrastive_cross_entropy",
    "load_student",
    "normalized_similarity",
    "top_k",
]


def __getattr__(name: str) -> Any:
    if name in ("data", "eval", "models", "train"):  # `import ckd` alone gives `ckd.data.load`
        return importlib.import_module(f"ckd.{name}")
    if name in ("Student", "load_student"):  # on demand: the losses need no models
        from ckd import models

        return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
