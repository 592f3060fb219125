"""Checkpoints: complete or absent, verified when read, exact."""

from __future__ import annotations

import builtins
import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from ckd import _files
from ckd._json import sealed
from ckd.train import checkpoint
from ckd.train.checkpoint import CheckpointError
from tests.test_files import ODD_FILES, make_odd_file

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3), "c": torch.zeros(0)}


def save(run: Path, step: int, value: float = 0.0) -> Path:
    return checkpoint.save(run, step, {"x": torch.full((3,), value)}, {"value": value})


def test_gives_back_tensors_and_state(tmp_path):
    path = checkpoint.save(tmp_path, 7, TENSORS, {"epoch": 2, "sums": {"loss": 0.1 + 0.2}})
    loaded = checkpoint.load(path)
    assert path.name == "step-00000007"
    assert loaded.state == {"epoch": 2, "sums": {"loss": 0.1 + 0.2}}
    assert loaded.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(loaded.tensors[name], tensor)
        assert loaded.tensors[name].dtype == tensor.dtype


def test_same_content_gives_same_bytes(tmp_path):
    paths = [checkpoint.save(tmp_path / n, 1, TENSORS, {"k": [1, 2]}) for n in ("one", "two")]
    for name in (checkpoint.TENSORS, checkpoint.STATE):
        assert (paths[0] / name).read_bytes() == (paths[1] / name).read_bytes()


def test_tensors_that_share_memory_or_lie_across_it_are_saved(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    loaded = checkpoint.load(checkpoint.save(tmp_path, 1, {"a": base, "b": base.t()}, {}))
    assert torch.equal(loaded.tensors["b"], base.t())


def test_newest_is_kept_and_the_older_removed(tmp_path):
    save(tmp_path, 9)
    path = save(tmp_path, 10)
    assert checkpoint.latest(tmp_path) == path
    assert [p.name for p in (tmp_path / checkpoint.FOLDER).iterdir()] == ["step-00000010"]


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    save(tmp_path, 1)
    leftover = tmp_path / checkpoint.FOLDER / ".tmp-step-00000002"
    leftover.mkdir()
    (leftover / checkpoint.TENSORS).write_bytes(b"half")
    assert checkpoint.latest(tmp_path).name == "step-00000001"
    save(tmp_path, 3)
    assert not leftover.exists()


class Fault:
    """Injects an OSError `code` after `after` system calls, once or (`forever`) at all later ones.

    It counts the calls by which `_files` and `checkpoint` change the disk.
    """

    def __init__(self, after: int, code: int, forever: bool) -> None:
        self.left, self.code, self.forever, self.fired = after, code, forever, False

    def wrap(self, function):
        def faulty(*args, **kwargs):
            self.left -= 1
            if self.left == -1 or (self.left < 0 and self.forever):
                self.fired = True
                raise OSError(self.code, os.strerror(self.code))
            return function(*args, **kwargs)

        return faulty

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in ("mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir", "remove"):
            patch.setattr(os, name, self.wrap(getattr(os, name)))

        def opened(*args, **kwargs):
            file = self.wrap(builtins.open)(*args, **kwargs)
            return _FaultyFile(file, self)

        patch.setattr(_files, "open", opened, raising=False)


class _FaultyFile:
    def __init__(self, file, fault: Fault) -> None:
        self.file = file
        self.write, self.flush = fault.wrap(file.write), fault.wrap(file.flush)
        self.fileno = file.fileno

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()


@pytest.mark.parametrize("forever", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES], ids=["disk full", "permission"])
def test_a_fault_at_any_system_call_leaves_an_intact_checkpoint(tmp_path, code, forever):
    finished = 0
    for after in range(100):
        run = tmp_path / str(after)
        save(run, 1, value=1.0)
        fault = Fault(after, code, forever)
        with pytest.MonkeyPatch.context() as patch:
            fault.install(patch)
            message = None
            try:
                save(run, 2, value=2.0)
            except CheckpointError as error:
                message = str(error)
        words = (os.strerror(code), "step-00000002", "step-00000001 is intact")
        assert message is None or all(word in message for word in words)
        found = checkpoint.load(checkpoint.latest(run))
        assert found.state["value"] in (1.0, 2.0)
        assert torch.equal(found.tensors["x"], torch.full((3,), found.state["value"]))
        assert message or found.state["value"] == 2.0
        # and the next save works
        save(run, 3, value=3.0)
        assert [p.name for p in (run / checkpoint.FOLDER).iterdir()] == ["step-00000003"]
        if not fault.fired:
            finished = after
            break
    assert finished > 10  # every call of a whole save has failed once


def test_a_file_where_the_folder_should_be_is_a_clear_error(tmp_path):
    (tmp_path / checkpoint.FOLDER).write_text("")
    with pytest.raises(CheckpointError, match=r"cannot save the checkpoint .*no older one"):
        save(tmp_path, 1)


@pytest.mark.parametrize("name", [checkpoint.TENSORS, checkpoint.STATE])
@pytest.mark.parametrize("damage", ["flip", "truncate", "append", "delete", "empty"])
def test_any_damage_is_an_error_that_names_the_file(tmp_path, name, damage):
    path = checkpoint.save(tmp_path, 1, TENSORS, {"epoch": 3})
    file, data = path / name, (path / name).read_bytes()
    if damage == "delete":
        file.unlink()
    else:
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 4
        file.write_bytes(
            {"flip": flipped, "truncate": data[:-9], "append": data + b"{}", "empty": b""}[damage]
        )
    with pytest.raises(CheckpointError, match=name if damage != "delete" else str(path)):
        checkpoint.load(path)


def test_every_flipped_bit_of_the_state_is_noticed(tmp_path):
    path = checkpoint.save(tmp_path, 1, TENSORS, {"epoch": 3, "lr": 0.25})
    file, original = path / checkpoint.STATE, (path / checkpoint.STATE).read_bytes()
    for position in range(len(original)):
        changed = bytearray(original)
        changed[position] ^= 1
        file.write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"state\.json"):
            checkpoint.load(path)


def test_a_newer_format_is_refused(tmp_path):
    path = save(tmp_path, 1)
    file = path / checkpoint.STATE
    file.write_text(file.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(CheckpointError, match="format 3, this version of ckd reads 2"):
        checkpoint.load(path)


def trained(seed: int, steps: int) -> tuple[dict[str, nn.Module], torch.optim.Optimizer]:
    torch.manual_seed(seed)
    modules = {
        "student": nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)),
        "method": nn.Linear(3, 2),
    }
    parameters = [p for module in modules.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(
        [{"params": parameters[1:]}, {"params": parameters[:1], "weight_decay": 0.0}], lr=0.1
    )
    for step in range(steps):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        modules["method"](modules["student"](x)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return modules, optimizer


@pytest.mark.parametrize("steps", [0, 3])
def test_unpack_restores_modules_and_optimizer_exactly(tmp_path, steps):
    modules, optimizer = trained(0, steps)
    packed = checkpoint.pack(modules, optimizer)
    loaded = checkpoint.load(checkpoint.save(tmp_path, steps, packed, {}))
    others, other_optimizer = trained(1, 0)
    checkpoint.unpack(loaded, others, other_optimizer)
    restored = checkpoint.pack(others, other_optimizer)
    assert restored.keys() == packed.keys()
    assert all(torch.equal(restored[name], packed[name]) for name in packed)
    assert any("exp_avg_sq" in name for name in packed) == (steps > 0)
    assert [g["weight_decay"] for g in other_optimizer.param_groups] == [0.01, 0.0]


def test_a_checkpoint_of_another_student_is_refused(tmp_path):
    modules, optimizer = trained(0, 1)
    loaded = checkpoint.load(checkpoint.save(tmp_path, 1, checkpoint.pack(modules, optimizer), {}))
    modules["student"] = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    with pytest.raises(CheckpointError, match=r"does not fit the student[\s\S]*0.weight"):
        checkpoint.unpack(loaded, modules, optimizer)


def test_unwritable_leftovers_do_no_harm(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # removes nothing
    save(tmp_path, 2, value=2.0)
    assert checkpoint.load(checkpoint.latest(tmp_path)).state["value"] == 2.0


def test_a_kill_while_the_older_one_is_removed_leaves_no_half(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def killed(path, **_):
        (Path(path) / checkpoint.TENSORS).unlink(missing_ok=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **how: os.path.exists(path) and killed(path))
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2, value=2.0)
    folder = tmp_path / checkpoint.FOLDER
    assert sorted(p.name for p in folder.iterdir()) == [".tmp-step-00000001", "step-00000002"]
    shutil.rmtree(folder / "step-00000002")  # as the error of a damaged checkpoint advises
    assert checkpoint.latest(tmp_path) is None
    checkpoint.sweep(tmp_path)
    assert not list(folder.iterdir())


def test_checkpoints_are_ordered_by_step_and_other_names_passed_over(tmp_path):
    save(tmp_path, 99_999_999)
    newest = save(tmp_path, 100_000_000)
    for name in ("step-", "step-x", "step-00000001.bak"):
        (newest.parent / name).mkdir()
    (newest.parent / "step-00000001").touch()
    assert checkpoint.latest(tmp_path) == newest
    (newest.parent / "step-00000002").symlink_to(newest)
    with pytest.raises(CheckpointError, match="step-00000002 is a symbolic link"):
        checkpoint.latest(tmp_path)


@pytest.mark.parametrize("name", [checkpoint.TENSORS, checkpoint.STATE])
@pytest.mark.parametrize("kind", ODD_FILES)
def test_only_regular_files_are_read(tmp_path, name, kind):
    path = save(tmp_path, 1)
    (path / name).unlink()
    make_odd_file(kind, path / name)
    with pytest.raises(CheckpointError, match=rf"{name}.*(regular file|symbolic link)"):
        checkpoint.load(path)


@pytest.mark.parametrize("change", [{"state": []}, {"step": None}, {"extra": 1}, {"format": "2"}])
def test_values_of_another_kind_are_errors(tmp_path, change):
    path = save(tmp_path, 1)
    content = json.loads((path / checkpoint.STATE).read_text())
    del content["checksum"]
    (path / checkpoint.STATE).write_bytes(sealed({**content, **change}))
    with pytest.raises(CheckpointError, match=r"state\.json"):
        checkpoint.load(path)


@pytest.mark.parametrize("change", ["shape", "missing", "step"])
def test_an_optimizer_state_of_another_shape_is_refused(tmp_path, change):
    modules, optimizer = trained(0, 1)
    packed = checkpoint.pack(modules, optimizer)
    if change == "shape":
        packed["optimizer.method.bias.exp_avg"] = torch.zeros(3, 3)
    elif change == "missing":
        del packed["optimizer.method.bias.exp_avg"]
    else:
        packed["optimizer.method.bias.step"] = torch.zeros(2)
    loaded = checkpoint.load(checkpoint.save(tmp_path, 1, packed, {}))
    with pytest.raises(CheckpointError, match="does not fit the optimizer"):
        checkpoint.unpack(loaded, modules, optimizer)


def test_checkpoints_that_cannot_be_listed_are_not_taken_for_none(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def refused(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "scandir", refused)
    for use in (lambda: checkpoint.latest(tmp_path), lambda: save(tmp_path, 2)):
        with pytest.raises(CheckpointError, match="checkpoint cannot be listed: Permission denied"):
            use()


def test_a_step_saved_again_removes_the_older_ones_too(tmp_path, monkeypatch):
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sweep", lambda run: None)  # killed before it
        save(tmp_path, 2)
    save(tmp_path, 2)
    assert [p.name for p in (tmp_path / checkpoint.FOLDER).iterdir()] == ["step-00000002"]
