"""benchmarks/bench_trainer.py: the parts add up, both ways of loading make batches of one kind."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

import bench_trainer
from ckd import models
from training.tasks import Setting, write_images

TINY = "vit:width=16,layers=1,heads=2"


def setting(folder: Path) -> Setting:
    return Setting(str(folder), TINY, "resnet20", 16, 4, 2, 0.0, "off", False, 1, "cpu")


def test_parts_add_up_to_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_trainer, "BATCHES", 1)
    monkeypatch.setattr(bench_trainer, "TURNS", 1)
    monkeypatch.setattr(bench_trainer, "REST", 0.0)
    threads, out = torch.get_num_threads(), tmp_path / "result.json"
    options = ["--student", TINY, "--image-size", "16", "--batch-size", "4", "--steps", "2"]
    try:
        assert bench_trainer.main([*options, "--threads", "1", "--out", str(out)]) == 0
    finally:
        torch.set_num_threads(threads)
    record = json.loads(out.read_text())
    parts = record["step"]["parts"]
    assert set(parts) == {*bench_trainer.PARTS, "everything else"}
    assert min(parts.values()) > 0
    assert sum(parts.values()) == pytest.approx(record["step"]["mean"])
    assert set(record["loading"]) == {"trainer", "PIL, 2 workers"}
    shown = capsys.readouterr().out
    assert "| everything else |" in shown
    assert "| PIL, 2 workers |" in shown
    assert bench_trainer.main(["--show", str(out)]) == 0
    assert capsys.readouterr().out == shown


def test_backward_is_torchs_own_again_afterwards(tmp_path: Path) -> None:
    before = torch.Tensor.backward
    bench_trainer.measure_step(setting(tmp_path), "embed-kd")
    assert torch.Tensor.backward is before


def test_both_ways_make_the_same_kind_of_batch(tmp_path: Path) -> None:
    one = setting(tmp_path)
    write_images(one)
    student = models.create(TINY, num_classes=2, image_size=16, in_channels=3)
    for batches in (
        bench_trainer.trainer_batches(one.images, 4, student),
        bench_trainer.pil_batches(one.images, 4),
    ):
        for batch in islice(batches, 5):
            assert batch.dtype == torch.float32
            assert batch.shape == (4, 3, 16, 16)
            assert batch.min() < 0 < batch.max()


def test_bad_numbers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_trainer.main(["--steps", "0"])
    assert "--steps: expected at least 1, got 0" in capsys.readouterr().err
