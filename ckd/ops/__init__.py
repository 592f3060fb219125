"""The ops: one file each, holding its public function, schema, fake and autograd."""

from ckd.ops.contrastive_ce import contrastive_cross_entropy
from ckd.ops.similarity import normalized_similarity
from ckd.ops.top_k import TopK, top_k

__all__ = ["TopK", "contrastive_cross_entropy", "normalized_similarity", "top_k"]
