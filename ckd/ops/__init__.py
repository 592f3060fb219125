"""The ops: one file each, holding its public function, schema, fake and autograd."""

from ckd.ops.contrastive_ce import contrastive_cross_entropy
from ckd.ops.similarity import normalized_similarity

__all__ = ["contrastive_cross_entropy", "normalized_similarity"]
