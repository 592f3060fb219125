"""Embeddings, labels and ids in .npy files: of any kind that is right, and of every other."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from ckd.bank import BankError, EmbeddingBank
from ckd.bank.npy import import_npy
from tests.damage import damaged, deadline, npy

ROWS = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float16)
LABELS, IDS = np.arange(6) % 3, np.arange(6)[::-1] * 7
WHOLE = {
    "e": npy("<f2", ROWS.shape, ROWS.tobytes()),
    "l": npy("<i8", (6,), LABELS.tobytes()),
    "i": npy("<i8", (6,), IDS.tobytes()),
}


def import_of(tmp_path: Path, **files: bytes) -> EmbeddingBank:
    for name, data in (WHOLE | files).items():
        (tmp_path / f"{name}.npy").write_bytes(data)
    embeddings, labels, ids = (tmp_path / f"{name}.npy" for name in WHOLE)
    return import_npy(embeddings, tmp_path / "bank", labels=labels, ids=ids)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"e": npy("<f2", (6, 4), ROWS.tobytes("F"), fortran=True)},
        {"e": npy(">f2", (6, 4), ROWS.astype(">f2").tobytes())},
        {"e": npy(">f8", (6, 4), ROWS.astype(">f8").tobytes("F"), fortran=True)},
        {"e": WHOLE["e"] + b"more"},
        {"l": npy(">u2", (6,), LABELS.astype(">u2").tobytes())},
        {"l": npy("|i1", (6,), LABELS.astype("i1").tobytes())},
        {"i": npy(">i8", (6,), IDS.astype(">i8").tobytes())},
        {"i": npy("<u8", (6,), IDS.tobytes())},
    ],
)  # fmt: skip
def test_arrays_of_any_order_are_imported(tmp_path: Path, files: dict[str, bytes]) -> None:
    bank = import_of(tmp_path, **files)
    np.testing.assert_array_equal(bank.rows(torch.from_numpy(IDS.copy())).numpy(), ROWS)
    assert bank.sample_ids.tolist() == IDS.tolist()
    assert bank.labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize(
    "data",
    [
        *(npy("<f2", (10**12, 4)), npy("<i8", (10**12,)), npy("<f2", (2**62, 2**62), bytes(9))),
        *(npy("<f2", (2**32, 2**32), bytes(9)), npy("<f2", (2**70, 4)), npy("<i8", (2**70,))),
        *(npy("<f2", (-6, 4), bytes(48)), npy("<f2", (-6, -4), bytes(48)), npy("<i8", (-6,))),
        *(npy("<f2", (), bytes(2)), npy("<i8", (), bytes(8)), npy("<i8", (6, 1), bytes(48))),
        *(npy("<f2", (6, 0)), npy("<f2", (10**12, 0)), npy("<f2", (0, 2**70))),
        *(npy("|V0", (6,)), npy("<U0", (10**12,)), npy("|S3", (6,), bytes(18))),
        *(npy([("a", "<f2", (4,))], (6,), bytes(48)), npy("|b1", (6,), bytes(6))),
        *(npy("<c8", (6, 4), bytes(192)), npy("<f16", (6, 4), bytes(384)), npy("|O", (6,))),
        *(npy("<M8[s]", (6,), bytes(48)), npy("nonsense", (6,), bytes(48)), npy("<f2", 6)),
        *(npy("<f2", "x").replace(b"'x'", b"(" * 9000), WHOLE["e"][:20], b""),
        b"\x93NUMPY\x02\0\xff\xff\xff\x7f{",
    ],
    ids=lambda data: str(data[10:90]),
)  # fmt: skip
def test_arrays_that_cannot_be_imported_are_named(tmp_path: Path, name: str, data: bytes) -> None:
    with deadline(), pytest.raises(BankError, match=rf"{name}\.npy"):
        import_of(tmp_path, **{name: data})
    assert not (tmp_path / "bank").exists()


@pytest.mark.parametrize("name", WHOLE)
def test_a_fifo_or_a_device_is_not_waited_for(tmp_path: Path, name: str) -> None:
    import_of(tmp_path)
    path = tmp_path / f"{name}.npy"
    arguments = (tmp_path / "e.npy", tmp_path / "other")
    files = {"labels": tmp_path / "l.npy", "ids": tmp_path / "i.npy"}
    path.unlink()
    os.mkfifo(path)
    with deadline(), pytest.raises(OSError, match=rf"a FIFO, not a regular file.*{name}\.npy"):
        import_npy(*arguments, **files)
    path.unlink()
    path.symlink_to("/dev/zero")
    with deadline(), pytest.raises(OSError, match=rf"a device, not a regular file.*{name}\.npy"):
        import_npy(*arguments, **files)


def test_a_damaged_file_is_imported_or_named(tmp_path: Path) -> None:
    draw, errors = random.Random(0), []
    for _ in range(300):
        name = draw.choice([*WHOLE])
        for left in tmp_path.glob("bank/*"):
            left.unlink()
        with deadline():
            try:
                assert len(import_of(tmp_path, **{name: damaged(WHOLE[name], draw)})) > 0
            except BankError as error:
                errors.append((name, str(error)))
    assert len(errors) > 100
    assert all(str(tmp_path) in message for _, message in errors)
