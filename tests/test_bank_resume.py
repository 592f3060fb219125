"""A build that is killed or fails at any step is resumed to the bytes of an undisturbed one."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckd import _files
from ckd.bank import BankError, BankWriter, EmbeddingBank
from ckd.bank.manifest import read_manifest
from tests.bank_tools import DIM, files_of, flip_bit, sample, write_bank

# Writes 100 shards, slowly enough (a second at least) to be killed in the middle.
SLOW_WRITER = """
import sys, time
import torch
from ckd.bank import BankWriter

torch.set_num_threads(1)
rows = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
print("ready", flush=True)
with BankWriter(sys.argv[1], 8, rows_per_shard=4) as writer:
    for start in range(0, 400, 3):
        time.sleep(float(sys.argv[2]))
        part = slice(start, start + 3)
        writer.write(torch.arange(400)[part] * 7, rows[part], torch.arange(400)[part] % 3)
"""


@pytest.mark.slow
def test_killed_at_random_moments_it_resumes_to_the_same_bytes(tmp_path):
    script = tmp_path / "write.py"
    script.write_text(SLOW_WRITER)
    chance = random.Random(0)
    shards = 0
    for _ in range(3):
        process = _start(script, tmp_path / "bank", pause_s=0.01)
        while _shards(tmp_path / "bank") <= shards:
            assert process.poll() is None, "the writer ended before it could be killed"
            time.sleep(0.001)
        time.sleep(chance.uniform(0.0, 0.1))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        shards = _shards(tmp_path / "bank")
    assert read_manifest(tmp_path / "bank").rows >= 8
    assert _start(script, tmp_path / "bank", pause_s=0.0).wait() == 0

    rows = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    with BankWriter(tmp_path / "undisturbed", 8, rows_per_shard=4) as writer:
        writer.write(torch.arange(400) * 7, rows, torch.arange(400) % 3)
    assert files_of(tmp_path / "bank") == files_of(tmp_path / "undisturbed")


def _shards(bank: Path) -> int:
    return len(list(bank.glob("shard-*")))


def _start(script: Path, bank: Path, pause_s: float) -> subprocess.Popen[bytes]:
    """Run the slow writer, and wait until it is about to write."""
    process = subprocess.Popen(
        [sys.executable, script, bank, str(pause_s)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


class Steps:
    """Counts opens, half-done writes, fsyncs and renames; calls `disturb` before the n-th."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n: int, disturb: Callable[[], None]):
        self.taken, self.n, self.disturb = 0, n, disturb
        monkeypatch.setattr(os, "replace", self._counted(os.replace))
        monkeypatch.setattr(os, "fsync", self._counted(os.fsync))
        monkeypatch.setattr(_files, "open", self._open, raising=False)

    def _counted(self, function):
        def step(*args):
            self.step()
            return function(*args)

        return step

    def step(self) -> None:
        self.taken += 1
        if self.taken == self.n:
            self.disturb()

    def _open(self, path, mode):
        self.step()
        file = open(path, mode)  # noqa: SIM115 (closed by _File)
        write = file.write

        def write_in_two_halves(data):
            write(data[: len(data) // 2])
            file.flush()
            self.step()
            write(data[len(data) // 2 :])

        return _File(file, write_in_two_halves)


class _File:
    """A file with another `write` (a real file's cannot be replaced)."""

    def __init__(self, file, write):
        self.file, self.write, self.flush, self.fileno = file, write, file.flush, file.fileno

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()


def count_steps(tmp_path: Path) -> int:
    with pytest.MonkeyPatch.context() as patches:
        steps = Steps(patches, 0, lambda: None)
        write_bank(tmp_path / "counted")
    return steps.taken


def finish(path: Path) -> EmbeddingBank:
    """What a user does after a failure: open the bank, or run the build again."""
    try:
        return EmbeddingBank.open(path)
    except BankError:
        return write_bank(path)


def test_a_full_disk_at_any_step_is_an_oserror_and_loses_nothing_but_the_shard(tmp_path):
    write_bank(tmp_path / "undisturbed")
    whole = files_of(tmp_path / "undisturbed")
    total = count_steps(tmp_path)
    # Open, write, fsync, rename, fsync of the folder for 4 shards and 5 manifests, and the parent.
    assert total == 46

    def disk_full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for n in range(1, total + 1):
        path = tmp_path / str(n)
        with pytest.MonkeyPatch.context() as patches:
            Steps(patches, n, disk_full)
            with pytest.raises(OSError, match="No space left"):
                write_bank(path)
        left = files_of(path)
        assert not any(name.startswith(".tmp-") for name in left), n
        assert files_of(finish(path).path) == whole, n


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_step_it_resumes_to_the_same_bytes(tmp_path):
    write_bank(tmp_path / "undisturbed")
    whole = files_of(tmp_path / "undisturbed")
    for n in range(1, count_steps(tmp_path) + 1):
        path = tmp_path / str(n)
        child = os.fork()
        if child == 0:
            Steps(pytest.MonkeyPatch(), n, lambda: os.kill(os.getpid(), signal.SIGKILL))
            try:
                write_bank(path)
            finally:
                os._exit(1)  # not reached: the step comes before the end
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert files_of(finish(path).path) == whole, n


class Stop(Exception):
    """Ends a block in the middle."""


def begin(path: Path, rows: int, **settings: Any) -> None:
    """Write the first rows of the sample, then leave the block by an exception."""
    ids, embeddings, labels = sample()
    with contextlib.suppress(Stop), BankWriter(path, DIM, **settings) as writer:
        writer.write(ids[:rows], embeddings[:rows], labels[:rows])
        raise Stop


def test_an_exception_in_the_block_leaves_a_bank_that_resumes(tmp_path):
    write_bank(tmp_path / "undisturbed")
    ids, embeddings, labels = sample()
    settings = {"class_names": ("ant", "bee", "cat"), "teacher": "t", "fingerprint": "f00d"}
    begin(tmp_path / "bank", 40, rows_per_shard=16, **settings)
    with pytest.raises(BankError, match="incomplete: 32 rows"):
        EmbeddingBank.open(tmp_path / "bank")
    # A caller may skip the stored rows itself.
    with BankWriter(tmp_path / "bank", DIM, rows_per_shard=16, **settings) as writer:
        done = writer.rows_done
        assert done == 32
        writer.write(ids[done:], embeddings[done:], labels[done:])
    assert files_of(tmp_path / "bank") == files_of(tmp_path / "undisturbed")


def test_rows_that_are_stored_are_passed_over_in_any_order(tmp_path):
    ids, embeddings, labels = sample()
    begin(tmp_path / "bank", 50, rows_per_shard=8)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    with BankWriter(tmp_path / "bank", DIM, rows_per_shard=8) as writer:
        assert writer.rows_done == 48
        writer.write(ids[order[:25]], embeddings[order[:25]], labels[order[:25]])
        with pytest.raises(BankError, match="duplicate"):  # by this writer
            writer.write(ids[order[:1]], embeddings[order[:1]])
        writer.write(ids[order[25:]], embeddings[order[25:]], labels[order[25:]])
    bank = EmbeddingBank.open(tmp_path / "bank")
    assert len(bank) == 50
    assert torch.equal(bank.rows(ids), embeddings.half())
    assert torch.equal(bank.labels[bank.positions(ids)], labels)


def test_a_bank_that_only_lacks_its_end_is_completed(tmp_path):
    begin(tmp_path / "bank", 32, rows_per_shard=16)
    with BankWriter(tmp_path / "bank", DIM, rows_per_shard=16, rows=32):
        pass
    assert len(EmbeddingBank.open(tmp_path / "bank")) == 32


def test_a_bank_is_not_completed_with_a_part_of_its_rows(tmp_path):
    path = tmp_path / "bank"
    ids, embeddings, labels = sample()
    begin(path, 32, rows_per_shard=16)
    before = files_of(path)
    with (
        pytest.raises(BankError, match=r"32 rows and nothing was written.*rows=32"),
        BankWriter(path, DIM, rows_per_shard=16),
    ):
        pass
    with (
        pytest.raises(BankError, match="has 40 rows, expected rows=50"),
        BankWriter(path, DIM, rows_per_shard=16, rows=50) as writer,
    ):
        writer.write(ids[:40], embeddings[:40], labels[:40])
    assert files_of(path) == before
    with BankWriter(path, DIM, rows_per_shard=16, rows=50) as writer:
        writer.write(ids, embeddings, labels)
    assert len(EmbeddingBank.open(path)) == 50


def test_rows_that_differ_from_the_stored_ones_are_refused(tmp_path):
    path = tmp_path / "bank"
    ids, embeddings, labels = sample()
    begin(path, 32, rows_per_shard=16)
    other, relabelled = embeddings.clone(), labels.clone()
    other[20] *= 1.02
    relabelled[21] += 1
    with contextlib.suppress(Stop), BankWriter(path, DIM, rows_per_shard=16) as writer:
        for batch, says in (
            ((ids, other, labels), rf"sample_id {int(ids[20])} .*another embedding"),
            ((ids, embeddings, relabelled), rf"sample_id {int(ids[21])} .*another label"),
            ((ids, embeddings), "another label"),
        ):
            with pytest.raises(BankError, match=f"{says}.*another path, or delete"):
                writer.write(*batch)
        raise Stop
    rounded = embeddings * (1 + 2**-9)  # as another batch size might round
    with BankWriter(path, DIM, rows_per_shard=16) as writer:
        writer.write(ids, rounded, labels)
    bank = EmbeddingBank.open(path)
    assert torch.equal(bank.rows(ids[:32]), embeddings[:32].half())
    assert torch.equal(bank.rows(ids[32:]), rounded[32:].half())


def test_settings_may_change_while_nothing_is_stored(tmp_path):
    begin(tmp_path / "bank", 3, rows_per_shard=16, teacher="wrong")
    (tmp_path / "bank" / "notes.txt").write_text("mine")
    with BankWriter(tmp_path / "bank", DIM, teacher="right") as writer:
        writer.write(*sample())
    bank = EmbeddingBank.open(tmp_path / "bank")
    assert bank.meta["teacher"] == {"name": "right"}
    assert len(bank) == 50


def test_a_complete_bank_is_told_from_one_with_other_settings_or_rows(tmp_path):
    path = tmp_path / "bank"
    assert not BankWriter(path, DIM).is_complete()
    begin(path, 32, rows_per_shard=16)
    assert not BankWriter(path, DIM, rows_per_shard=16).is_complete()
    with BankWriter(path, DIM, rows_per_shard=16) as writer:
        writer.write(*sample())
    assert BankWriter(path, DIM, rows_per_shard=16, rows=50).is_complete()
    with pytest.raises(BankError, match=r"complete bank of 50 rows.*rows_per_shard: 16, now 8"):
        BankWriter(path, DIM, rows_per_shard=8).is_complete()
    with pytest.raises(BankError, match="has 50 rows, expected rows=60"):
        BankWriter(path, DIM, rows_per_shard=16, rows=60).is_complete()
    with (
        pytest.raises(BankError, match="already holds a complete bank"),
        BankWriter(path, DIM, rows_per_shard=16),
    ):
        pass


def test_leftovers_are_removed_and_foreign_files_are_not(tmp_path):
    path = tmp_path / "bank"
    begin(path, 20, rows_per_shard=16)
    for name in (".tmp-shard-00001.safetensors", ".tmp-manifest.json", "shard-00001.safetensors"):
        (path / name).write_bytes(b"half a file")
    (path / "notes.txt").write_text("mine")
    with BankWriter(path, DIM, rows_per_shard=16) as writer:
        assert sorted(files_of(path)) == ["manifest.json", "notes.txt", "shard-00000.safetensors"]
        writer.write(*sample())
    assert len(EmbeddingBank.open(path)) == 50


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("teacher", "another"),
        ("preprocessing", {"mean": 0.5}),
        ("fingerprint", "beef"),
        ("dataset", "other"),
        ("class_names", ["ant", "bee", "dog"]),
        ("normalize", True),
        ("rows_per_shard", 8),
    ],
)
def test_other_settings_than_those_of_the_bank_are_named(tmp_path, field, value):
    path = tmp_path / "bank"
    settings = {"class_names": ["ant", "bee", "cat"], "teacher": "t", "fingerprint": "f00d"}
    settings["rows_per_shard"] = 16
    begin(path, 50, **settings)
    before = files_of(path)
    name = {"normalize": "normalized"}.get(field, field)
    with (
        pytest.raises(BankError, match=f"other settings: {name}: .*, now .*"),
        BankWriter(path, DIM, **(settings | {field: value})),
    ):
        pass
    with pytest.raises(BankError, match="dim: 8, now 9"), BankWriter(path, 9, **settings):
        pass
    assert files_of(path) == before


def test_a_damaged_shard_is_found_before_the_build_goes_on(tmp_path):
    path = tmp_path / "bank"
    begin(path, 50, rows_per_shard=16)
    flip_bit(path / "shard-00001.safetensors", -1)
    with (
        pytest.raises(BankError, match=r"shard-00001.*rows 16 to 31.*xxh3"),
        BankWriter(path, DIM, rows_per_shard=16),
    ):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_an_oserror(tmp_path):
    (tmp_path / "bank").mkdir(mode=0o500)
    with pytest.raises(PermissionError), BankWriter(tmp_path / "bank", DIM):
        pass


def test_a_writer_that_failed_may_be_entered_again(tmp_path, monkeypatch):
    writer = BankWriter(tmp_path / "bank", DIM, rows_per_shard=16)
    ids, embeddings, _ = sample()

    def disk_full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail_in_the_second_shard() -> None:
        with writer, monkeypatch.context() as patches:
            writer.write(ids[:20], embeddings[:20])
            patches.setattr(os, "fsync", disk_full)
            writer.write(ids[20:], embeddings[20:])

    with pytest.raises(OSError, match="No space left"):
        fail_in_the_second_shard()
    with writer:
        assert writer.rows_done == 16
        writer.write(ids, embeddings)
    assert torch.equal(EmbeddingBank.open(tmp_path / "bank").embeddings(), embeddings.half())
