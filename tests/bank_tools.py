"""Small banks for the tests, and ways to look at and to damage their files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ckd._json import sealed
from ckd.bank import BankWriter, EmbeddingBank
from ckd.bank.manifest import MANIFEST_NAME, encode, read_manifest
from ckd.bank.neighbours import FOLDER
from ckd.bank.shards import record_of

CLASSES = ("ant", "bee", "cat")
DIM = 8


def sample(rows: int = 50, dim: int = DIM, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Sample ids (shuffled, with gaps, some negative), float32 embeddings and labels of CLASSES."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(10 * rows, generator=generator)[:rows] - rows
    embeddings = torch.randn(rows, dim, generator=generator)
    return ids, embeddings, torch.arange(rows) % len(CLASSES)


def write_bank(
    path: Path, rows: int = 50, *, batch: int = 7, rows_per_shard: int = 16, **settings: Any
) -> EmbeddingBank:
    """Write `sample(rows)` in batches, and open the bank."""
    ids, embeddings, labels = sample(rows)
    options: dict[str, Any] = {"class_names": CLASSES, "teacher": "t", "fingerprint": "f00d"}
    options |= {"rows_per_shard": rows_per_shard} | settings
    with BankWriter(path, DIM, **options) as writer:
        for start in range(0, rows, batch):
            part = slice(start, start + batch)
            writer.write(ids[part], embeddings[part], labels[part])
    return EmbeddingBank.open(path)


def files_of(path: Path) -> dict[str, bytes]:
    """Name and content of everything in the folder."""
    return {file.name: file.read_bytes() for file in path.iterdir()}


def change_manifest(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the values in a manifest and recompute its checksum."""
    file = path / MANIFEST_NAME
    values = json.loads(file.read_text())
    del values["checksum"]
    change(values)
    file.write_bytes(sealed(values))


def replace_shard(path: Path, index: int, data: bytes) -> None:
    """Replace the bytes of a shard, and its size and hashes in the manifest."""
    manifest = read_manifest(path)
    old = manifest.shards[index]
    (path / old.file).write_bytes(data)
    shards = list(manifest.shards)
    shards[index] = record_of(index, old.first_row, old.rows, data)
    changed = replace(manifest, shards=tuple(shards))
    (path / MANIFEST_NAME).write_bytes(encode(changed))


def replace_part(path: Path, name: str, data: bytes) -> None:
    """Replace the bytes of a part of the neighbours, and its size and hashes."""
    (path / FOLDER / name).write_bytes(data)
    record = vars(record_of(0, 0, 1, data))

    def change(values: dict[str, Any]) -> None:
        part = next(part for part in values["parts"] if part["file"] == name)
        part.update({field: record[field] for field in ("bytes", "xxh3", "sha256")})

    change_manifest(path / FOLDER, change)


def flip_bit(file: Path, position: int, bit: int = 0) -> None:
    """Flip one bit of a file; a negative position counts from its end."""
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << bit
    file.write_bytes(data)
