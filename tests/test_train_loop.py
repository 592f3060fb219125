"""The training loop: what a run computes, and the files it writes."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ckd import data, models
from ckd._device import pick_device
from ckd.models import ModelError
from ckd.train import Config, TrainError, checkpoint, evaluate, train
from ckd.train import loop as loop_module
from ckd.train.device import torch_state
from ckd.train.methods import METHODS, method_class
from ckd.train.run import run_folder, set_up
from ckd.train.stored import read_result
from tests.train_runs import tiny_config, tiny_data


@pytest.fixture(autouse=True)
def _one_thread():
    """Faster for tiny models on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_figures(monkeypatch):
    """Drawing takes longer than the run."""
    monkeypatch.setattr(loop_module, "draw_curves", lambda *args: None)


def weights(config: Config) -> torch.Tensor:
    """All parameters of the student that a run saved, in one vector."""
    student = models.load(config.folder)
    return torch.cat([p.flatten() for p in student.parameters()])


def test_leaves_the_files_that_are_promised(tmp_path):
    config = tiny_config(tmp_path)
    result = train(config, verbose=False)
    names = {path.name for path in config.folder.iterdir()}
    expected = {"config.json", "metrics.jsonl", "curves.png", "student.safetensors", "checkpoint"}
    assert names == expected | {"report.html", "result.json"}
    assert read_result(config.folder) == result
    lines = [json.loads(x) for x in (config.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert [line["step"] for line in lines] == [7, 14]
    for line in lines:
        assert line["loss"] == pytest.approx(line["cross_entropy"] + 2 * line["mse"])
        assert line["images_per_s"] == pytest.approx(90 / line["time_s"])
        assert line["peak_rss_mib"] >= line["start_rss_mib"] > 0
    assert result["test_accuracy"] == lines[-1]["test_accuracy"]
    assert (config.folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_learns(tmp_path, no_figures):
    result = train(tiny_config(tmp_path, epochs=12, lr=1e-2, flip=False), verbose=False)
    assert result["test_accuracy"] > 0.8


def test_matches_a_loop_written_out(tmp_path, no_figures):
    """The whole recipe for `plain`, without augmentation, in a dozen lines of eager torch."""
    config = tiny_config(tmp_path, method="plain", crop_padding=0, flip=False, lr=3e-3)
    train(config, verbose=False)

    dataset = data.load(config.data)
    torch.manual_seed(config.seed)
    student = models.create(config.student, num_classes=3, image_size=8, in_channels=1)
    # The trainer's memory format, for the same bits: AdamW divides gradients by their own size, so
    # that in those near zero other roundings would move the weights.
    student = student.to(memory_format=torch.channels_last)
    decay = [p for n, p in student.named_parameters() if p.ndim > 1 and n not in TOKENS]
    rest = [p for n, p in student.named_parameters() if p.ndim <= 1 or n in TOKENS]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, fused=True)
    step = 0
    for epoch in range(2):
        for rows in data.epoch_order(90, seed=0, epoch=epoch).split(14):
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * 0.5 * (1 + math.cos(math.pi * step / 14))
            images = dataset.images[rows].float() / 255
            logits = student((images - 0.5) / 0.5).logits
            optimizer.zero_grad()
            F.cross_entropy(logits, dataset.labels[rows]).backward()
            optimizer.step()
            step += 1
    expected = torch.cat([p.detach().flatten() for p in student.parameters()])
    assert torch.equal(weights(config), expected)


TOKENS = ("class_token", "position")


@pytest.mark.parametrize("accumulate", [2, 5, 100])
def test_accumulating_equals_one_large_batch(tmp_path, no_figures, accumulate):
    # 90 images in batches of 7, the last of 6. Of groups of 2, the last holds that batch alone; of
    # groups of 5, two full batches and that one; a group of 100 takes the epoch in one step.
    settings = {"method": "embed-kd", "crop_padding": 0, "flip": False}
    large = tiny_config(tmp_path, **settings, batch_size=7 * accumulate)
    small = replace(large, batch_size=7, accumulate=accumulate, out=str(tmp_path / "small"))
    train(large, verbose=False)
    train(small, verbose=False)
    assert_same_gradients(small, large)


def test_any_path_can_be_the_title_of_the_curves(tmp_path):
    config = tiny_config(tmp_path, method="plain", epochs=1)
    path = tmp_path / "a$x^$\udcff.npz"
    os.rename(config.data, path)
    train(replace(config, data=str(path)), verbose=False)
    assert (config.folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_last_image_left_over_joins_the_batch_before_it(tmp_path, no_figures):
    # 4 x 4 images end in a map of 1 x 1, so that batch normalisation refuses a batch of one.
    tiny_data(tmp_path, train=43, size=4)
    settings = {"method": "plain", "student": "resnet8:width=4", "epochs": 1}
    config = tiny_config(tmp_path, **settings)
    train(config, verbose=False)
    line = _last_line(config)
    assert (line["step"], line["lr"]) == (3, pytest.approx(1e-3 * 0.25))  # of three steps, not four
    student = models.load(config.folder)
    assert student.bn1.num_batches_tracked == 3


@pytest.mark.parametrize("count", [1, 6])
def test_batches_of_one_image_that_batch_norm_refuses_name_the_flag(tmp_path, no_figures, count):
    tiny_data(tmp_path, train=count, size=4, classes=1)
    settings = {"method": "plain", "student": "resnet8:width=4", "batch_size": 1}
    config = tiny_config(tmp_path, **settings)
    with pytest.raises(TrainError, match="one value per channel; pass a --batch-size"):
        train(config, verbose=False)


def test_a_short_last_batch_counts_by_its_images(tmp_path, no_figures):
    # Batches of 7 and groups of 2: the last group of an epoch is one batch of 6 images.
    settings = {"method": "plain", "crop_padding": 0, "flip": False, "epochs": 1}
    large = tiny_config(tmp_path, **settings, batch_size=14)
    small = replace(large, batch_size=7, accumulate=2, out=str(tmp_path / "small"))
    losses = [train(c, verbose=False) and _last_line(c)["loss"] for c in (large, small)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert_same_gradients(small, large)


def assert_same_gradients(one: Config, other: Config) -> None:
    """The same number of steps, and the same running mean of gradients (AdamW's first moment).

    Not the same weights: where a gradient is zero, such as that of the attention's key bias, AdamW
    makes full steps of its rounding error.
    """
    paths = [checkpoint.latest(config.folder) for config in (one, other)]
    assert paths[0].name == paths[1].name
    tensors = [checkpoint.load(path).tensors for path in paths]
    for name in tensors[0]:
        if name.endswith("exp_avg"):
            scale = tensors[1][name].abs().max().item()
            torch.testing.assert_close(
                tensors[0][name], tensors[1][name], rtol=1e-3, atol=1e-3 * scale + 1e-7
            )


def _last_line(config: Config) -> dict:
    return json.loads((config.folder / "metrics.jsonl").read_text().splitlines()[-1])


def test_the_average_of_the_weights_is_what_is_saved_and_scored(tmp_path, no_figures):
    config = tiny_config(tmp_path, epochs=1, ema=0.5, student="resnet8")
    train(config, verbose=False)
    tensors = checkpoint.load(checkpoint.latest(config.folder)).tensors
    saved = models.load(config.folder)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, tensors[f"ema.module.{name}"])
    assert not torch.equal(tensors["student.linear.weight"], tensors["ema.module.linear.weight"])
    scores = evaluate(
        saved, data.load(config.data, "test"), batch_size=8, device=pick_device("cpu")
    )
    assert scores.accuracy == _last_line(config)["test_accuracy"]


def test_a_small_norm_bound_holds_the_weights_back(tmp_path, no_figures):
    # AdamW's steps do not depend on the gradient's scale, so compare its first moment.
    moments = []
    for clip_norm in (0.0, 1e-3):
        config = tiny_config(
            tmp_path, epochs=1, clip_norm=clip_norm, out=str(tmp_path / f"{clip_norm}")
        )
        train(config, verbose=False)
        tensors = checkpoint.load(checkpoint.latest(config.folder)).tensors
        moments.append(max(v.norm() for k, v in tensors.items() if k.endswith("exp_avg")).item())
    assert moments[1] <= 1e-3 < moments[0]


def test_bf16_stays_close_to_float32_and_keeps_float32_weights(tmp_path, no_figures):
    plain = tiny_config(tmp_path, epochs=1)
    mixed = replace(plain, amp="bf16", out=str(tmp_path / "mixed"))
    train(plain, verbose=False)
    train(mixed, verbose=False)
    assert _last_line(mixed)["loss"] == pytest.approx(_last_line(plain)["loss"], rel=0.02)
    assert weights(mixed).dtype == torch.float32
    assert not torch.equal(weights(mixed), weights(plain))


def test_fp16_passes_over_steps_that_overflow_and_then_learns(tmp_path, no_figures):
    config = tiny_config(tmp_path, amp="fp16", epochs=4, lr=1e-2)
    train(config, verbose=False)
    saved = checkpoint.load(checkpoint.latest(config.folder))
    assert saved.state["scaler"]["scale"] < 2**16  # the initial scale
    lines = [json.loads(x) for x in (config.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert weights(config).dtype == torch.float32


class _Poisoned(METHODS["plain"]):
    """Gives a NaN term at its third batch."""

    def distill(self, output, batch, images):
        self.calls = getattr(self, "calls", 0) + 1
        value = float("nan") if self.calls == 3 else 0.0
        return {"poison": output.embedding.sum() * value}


def test_a_non_finite_term_stops_the_run_before_the_step(tmp_path, monkeypatch, no_figures):
    monkeypatch.setitem(METHODS, "plain", _Poisoned)
    config = tiny_config(tmp_path, method="plain", checkpoint_steps=1)
    with pytest.raises(TrainError, match=r"^poison is not finite at step 2 .*nonfinite\.json"):
        train(config, verbose=False)
    report = json.loads((config.folder / "nonfinite.json").read_text())
    assert report["terms"] == ["loss", "poison"]
    assert (report["step"], report["epoch"]) == (2, 1)
    order = data.epoch_order(90, seed=0, epoch=0)
    assert report["sample_ids"] == order[28:42].tolist()
    assert checkpoint.latest(config.folder).name == "step-00000002"


def test_a_non_finite_gradient_stops_the_run_before_the_step(tmp_path, monkeypatch, no_figures):
    class Steep(METHODS["plain"]):
        def distill(self, output, batch, images):
            # the loss is 0, its gradient infinite
            return {"steep": (output.embedding - output.embedding.detach()).abs().sum().sqrt()}

    monkeypatch.setitem(METHODS, "plain", Steep)
    config = tiny_config(tmp_path, method="plain")
    with pytest.raises(TrainError, match=r"gradient norm is not finite at step 0"):
        train(config, verbose=False)
    assert len(json.loads((config.folder / "nonfinite.json").read_text())["sample_ids"]) == 14


def test_training_time_leaves_out_evaluation_and_checkpoints(tmp_path, monkeypatch, no_figures):
    slow = [("evaluate", loop_module.evaluate), ("save", loop_module.save)]
    for name, function in slow:

        def slowly(*args, function=function, **kwargs):
            time.sleep(0.2)
            return function(*args, **kwargs)

        monkeypatch.setattr(loop_module, name, slowly)
    config = tiny_config(tmp_path, epochs=1, checkpoint_steps=3)
    began = time.monotonic()
    train(config, verbose=False)
    line = _last_line(config)
    assert line["eval_time_s"] >= 0.2
    assert line["time_s"] <= time.monotonic() - began - 0.8  # two saves within, one at the end


def test_all_weights_decay_under_paper_compat_only(tmp_path):
    for paper in (False, True):
        config = tiny_config(tmp_path, paper_compat=paper, out=str(tmp_path / f"paper {paper}"))
        with run_folder(config, resume=False), torch_state(config, torch.device("cpu")):
            run = set_up(config, torch.device("cpu"), method_class(config))
        decays = [group["weight_decay"] for group in run.optimizer.param_groups]
        assert decays == ([0.1] if paper else [0.1, 0.0])


def test_the_callers_random_state_and_switches_are_left_alone(tmp_path, no_figures):
    config = tiny_config(tmp_path, epochs=1, deterministic=True)
    before = torch.get_rng_state()
    train(config, verbose=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_seed_decides_everything(tmp_path, no_figures):
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = tiny_config(tmp_path, epochs=1, seed=seed, out=str(tmp_path / name))
        torch.manual_seed(len(found))
        train(config, verbose=False)
        found.append(weights(config))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_scores_agree_with_a_count_by_hand(tmp_path):
    torch.manual_seed(0)
    config = tiny_config(tmp_path)
    student = models.create(config.student, num_classes=3, image_size=8, in_channels=1).train()
    test_set = data.load(config.data, "test")
    scores = evaluate(student, test_set, batch_size=7, device=torch.device("cpu"))
    assert student.training
    with torch.no_grad():
        logits = student.eval()((test_set.images.float() / 255 - 0.5) / 0.5).logits
    assert scores.correct == (logits.argmax(1) == test_set.labels).sum().item()
    assert scores.images == 20
    assert scores.accuracy == scores.correct / 20
    assert scores.loss == pytest.approx(F.cross_entropy(logits, test_set.labels).item(), rel=1e-5)


def test_a_run_that_failed_before_its_first_checkpoint_leaves_its_folder_free(tmp_path):
    config = tiny_config(tmp_path)
    with pytest.raises(ModelError):
        train(replace(config, student="vitt"), verbose=False)
    assert train(config, verbose=False)["student"] == config.student
