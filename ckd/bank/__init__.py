"""Teacher embeddings on disk: written once, read through memory maps, every byte checksummed."""

from __future__ import annotations

from ckd.bank.manifest import BankError
from ckd.bank.neighbours import Neighbours
from ckd.bank.reader import EmbeddingBank
from ckd.bank.writer import BankWriter

__all__ = ["BankError", "BankWriter", "EmbeddingBank", "Neighbours"]
