"""The exported student: its file holds the map that the run trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ckd
from ckd import data, models
from ckd.bank import EmbeddingBank
from ckd.neighbours import build_neighbours
from ckd.train import CheckpointError, Config, Interrupted, checkpoint, train
from tests.model_files import description
from tests.test_train_resume import check_resumes, interrupt_at
from tests.test_train_terms import bank_with_head
from tests.train_runs import tiny_config

pytestmark = pytest.mark.usefixtures("quick_runs")


def run(folder: Path, **settings: Any) -> Config:
    config = tiny_config(folder, **{"epochs": 1, **settings})
    train(config, verbose=False)
    return config


def tensors_of(config: Config) -> dict[str, torch.Tensor]:
    path = checkpoint.latest(config.folder)
    assert path is not None
    return checkpoint.load(path).tensors


def map_of(student: ckd.Student) -> dict[str, torch.Tensor]:
    return dict(student.teachers[0].state_dict())


HEADS = {"cosine": "linear", "mse": "mlp", "soft": "linear", "cosine,contrastive": "linear"}


@pytest.mark.parametrize("mix", HEADS)
def test_with_a_head_a_student_is_compared_with_rows_as_they_are(tmp_path: Path, mix: str) -> None:
    bank = bank_with_head(tmp_path)
    build_neighbours(bank, k=5, temperature=0.1, progress=False)
    config = run(tmp_path, bank=bank, distill=mix, head=HEADS[mix])
    student, tensors = ckd.load_student(config.folder), tensors_of(config)
    found = map_of(student)
    trained = {
        name.removeprefix("method."): tensor
        for name, tensor in tensors.items()
        if name.startswith("method.head.")
    }
    kept = {name: tensor for name, tensor in found.items() if name.startswith("head.")}
    assert kept.keys() == trained.keys()
    assert all(torch.equal(kept[name], trained[name]) for name in trained)
    assert {"weight", "bias"} <= found.keys() if "contrastive" in mix else "weight" not in found
    rows = EmbeddingBank.open(bank).embeddings()
    images = data.load(config.data).images[:5]
    embedding = student(student.preprocess(images))
    assert embedding.shape == (5, 12)
    assert torch.equal(student.comparable(rows), rows.float())
    # Rows of the bank are about 10 + 2 x; the head brings the student there.
    assert torch.nn.functional.cosine_similarity(embedding, rows[:5].float()).min() > 0.8


def test_contrastive_alone_keeps_its_projection(tmp_path: Path) -> None:
    config = run(tmp_path, distill="contrastive")
    student, tensors = ckd.load_student(config.folder), tensors_of(config)
    found = map_of(student)
    assert found.keys() == {"weight", "bias"}
    for name, tensor in found.items():
        assert torch.equal(tensor, tensors[f"method.contrastive.{name}"])
    bank = EmbeddingBank.open(*config.bank)
    assert student.comparable(bank.embeddings()).shape == (len(bank), student.model.embedding_dim)


@pytest.mark.parametrize(
    "settings",
    [{"method": "plain"}, {"method": "logit-kd"}, {"method": "teacher-kd"}, {"distill": "logits"}],
    ids=str,
)
def test_other_students_have_no_map(tmp_path: Path, settings: dict[str, Any]) -> None:
    bank = bank_with_head(tmp_path)
    config = run(tmp_path, **settings, bank=bank, ema=0.5)
    assert ckd.load_student(config.folder).teachers == ()
    assert "teachers" not in description(config.folder / "student.safetensors")
    assert not any(name.startswith("ema_maps") for name in tensors_of(config))


TEACHERS = (
    *(("my-clip", "my-clip"), ({"name": "x", "pool": "cls"}, "x"), (None, "")),
    *(({"pool": "cls"}, ""), ({"name": 3}, "")),
)


def test_the_teachers_name_is_that_of_the_bank(tmp_path: Path) -> None:
    for teacher, name in TEACHERS:
        folder = tmp_path / str(len([*tmp_path.iterdir()]))
        folder.mkdir()
        config = run(folder, bank=bank_with_head(folder, teacher=teacher))
        assert [one.name for one in ckd.load_student(config.folder).teachers] == [name]


def test_a_name_that_is_too_long_for_the_file_is_cut(tmp_path: Path) -> None:
    """A file refuses it, which must not happen after the training."""
    config = run(tmp_path, bank=bank_with_head(tmp_path, teacher="x" * 5000))
    assert [one.name for one in ckd.load_student(config.folder).teachers] == ["x" * 4096]


@pytest.mark.parametrize("mix", ["cosine", "contrastive"])
def test_the_average_is_that_of_the_student_and_of_its_map(tmp_path: Path, mix: str) -> None:
    config = run(tmp_path, ema=0.5, distill=mix)
    student, tensors = ckd.load_student(config.folder), tensors_of(config)
    for name, tensor in student.model.state_dict().items():
        assert torch.equal(tensor, tensors[f"ema.module.{name}"])
    live = {"cosine": "method.head.net.weight", "contrastive": "method.contrastive.weight"}[mix]
    name = {"cosine": "head.net.weight", "contrastive": "weight"}[mix]
    found = map_of(student)
    for key, tensor in found.items():
        assert torch.equal(tensor, tensors[f"ema_maps.module.0.{key}"])
    assert not torch.equal(found[name], tensors[live])
    torch.testing.assert_close(found[name], tensors[live], rtol=0.1, atol=0.02)  # but near
    if mix == "cosine":
        for key in ("mean", "sigma"):
            assert torch.equal(found[f"head.{key}"], tensors[f"method.head.{key}"])


AVERAGED = {
    "method.head.net.weight": "ema_maps.module.0.head.net.weight",
    "student.bn1.running_var": "ema.module.bn1.running_var",
}


def test_an_average_is_what_its_formula_says(tmp_path, monkeypatch) -> None:
    """After two steps: the first is copied, then decay * average + (1 - decay) * weights, or batch
    statistics."""
    config = tiny_config(
        tmp_path, student="resnet8:width=4", ema=0.75, distill="cosine", checkpoint_steps=1
    )
    interrupt_at(monkeypatch, {0, 1})
    seen = []
    for resume in (False, True):
        with pytest.raises(Interrupted):
            train(config, resume=resume, verbose=False)
        seen.append(tensors_of(config))
    for name, averaged in AVERAGED.items():
        first, second = (tensors[name].double() for tensors in seen)
        assert not torch.equal(first, second)
        average = seen[1][averaged].double()
        torch.testing.assert_close(average, 0.75 * first + 0.25 * second, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mix", ["cosine", "contrastive,mse"])
def test_a_resumed_run_with_an_average_exports_the_same_bytes(tmp_path, monkeypatch, mix) -> None:
    config = tiny_config(tmp_path, ema=0.9, distill=mix)
    check_resumes(config, monkeypatch, {1, 6})


def test_a_checkpoint_without_the_maps_average_is_refused(tmp_path, monkeypatch) -> None:
    config = tiny_config(tmp_path, ema=0.9)
    interrupt_at(monkeypatch, {3})
    with pytest.raises(Interrupted):
        train(config, verbose=False)
    path = checkpoint.latest(config.folder)
    assert path is not None
    saved = checkpoint.load(path)
    kept = {name: t for name, t in saved.tensors.items() if not name.startswith("ema_maps.")}
    checkpoint._remove(path)
    checkpoint.save(config.folder, saved.state["progress"]["step"], kept, saved.state)
    with pytest.raises(CheckpointError, match="does not fit the ema_maps"):
        train(config, resume=True, verbose=False)


def test_preprocess_fits_photos_as_the_data_does(tmp_path: Path) -> None:
    """A photo of a class folder, read by the data set, and the same given to the student."""
    rng, images = np.random.default_rng(0), tmp_path / "images"
    for number in range(24):
        folder = images / f"class {number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        smooth = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        photo = Image.fromarray(smooth).resize((40, 23) if number % 3 else (30, 60))
        photo.save(folder / f"{number}.png")
    config = tiny_config(
        tmp_path, method="plain", data=str(images), image_size=16, epochs=1, student="resnet8"
    )
    train(config, verbose=False)
    student = ckd.load_student(config.folder)
    dataset = data.load(config.data, image_size=16)
    batch = next(iter(dataset.batches(torch.arange(4), 4, torch.device("cpu"))))
    expected = models.prepare(student.model, batch.images)
    photos = [Image.open(path) for path in images.rglob("*.png")]
    found = (
        student.preprocess(photos),
        torch.cat([student.preprocess(_tensor(p)) for p in photos]),
    )
    for preprocessed in found:
        for image in expected:
            assert any(torch.equal(image, one) for one in preprocessed)


def _tensor(photo: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None]
