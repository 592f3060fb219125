"""Makes Triton's interpreter fit for tests: it multiplies the bits of bfloat16 operands, and cuts
float32 off to bfloat16 where hardware rounds to the nearest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def repair() -> None:
    builder = interpreter.InterpreterBuilder
    original = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return original(self, _widened(self, a), _widened(self, b), *others)

    builder.create_dot = create_dot
    builder.cast_impl = _rounding(builder.cast_impl)
    builder.create_fp_trunc = lambda self, x, dtype: self.cast_impl(x, dtype)


def _rounding(cast: Callable[..., Any]) -> Callable[..., Any]:
    def cast_impl(self: Any, x: Any, dtype: Any) -> Any:
        if x.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
            return cast(self, x, dtype)
        rounded = torch.from_numpy(np.ascontiguousarray(x.data)).bfloat16().view(torch.int16)
        return interpreter.TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)

    return cast_impl


def _widened(builder: Any, x: Any) -> Any:
    return builder.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x
