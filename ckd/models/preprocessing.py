"""From pixels to a model's input, measured on the preprocessing of the library that made the model.

Libraries describe their preprocessing by dozens of settings (crop_pct, do_rescale, rescale_offset,
...) whose meaning depends on the class that reads them. All of it comes down to a resize, a centre
crop and one linear map per channel, so `measure` runs the library's own function on a few images
and finds these, or refuses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ckd._errors import CkdError

Filter = Literal["bicubic", "bilinear", "nearest", "nearest-exact"]

# Height and width of the images on which preprocessing is measured: smaller and larger than usual
# inputs, square, oblong and narrow.
_SIZES = ((48, 48), (61, 90), (320, 257), (120, 40))
# Limit of the mean difference on images of noise. Pillow 13.0, which rounds to 8 bits after each of
# its two passes, differs by 0.2 levels; another filter, or a crop one pixel off, by 3.6 at least.
_TOLERANCE_LEVELS = 1.0


@dataclass(frozen=True)
class Resize:
    """Resizes images, then cuts out the centre, of the model's image size.

    edge: the pixels of both sides, or of the shorter one with `keep_aspect`; None: the model's
        image size. A side that exceeds the image size is cropped.
    filter: of the resize; bicubic and bilinear are antialiased, as in Pillow. Pillow's nearest and
        torch's nearest-exact differ where two pixels are equally near.
    half_even: whether a crop of an odd number of pixels begins at round(margin / 2) instead of
        margin // 2.
    """

    edge: int | None = None
    keep_aspect: bool = False
    filter: Filter = "bicubic"
    half_even: bool = False

    def __call__(self, images: Tensor, image_size: int) -> Tensor:
        """uint8 [B, C, H, W] -> whole numbers 0..255, float32 [B, C, image_size, image_size]."""
        x, (height, width) = images.float(), images.shape[2:]
        edge = self.edge or image_size
        target = (edge, edge)
        if self.keep_aspect:
            short = min(height, width)
            target = (edge * height // short, edge * width // short)
        if (height, width) != target:
            if self.filter == "nearest":
                rows, columns = (_nearest(*pair) for pair in zip((height, width), target))
                x = x[:, :, rows.to(x.device)][:, :, :, columns.to(x.device)]
            elif self.filter == "nearest-exact":
                x = F.interpolate(x, target, mode=self.filter)
            else:
                x = F.interpolate(x, target, mode=self.filter, antialias=True, align_corners=False)
                x = x.round_().clamp_(0, 255)  # bicubic overshoots at edges
        top, left = (self._margin(side - image_size) for side in target)
        return x[:, :, top : top + image_size, left : left + image_size]

    def _margin(self, extra: int) -> int:
        return round(extra / 2) if self.half_even else extra // 2

    def at(self, old: int, new: int) -> Resize:
        """The same for a model's image size `new` instead of `old`: crops the same share."""
        if self.edge is None or old == new:
            return self
        return replace(self, edge=max(new, round(self.edge * new / old)))


SQUASHED = Resize()  # to the model's image size, whatever the aspect ratio


@dataclass(frozen=True)
class Preprocessing:
    """input = (pixel / 255 - mean) / std per channel, of images resized and cropped by `resize`.

    flip_channels: the model takes its channels in reversed order (BGR); mean and std are in the
    order of the model's input.
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Resize = SQUASHED
    flip_channels: bool = False

    def at(self, image_size: int) -> Preprocessing:
        """The same for another image size."""
        return replace(
            self, image_size=image_size, resize=self.resize.at(self.image_size, image_size)
        )


class Unsupported(CkdError, ValueError):
    """A library's preprocessing is not a resize, a centre crop and one linear map per channel."""


def measure(
    process: Callable[[np.ndarray], np.ndarray],
    channels: int,
    edges: Iterable[int],
    *,
    half_even: bool,
) -> Preprocessing:
    """The Preprocessing that is equal to `process`, a function from uint8 [H, W, C] to [C, S, S].

    edges: lengths that the resize may have; the size of the output is always tried. half_even: the
    library's rounding in crops, which few images would show. Raises Unsupported if no resize
    agrees, to one of 255 levels in the mean, on images of four sizes.
    """
    black, *colours = (_centre(process(image)) for image in _constant_images(channels))
    if black.shape != (channels,):
        raise Unsupported(f"it gives {len(black)} channels for images of {channels}")
    gains = np.stack(colours, axis=1) - black[:, None]  # [output channel, input channel]
    if not np.isfinite(gains).all():
        raise Unsupported("it gives values that are not finite")
    flip = channels > 1 and not gains[0, 0]
    scale = (gains[:, ::-1] if flip else gains).diagonal().astype(float)
    if not scale.all() or np.count_nonzero(gains) != channels:
        raise Unsupported("it mixes the channels")
    mean, std = -black / scale, 1 / scale

    images = [_noise(size, channels) for size in _SIZES]
    outputs = [process(image) for image in images]
    sizes = {output.shape[1:] for output in outputs}
    if len(sizes) > 1 or len({*next(iter(sizes))}) > 1:
        raise Unsupported("it does not bring every image to one square size")
    image_size = outputs[0].shape[1]
    levels = [255 * (out * std[:, None, None] + mean[:, None, None]) for out in outputs]
    if flip:
        levels = [level[::-1] for level in levels]

    def error(resize: Resize, number: int) -> float:
        ours = resize(_planes(images[number]), image_size)[0].numpy()
        return float(np.abs(ours - levels[number]).mean())

    def worst_error(resize: Resize) -> float:
        return max(error(resize, number) for number in range(len(images)))

    # Most are ruled out by the second image, the cheapest of those that are not square.
    errors = {resize: error(resize, 1) for resize in _candidates(image_size, edges, half_even)}
    close = [resize for resize in errors if errors[resize] <= min(errors.values()) + 0.5]
    best = min(close, key=worst_error)
    worst = worst_error(best)
    if worst > _TOLERANCE_LEVELS:
        raise Unsupported(
            "no bicubic, bilinear or nearest resize with a centre crop gives the same pixels "
            f"(the nearest differs by {worst:.0f} of 255 levels)"
        )
    return Preprocessing(image_size, _rounded(mean), _rounded(std), best, bool(flip))


@functools.lru_cache
def _nearest(length: int, target: int) -> Tensor:
    """The index of the source pixel for each of `target` pixels in Pillow's nearest filter, which
    accumulates its step in float64."""
    steps = np.full(target, length / target)
    steps[0] /= 2
    return torch.from_numpy(np.add.accumulate(steps).astype(np.int64))


def _candidates(image_size: int, edges: Iterable[int], half_even: bool) -> Iterator[Resize]:
    tried = sorted({image_size, *(edge for edge in edges if edge >= image_size)})
    # The first of equal ones is chosen, so the simplest comes first.
    for edge, aspect, mode in product(tried, (False, True), get_args(Filter)):
        yield Resize(None if edge == image_size else edge, aspect, mode, half_even)


def _constant_images(channels: int) -> Iterator[np.ndarray]:
    """A black image, and for each channel one in which that channel alone is 255."""
    yield np.zeros((64, 64, channels), np.uint8)
    for channel in range(channels):
        image = np.zeros((64, 64, channels), np.uint8)
        image[:, :, channel] = 255
        yield image


def _noise(size: tuple[int, int], channels: int) -> np.ndarray:
    # Levels 64 to 191: an overshoot of the bicubic filter stays within 0..255. Pillow clips it
    # after each of its two passes, torch once.
    random = np.random.default_rng(0)
    return random.integers(64, 192, (*size, channels), dtype=np.uint8)


def _planes(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image.transpose(2, 0, 1)[None].copy())


def _centre(output: np.ndarray) -> np.ndarray:
    return output[:, output.shape[1] // 2, output.shape[2] // 2]


def _rounded(values: np.ndarray) -> tuple[float, ...]:
    """To six digits: the measured values are those of float32 arithmetic."""
    return tuple(float(f"{value:.6g}") + 0.0 for value in values)
