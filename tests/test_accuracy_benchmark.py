"""benchmarks/accuracy.py: trains what is missing, and prints mean and spread."""

from __future__ import annotations

from pathlib import Path

import pytest

import accuracy
from ckd import models


@pytest.mark.slow
def test_trains_every_setting_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    teacher = tmp_path / "teacher.safetensors"
    spec = "vit:width=16,layers=1,heads=2"
    models.save(models.create(spec, num_classes=10, image_size=8, in_channels=1), teacher)
    out = tmp_path / "runs"
    command = ["--data", "digits", "--teacher", spec, "--teacher-weights", str(teacher)]
    command += ["--student", spec, "--epochs", "1", "--seeds", "2", "--out", str(out)]
    command += ["--settings", "plain,centroids"]
    assert accuracy.main(command) == 0
    table = [line for line in capfd.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in table[2:]] == ["plain", "centroids"]
    assert [row.split("|")[4].strip() for row in table[2:]] == ["2", "2"]

    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("student.safetensors")}
    assert len(stamps) == 4
    assert accuracy.main(command) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    assert table == [line for line in capfd.readouterr().out.splitlines() if line.startswith("| ")]


def test_bad_settings_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        accuracy.main(
            ["--data", "a", "--teacher", "b", "--teacher-weights", "c", "--settings", "d"]
        )
    assert "'d' is none of plain, logit-kd" in capsys.readouterr().err
