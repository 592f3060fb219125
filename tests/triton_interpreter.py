"""Patches Triton's interpreter where it differs from hardware. Unpatched, it multiplies the bit
patterns of bfloat16 operands as integers, truncates float32 to bfloat16 where hardware rounds to
nearest, and multiplies all bits of float32 where NVIDIA's matrix units truncate to tf32. Older
versions (Triton 3.6, say) convert arrays of one element to numbers in a way that NumPy 2.4 refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton.ir import INPUT_PRECISION
from triton.runtime import interpreter


def repair() -> None:
    builder = interpreter.InterpreterBuilder

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, *others: Any) -> Any:
        a, b = _widened(self, a), _widened(self, b)
        if precision == INPUT_PRECISION.TF32:
            a, b = _cut_off_to_tf32(a), _cut_off_to_tf32(b)
        # By torch: OpenBLAS's kernels for Haswell give NaN where finite operands are large.
        left, right = (torch.from_numpy(np.ascontiguousarray(x.data, d.data.dtype)) for x in (a, b))
        with torch.autocast("cpu", enabled=False):
            product = left @ right
        return interpreter.TensorHandle(product.numpy() + d.data, d.dtype.scalar)

    builder.create_dot = create_dot
    builder.cast_impl = _rounding(builder.cast_impl)
    builder.create_fp_trunc = lambda self, x, dtype: self.cast_impl(x, dtype)

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_with_index


def _rounding(cast: Callable[..., Any]) -> Callable[..., Any]:
    def cast_impl(self: Any, x: Any, dtype: Any) -> Any:
        if x.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
            return cast(self, x, dtype)
        rounded = torch.from_numpy(np.ascontiguousarray(x.data)).bfloat16().view(torch.int16)
        return interpreter.TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)

    return cast_impl


def _cut_off_to_tf32(x: Any) -> Any:
    if x.dtype.scalar != tl.float32:
        return x
    bits = np.ascontiguousarray(x.data).view(np.uint32) & np.uint32(0xFFFFE000)
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _widened(builder: Any, x: Any) -> Any:
    return builder.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x
