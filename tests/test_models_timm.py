from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ckd.models import ModelError, create, load, prepare, save, weights_hash

timm = pytest.importorskip("timm", exc_type=ImportError)


@pytest.mark.parametrize(
    ("name", "image_size", "in_channels"),
    [
        ("resnet10t", 32, 1),
        ("mobilenetv3_small_050", 32, 3),  # has a hidden layer between pooling and classifier
        ("vit_tiny_patch16_224", 32, 3),  # position embeddings fix its image size
        ("convnext_atto", None, None),
    ],
)
def test_logits_are_timms_own(name: str, image_size: int | None, in_channels: int | None) -> None:
    model = create(f"timm:{name}", num_classes=5, image_size=image_size, in_channels=in_channels)
    model.eval()
    assert model.image_size == (image_size or 224)
    images = torch.randint(0, 256, (2, model.in_channels, 20, 20), dtype=torch.uint8)
    x = prepare(model, images)
    embedding, logits = model(x)
    assert embedding.shape == (2, model.embedding_dim)
    torch.testing.assert_close(logits, model.embed.network(x))
    assert len(model.mean) == len(model.std) == model.in_channels


def test_without_classes_there_are_no_logits() -> None:
    model = create("timm:resnet10t", num_classes=None, image_size=32).eval()
    assert model.num_classes is None
    assert model(torch.zeros(1, 3, 32, 32)).logits is None


def test_saved_student_comes_back(tmp_path: Path) -> None:
    model = create("timm:resnet10t", num_classes=5, image_size=32, in_channels=1)
    save(model, tmp_path / "m.safetensors")
    assert weights_hash(load(tmp_path / "m.safetensors")) == weights_hash(model)


def test_unknown_name_lists_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"unknown timm model 'resnt18'.*nearest first: resnet18"):
        create("timm:resnt18", num_classes=5, image_size=32)


def test_several_classifiers_are_refused() -> None:
    with pytest.raises(ModelError, match="several classifiers"):
        create("timm:deit_tiny_distilled_patch16_224", num_classes=5, image_size=224)
