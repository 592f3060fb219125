"""The first lines of a run, how many images an accuracy counts, and what result.json says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ckd
from ckd import backends
from ckd.backends import native
from ckd.data import load
from ckd.neighbours import build_neighbours
from ckd.train import Config, train
from ckd.train.report import accuracy_words, peak_mib, read_result, result_words, sealed
from tests.train_runs import tiny_bank, tiny_config

pytestmark = pytest.mark.usefixtures("quick_runs")


def told(config: Config, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What the first lines of a run say, by their first word."""
    train(config)
    out = capsys.readouterr().out
    lines = out[: out.index("epoch ")].splitlines()
    return {line[:9].rstrip(): line[10:] for line in lines}


def flat_data(folder: Path, count: int = 120) -> Path:
    """Images without splits, of which ckd holds out a tenth."""
    rng = np.random.default_rng(0)
    path = folder / "flat.npz"
    images = rng.integers(0, 256, (count, 8, 8), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(count) % 3)
    return path


def test_images_student_loss_bank_and_device_are_named(tmp_path: Path, capsys: Any) -> None:
    config = tiny_config(tmp_path, epochs=1, label_smoothing=0.1)
    lines = told(config, capsys)
    assert lines["data"] == f"{config.data}: 90 training images, 20 test images"
    result = read_result(config.folder)
    assert lines["student"] == f"{config.student}, {result['parameters']:,} parameters"
    assert lines["loss"] == "embed-kd: 1 cross_entropy + 2 mse"
    assert lines["bank"] == f"{tmp_path / 'bank'}: 90 x 12 float16"
    assert lines["device"].startswith("cpu (")
    assert lines["device"].endswith("), 1 CPU thread")
    assert "backend" not in lines  # mse is plain torch
    assert result["backend"] is None


def test_how_many_images_were_held_out_is_told_and_stored(tmp_path: Path, capsys: Any) -> None:
    path = flat_data(tmp_path)
    test = len(load(path, "test"))
    config = tiny_config(tmp_path, method="plain", data=str(path), epochs=1)
    assert told(config, capsys)["data"] == (
        f"{path}: {120 - test} training images, {test} test images (held out by ckd: {test} of "
        "120, since the data have no test split)"
    )
    result = read_result(config.folder)
    assert (result["train_images"], result["test_images"]) == (120 - test, test)
    assert result["held_out"] is True
    assert result["test_correct"] / test == result["test_accuracy"]
    whole = tiny_config(tmp_path, method="plain", epochs=1, out=str(tmp_path / "whole"))
    assert train(whole, verbose=False)["held_out"] is False


@pytest.mark.parametrize(
    ("settings", "term"),
    [
        ({"distill": "contrastive"}, "contrastive"),
        ({"targets": "centroids"}, "contrastive"),
        ({"distill": "contrastive,mse"}, "contrastive"),
        ({"method": "teacher-kd"}, "contrastive"),
        ({"distill": "soft,mse"}, "soft"),
        ({"distill": "contrastive,soft", "amp": "bf16"}, "contrastive, soft"),
    ],
)
def test_the_backend_of_an_op_is_named_with_the_reason_against_others(
    tmp_path: Path, capsys: Any, settings: dict[str, Any], term: str
) -> None:
    if native.missing is not None:
        pytest.skip(native.missing)
    config = tiny_config(tmp_path, epochs=1, **settings)
    if "soft" in term:
        build_neighbours(config.bank[0], k=3, progress=False)
    words = told(config, capsys)["backend"]
    assert words.startswith("cpu (not triton: ")
    assert "; not cuda: " in words
    assert words.endswith(f") for {term}")
    assert read_result(config.folder)["backend"] == "cpu"


def test_the_reference_for_want_of_a_build_is_a_warning_with_the_remedy(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
    capsys: Any,
) -> None:
    train(tiny_config(tmp_path, epochs=1, out=str(tmp_path / "mse")), verbose=False)
    config = tiny_config(tmp_path, epochs=1, distill="contrastive")
    monkeypatch.setattr(native, "missing", "ckd._C is not installed (why); and how")
    monkeypatch.setattr(native, "_warned", False)
    backends.set_cache_limit(backends.cache_limit())  # no cached plan
    assert not recwarn
    with pytest.warns(RuntimeWarning, match="without its compiled kernels") as caught:
        assert train(config)["backend"] == "reference"
    (message,) = {str(one.message) for one in caught}
    assert message.endswith("ckd._C is not installed (why); and how")
    assert "not cpu: ckd._C is not installed (why)) for contrastive" in capsys.readouterr().out


def test_each_bank_is_named_with_its_teacher_and_cannot_command_the_terminal(
    tmp_path: Path, capsys: Any
) -> None:
    config = tiny_config(tmp_path, epochs=1)
    (tmp_path / "two").mkdir()
    other = tiny_bank(tmp_path / "two", load(config.data), dim=16, teacher="evil\x1b[2J")
    config = tiny_config(tmp_path, epochs=1, bank=(*config.bank, str(other)), bank_weights=(1, 3))
    lines = told(config, capsys)
    assert lines["loss"] == "embed-kd: 1 cross_entropy + 2 mse_1 + 6 mse_2"
    assert lines["bank 1"].startswith(f"{tmp_path / 'bank'}: 90 x 12 float16")
    assert lines["bank 2"] == rf"{other}: 90 x 16 float16 of evil\x1b[2J"


def test_a_resumed_run_says_from_where(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, epochs=2)
    train(config, verbose=False)
    (config.folder / "student.safetensors").unlink()
    train(config, resume=True)
    assert "resumed   after step 14" in capsys.readouterr().out


def test_without_a_score_nothing_is_counted(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, epochs=1, label_fraction=0.0)
    result = train(config, verbose=False)
    assert (result["test_images"], result["test_correct"]) == (0, None)
    assert read_result(config.folder) == result
    assert result_words(result) == "no test accuracy"


def test_a_result_of_version_0_1_is_read(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, epochs=1)
    result = train(config, verbose=False)
    new = ("train_images", "test_images", "test_correct", "held_out", "backend")
    old = {name: value for name, value in result.items() if name not in new}
    (config.folder / "result.json").write_bytes(sealed(old))
    assert read_result(config.folder) == old
    assert result_words(old) == f"test accuracy {100 * old['test_accuracy']:.2f} %"


@pytest.mark.parametrize(
    ("name", "value"),
    [("held_out", 1.5), ("test_images", "46"), ("test_correct", 0.5), ("backend", 3)],
)
def test_a_result_of_another_type_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    config = tiny_config(tmp_path, epochs=1)
    result = train(config, verbose=False)
    (config.folder / "result.json").write_bytes(sealed({**result, name: value}))
    with pytest.raises(ckd.CkdError, match=name):
        read_result(config.folder)


def test_words_for_an_accuracy() -> None:
    assert accuracy_words(14 / 46, 14, 46) == "30.43 % (14 of 46 images)"
    assert accuracy_words(1.0, 12_000, 12_000) == "100.00 % (12,000 of 12,000 images)"
    assert accuracy_words(0.5) == "50.00 %"


def test_peak_memory_has_one_definition(tmp_path: Path) -> None:
    result = train(tiny_config(tmp_path, epochs=1), verbose=False)
    assert peak_mib(result) == result["peak_rss_mib"] >= result["start_rss_mib"]
    assert peak_mib({"peak_cuda_mib": 7.0}) == 7.0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["peak_rss_mib"] == result["peak_rss_mib"]
