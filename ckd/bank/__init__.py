"""Teacher embeddings on disk: written once, memory-mapped ever after, every byte checked."""

from __future__ import annotations

from ckd.bank.manifest import BankError
from ckd.bank.reader import EmbeddingBank
from ckd.bank.writer import BankWriter

__all__ = ["BankError", "BankWriter", "EmbeddingBank"]
