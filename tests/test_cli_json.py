"""`--json` and `--quiet`: what commands print for other programs, and what they leave out."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ckd import cli
from ckd._json import document
from ckd.bank import BankWriter
from ckd.bank.__main__ import main as bank_main
from ckd.eval.report import FIGURES
from ckd.train import train
from tests.train_runs import tiny_config, tiny_teacher

DOCS = (Path(__file__).parents[1] / "docs" / "scripts.md").read_text()


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    with BankWriter(tmp_path / "bank", 4, teacher="t", class_names=["a\u202e", "ü"]) as writer:
        rows = torch.arange(20.0).reshape(5, 4)
        writer.write(torch.arange(5), rows, torch.tensor([0, 0, 1, 1, -1]))
    return tmp_path / "bank"


def printed(argv: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The one JSON document that this command prints."""
    capsys.readouterr()
    assert cli.main([*argv, "--json"]) == 0
    out, err = capsys.readouterr()
    assert out.isascii()
    assert out.count("\n{") == 0
    assert "\x1b" not in err
    return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def documented(command: str) -> set[str]:
    """The keys in the row of docs/scripts.md that begins with this command."""
    (row,) = (line for line in DOCS.splitlines() if re.match(rf"\|[^|]*`{command}`", line))
    keys = re.sub(r"\([^()]*\)", "", row.split("|")[2])
    return set(re.findall(r"`(\w+)`", keys))


def test_the_json_of_a_bank(bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = printed(["bank", "info", str(bank)], capsys)
    assert info.keys() == documented("bank info")
    assert (info["rows"], info["neighbours"]) == (5, None)
    assert [entry["name"] for entry in info["classes"]] == ["a\u202e", "ü"]

    verified = printed(["bank", "verify", str(bank)], capsys)
    assert verified.keys() == documented("bank verify")
    assert (verified["hashes"], verified["neighbours"]) == (["xxh3"], None)

    found = printed(["bank", "neighbours", str(bank), "--k", "2", "--device", "cpu"], capsys)
    assert found.keys() == documented("bank neighbours")
    assert (found["k"], found["rows"], found["path"]) == (2, 5, str(bank / "neighbours"))

    verified = printed(["bank", "verify", str(bank), "--full"], capsys)
    assert verified["hashes"] == ["xxh3", "sha256"]
    assert verified["neighbours"] == {"path": found["path"], "bytes": found["bytes"]}

    np.save(tmp_path / "rows.npy", np.eye(3, 4, dtype=np.float16))
    argv = ["bank", "build", "--from-npy", str(tmp_path / "rows.npy"), "--out"]
    built = printed([*argv, str(tmp_path / "other")], capsys)
    assert built == printed(["bank", "info", str(tmp_path / "other")], capsys)


def test_the_json_of_a_bank_of_images_has_its_notes_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["bank", "build", "--data", "digits", "--teacher", str(tiny_teacher(tmp_path))]
    argv += ["--device", "cpu", "--split", "test", "--out", str(tmp_path / "bank")]
    assert cli.main([*argv, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["rows"] > 0
    assert "rows x 24 float16 of digits (test)" in err
    assert cli.main([*argv, "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert (out.count("\n"), err) == (1, "")
    assert "is complete: " in out


@pytest.mark.usefixtures("quick_runs")
def test_the_json_of_an_evaluation_is_that_of_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, method="plain", epochs=1)
    train(config, verbose=False)
    file = tmp_path / "figures.json"
    argv = ["eval", str(config.folder), "--device", "cpu", "--out", str(file)]
    figures = printed(argv, capsys)
    assert figures.keys() == documented("eval")
    assert [figure["name"] for figure in figures["figures"]] == [*FIGURES]
    stored = json.loads(file.read_text())
    del stored["checksum"]
    assert figures == stored


def test_the_json_of_info(capsys: pytest.CaptureFixture[str]) -> None:
    info = printed(["info"], capsys)
    assert info.keys() == documented("info")
    assert info["auto"]["cpu"]["backend"] in info["backends"]
    assert info["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("command", ["info", "verify", "neighbours"])
def test_an_error_is_one_line_on_stderr_and_a_status_also_with_json(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bank_main([command, str(tmp_path / "nowhere"), "--json"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")


def test_the_picture_of_a_bank_is_noted_beside_the_json(
    bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    for flags, where in ([], "out"), (["--json"], "err"), (["--quiet"], ""):
        argv = ["bank", "info", str(bank), "--plot", str(tmp_path / "bank.png"), *flags]
        assert cli.main(argv) == 0
        streams = capsys.readouterr()
        noted = [name for name in ("out", "err") if "wrote " in getattr(streams, name)]
        assert noted == [where] * bool(where)


def test_a_document_has_null_for_what_json_lacks() -> None:
    values = {"a": math.nan, "b": [1.5, math.inf, {"c": (-math.inf, None, "NaN", True)}]}
    parsed = json.loads(document(values), parse_constant=pytest.fail)
    assert parsed == {"a": None, "b": [1.5, None, {"c": [None, None, "NaN", True]}]}


def test_the_json_of_runs_and_students(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quick_runs: None
) -> None:
    config = tiny_config(tmp_path, method="plain", bank=())
    argv = ["--data", config.data, "--student", config.student, "--method", "plain"]
    argv += ["--epochs", "1", "--device", "cpu", "--out", str(config.folder)]
    run = printed(["train", *argv], capsys)
    memory = {"peak_cuda_mib"}
    assert run.keys() | memory == documented("train") | {"run"}
    scores = printed(["train", "--eval", str(config.folder), "--device", "cpu"], capsys)
    assert scores.keys() == documented("train --eval")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    images = [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    assert cli.main(["predict", str(config.folder), *images, "--json", "--device", "cpu"]) == 2
    told = json.loads(capsys.readouterr().out)
    inner = {*told["predictions"][0], *told["failed"][0]}
    assert told.keys() | inner == documented("predict")
    argv = ["export", str(config.folder), "--out", str(tmp_path / "s.pt2")]
    assert printed(argv, capsys).keys() == documented("export")
