"""Teachers whose embeddings are not a function of the image are refused."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ckd import data
from ckd.bank.build import build_bank
from ckd.models import (
    Model,
    ModelError,
    ModelOutput,
    Resize,
    check_teacher,
    create,
    load,
    prepare,
    save,
)


class Teacher(Model):
    """Eight numbers of the image, spoilt by `fault`."""

    def __init__(self, fault) -> None:
        super().__init__(
            spec="mine",
            embedding_dim=8,
            num_classes=None,
            image_size=8,
            in_channels=1,
            mean=[0.5],
            std=[0.5],
        )
        self.linear, self.fault = nn.Linear(64, 8), fault

    def forward(self, images: Tensor) -> ModelOutput:
        return ModelOutput(self.fault(self.linear(images.flatten(1))), None)


FAULTS = [
    (lambda x: nn.functional.dropout(x, 0.1), "random part"),
    (lambda x: x + 0.1 * torch.randn_like(x), "random part"),
    (lambda x: nn.functional.batch_norm(x, None, None, training=True), "other images"),
    (lambda x: x - 0.2 * x.mean(dim=0), "other images"),
    (lambda x: x / x.std(), "other images"),
    (lambda x: x.cumsum(dim=0), "other images"),
]


@pytest.mark.parametrize(("fault", "reason"), FAULTS)
def test_an_embedding_that_is_not_the_images_alone_is_refused(fault, reason, tmp_path) -> None:
    with pytest.raises(ModelError, match=f"'mine' cannot be a teacher.*{reason}"):
        build_bank(data.load("digits"), Teacher(fault), tmp_path / "bank")
    assert not (tmp_path / "bank").exists()


def test_an_embedding_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ModelError, match="not finite"):
        check_teacher(Teacher(lambda x: x / 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_fault(dtype: torch.dtype, tmp_path: Path) -> None:
    dataset, teacher = data.load("digits"), Teacher(lambda x: x).to(dtype)
    bank = build_bank(dataset, teacher, tmp_path / "bank", progress=False)
    assert torch.equal(bank.sample_ids, dataset.sample_ids)


def test_a_saved_model_keeps_its_preprocessing(tmp_path: Path) -> None:
    model = create("vit:patch=4,width=16,layers=1,heads=2", num_classes=2, image_size=8)
    model.preprocess_with((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), Resize(10, True, "bilinear"), True)
    save(model, tmp_path / "m.safetensors", class_names=["a", "b"])
    loaded = load(tmp_path / "m.safetensors")
    assert asdict(loaded.resize) == asdict(model.resize)
    assert loaded.class_names == ("a", "b")
    images = torch.randint(0, 256, (2, 3, 20, 30), dtype=torch.uint8)
    assert torch.equal(prepare(loaded, images), prepare(model, images))
