"""--distill: the terms of the loss against a bank, with their weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

from ckd._hints import unknown
from ckd.train.errors import ConfigError

TermName = Literal["contrastive", "cosine", "mse", "soft", "logits"]
TERM_NAMES: tuple[TermName, ...] = get_args(TermName)

#: The terms that share the head from the student into the teacher's space.
HEAD_TERMS = frozenset({"cosine", "mse", "soft"})

#: The weight of a term that is named alone, beside a cross-entropy of weight 1.
WEIGHTS: Mapping[str, float] = {
    "contrastive": 0.5,
    "cosine": 5.0,
    "mse": 2.0,
    "soft": 1.0,
    "logits": 1.0,
}


def parse_mix(text: str, default_weight: float | None = None) -> dict[str, float]:
    """Weights by name of "contrastive=0.5,cosine", in the order of TERM_NAMES; a name alone has the
    default weight, or its own in WEIGHTS if that is None.

    Raises ConfigError for names that are unknown, empty or repeated, and for weights that are not
    above 0.
    """
    if not isinstance(text, str):
        raise ConfigError(f"--distill must be a string, as in contrastive=0.2,mse=2, got {text!r}")
    mix: dict[str, float] = {}
    for item in text.split(","):
        name, equals, given = (part.strip() for part in item.partition("="))
        if not name:
            raise ConfigError(
                f"--distill must name terms, as in contrastive=0.5,cosine=1, got {text!r}"
            )
        if name not in TERM_NAMES:
            raise ConfigError(unknown("term", name, TERM_NAMES, "--distill takes"))
        if name in mix:
            raise ConfigError(f"--distill names {name} twice: {text!r}")
        alone = WEIGHTS[name] if default_weight is None else default_weight
        mix[name] = _weight(name, given) if equals else alone
        if not mix[name] > 0:
            raise ConfigError(
                f"--distill: {name} has weight 0, the --distill-weight; give it one of its own, as "
                f"in {name}=1"
            )
    return {name: mix[name] for name in TERM_NAMES if name in mix}


def _weight(name: str, given: str) -> float:
    try:
        weight = float(given)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise ConfigError(
            f"--distill: the weight of {name} must be a number above 0, got {given!r}; leave a "
            "term out to train without it"
        )
    return weight
