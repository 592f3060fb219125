from __future__ import annotations

import pytest
import torch

from ckd.models import create, flops_per_image, known, parameter_count, prepare


def model(image_size: int = 8, in_channels: int = 3):
    return create("resnet8:width=4", num_classes=2, image_size=image_size, in_channels=in_channels)


def test_same_size_is_normalised_exactly() -> None:
    images = torch.arange(2 * 3 * 64, dtype=torch.int32).to(torch.uint8).view(2, 3, 8, 8)
    before = images.clone()
    net = model()
    out = prepare(net, images)
    assert out.dtype == torch.float32
    assert torch.equal(images, before)
    for channel in range(3):
        expected = (images[:, channel].double() / 255 - net.mean[channel]) / net.std[channel]
        torch.testing.assert_close(out[:, channel].double(), expected, rtol=1e-6, atol=1e-6)


def test_gray_serves_a_colour_model() -> None:
    images = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(
        prepare(model(), images), prepare(model(), images.expand(2, 3, 8, 8)), rtol=0, atol=0
    )


@pytest.mark.parametrize("shape", [(4, 4), (16, 16), (31, 20)])
def test_other_sizes_are_resized_within_the_range_of_pixels(shape: tuple[int, int]) -> None:
    net = model()
    images = (torch.randint(0, 2, (2, 3, *shape)) * 255).to(torch.uint8)
    out = prepare(net, images)
    assert out.shape == (2, 3, 8, 8)
    pixels = out * torch.tensor(net.std).view(3, 1, 1) + torch.tensor(net.mean).view(3, 1, 1)
    assert pixels.min() > -1e-5
    assert pixels.max() < 1 + 1e-5
    flat = prepare(net, torch.full((1, 3, *shape), 200, dtype=torch.uint8))
    torch.testing.assert_close(flat, prepare(net, torch.full((1, 3, 8, 8), 200).to(torch.uint8)))


def test_flops_of_a_network_counted_by_hand() -> None:
    net = create("resnet8:width=4", num_classes=5, image_size=8).train()
    # Multiply-adds of the seven convolutions and the classifier.
    macs = 64 * 27 * 4 + 2 * 64 * 36 * 4
    macs += 16 * 36 * 8 + 16 * 72 * 8 + 4 * 72 * 16 + 4 * 144 * 16 + 16 * 5
    assert flops_per_image(net) == 2 * macs
    assert net.training


def test_flops_of_a_network_that_fails_leave_it_in_training() -> None:
    net = model().train()
    net.bn1 = torch.nn.BatchNorm2d(5)  # of another width: the forward fails
    with pytest.raises(RuntimeError):
        flops_per_image(net)
    assert net.training


def test_flops_include_attention() -> None:
    net = create("vit:patch=4,width=16,layers=2,heads=2", num_classes=None, image_size=8)
    tokens, width = 5, 16
    per_layer = 12 * tokens * width * width + 2 * tokens * tokens * width
    assert flops_per_image(net) == 2 * (4 * 48 * width + 2 * per_layer)


def test_shared_parameters_count_once() -> None:
    net = torch.nn.ModuleList([layer := torch.nn.Linear(3, 2), layer])
    assert parameter_count(net) == 8


def test_known_models_can_be_made() -> None:
    for name in known():
        if ":" not in name:
            assert create(name, num_classes=2, image_size=8).spec == name
