"""What examining a call found out, kept for the next call like it.

To check shapes, dtypes and devices, to choose a backend and to see who has to know of the call
takes as long as the loss itself against a small bank, and in training every step is like the last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ckd.backends import interface
from ckd.ops._library import PLAIN, is_observed, kind

MOST = 256  # plans kept


class Plan(NamedTuple):
    """How calls of a kind are made: `way(options, *tensors)`."""

    way: Callable[..., Any]  # of the op, see `Op.way`
    options: tuple[Any, ...]  # of the op


class Plans:
    """`plans(tensors, options)` is `examine(*tensors, *options)`, asked once for calls of a kind.

    `examine` raises what is wrong with the call. Its plan may depend on everything about the
    tensors but their values and strides, on the options, on grad mode, on autocast, and on settings
    that report their changes to `interface.changed_settings`.
    """

    def __init__(self, examine: Callable[..., Plan]) -> None:
        self._examine = examine
        self._known: dict[tuple[Any, ...], Plan] = {}

    def __call__(self, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Plan:
        key = None if is_observed() else _key(tensors, options)
        if key is None:
            return self._examine(*tensors, *options)
        plan = self._known.get(key)
        if plan is None:
            plan = self._examine(*tensors, *options)
            if len(self._known) >= MOST:
                self._known.clear()
            self._known[key] = plan
        return plan


def _key(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Everything that a plan may depend on; None for a call that has to be examined by itself."""
    student = tensors[0]
    if type(student) not in PLAIN or student.is_meta:
        return None
    kinds: list[Any] = []
    for x in tensors:
        if x is not None and type(x) not in PLAIN:
            return None
        kinds.append(None if x is None else kind(x))
    for option in options:
        if type(option) not in (float, int, str, bool):
            return None
        kinds.append(type(option))  # 1, 1.0 and True are equal
    kinds += options
    kinds.append(torch.is_grad_enabled())
    kinds.append(torch.is_autocast_enabled(student.device.type))
    kinds.append(interface.settings)
    return tuple(kinds)
