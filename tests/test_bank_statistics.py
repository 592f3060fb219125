"""Mean and variance of a bank's rows: exact, the same whenever they are computed, and stored."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pytest
import torch

from ckd.bank import BankError, BankWriter, EmbeddingBank
from ckd.bank.manifest import encode, read_manifest
from ckd.bank.npy import import_npy
from ckd.bank.statistics import Moments, Statistics
from tests.bank_tools import DIM, change_manifest, files_of, sample, write_bank
from tests.test_bank_resume import begin

NAN, NEGATIVE = (base64.b64encode(np.full(DIM, x).tobytes()).decode() for x in (np.nan, -1.0))


def as_version_1(path: Path) -> None:
    """Turn a bank into one that the first version of the format would have written."""

    def change(values: dict[str, object]) -> None:
        del values["statistics"], values["class_head"]
        values["schema_version"] = 1

    change_manifest(path, change)


def equal(one: Statistics, other: Statistics) -> bool:
    return torch.equal(one.mean, other.mean) and torch.equal(one.variance, other.variance)


@pytest.mark.parametrize("rows", [1, 50, 3000])
def test_they_are_those_of_the_stored_rows(tmp_path, rows):
    bank = write_bank(tmp_path / "bank", rows, rows_per_shard=1300)
    stored = bank.embeddings().double()
    statistics = bank.statistics()
    torch.testing.assert_close(statistics.mean, stored.mean(0), rtol=1e-12, atol=1e-13)
    variance = stored.var(dim=0, correction=0)
    torch.testing.assert_close(statistics.variance, variance, rtol=1e-11, atol=1e-13)
    assert statistics.sigma == pytest.approx(variance.mean().sqrt().item())


def test_a_large_mean_leaves_the_variance_its_digits():
    rows = 1000 + torch.randn(5000, 3, generator=torch.Generator().manual_seed(0))
    rows[:, 2] = 1000.5  # a constant
    moments = Moments(3)
    for shard in rows.half().split(1300):
        moments.add(shard)
    expected = rows.half().double().var(dim=0, correction=0)
    statistics = moments.statistics()
    torch.testing.assert_close(statistics.variance, expected, rtol=1e-8, atol=1e-9)
    assert statistics.variance[2] == 0


def test_threads_do_not_change_them():
    rows = torch.randn(5000, 64, generator=torch.Generator().manual_seed(0)).half()
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        moments = Moments(64)
        moments.add(rows)
        results.append(moments.statistics())
    torch.set_num_threads(threads)
    assert all(equal(result, results[0]) for result in results)


@pytest.mark.parametrize("rows", [20, 32, 49])
def test_a_resumed_bank_stores_the_same(tmp_path, rows):
    settings = {"class_names": ("ant", "bee", "cat"), "teacher": "t", "fingerprint": "f00d"}
    begin(tmp_path / "bank", rows, rows_per_shard=16, **settings)
    write_bank(tmp_path / "bank")
    write_bank(tmp_path / "undisturbed")
    assert files_of(tmp_path / "bank") == files_of(tmp_path / "undisturbed")


def test_a_bank_of_an_earlier_version_opens_and_computes_the_same_bits(tmp_path):
    bank = write_bank(tmp_path / "bank", 3000, rows_per_shard=1300)
    as_version_1(tmp_path / "bank")
    old = EmbeddingBank.open(tmp_path / "bank")
    assert old.meta["schema_version"] == 1
    assert "statistics" not in old.meta
    assert old.class_head() is None
    assert equal(old.statistics(), bank.statistics())
    # Its identity, by which pickles and neighbours know it, is that of its own version.
    manifest = tmp_path / "bank" / "manifest.json"
    assert encode(read_manifest(tmp_path / "bank")) == manifest.read_bytes()


def test_a_bank_that_an_earlier_version_began_is_completed_in_this_one(tmp_path):
    settings = {"class_names": ("ant", "bee", "cat"), "teacher": "t", "fingerprint": "f00d"}
    begin(tmp_path / "bank", 40, rows_per_shard=16, **settings)
    as_version_1(tmp_path / "bank")
    write_bank(tmp_path / "bank")
    write_bank(tmp_path / "undisturbed")
    assert files_of(tmp_path / "bank") == files_of(tmp_path / "undisturbed")


def test_a_complete_bank_of_an_earlier_version_is_the_success_that_it_was(tmp_path):
    rows = sample()[1].numpy()
    np.save(tmp_path / "e.npy", rows)
    import_npy(tmp_path / "e.npy", tmp_path / "bank")
    as_version_1(tmp_path / "bank")
    before = files_of(tmp_path / "bank")
    import_npy(tmp_path / "e.npy", tmp_path / "bank")
    assert files_of(tmp_path / "bank") == before


@pytest.mark.parametrize(
    ("says", "change"),
    [
        ("statistics must be mean and variance", lambda m: m.update(statistics="AAAA")),
        ("statistics must be mean and variance", lambda m: m["statistics"].pop("mean")),
        (f"statistics must be {DIM} numbers", lambda m: m["statistics"].update(mean="AAAA")),
        (
            f"statistics must be {DIM} numbers",
            lambda m: m["statistics"].update(mean="AAAAAAAAAAA="),
        ),
        (f"statistics must be {DIM} numbers", lambda m: m["statistics"].update(variance="?")),
        (f"statistics must be {DIM} numbers", lambda m: m["statistics"].update(variance="é")),
        (f"statistics must be {DIM} numbers", lambda m: m["statistics"].update(variance=[1.0] * 8)),
        (f"statistics must be {DIM} numbers", lambda m: m["statistics"].update(mean=NAN)),
        ("a negative variance", lambda m: m["statistics"].update(variance=NEGATIVE)),
        ("missing or unexpected", lambda m: m.pop("statistics")),
        ("missing or unexpected", lambda m: m.update(schema_version=1)),
    ],
)
def test_statistics_that_cannot_be_are_refused(tmp_path, says, change):
    write_bank(tmp_path / "bank")
    change_manifest(tmp_path / "bank", change)
    with pytest.raises(BankError, match=rf"manifest\.json is damaged.*{says}"):
        EmbeddingBank.open(tmp_path / "bank")


def test_a_writer_that_is_entered_again_counts_no_row_twice(tmp_path, monkeypatch):
    writer = BankWriter(tmp_path / "bank", DIM, rows_per_shard=16)
    ids, embeddings, _ = sample()

    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def fail_in_the_second_shard() -> None:
        with writer, monkeypatch.context() as patches:
            writer.write(ids[:20], embeddings[:20])
            patches.setattr("os.fsync", disk_full)
            writer.write(ids[20:], embeddings[20:])

    with pytest.raises(OSError, match="No space"):
        fail_in_the_second_shard()
    with writer:
        writer.write(ids, embeddings)
    bank = EmbeddingBank.open(tmp_path / "bank")
    expected = bank.embeddings().double().mean(0)
    torch.testing.assert_close(bank.statistics().mean, expected, rtol=1e-12, atol=1e-13)
