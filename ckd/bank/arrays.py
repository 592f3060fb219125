"""Converts callers' tensors, numpy arrays and lists to the tensors that a bank stores."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ckd.bank.manifest import BankError, RowError

_SIGNED = (torch.int64, torch.int32, torch.int16, torch.int8)
_UNSIGNED = (torch.uint64, torch.uint32, torch.uint16, torch.uint8)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

FLOAT16_MAX = torch.finfo(torch.float16).max

# The largest error of a stored row, relative to its length: that of rounding to bfloat16, in which
# teachers run. Rounding to float16 has 2^-11, unless most of the row's length is in elements below
# 2^-14 (subnormal), which are rounded by up to 2^-25 each, whatever their size.
_ROUNDING = 2**-8


def integers(name: str, values: Any) -> Tensor:
    """`values` as int64 [n] on the CPU. BankError for another rank or dtype, or beyond int64."""
    tensor = _as_tensor(name, values)
    if tensor.ndim == 1 and len(tensor) == 0:
        return torch.empty(0, dtype=torch.int64)
    if tensor.ndim != 1 or tensor.dtype not in _SIGNED + _UNSIGNED:
        raise BankError(
            f"{name} must be integers of shape [n], got {tensor.dtype} of shape "
            f"{list(tensor.shape)}; convert with .to(torch.int64) or .astype('int64')"
        )
    signed = tensor.to("cpu", torch.int64)
    # uint64 above the largest int64 wraps to a negative number without an error.
    if tensor.dtype in _UNSIGNED and bool((signed < 0).any()):
        raise BankError(f"{name} must fit into int64, got a {tensor.dtype} beyond {2**63 - 1}")
    return signed


def embeddings(name: str, values: Any, dim: int) -> Tensor:
    """`values` as a detached floating tensor [n, dim] on the CPU, in its own dtype."""
    tensor = _as_tensor(name, values).detach().cpu()
    if tensor.ndim != 2 or tensor.shape[1] != dim or tensor.dtype not in _FLOATS:
        raise BankError(
            f"{name} must be floating point of shape [n, {dim}], "
            f"got {tensor.dtype} of shape {list(tensor.shape)}"
        )
    return tensor


def to_float16(rows: Tensor, sample_ids: Tensor, *, normalize: bool) -> Tensor:
    """Rows [n, D] as float16; `normalize` scales them to length 1 first.

    Raises RowError, naming the row and its sample id, for a row that is not finite, exceeds
    float16's range, is so small that float16 loses its direction (a row of zeros has none), or has
    length 0 and should be normalised.
    """

    def refuse(bad: Tensor, what: str) -> None:
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            sample_id = int(sample_ids[row])
            raise RowError("embeddings", row, f"{{where}} (sample_id {sample_id}) {what}")

    largest = rows.abs().amax(dim=1)  # NaN if the row holds NaN
    refuse(~largest.isfinite(), "holds NaN or inf")
    if normalize:
        refuse(largest == 0, "is all zeros and cannot be normalised")
        rows = _scaled(rows, largest)
        # Of length 1 and less than 2^33 elements, a row fits float16 and keeps its direction.
        return (rows / rows.norm(dim=1, keepdim=True)).to(torch.float16)
    half = rows.to(torch.float16)
    refuse(
        ~largest.to(torch.float16).isfinite(),
        f"holds a value beyond float16's largest, {FLOAT16_MAX:.0f}; "
        "scale the embeddings down, or store them with normalize=True",
    )
    # For other rows, 2^-25 for each of D elements is at most 2^-9 of the length.
    small = (largest > 0) & (largest < 2**-16 * rows.shape[1] ** 0.5)
    lost = small.clone()
    lost[small] = _loses_direction(rows[small], half[small], largest[small])
    refuse(
        lost,
        "is too small for float16, which would round its direction away; "
        "scale the embeddings up, or store them with normalize=True",
    )
    return half


def half_if_accurate(rows: Tensor) -> Tensor:
    """Finite rows [n, D] as float16; unchanged if one would overflow or lose its direction."""
    half, largest = rows.to(torch.float16), rows.abs().amax(dim=1)
    some = largest > 0
    lost = ~half.isfinite().all() | _loses_direction(rows[some], half[some], largest[some]).any()
    return rows if lost else half


def _scaled(rows: Tensor, largest: Tensor) -> Tensor:
    """The rows in float64, divided by their largest elements, so that squares stay in range."""
    return rows.double() / largest.double()[:, None]


def _loses_direction(rows: Tensor, half: Tensor, largest: Tensor) -> Tensor:
    """Mask [n] of the rows that float16 changes by more than _ROUNDING of their length."""
    exact = _scaled(rows, largest)
    return (_scaled(half, largest) - exact).norm(dim=1) > _ROUNDING * exact.norm(dim=1)


def same_rows(offered: Tensor, stored: Tensor) -> Tensor:
    """Mask [n] of the rows that are equal in two float16 [n, D], up to a teacher's rounding.

    Rounding changes with the batch size. The difference may have 2^-7 of the row's length (8 ulps
    of float16, one of bfloat16, in which a teacher may run), plus 2^-24 (a subnormal ulp of
    float16) in each element.
    """
    offered, stored = offered.double(), stored.double()
    tolerance = 2**-7 * stored.norm(dim=1) + 2**-24 * stored.shape[1] ** 0.5
    return (offered - stored).norm(dim=1) <= tolerance


def _as_tensor(name: str, values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values
    try:
        array = np.asarray(values)
        # from_numpy needs native byte order and no negative strides, and warns of read-only memory.
        copy = not array.flags.writeable or any(stride < 0 for stride in array.strides)
        array = array.astype(array.dtype.newbyteorder("="), order="C" if copy else "K", copy=copy)
        return torch.from_numpy(array)
    except (TypeError, ValueError) as error:
        raise BankError(f"{name} must be a tensor or an array of numbers: {error}") from error
