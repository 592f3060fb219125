"""What callers offer (tensors, numpy arrays, lists of ids) as the tensors that a bank stores."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ckd.bank.manifest import BankError

# Unsigned 64-bit ids are refused: half of them would change their sign without a word.
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

FLOAT16_MAX = torch.finfo(torch.float16).max


def integers(name: str, values: Any) -> Tensor:
    """`values` as int64 [n] on the CPU. BankError for another rank or kind of number."""
    tensor = _as_tensor(name, values)
    if tensor.ndim == 1 and len(tensor) == 0:
        return torch.empty(0, dtype=torch.int64)
    if tensor.ndim != 1 or tensor.dtype not in _INTEGERS:
        raise BankError(
            f"{name} must be integers of shape [n], got {tensor.dtype} of shape "
            f"{list(tensor.shape)}; convert with .to(torch.int64) or .astype('int64')"
        )
    return tensor.to("cpu", torch.int64)


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

    Raises BankError that names the first row (and its sample id) that is not finite, is beyond
    float16's range, or has length 0 where it should be normalised.
    """

    def refuse(bad: Tensor, what: str) -> None:
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise BankError(
                f"row {row} of the batch (sample_id {int(sample_ids[row])}) {what}; "
                "nothing of this batch was written"
            )

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


def _as_tensor(name: str, values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values
    try:
        array = np.asarray(values)
        # torch wants native byte order and, without a warning, memory that may be written.
        array = array.astype(array.dtype.newbyteorder("="), copy=not array.flags.writeable)
        return torch.from_numpy(array)
    except (TypeError, ValueError) as error:
        raise BankError(f"{name} must be a tensor or an array of numbers: {error}") from error
