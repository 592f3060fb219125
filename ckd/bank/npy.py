"""Imports existing embeddings from .npy files into a bank."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash

from ckd import _npy
from ckd._console import bar, byte_bar
from ckd._files import LFS_POINTER, holds_lfs_pointer, open_regular, read_lines, user_path
from ckd.bank import arrays
from ckd.bank.manifest import BankError, RowError
from ckd.bank.reader import EmbeddingBank
from ckd.bank.writer import BankWriter

_CHUNK_ROWS = 8192


def import_npy(
    embeddings: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    labels: str | os.PathLike[str] | None = None,
    ids: str | os.PathLike[str] | None = None,
    class_names: str | os.PathLike[str] | None = None,
    teacher: str | None = None,
    normalize: bool = False,
    rows_per_shard: int = 8192,
    progress: bool = True,
) -> EmbeddingBank:
    """Make the bank `path` from the file `embeddings`, floating point [N, D].

    labels, ids: .npy files of integers [N]; default: no class, and row numbers as sample ids.
    class_names: a UTF-8 text file, one name per line. teacher: its name, for the manifest. In a
    path, a leading `~` is the home folder. progress: show progress bars.

    The embeddings are memory-mapped, and nothing is unpickled. Safe to kill: the same call resumes.
    A complete bank is opened unchanged. Raises BankError that names the invalid file (and row), and
    OSError if a file cannot be read.
    """
    rows = _map(embeddings)
    if rows.ndim != 2 or rows.size == 0 or rows.dtype.kind != "f" or rows.dtype.itemsize > 8:
        raise BankError(
            f"{embeddings} must hold floating point of shape [N, D] (float16, float32 or float64), "
            f"got {rows.dtype} of shape {list(rows.shape)}"
        )
    row_ids = np.arange(len(rows)) if ids is None else _integers(ids)
    row_labels = np.full(len(rows), -1) if labels is None else _integers(labels)
    for name, values in ((ids, row_ids), (labels, row_labels)):
        if values.shape != rows.shape[:1]:
            raise BankError(
                f"{name} must have an entry for each row of {embeddings}, shape [{len(rows)}], "
                f"got {list(values.shape)}"
            )
    source = {
        "imported_from": os.path.basename(embeddings),
        # Hashes in the settings, so that a resume from changed files is refused.
        "xxh3": _xxh3((rows, row_labels, row_ids), progress=progress),
    }
    writer = BankWriter(
        path,
        rows.shape[1],
        teacher=teacher,
        preprocessing=source,
        class_names=None if class_names is None else read_lines(class_names, BankError),
        normalize=normalize,
        rows_per_shard=rows_per_shard,
        rows=len(rows),
    )
    if writer.is_complete():
        return EmbeddingBank.open(writer.path)
    files = {"sample_ids": ids, "embeddings": embeddings, "labels": labels}
    rows_done = bar("embeddings", total=len(rows), unit="rows", shown=progress)
    with writer, rows_done:
        for start in range(0, len(rows), _CHUNK_ROWS):
            chunk = slice(start, start + _CHUNK_ROWS)
            try:
                writer.write(row_ids[chunk], rows[chunk], row_labels[chunk])
            except RowError as error:
                where = f"row {start + error.row} of {files[error.argument]}"
                raise error.found_at(where) from error
            rows_done.update(len(rows[chunk]))
    return EmbeddingBank.open(writer.path)


def _map(path: str | os.PathLike[str]) -> np.ndarray[Any, Any]:
    path = user_path(path)
    with open_regular(path, follow=True) as file:
        head, size = file.read(_npy.HEAD_BYTES), file.seek(0, os.SEEK_END)
    try:
        _npy.check_header(head, size)
        return np.lib.format.open_memmap(path, mode="r")
    except _npy.DAMAGE as error:
        reason = str(error)
        if "Python objects" in reason:
            reason = "it holds Python objects, which are not unpickled; save an array of numbers"
        if holds_lfs_pointer(path):
            reason = LFS_POINTER
        raise BankError(f"{path} is not a usable .npy file: {reason}") from error


def _integers(path: str | os.PathLike[str]) -> np.ndarray[Any, Any]:
    return arrays.integers(os.fspath(path), _map(path)).numpy()


def _xxh3(files: Sequence[np.ndarray[Any, Any]], *, progress: bool) -> list[str]:
    """The hash of each array."""
    hashes = []
    total = sum(values.nbytes for values in files)
    with byte_bar("hashing the files", total=total, shown=progress) as done:
        for values in files:
            digest = xxhash.xxh3_64()
            for start in range(0, len(values), _CHUNK_ROWS):
                chunk = np.ascontiguousarray(values[start : start + _CHUNK_ROWS])
                digest.update(chunk.data)
                done.update(chunk.nbytes)
            hashes.append(digest.hexdigest())
    return hashes
