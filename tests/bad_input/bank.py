"""Bad input to the bank: settings and batches of the writer, files on disk, queries, imports."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ckd import _lock
from ckd.bank import BankError, BankWriter, ClassHead, EmbeddingBank
from ckd.bank.npy import import_npy
from ckd.bank.picture import draw_bank
from tests.bad_input import Case
from tests.bank_tools import CLASSES, DIM, change_manifest, flip_bit, sample, write_bank

IDS, ROWS, LABELS = sample()
HEAD = ClassHead(torch.ones(3, DIM), torch.zeros(3))
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def offered(*batch: Any, **settings: Any) -> Callable[[Path], Any]:
    """Write one batch to a new bank."""

    def call(tmp_path: Path) -> None:
        with BankWriter(tmp_path / "bank", DIM, **settings) as writer:
            writer.write(*batch)

    return call


def asked(question: Callable[[EmbeddingBank], Any], **settings: Any) -> Callable[[Path], Any]:
    """Query an intact bank."""
    return lambda tmp_path: question(write_bank(tmp_path / "bank", **settings))


def damaged(damage: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Open a bank after damage to its folder."""

    def call(tmp_path: Path) -> None:
        write_bank(tmp_path / "bank")
        damage(tmp_path / "bank")
        EmbeddingBank.open(tmp_path / "bank")

    return call


def truncate(folder: Path) -> None:
    file = folder / "shard-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-3])


def append(folder: Path) -> None:
    file = folder / "shard-00000.safetensors"
    file.write_bytes(file.read_bytes() + b"garbage")


def poisoned(value: float) -> torch.Tensor:
    rows = ROWS.clone()
    rows[3, 1] = value
    return rows


def write_failing_with(error: int) -> Callable[[Path], Any]:
    """Write a new bank while fsync fails."""

    def fail(*_: Any) -> None:
        raise OSError(error, os.strerror(error))

    def call(tmp_path: Path) -> None:
        with pytest.MonkeyPatch.context() as patches:
            patches.setattr(os, "fsync", fail)
            offered(IDS, ROWS)(tmp_path)

    return call


def stored(end: Exception, **settings: Any) -> Callable[[Path], Any]:
    """Write full shards of a bank, and end the block by an exception."""

    def call(tmp_path: Path) -> None:
        with BankWriter(tmp_path / "bank", DIM, rows_per_shard=25, **settings) as writer:
            writer.write(IDS, ROWS, LABELS)
            raise end

    return call


def resumed(first: Mapping[str, Any], second: Mapping[str, Any]) -> Callable[[Path], Any]:
    """Start a bank with the settings `first`, and resume it with `second`."""

    def call(tmp_path: Path) -> None:
        with contextlib.suppress(KeyError):
            stored(KeyError(), **first)(tmp_path)
        offered(IDS, ROWS, LABELS, **second)(tmp_path)

    return call


def imported(
    embeddings: np.ndarray[Any, Any], labels: Sequence[Any] = (), names: str | None = None
) -> Callable[[Path], Any]:
    def call(tmp_path: Path) -> None:
        np.save(tmp_path / "e.npy", embeddings)
        np.save(tmp_path / "l.npy", np.asarray(labels))
        labels_file = tmp_path / "l.npy" if len(labels) else None
        (tmp_path / "names.txt").write_text(names or "")
        names_file = tmp_path / "names.txt" if names else None
        import_npy(
            tmp_path / "e.npy", tmp_path / "bank", labels=labels_file, class_names=names_file
        )

    return call


def resumed_with(rows: torch.Tensor | None) -> Callable[[Path], Any]:
    """Resume with the same settings and ids but other rows, or (None) with no rows."""

    def call(tmp_path: Path) -> None:
        with contextlib.suppress(KeyError):
            stored(KeyError())(tmp_path)
        with BankWriter(tmp_path / "bank", DIM, rows_per_shard=25) as writer:
            if rows is not None:
                writer.write(IDS, rows, LABELS)

    return call


def drawn_of_equal_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    offered(IDS, torch.ones_like(ROWS))(tmp_path)
    draw_bank(EmbeddingBank.open(tmp_path / "bank"), tmp_path / "x.png")


def into_a_file(tmp_path: Path) -> None:
    (tmp_path / "bank").write_text("a file")
    offered(IDS, ROWS)(tmp_path)


def into_a_foreign_folder(tmp_path: Path) -> None:
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / "thesis.tex").write_text("precious")
    offered(IDS, ROWS)(tmp_path)


def onto_a_complete_bank(tmp_path: Path) -> None:
    write_bank(tmp_path / "bank")
    offered(IDS, ROWS)(tmp_path)


def pointer_for(name: str) -> Callable[[Path], Any]:
    """Replace a file of the folder by a Git LFS pointer."""
    return lambda folder: (folder / name).write_bytes(POINTER)


def import_of(data: bytes) -> Callable[[Path], Any]:
    """Import an .npy file with these bytes."""

    def call(tmp_path: Path) -> None:
        (tmp_path / "e.npy").write_bytes(data)
        import_npy(tmp_path / "e.npy", tmp_path / "bank")

    return call


def unpickled_after_it_was_replaced(tmp_path: Path) -> None:
    data = pickle.dumps(write_bank(tmp_path / "bank"))
    shutil.rmtree(tmp_path / "bank")
    write_bank(tmp_path / "bank", rows=40)
    pickle.loads(data)


def locked_by_a_file(tmp_path: Path) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / _lock.LOCK_FILE).write_text("process 12 on another host")
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(fcntl, "flock", flock)
        patches.setattr(_lock, "LOCK_PATIENCE_S", 0.0)
        offered(IDS, ROWS)(tmp_path)


SHARD_1 = ("shard-00001.safetensors", "rows 16 to 31")

CASES = [
    # Settings of the writer
    Case("dim zero", lambda p: BankWriter(p / "b", 0), BankError, ("dim", "got 0")),
    Case("dim float", lambda p: BankWriter(p / "b", 8.0), BankError, ("dim", "8.0")),  # type: ignore[arg-type]
    Case(
        "shard size",
        lambda p: BankWriter(p / "b", 8, rows_per_shard=-1),
        BankError,
        ("rows_per_shard", "-1"),
    ),
    Case(
        "teacher not json",
        lambda p: BankWriter(p / "b", 8, teacher={"weights": torch.zeros(1)}),
        BankError,
        ("teacher", "JSON"),
    ),
    Case(
        "class names string",
        lambda p: BankWriter(p / "b", 8, class_names="abc"),
        BankError,
        ("class_names", "'abc'"),
    ),
    # Batches
    Case("rank", offered(IDS, ROWS[0]), BankError, ("embeddings", "[n, 8]", "[8]")),
    Case("width", offered(IDS, ROWS[:, :7]), BankError, ("embeddings", "[50, 7]")),
    Case("dtype", offered(IDS, ROWS.long()), BankError, ("embeddings", "torch.int64")),
    Case("no array", offered(IDS, "rows"), BankError, ("embeddings", "array of numbers")),
    Case("ids dtype", offered(IDS.float(), ROWS), BankError, ("sample_ids", "float32")),
    Case("ids rank", offered(IDS[:, None], ROWS), BankError, ("sample_ids", "[50, 1]")),
    Case("lengths", offered(IDS[:-1], ROWS), BankError, ("49", "50")),
    Case("labels length", offered(IDS, ROWS, LABELS[1:]), BankError, ("labels", "49")),
    Case("label below", offered(IDS, ROWS, LABELS - 2), BankError, ("labels", "got -2")),
    Case(
        "label beyond class names",
        offered(IDS, ROWS, LABELS, class_names=CLASSES[:2]),
        BankError,
        ("labels", "0 to 1", "got 2 in row 2"),
    ),
    Case(
        "nan",
        offered(IDS, poisoned(float("nan"))),
        BankError,
        ("row 3", f"sample_id {int(IDS[3])}", "NaN"),
    ),
    Case("inf", offered(IDS, poisoned(float("inf"))), BankError, ("row 3", "inf")),
    Case(
        "underflow",
        offered(IDS, ROWS * torch.where(torch.arange(50) == 3, 1e-8, 1.0)[:, None]),
        BankError,
        ("row 3", f"sample_id {int(IDS[3])}", "too small for float16", "normalize=True"),
    ),
    Case("overflow", offered(IDS, poisoned(1e5)), BankError, ("row 3", "65504")),
    Case(
        "zero row normalized",
        offered(IDS, ROWS * (torch.arange(50) != 4)[:, None], normalize=True),
        BankError,
        ("row 4", "all zeros"),
    ),
    Case(
        "duplicate ids",
        offered([1, 2, 1], ROWS[:3]),
        BankError,
        ("duplicate sample_id 1", "row 2"),
    ),
    Case("empty", offered(IDS[:0], ROWS[:0]), BankError, ("empty",)),
    # Path, resume, file system
    Case("path is a file", into_a_file, BankError, ("is a file",)),
    Case("foreign folder", into_a_foreign_folder, BankError, ("not a bank", "thesis.tex")),
    Case(
        "path that is not UTF-8",
        lambda p: BankWriter(os.fsdecode(bytes(p) + b"/\xff"), 8),
        BankError,
        (r"\udcff", "not UTF-8"),
    ),
    Case(
        "locked where flock is missing",
        locked_by_a_file,
        BankError,
        ("being written", ".ckd-lock, of process 12 on another host", "delete the file"),
    ),
    Case("complete already", onto_a_complete_bank, BankError, ("complete bank of 50 rows",)),
    Case(
        "resumed otherwise",
        resumed({"teacher": "a", "fingerprint": "f"}, {"teacher": "b", "fingerprint": "f"}),
        BankError,
        ("teacher: {'name': 'a'}, now {'name': 'b'}",),
    ),
    Case(
        "resumed with other rows",
        resumed_with(ROWS * 1.1),
        BankError,
        (f"sample_id {int(IDS[0])}", "another embedding", "delete the bank"),
    ),
    Case(
        "resumed without a row",
        resumed_with(None),
        BankError,
        ("50 rows", "nothing was written", "rows=50"),
    ),
    Case("fewer rows than announced", offered(IDS, ROWS, rows=60), BankError, ("50", "rows=60")),
    Case("rows zero", lambda p: BankWriter(p / "b", 8, rows=0), BankError, ("rows", "got 0")),
    Case(
        "disk full",
        write_failing_with(errno.ENOSPC),
        OSError,
        ("No space left", "manifest.json"),
    ),
    Case(
        "no permission",
        write_failing_with(errno.EACCES),
        PermissionError,
        ("denied", "manifest.json"),
    ),
    # Damaged files
    Case("missing", EmbeddingBank.open, BankError, ("not a bank", "manifest.json")),
    Case(
        "flipped bit",
        damaged(lambda b: flip_bit(b / SHARD_1[0], -100, bit=3)),
        BankError,
        SHARD_1,
    ),
    Case(
        "truncated shard",
        damaged(truncate),
        BankError,
        ("shard-00003.safetensors", "rows 48 to 49", "truncated"),
    ),
    Case(
        "missing shard",
        damaged(lambda b: (b / SHARD_1[0]).unlink()),
        BankError,
        (*SHARD_1, "missing"),
    ),
    Case(
        "trailing garbage",
        damaged(append),
        BankError,
        ("shard-00000.safetensors", "rows 0 to 15", "too long"),
    ),
    Case(
        "manifest flipped bit",
        damaged(lambda b: flip_bit(b / "manifest.json", 100)),
        BankError,
        ("manifest.json", "damaged"),
    ),
    Case(
        "manifest other version",
        damaged(lambda b: change_manifest(b, lambda m: m.update(schema_version=7))),
        BankError,
        ("manifest.json", "schema version 7", "reads version 1"),
    ),
    Case(
        "class head flipped bit",
        lambda tmp_path: (
            write_bank(tmp_path / "bank", class_head=HEAD),
            flip_bit(tmp_path / "bank" / "class_head.safetensors", -1),
            EmbeddingBank.open(tmp_path / "bank"),
        ),
        BankError,
        ("class_head.safetensors is damaged", "the teacher's class head", "xxh3"),
    ),
    Case(
        "class head of another width",
        offered(IDS, ROWS, class_head=ClassHead(torch.zeros(3, DIM + 1), torch.zeros(3))),
        BankError,
        (f"weight [C, {DIM}]", f"got [3, {DIM + 1}]"),
    ),
    Case(
        "class head of rows of length 1",
        offered(IDS, ROWS, class_head=HEAD, normalize=True),
        BankError,
        ("class_head and normalize exclude each other",),
    ),
    Case(
        "manifest path traversal",
        damaged(lambda b: change_manifest(b, lambda m: m["shards"][0].update(file="../../x"))),
        BankError,
        ("manifest.json", "../../x"),
    ),
    Case(
        "shard LFS pointer",
        damaged(pointer_for(SHARD_1[0])),
        BankError,
        (*SHARD_1, "Git LFS pointer", "git lfs pull"),
    ),
    Case(
        "manifest LFS pointer",
        damaged(pointer_for("manifest.json")),
        BankError,
        ("manifest.json", "Git LFS pointer", "git lfs pull"),
    ),
    Case(
        "replaced after pickling",
        unpickled_after_it_was_replaced,
        BankError,
        ("bank holds another bank", "pickled"),
    ),
    # Queries
    Case(
        "unknown id",
        asked(lambda bank: bank.rows([int(IDS[0]), 99_999])),
        BankError,
        ("sample_id 99999", "not in the bank"),
    ),
    Case(
        "class without rows",
        asked(lambda bank: bank.centroids(), class_names=(*CLASSES, "dodo")),
        BankError,
        ("class 3", "'dodo'", "no row"),
    ),
    Case(
        "per class zero",
        asked(lambda bank: bank.centroids(0)),
        BankError,
        ("per_class", "got 0"),
    ),
    Case("other dim", asked(lambda bank: bank.check(dim=512)), BankError, ("8", "512")),
    Case(
        "other class names",
        asked(lambda bank: bank.check(class_names=("ant", "bee", "dog"))),
        BankError,
        ("class 2", "'cat'", "'dog'"),
    ),
    Case(
        "class names that look equal",
        asked(lambda bank: bank.check(class_names=("ant", "bee", "\u0441at"))),
        BankError,
        ("class 2", "'cat'", r"'\u0441at'"),
    ),
    Case(
        "other data",
        asked(lambda bank: bank.check(fingerprint="beef")),
        BankError,
        ("f00d", "beef"),
    ),
    Case(
        "verify mode",
        lambda p: EmbeddingBank.open(p, verify="ful"),
        BankError,
        ("'ful'", "full"),
    ),
    Case(
        "plot of equal rows",
        drawn_of_equal_rows,
        BankError,
        ("zero variance",),
    ),
    Case(
        "plot method",
        asked(lambda bank: draw_bank(bank, bank.path / "x.png", method="umap")),
        BankError,
        ("'umap'", "pca"),
    ),
    # Imports from .npy files
    Case(
        "npy pickled",
        imported(np.array([[{}]], dtype=object)),
        BankError,
        ("e.npy", "not a usable .npy file", "Python objects", "array of numbers"),
    ),
    Case(
        "npy damaged header",
        import_of(b"\x93NUMPY\x01\x00\x10\x00{'descr': ('<f4'" + b"\n"),
        BankError,
        ("e.npy", "not a usable .npy file"),
    ),
    Case("npy LFS pointer", import_of(POINTER), BankError, ("e.npy", "Git LFS pointer")),
    Case("npy empty", imported(np.zeros((0, 3))), BankError, ("e.npy", "[N, D]", "[0, 3]")),
    Case("npy dtype", imported(np.zeros((3, 2), int)), BankError, ("e.npy", "int64")),
    Case(
        "npy labels dates",
        imported(np.zeros((2, 2)), labels=np.array(["2020-01-01", "2021-01-01"], "M8[D]")),  # type: ignore[arg-type]
        BankError,
        ("l.npy", "array of numbers"),
    ),
    Case(
        "npy labels beyond int64",
        imported(np.zeros((2, 2)), labels=np.array([1, 2**63], np.uint64)),  # type: ignore[arg-type]
        BankError,
        ("l.npy", "int64", "uint64"),
    ),
    Case(
        "npy label row",
        imported(np.zeros((2, 2)), labels=[0, 2], names="ant\nbee\n"),
        BankError,
        ("0 to 1", "got 2 in row 1 of", "l.npy"),
    ),
    Case(
        "npy blank class name",
        imported(np.zeros((2, 2)), labels=[0, 1], names="ant\n\nbee\n"),
        BankError,
        ("names.txt", "line 2"),
    ),
    Case(
        "npy class names in UTF-16",
        imported(np.zeros((2, 2)), labels=[0, 1], names="a\0n\0t\0\n\0"),
        BankError,
        ("names.txt", "UTF-8"),
    ),
    Case("npy rank", imported(np.zeros(3)), BankError, ("e.npy", "[N, D]", "[3]")),
    Case(
        "npy labels",
        imported(np.zeros((3, 2)), labels=[0, 1]),
        BankError,
        ("l.npy", "[3]", "[2]"),
    ),
]
