from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ckd.data import load as load_data
from ckd.models import create, load, parameter_count, prepare
from ckd.models.resnet import Block

SHARED = Path(__file__).parents[2] / "shared"


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (56, 853_018)])
def test_size_is_that_of_the_published_networks(depth: int, parameters: int) -> None:
    model = create(f"resnet{depth}", num_classes=10, image_size=32)
    assert parameter_count(model) == parameters
    assert model.embedding_dim == 64
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) + 1 == depth
    assert all(m.bias is None for m in convolutions)


def test_shapes_width_and_no_classifier() -> None:
    model = create("resnet8:width=4", num_classes=None, image_size=8, in_channels=1)
    embedding, logits = model(torch.randn(2, 1, 8, 8))
    assert embedding.shape == (2, 16)
    assert logits is None


def test_shortcut_drops_pixels_and_adds_zero_channels_on_both_sides() -> None:
    block = Block(4, 8, stride=2).eval()
    nn.init.zeros_(block.bn2.weight)  # leaves the shortcut alone
    x = torch.rand(2, 4, 6, 6)
    out = block(x)
    assert out.shape == (2, 8, 3, 3)
    torch.testing.assert_close(out[:, 2:6], x[:, :, ::2, ::2])
    assert not out[:, :2].any()
    assert not out[:, 6:].any()


def test_embedding_is_pooled_and_logits_are_linear_in_it() -> None:
    model = create("resnet8:width=4", num_classes=3, image_size=8).eval()
    embedding, logits = model(torch.randn(2, 3, 8, 8))
    assert (embedding >= 0).all()  # mean of what a relu gave
    torch.testing.assert_close(logits, model.linear(embedding))


@pytest.mark.skipif(
    not (SHARED / "teachers").is_dir(), reason=f"no teachers in {SHARED}, beside the repository"
)
@pytest.mark.parametrize(("depth", "correct"), [(20, 84), (56, 88)])
def test_trained_teachers_reach_their_accuracy(depth: int, correct: int) -> None:
    """On the first 100 test images; all 10,000 give 91.73 % and 93.39 %."""
    pytest.importorskip("pyarrow")
    weights = SHARED / "teachers" / f"cifar10_resnet{depth}.safetensors"
    model = load(f"resnet{depth}", weights=weights)
    assert (model.num_classes, model.image_size, model.in_channels) == (10, 32, 3)
    data = load_data(SHARED / "data" / "cifar10", "test", memory_limit=0)
    found = 0
    with torch.inference_mode():
        for batch in data.batches(torch.arange(100), 100):
            predicted = model(prepare(model, batch.images)).logits.argmax(1)
            found += int((predicted == batch.labels).sum())
    assert abs(found - correct) <= 1  # rounding differs between processors
