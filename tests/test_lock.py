"""The lock file that stands in for flock where the file system has none."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ckd import _lock
from ckd.bank import BankError, BankWriter
from ckd.train.config import Config
from ckd.train.errors import TrainError
from ckd.train.run import run_folder
from tests.bank_tools import DIM, files_of, sample, write_bank


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def no_flock(request, monkeypatch):
    """A file system whose flock fails with one of these errors; nothing is waited for."""

    def flock(*_):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(_lock, "LOCK_PATIENCE_S", 0.0)


def dead_process() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leave_lock(folder: Path, process: int, machine: str | None = None) -> Path:
    file = folder / _lock.LOCK_FILE
    file.write_text(f"process {process} on {machine or _lock._machine()}")
    return file


def test_a_bank_without_flock_has_one_writer_and_the_same_files(tmp_path, no_flock):
    ids, embeddings, _ = sample()
    with BankWriter(tmp_path / "bank", DIM) as writer:
        holder = rf"bank/\.ckd-lock, of process {os.getpid()} on .* delete the files \.ckd-lock\*"
        with pytest.raises(BankError, match=holder), BankWriter(tmp_path / "bank", DIM):
            pass
        writer.write(ids, embeddings)
    assert sorted(files_of(tmp_path / "bank")) == ["manifest.json", "shard-00000.safetensors"]


def test_a_run_folder_without_flock_has_one_trainer(tmp_path, no_flock):
    config = Config(method="plain", out=str(tmp_path))
    with (
        run_folder(config, resume=False),
        pytest.raises(TrainError, match=r"another process.*delete the files \.ckd-lock\*"),
        run_folder(config, resume=False),
    ):
        pass
    assert sorted(os.listdir(tmp_path)) == ["config.json"]


def test_the_lock_file_is_removed_after_an_exception_and_a_change_of_folder(
    tmp_path, no_flock, monkeypatch
):
    (tmp_path / "locked").mkdir()
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(KeyError), _lock.locked_folder("locked"):
        assert os.listdir(tmp_path / "locked") == [_lock.LOCK_FILE]
        monkeypatch.chdir("/")
        raise KeyError
    assert os.listdir(tmp_path / "locked") == []


def test_the_lock_of_a_process_that_died_on_this_machine_is_taken_over(tmp_path, no_flock):
    (tmp_path / "bank").mkdir()
    leave_lock(tmp_path / "bank", dead_process())
    assert len(write_bank(tmp_path / "bank")) == 50
    assert not [name for name in files_of(tmp_path / "bank") if name.startswith(".")]


@pytest.mark.parametrize(
    ("process", "machine"), [(1, None), (dead_process(), "another"), (os.getpid(), None)]
)
def test_a_lock_whose_process_may_live_is_kept(tmp_path, no_flock, process, machine):
    file = leave_lock(tmp_path, process, machine)
    before = file.read_text()
    with pytest.raises(BlockingIOError, match=before.partition("[")[0]):
        _lock.locked_folder(tmp_path).__enter__()
    assert file.read_text() == before


def test_a_lock_file_that_is_not_written_yet_is_kept(tmp_path, no_flock):
    (tmp_path / _lock.LOCK_FILE).touch()
    with pytest.raises(BlockingIOError, match="not written its name"):
        _lock.locked_folder(tmp_path).__enter__()
    assert os.listdir(tmp_path) == [_lock.LOCK_FILE]


def test_a_lock_that_another_process_took_over_first_is_kept(tmp_path, no_flock, monkeypatch):
    file = leave_lock(tmp_path, dead_process())
    owner_died = _lock._owner_died

    def slow(looked_at: Path) -> bool:
        died = owner_died(looked_at)
        leave_lock(tmp_path, os.getpid())  # by the faster process, after this look
        return died

    monkeypatch.setattr(_lock, "_owner_died", slow)
    with pytest.raises(BlockingIOError, match=f"process {os.getpid()}"):
        _lock.locked_folder(tmp_path).__enter__()
    assert os.listdir(tmp_path) == [file.name]


def test_two_processes_do_not_take_over_at_once(tmp_path, no_flock):
    file = leave_lock(tmp_path, dead_process())
    guard = tmp_path / f"{_lock.LOCK_FILE}.stale"
    guard.touch()  # by the process that is about to delete the lock
    with pytest.raises(BlockingIOError):
        _lock.locked_folder(tmp_path).__enter__()
    assert sorted(os.listdir(tmp_path)) == [file.name, guard.name]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_does_not_remove_its_parents_lock_file(tmp_path, no_flock):
    lock = _lock.locked_folder(tmp_path)
    with lock:
        child = os.fork()
        if child == 0:
            lock.gen.close()  # type: ignore[attr-defined]  # the end of the block, in the child
            os._exit(0)
        os.waitpid(child, 0)
        assert os.listdir(tmp_path) == [_lock.LOCK_FILE]
    assert os.listdir(tmp_path) == []


def test_another_error_of_flock_is_raised(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    descriptors = len(os.listdir("/dev/fd"))
    with pytest.raises(OSError, match="Input/output") as caught:
        _lock.locked_folder(tmp_path / "new" / "inner").__enter__()
    assert caught.value.filename == str(tmp_path / "new" / "inner")
    assert os.listdir(tmp_path) == []
    (tmp_path / "old").mkdir()
    with pytest.raises(OSError, match="Input/output"):
        BankWriter(tmp_path / "old", DIM).__enter__()
    assert os.listdir(tmp_path) == ["old"]
    assert len(os.listdir("/dev/fd")) == descriptors


def test_a_lock_file_that_is_a_fifo_is_not_waited_for(tmp_path, no_flock):
    os.mkfifo(tmp_path / _lock.LOCK_FILE)
    with pytest.raises(BlockingIOError, match=r"unknown process \(it is a FIFO"):
        _lock.locked_folder(tmp_path).__enter__()
