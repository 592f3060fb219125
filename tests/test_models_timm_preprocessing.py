"""Every preprocessing of timm's published models, against timm's own transform."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from ckd.models.preprocessing import Unsupported, measure

timm = pytest.importorskip("timm", exc_type=ImportError)
pytestmark = pytest.mark.slow


def settings() -> list[tuple[int, float, str, str]]:
    """The distinct sizes, crops, filters and modes; larger sizes have the same crops."""
    configs = [timm.models.get_pretrained_cfg(name) for name in timm.list_models(pretrained=True)]
    found = {(c.input_size[-1], c.crop_pct, c.interpolation, c.crop_mode) for c in configs}
    return sorted(setting for setting in found if setting[0] <= 288)


@pytest.mark.parametrize("setting", settings(), ids=str)
def test_preprocessing_is_that_of_timms_transform(setting) -> None:
    size, crop_pct, interpolation, crop_mode = setting
    transform = timm.data.create_transform(
        (3, size, size), crop_pct=crop_pct, interpolation=interpolation, crop_mode=crop_mode
    )
    edge = math.floor(size / crop_pct)

    def process(image: np.ndarray) -> np.ndarray:
        return transform(Image.fromarray(image)).numpy()

    try:
        found = measure(process, 3, [edge], half_even=True)
    except Unsupported:
        if crop_mode == "border" or crop_pct > 1:  # both pad images
            return
        raise
    random = np.random.default_rng(0)
    # Crops of 0 to 3 pixels modulo 4, which begin at half of it or beside.
    for shape in ((edge, edge + 3), (edge + 31, edge), (edge, edge + 1), (101, 150), (300, 407)):
        image = random.integers(64, 192, (*shape, 3), dtype=np.uint8)
        ours = found.resize(torch.from_numpy(image.transpose(2, 0, 1)[None].copy()), size)[0]
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (found.mean, found.std))
        theirs = 255 * (torch.from_numpy(process(image)) * std + mean)
        assert (ours - theirs).abs().mean() < 0.5
