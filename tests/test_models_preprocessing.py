from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ckd.models.preprocessing import Preprocessing, Resize, Unsupported, measure


def measured(process, channels: int, edges: list[int], half_even: bool = False) -> Preprocessing:
    return measure(process, channels, edges, half_even=half_even)


MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
}


def pillow(
    size: int,
    edge: int | None = None,
    keep_aspect=False,
    kind="bicubic",
    half_even=False,
    flip=False,
):
    """Preprocessing as an independent program does it: Pillow and numpy."""

    def process(image: np.ndarray) -> np.ndarray:
        height, width, channels = image.shape
        to = edge or size
        new = (to, to)
        if keep_aspect:
            short = min(height, width)
            new = (int(width * to / short), int(height * to / short))
        planes = [
            np.asarray(Image.fromarray(image[:, :, c]).resize(new, FILTERS[kind]))
            for c in range(channels)
        ]
        x = np.stack(planes)
        margins = (x.shape[1] - size, x.shape[2] - size)
        top, left = (round(m / 2) if half_even else m // 2 for m in margins)
        x = x[:, top : top + size, left : left + size].astype(np.float32)
        x = x[::-1] if flip else x
        mean, std = (np.array(v[:channels], np.float32)[:, None, None] for v in (MEAN, STD))
        return (x / 255 - mean) / std

    return process


@pytest.mark.parametrize("kind", ["bicubic", "bilinear", "nearest"])
@pytest.mark.parametrize(
    ("size", "edge", "keep_aspect"),
    [(32, None, False), (32, None, True), (32, 37, True), (32, 37, False), (224, 256, True)],
)
def test_resize_and_crop_are_found(size, edge, keep_aspect, kind) -> None:
    found = measured(pillow(size, edge, keep_aspect, kind), 3, [37, 256, 300])
    assert found == Preprocessing(size, MEAN, STD, Resize(edge, keep_aspect, kind))


def test_crops_of_an_odd_margin_are_told_apart() -> None:
    for half_even in (False, True):
        process = pillow(33, 40, True, half_even=half_even)
        assert measured(process, 3, [40], half_even).resize == Resize(40, True, half_even=half_even)
        with pytest.raises(Unsupported):
            measured(process, 3, [40], not half_even)


def test_channels_in_reversed_order_and_gray() -> None:
    found = measured(pillow(32, flip=True), 3, [])
    assert found == Preprocessing(32, MEAN, STD, flip_channels=True)
    assert measured(pillow(32), 1, []) == Preprocessing(32, MEAN[:1], STD[:1])


@pytest.mark.parametrize(
    ("factor", "offset", "mean", "std"),
    [
        (1.0, 0.0, 0.0, 1 / 255),  # neither rescaled nor normalised
        (1 / 255, 0.0, 0.0, 1.0),
        (1 / 127.5, 1.0, 0.5, 0.5),  # to -1..1
    ],
)
def test_every_linear_map_is_found(factor, offset, mean, std) -> None:
    def process(image: np.ndarray) -> np.ndarray:
        x = pillow(32)(image) * np.array(STD)[:, None, None] + np.array(MEAN)[:, None, None]
        return (255 * factor * x - offset).astype(np.float32)

    found = measured(process, 3, [])
    assert found.mean == pytest.approx([mean] * 3, abs=1e-6)
    assert found.std == pytest.approx([std] * 3, rel=1e-5)


def unresized(image: np.ndarray) -> np.ndarray:
    return image.transpose(2, 0, 1).astype(np.float32)


def padded(image: np.ndarray) -> np.ndarray:
    return np.pad(pillow(24)(image), ((0, 0), (4, 4), (4, 4)))


def mixed(image: np.ndarray) -> np.ndarray:
    x = pillow(32)(image)
    return np.stack([x.mean(axis=0)] * 3)


def cubed(image: np.ndarray) -> np.ndarray:
    return pillow(32)(image) ** 3


@pytest.mark.parametrize(
    ("process", "reason"),
    [
        (unresized, "one square size"),
        (pillow(32, kind="lanczos"), "differs by"),
        (pillow(32, 37, True), "differs by"),  # 37 is not among the edges
        (padded, "differs by"),
        (mixed, "mixes the channels"),
        (cubed, "differs by"),
        (lambda image: pillow(32)(image)[:1], "1 channels for images of 3"),
    ],
)
def test_other_preprocessing_is_refused(process, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        measured(process, 3, [40])


def test_another_image_size_keeps_the_share_that_is_cropped() -> None:
    found = measured(pillow(224, 256, True), 3, [256]).at(112)
    assert (found.image_size, found.resize) == (112, Resize(128, True))
    assert Resize(None, True).at(224, 112) == Resize(None, True)
