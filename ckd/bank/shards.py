"""One shard of a bank: a safetensors file with `embedding`, `label` and `sample_id`; and how any
file of tensors is mapped and checked against its record."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import safetensors.torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from ckd._console import byte_bar
from ckd._files import LFS_POINTER, holds_lfs_pointer, open_regular
from ckd.bank.manifest import BankError, ShardRecord, shard_name

_READ_BYTES = 4 << 20
REMEDY = "restore it from a copy, or delete the bank and build it again"

# Name -> (safetensors dtype, shape) of each tensor of a file.
Layout = dict[str, tuple[str, list[int]]]
Read = Callable[[int], object]


class FileRecord(Protocol):
    """A manifest's entry for a file of tensors; `span` says in words what the file holds."""

    @property
    def file(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    @property
    def xxh3(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def span(self) -> str: ...


class _Damage(BankError):
    """What is wrong with a file, in words."""


@dataclass(frozen=True)
class Shard:
    """The three tensors of a shard, as views of the mapped file.

    embedding: float16 [n, D]; label: int64 [n], -1 for none; sample_id: int64 [n]. The mapping is
    private: pages are read on first access, and a write to a tensor never reaches the file.
    """

    record: ShardRecord
    embedding: Tensor
    label: Tensor
    sample_id: Tensor


def encode_shard(embedding: Tensor, label: Tensor, sample_id: Tensor) -> bytes:
    """The bytes of a shard file; the same rows always give the same bytes."""
    tensors = {"embedding": embedding, "label": label, "sample_id": sample_id}
    return safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()})


def record_of(index: int, first_row: int, rows: int, data: bytes) -> ShardRecord:
    """The manifest's entry for shard number `index`, a file with the content `data`."""
    return ShardRecord(
        file=shard_name(index),
        first_row=first_row,
        rows=rows,
        bytes=len(data),
        xxh3=xxhash.xxh3_64_hexdigest(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def map_shard(
    folder: Path, record: ShardRecord, dim: int, verify: str, read: Read | None = None
) -> Shard:
    """Map a shard into memory; checks and errors as in `map_tensors`."""
    layout: Layout = {
        "embedding": ("F16", [record.rows, dim]),
        "label": ("I64", [record.rows]),
        "sample_id": ("I64", [record.rows]),
    }
    return Shard(record, *map_tensors(folder, record, layout, verify, REMEDY, read))


def map_tensors(
    folder: Path,
    record: FileRecord,
    layout: Layout,
    verify: str,
    remedy: str,
    read: Read | None = None,
) -> list[Tensor]:
    """Map a file into memory, checked as `verify` says ("off": size and header only).

    read: called with the number of bytes of each block that is hashed.

    `safe_open(...).get_tensor` copies nothing: it returns views of one private mapping of the file,
    which outlives the handle (measured with safetensors 0.8: a 410 MB tensor in 1.2 ms, no
    anonymous memory). Raises BankError that names the file, its rows and, for damage, the remedy.
    """
    path = folder / record.file
    try:
        _check_size(path, record)
        if verify != "off":
            _check_hashes(path, record, full=verify == "full", read=read)
        with safe_open(path, framework="pt", device="cpu") as file:
            _check_header(file, layout)
            return [file.get_tensor(name) for name in layout]
    except _Damage as damage:
        raise BankError(f"{path} is damaged ({record.span}): {damage}; {remedy}") from None
    except FileNotFoundError:
        raise BankError(f"{path} is missing ({record.span}); {remedy}") from None
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BankError(f"{path} cannot be read ({record.span}): {reason}") from error


def checking(records: Iterable[FileRecord], verify: str) -> tqdm:
    """A progress bar over the bytes that `map_tensors` hashes of these files."""
    total = sum(record.bytes for record in records)
    return byte_bar("checking the bank", total=total, shown=verify != "off")


def _check_size(path: Path, record: FileRecord) -> None:
    # Before anything is mapped: touching a mapping beyond the end of its file kills the process.
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
    if size != record.bytes:
        if holds_lfs_pointer(path):
            raise BankError(f"{path} cannot be read ({record.span}): {LFS_POINTER}")
        how = "truncated" if size < record.bytes else "too long"
        sizes = f"{size} bytes where the manifest says {record.bytes}"
        raise _Damage(f"{how}, {sizes}")


def _check_hashes(path: Path, record: FileRecord, *, full: bool, read: Read | None) -> None:
    xxh3, sha256 = xxhash.xxh3_64(), hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(_READ_BYTES):
            xxh3.update(block)
            if full:
                sha256.update(block)
            if read is not None:
                read(len(block))
    if xxh3.hexdigest() != record.xxh3:
        raise _Damage("its xxh3 is not the one in the manifest")
    if full and sha256.hexdigest() != record.sha256:
        raise _Damage("its sha256 is not the one in the manifest")


def _check_header(file: safe_open, layout: Layout) -> None:
    names = sorted(file.keys())
    if names != sorted(layout):
        raise _Damage(f"it holds {names}, expected {sorted(layout)}")
    for name, (dtype, shape) in layout.items():
        view = file.get_slice(name)
        if view.get_dtype() != dtype or view.get_shape() != shape:
            came = f"{view.get_dtype()} {view.get_shape()}"
            raise _Damage(f"{name} is {came}, expected {dtype} {shape}")
