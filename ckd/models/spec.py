"""The grammar of model names: NAME[:key=value,...], timm:NAME, hf:NAME."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from ckd._errors import CkdError
from ckd._files import user_path
from ckd._hints import unknown

#: How a transformer's tokens become one embedding: its class token, the mean of its patch tokens,
#: or the output of its own pooling layer.
Pool = Literal["cls", "mean", "pooler"]
POOLS: tuple[Pool, ...] = get_args(Pool)
# Of a model's sizes: a file that names larger ones is no model's.
LARGEST = {"num_classes": 2**31 - 1, "image_size": 4096, "in_channels": 4096}


class ModelError(CkdError, ValueError):
    """A model cannot be created, loaded or saved as requested; the message names the cause."""


@dataclass(frozen=True)
class Spec:
    """`family` is "vit", "resnet56", ..., "timm" or "hf"; `name` is set for the last two."""

    text: str
    family: str
    name: str = ""
    options: Mapping[str, int] | None = None

    def integers(self, defaults: Mapping[str, int]) -> dict[str, int]:
        """The defaults, replaced by the options; ModelError for an option without a default."""
        given = self.options or {}
        for key in given:
            if key not in defaults:
                raise ModelError(f"{self.text!r}: {unknown('option', key, defaults)}")
        return {**defaults, **given}


def parse(text: str) -> Spec:
    """Parse a model's name. Raises ModelError if an option is not key=POSITIVE INTEGER."""
    family, _, rest = text.partition(":")
    if family in ("timm", "hf"):
        if not rest:
            raise ModelError(f"{text!r}: a model's name must follow, such as {family}:NAME")
        # Python and timm do not expand the home folder of a path.
        local = "local-dir:" if family == "timm" else ""
        if rest.startswith(f"{local}~"):
            rest = local + str(user_path(rest.removeprefix(local)))
        return Spec(text, family, name=rest)
    options: dict[str, int] = {}
    for item in rest.split(",") if rest else ():
        key, equals, value = item.partition("=")
        # Nine digits are more than any size needs, and few enough for int() and for torch.
        if not equals or not re.fullmatch(r"0*[1-9][0-9]{0,8}", value):
            raise ModelError(
                f"{_short(text)!r}: {_short(item)!r} is not key=value with a positive whole "
                "number of at most nine digits, such as vit:patch=2,width=64"
            )
        if key in options:
            raise ModelError(f"{text!r}: {key} is given twice")
        options[key] = int(value)
    return Spec(text, family, options=options)


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
