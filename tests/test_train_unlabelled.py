"""Runs on data without labels, and with labels for some of the images."""

from __future__ import annotations

import json
import multiprocessing
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ckd import data, models
from ckd.data import DataError, MissingSplit
from ckd.models import parameter_count
from ckd.train import CheckpointError, Config, ConfigError, Interrupted, checkpoint, evaluate, train
from ckd.train import curves as curves_module
from ckd.train import loop as loop_module
from ckd.train.__main__ import main
from ckd.train.methods import method_class
from ckd.train.run import set_up
from ckd.train.stored import read_result
from tests.train_runs import outcome, resume_in_process, tiny_bank, tiny_config

pytestmark = pytest.mark.usefixtures("quick_runs")


def bare_config(folder: Path, keep: int = 0, test: bool = False, **settings: Any) -> Config:
    """A run like `tiny_config`, whose data are without labels but for the first `keep` images.

    test: with test images, labelled if `keep` is not 0. The bank is that of the labelled images,
    without a fingerprint.
    """
    config = tiny_config(folder)
    with np.load(config.data) as file:
        arrays = dict(file)
    labelled = data.load(config.data)
    labels = arrays.pop("train_labels")
    if keep:
        arrays["train_labels"] = np.where(np.arange(len(labels)) < keep, labels, -1)
    else:
        del arrays["class_names"], arrays["test_labels"]
    if not test:
        del arrays["test_images"]
        arrays.pop("test_labels", None)
    path = folder / "bare.npz"
    np.savez(path, **arrays)
    place = folder / "bare"
    if not place.exists():
        place.mkdir()
        tiny_bank(place, labelled, fingerprint=None)
    return replace(
        config, data=str(path), bank=str(place / "bank"), out=str(folder / "bare-run"), **settings
    )


def lines(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.folder / "metrics.jsonl").open()]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "teacher-kd", "amp": "bf16"},
        {"student": "resnet8", "ema": 0.5, "accumulate": 2},
        {"label_smoothing": 0.1, "clip_norm": 0.1, "amp": "fp16"},
    ],
    ids=lambda settings: settings.get("method", "embed-kd"),
)
def test_trains_without_labels_and_without_test_images(tmp_path, capsys, settings) -> None:
    config = bare_config(tmp_path, **settings)
    result = train(config)
    scores = ("test_accuracy", "test_loss", "best_test_accuracy", "best_epoch")
    assert {result[name] for name in scores} == {None}
    assert read_result(config.folder) == result
    for line in lines(config):
        assert (line["test_accuracy"], line["test_loss"]) == (None, None)
        weight, term = (2, "mse") if config.method == "embed-kd" else (0.5, "contrastive")
        assert line["loss"] == pytest.approx(weight * line[term], rel=1e-2)
    told = capsys.readouterr().out
    assert "0 of 90 training images are used with their labels" in told
    assert "the student has no class head" in told
    assert told.count("no test split: nothing is scored") == 1
    assert "epoch 2/2   loss" in told
    assert "test " not in told.partition("epoch 1")[2]
    student = models.load(config.folder)
    assert (student.num_classes, student.class_names) == (None, ())
    assert models.class_names(config.folder) == ()
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    output = student(models.prepare(student, images))
    assert output.logits is None
    assert output.embedding.shape == (2, student.embedding_dim)
    assert models.flops_per_image(student) > 0
    assert parameter_count(student) == result["parameters"]


def interrupt_in(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    original = loop_module.step_generator

    def step_generator(seed, step, device):
        if step in steps:
            steps.remove(step)
            signal.raise_signal(signal.SIGINT)
        return original(seed, step, device)

    monkeypatch.setattr(loop_module, "step_generator", step_generator)


@pytest.mark.parametrize("keep", [0, 10])
def test_interrupted_and_resumed_equals_undisturbed(tmp_path, monkeypatch, keep) -> None:
    config = bare_config(tmp_path, keep, test=keep > 0, label_fraction=0.5 if keep else 1.0)
    whole = replace(config, out=str(tmp_path / "whole"))
    train(whole, verbose=False)
    stops = {1, 8, 13}
    interrupt_in(monkeypatch, set(stops))
    for count in range(len(stops) + 1):
        try:
            train(config, resume=count > 0, verbose=False)
            break
        except Interrupted:
            pass
    assert count == len(stops)
    assert outcome(config.folder) == outcome(whole.folder)


def test_killed_and_resumed_equals_undisturbed(tmp_path) -> None:
    config = bare_config(tmp_path, epochs=4, checkpoint_steps=1)
    whole = replace(config, out=str(tmp_path / "whole"))
    train(whole, verbose=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ckd.train", "torch._dynamo"])
    process = context.Process(target=resume_in_process, args=(config,))
    process.start()
    while process.is_alive() and checkpoint.latest(config.folder) is None:
        time.sleep(0.002)
    process.kill()
    process.join()
    train(config, resume=True, verbose=False)
    assert outcome(config.folder) == outcome(whole.folder)


def test_labels_for_some_train_a_class_head_that_is_scored(tmp_path) -> None:
    config = bare_config(tmp_path, keep=30, test=True, epochs=12, lr=1e-2, flip=False)
    result = train(config, verbose=False)
    assert result["test_accuracy"] > 0.6
    student = models.load(config.folder)
    assert student.class_names == tuple(f"class {c}" for c in range(3))


@pytest.mark.parametrize(
    ("settings", "used"),
    [
        ({}, "10"),
        ({"label_weight": 0.0}, "0"),
        ({"label_weight": 0.0, "targets": "centroids"}, "10"),
    ],
)
def test_it_is_said_how_many_labels_are_used(tmp_path, settings, used) -> None:
    config = bare_config(tmp_path, keep=10, test=True)
    config = replace(config, **settings)
    run = set_up(config, torch.device("cpu"), method_class(config))
    assert run.notes[0] == f"{used} of 90 training images are used with their labels"


def test_plain_takes_batches_without_a_label(tmp_path) -> None:
    config = bare_config(tmp_path, keep=3, test=True, method="plain")
    assert train(config, verbose=False)["test_accuracy"] is not None


def test_test_images_without_a_label_are_left_out(tmp_path) -> None:
    config = tiny_config(tmp_path)
    student = models.create(config.student, num_classes=3, image_size=8, in_channels=1).eval()
    whole = data.load(config.data, "test")
    keep = torch.tensor([1, 4, 7, 12])
    labels = torch.full((20,), -1)
    labels[keep] = whole.labels[keep]
    part = data.MemoryImages(whole.images[keep], whole.labels[keep], class_names=whole.class_names)
    device = torch.device("cpu")
    scores = evaluate(student, whole.with_labels(labels), batch_size=3, device=device)
    assert scores == evaluate(student, part, batch_size=3, device=device)
    assert scores.images == 4
    nothing = evaluate(student, whole.with_labels(labels * 0 - 1), batch_size=3, device=device)
    assert nothing == (None, None, 0, 0)


def test_the_label_fraction_is_part_of_the_run_and_0_is_training_without_labels(tmp_path) -> None:
    config = tiny_config(tmp_path, label_fraction=0.0)
    assert train(config, verbose=False)["test_accuracy"] is None
    bare = bare_config(tmp_path)
    train(bare, verbose=False)
    students = [(c.folder / "student.safetensors").read_bytes() for c in (config, bare)]
    assert students[0] == students[1]
    with pytest.raises(ConfigError, match=r"label_fraction was 0\.0, is 0\.5"):
        train(replace(config, label_fraction=0.5), resume=True)


def test_a_label_fraction_keeps_the_bank_of_all_images(tmp_path, capsys) -> None:
    config = tiny_config(tmp_path, label_fraction=0.1)  # its bank checks the fingerprint
    assert train(config)["test_accuracy"] is not None
    assert "9 of 90 training images are used with their labels" in capsys.readouterr().out
    assert lines(config)[-1]["cross_entropy"] > 0


def test_logit_kd_trains_the_class_head_without_labels(tmp_path) -> None:
    config = tiny_config(tmp_path, method="logit-kd", label_fraction=0.0)
    assert train(config, verbose=False)["test_accuracy"] is not None
    assert models.load(config.folder).num_classes == 3


def test_labelled_data_still_need_a_test_split(tmp_path) -> None:
    config = tiny_config(tmp_path)
    with np.load(config.data) as file:
        arrays = {name: file[name] for name in file if not name.startswith("test")}
    np.savez(config.data, **arrays)
    with pytest.raises(MissingSplit, match="no images of the test split"):
        train(config, verbose=False)


def test_a_test_split_that_appears_or_goes_is_refused_by_a_resume(tmp_path, monkeypatch) -> None:
    for before, after in ((False, True), (True, False)):
        config = replace(bare_config(tmp_path, test=before), out=str(tmp_path / f"run {before}"))
        interrupt_in(monkeypatch, {3})
        with pytest.raises(Interrupted):
            train(config, verbose=False)
        bare_config(tmp_path, test=after)
        with pytest.raises(CheckpointError, match=r"the test data is not .*None"):
            train(config, resume=True, verbose=False)


def test_test_images_without_any_label_are_pointed_out(tmp_path, capsys) -> None:
    config = tiny_config(tmp_path)
    with np.load(config.data) as file:
        arrays = dict(file)
    del arrays["test_labels"]
    np.savez(config.data, **arrays)
    assert train(config)["test_accuracy"] is None
    told = capsys.readouterr().out
    assert "no test image has a label: there is no test accuracy" in told
    assert models.load(config.folder).num_classes == 3


def test_eval_says_why_there_is_no_accuracy(tmp_path, capsys) -> None:
    config = bare_config(tmp_path, epochs=1)
    train(config, verbose=False)
    assert main(["--eval", str(config.folder)]) == 2
    assert "no images of the test split" in capsys.readouterr().err
    labelled = str(tmp_path / "tiny.npz")
    assert main(["--eval", str(config.folder), "--data", labelled]) == 2
    assert "has no class head, so it has no accuracy" in capsys.readouterr().err
    np.savez(tmp_path / "flat.npz", images=np.load(labelled)["train_images"])
    assert main(["--eval", config.teacher, "--data", str(tmp_path / "flat.npz")]) == 2
    assert "no image of flat (test) has a label" in capsys.readouterr().err


def test_a_damaged_image_folder_is_an_error_of_the_data_as_before(tmp_path) -> None:
    config = bare_config(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no class folders and no images"):
        train(replace(config, data=str(tmp_path / "empty")), verbose=False)


def test_curves_without_an_accuracy_draw_the_losses(tmp_path, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(curves_module, "save_figure", lambda figure, path: drawn.append(figure))
    record = {"epoch": 1, "loss": 1.0, "contrastive": 2.0, "cross_entropy": 0.0, "lr": 0.1}
    for accuracy, loss in ((None, None), (0.5, 1.0)):
        scores = {"test_accuracy": accuracy, "test_loss": loss}
        curves_module.draw_curves([{**record, **scores}] * 2, tmp_path / "a.png", "")
    assert [len(figure.axes) for figure in drawn] == [1, 2]
    assert [len(figure.axes[0].lines) for figure in drawn] == [3, 4]
    titles = [[axes.get_title(loc="left").split()[0] for axes in figure.axes] for figure in drawn]
    assert titles == [["Loss,"], ["Loss,", "Test"]]
