"""The intervals in which the numbers of a config must lie."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckd._hints import flag
from ckd._json import is_number
from ckd.train.errors import ConfigError

_SIZE, _COUNT = 4096, 2**31 - 1  # the most pixels of a model's side; of anything counted


@dataclass(frozen=True)
class Range:
    """An interval of finite numbers, which holds its ends unless `open_low` or `open_high`."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        if not is_number(value):
            return False
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def words(self, value: Any) -> str:
        """What is expected in place of `value`; without a high end that it is far from."""
        low = f"{'above' if self.open_low else 'at least'} {self.low}"
        if self.high >= _COUNT and not (is_number(value) and value > self.high):
            return low
        return f"{low} and {'below' if self.open_high else 'at most'} {self.high:,}"


RANGES: Mapping[str, Range] = {
    "image_size": Range(1, _SIZE),
    "max_image_pixels": Range(1, _COUNT),
    "epochs": Range(1, _COUNT),
    "batch_size": Range(1, _COUNT),
    "accumulate": Range(1, _COUNT),
    "lr": Range(0, open_low=True),
    "weight_decay": Range(0),
    "warmup_epochs": Range(0),
    "clip_norm": Range(0),
    "label_fraction": Range(0, 1),
    "label_smoothing": Range(0, 1, open_high=True),
    "ema": Range(0, 1, open_high=True),
    "crop_padding": Range(0, _SIZE),
    "label_weight": Range(0),
    "distill_weight": Range(0),
    "centroids_per_class": Range(1, _COUNT),
    "logit_scale": Range(0, 100, open_low=True),
    "temperature": Range(0, open_low=True),
    "seed": Range(0, 2**63 - 1),
    "workers": Range(0, _COUNT),
    "checkpoint_minutes": Range(0, open_low=True),
    "checkpoint_steps": Range(0, _COUNT),
}


def check_ranges(config: Any) -> None:
    """Raise ConfigError for the first number of a config that lies outside its range."""
    for name, expected in RANGES.items():
        value = getattr(config, name)
        if value is not None and not expected.holds(value):
            raise ConfigError(f"{flag(name)} must be {expected.words(value)}, got {value}")
