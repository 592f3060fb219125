"""Knowledge distillation from stored teacher embeddings, with a fused contrastive loss."""

from ckd import backends
from ckd._version import __version__
from ckd.losses import EmbeddingDistillationLoss
from ckd.ops import contrastive_cross_entropy, normalized_similarity

__all__ = [
    "EmbeddingDistillationLoss",
    "__version__",
    "backends",
    "contrastive_cross_entropy",
    "normalized_similarity",
]
