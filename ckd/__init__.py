"""Knowledge distillation from stored teacher embeddings, with a fused contrastive loss."""

from ckd import backends
from ckd._errors import CkdError
from ckd._version import __version__
from ckd.bank import BankError, BankWriter, EmbeddingBank
from ckd.losses import EmbeddingDistillationLoss
from ckd.ops import TopK, contrastive_cross_entropy, normalized_similarity, top_k

__all__ = [
    "BankError",
    "BankWriter",
    "CkdError",
    "EmbeddingBank",
    "EmbeddingDistillationLoss",
    "TopK",
    "__version__",
    "backends",
    "contrastive_cross_entropy",
    "normalized_similarity",
    "top_k",
]
