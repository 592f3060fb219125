"""Knowledge distillation from stored teacher embeddings, with a fused contrastive loss."""

from ckd import backends
from ckd.losses import EmbeddingDistillationLoss
from ckd.ops import contrastive_cross_entropy, normalized_similarity

__version__ = "0.1.0"

__all__ = [
    "EmbeddingDistillationLoss",
    "backends",
    "contrastive_cross_entropy",
    "normalized_similarity",
]
