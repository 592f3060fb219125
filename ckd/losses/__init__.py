"""Losses as modules: terms of distillation from stored embeddings, alone or in a mix."""

from __future__ import annotations

from ckd.heads import HeadKind, TeacherSpaceHead
from ckd.losses.contrastive import EmbeddingDistillationLoss
from ckd.losses.cosine import CosineDistillationLoss
from ckd.losses.logits import LogitDistillationLoss
from ckd.losses.mse import MSEDistillationLoss
from ckd.losses.soft import SoftDistillationLoss, TopSoftDistillationLoss

__all__ = [
    "CosineDistillationLoss",
    "EmbeddingDistillationLoss",
    "HeadKind",
    "LogitDistillationLoss",
    "MSEDistillationLoss",
    "SoftDistillationLoss",
    "TeacherSpaceHead",
    "TopSoftDistillationLoss",
]
