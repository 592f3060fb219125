"""`--device`: one function for every command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ckd._device import pick_device
from ckd._errors import ConfigError
from ckd.bank.__main__ import main as bank_main
from ckd.train import train
from tests.train_runs import tiny_config


@pytest.mark.parametrize(("there", "picked"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_cuda_where_there_is_one(
    there: bool, picked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert pick_device("auto") == torch.device(picked)


def test_cpu_is_the_cpu() -> None:
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_that_is_not_here_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"^--device cuda cannot be used here: .*; try auto$"):
        pick_device("cuda")


@pytest.mark.parametrize(
    ("name", "reason"), [("meta", "Cannot copy out of meta tensor"), ("xla", "Could not run")]
)
def test_a_device_that_holds_no_values_is_refused_with_the_remedy(name: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        pick_device(name)
    message = str(caught.value)
    assert message.startswith(f"--device {name} cannot be used here: {reason}")
    assert message.endswith("; try auto")
    assert len(message) < 200  # torch's own error lists every kernel


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "CPU 0"])
def test_nonsense_names_what_is_taken(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        pick_device(name)
    assert str(caught.value) == f"--device must be auto, cpu, cuda, cuda:1, ..., got {name}"


def test_trainer_and_bank_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        train(tiny_config(tmp_path, device="meta"), verbose=False)
    argv = ["build", "--teacher", "vit", "--data", "digits", "--device", "meta"]
    assert bank_main([*argv, "--out", str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err == f"error: {caught.value}\n"
    assert not (tmp_path / "new").exists()
