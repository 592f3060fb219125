"""Teacher embeddings on disk: written once, read through memory maps, every byte checksummed."""

from __future__ import annotations

from ckd.bank.class_head import ClassHead
from ckd.bank.manifest import BankError
from ckd.bank.neighbours import Neighbours
from ckd.bank.npy import import_npy
from ckd.bank.reader import EmbeddingBank
from ckd.bank.statistics import Statistics
from ckd.bank.writer import BankWriter

__all__ = [
    "BankError",
    "BankWriter",
    "ClassHead",
    "EmbeddingBank",
    "Neighbours",
    "Statistics",
    "import_npy",
]
