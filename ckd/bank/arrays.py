"""What callers offer (tensors, numpy arrays, lists of ids) as the tensors that a bank stores."""

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


def integers(name: str, values: Any) -> Tensor:
    """`values` as int64 [n] on the CPU. BankError for another rank, kind or size of number."""
    tensor = _as_tensor(name, values)
    if tensor.ndim == 1 and len(tensor) == 0:
        return torch.empty(0, dtype=torch.int64)
    if tensor.ndim != 1 or tensor.dtype not in _SIGNED + _UNSIGNED:
        raise BankError(
            f"{name} must be integers of shape [n], got {tensor.dtype} of shape "
            f"{list(tensor.shape)}; convert with .to(torch.int64) or .astype('int64')"
        )
    signed = tensor.to("cpu", torch.int64)
    # A large uint64 would change its sign without a word.
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
    """Rows [n, D] as float16, scaled to length 1 first if asked.

    Raises RowError that names the first row (and its sample id) that is not finite, is beyond
    float16's range, or has length 0 where it should be normalised.
    """

    def refuse(bad: Tensor, what: str) -> None:
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            sample_id = int(sample_ids[row])
            raise RowError("embeddings", row, f"{{where}} (sample_id {sample_id}) {what}")

    refuse(~rows.isfinite().all(dim=1), "holds NaN or inf")
    if normalize:
        # float64: the square of a large float32 is not yet infinite there.
        lengths = rows.double().norm(dim=1, keepdim=True)
        refuse(lengths.squeeze(1) == 0, "is all zeros and cannot be normalised")
        rows = rows.double() / lengths
    half = rows.to(torch.float16)
    refuse(
        ~half.isfinite().all(dim=1),
        f"holds a value beyond float16's largest, {FLOAT16_MAX:.0f}; "
        "scale the embeddings down, or store them with normalize=True",
    )
    return half


def same_rows(offered: Tensor, stored: Tensor) -> Tensor:
    """A mask [n]: which rows of two float16 [n, D] are the same, but for how a batch rounds.

    The difference may have 2^-7 of the length of the row: 8 float16 ulps, and one of bfloat16, in
    which a teacher may have run. Below float16's normal range an absolute ulp (2^-24) is added.
    """
    offered, stored = offered.double(), stored.double()
    tolerance = 2**-7 * stored.norm(dim=1) + 2**-24 * stored.shape[1] ** 0.5
    return (offered - stored).norm(dim=1) <= tolerance


def _as_tensor(name: str, values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values
    try:
        array = np.asarray(values)
        # torch wants native byte order, no negative strides and, without a warning, memory that
        # may be written.
        copy = not array.flags.writeable or any(stride < 0 for stride in array.strides)
        array = array.astype(array.dtype.newbyteorder("="), order="C" if copy else "K", copy=copy)
        return torch.from_numpy(array)
    except (TypeError, ValueError) as error:
        raise BankError(f"{name} must be a tensor or an array of numbers: {error}") from error
