"""The progress bars of banks and evaluations: on a terminal, for long work, removed at the end."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ckd import cli
from ckd._console import byte_bar, clock, console
from ckd.bank import BankWriter, EmbeddingBank
from ckd.train import train
from tests.train_runs import tiny_config

pytestmark = pytest.mark.usefixtures("terminal")


def bars(stderr: str) -> set[str]:
    """The names of the bars that were shown."""
    shown = re.split(r"[\r\n]|\x1b\[A", stderr)
    return {line.partition(":")[0].partition(" [")[0].strip() for line in shown} - {""}


def bank(path: Path, rows: int = 40) -> Path:
    with BankWriter(path, 8, class_names=["a", "b"], rows_per_shard=16) as writer:
        generator = torch.Generator().manual_seed(1)
        values = torch.randn(rows, 8, generator=generator)
        writer.write(torch.arange(rows), values, torch.arange(rows) % 2)
    return path


@pytest.mark.parametrize("argv", [["verify"], ["verify", "--full"], ["info"]], ids=" ".join)
def test_what_hashes_a_bank_shows_the_bytes(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bank", *argv, str(bank(tmp_path / "bank"))]) == 0
    err = capsys.readouterr().err
    assert bars(err) == {"checking the bank"}
    assert re.search(r"/\d\.\d\dkiB \[", err)


def test_a_bar_over_bytes_counts_all_that_is_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    make = byte_bar
    monkeypatch.setattr(
        "ckd.bank.shards.byte_bar", lambda *a, **k: made.append(make(*a, **k)) or made[-1]
    )
    opened = EmbeddingBank.open(bank(tmp_path / "bank"))
    counted: list[int] = []
    monkeypatch.setattr(made[-1].__class__, "update", lambda self, n=1: counted.append(n))
    EmbeddingBank.open(opened.path, verify="full")
    assert sum(counted) == made[-1].total == opened.nbytes
    counted.clear()
    EmbeddingBank.open(opened.path, verify="off")
    assert counted == []


def test_an_import_shows_what_it_hashes_and_stores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "rows.npy", np.ones((30, 4), np.float32))
    argv = ["bank", "build", "--from-npy", str(tmp_path / "rows.npy"), "--out"]
    assert cli.main([*argv, str(tmp_path / "bank")]) == 0
    assert bars(capsys.readouterr().err) == {"hashing the files", "embeddings", "checking the bank"}


@pytest.mark.parametrize("flag", ["--quiet", "--json"])
def test_quiet_shows_no_bar_and_json_does(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bank", "verify", flag, str(bank(tmp_path / "bank"))]) == 0
    assert bars(capsys.readouterr().err) == (set() if flag == "--quiet" else {"checking the bank"})


@pytest.mark.usefixtures("quick_runs")
def test_an_evaluation_shows_where_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, method="plain", epochs=1)
    train(config, verbose=False)
    capsys.readouterr()
    assert cli.main(["eval", str(config.folder), "--device", "cpu"]) == 0
    shown = capsys.readouterr().err
    for name in ("test images", "train images", "nearest rows", "linear probe"):
        assert re.search(rf"figure \d+ of 15: {name}: ", shown)
    assert "\\x1b" not in shown  # one bar at a time: the cursor never moves up


def test_a_clock_ticks_while_one_call_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with clock("thinking"):
        time.sleep(0.5)
    shown = capsys.readouterr().err
    assert shown.count("thinking [00:00]") >= 2
    assert shown.endswith("\r")  # and is removed
    with console(quiet=True), clock("silent"):
        time.sleep(0.3)
    assert "silent" not in capsys.readouterr().err


def test_an_error_passes_through_a_clock() -> None:
    with pytest.raises(KeyboardInterrupt), clock("work"):
        raise KeyboardInterrupt
