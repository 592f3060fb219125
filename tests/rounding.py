"""Models of arithmetic: float32 sums in another order, random roundings, bfloat16 operands.

Each is a dispatch mode: it intercepts torch's operations, also those of autograd's backward, so one
function in plain torch (tests/oracle.py) gives the exact result, eager's and that of each model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
UNIT_ROUNDOFF = 2.0**-24  # of float32
CHUNKS = (None, 128, 32, 8)  # terms of each partial sum; None: all


class OtherOrder(TorchDispatchMode):
    """Sums in a random order, and matrix products in partial sums of CHUNKS[seed % 4] terms.

    The order that eager itself uses depends on the processor, torch and the number of threads.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._chunk = CHUNKS[seed % len(CHUNKS)]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is aten.mm.default:
            return self._product(*args)
        if function is aten.addmm.default:
            return args[0] + self._product(*args[1:])
        if function is aten.sum.default:
            return function(self._shuffled(args[0].reshape(-1), [0]), **kwargs)
        if function is aten.sum.dim_IntList:
            return function(self._shuffled(*args[:2]), *args[1:], **kwargs)
        if function in (aten.linalg_vector_norm.default, aten.logsumexp.default):
            return function(self._shuffled(args[0], [1]), *args[1:], **kwargs)
        if function is aten._log_softmax.default:
            order = self._order(args[0].shape[1], args[0].device)
            return function(args[0][:, order], *args[1:])[:, order.argsort()]
        return function(*args, **kwargs)

    def _order(self, terms: int, device: torch.device) -> Tensor:
        return torch.randperm(terms, generator=self._generator, device="cpu").to(device)

    def _shuffled(self, x: Tensor, dims: Sequence[int]) -> Tensor:
        for dim in dims:
            x = x.index_select(dim, self._order(x.shape[dim], x.device))
        return x

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        order = self._order(a.shape[1], a.device)
        first, *others = order.split(self._chunk or max(len(order), 1))
        out = a[:, first] @ b[first]
        for part in others:
            out = out + a[:, part] @ b[part]
        return out


class Rounded(TorchDispatchMode):
    """Float64 operations, with a random error as large as float32's rounding added to each result.

    A sum c of n terms t is rounded n times. As a random walk, its partial sum of j terms is about
    c j / n, give or take sqrt(j) times the size of a term, and its rounding error is uniform up to
    the unit roundoff u times that. The variances add up to (u^2 / 3) (n c^2 / 3 + n |t|^2 / 2), so

        the standard deviation is u sqrt(n) sqrt(c^2 / 9 + |t|^2 / 6)

    or, relative to c, the unit roundoff times the square root of the length times the condition of
    the sum. A product, or a sum of two numbers, counts as a sum of one term. The computation itself
    propagates these errors to its result; none depends on the machine.

    `chunk`: the terms of a partial sum, for kernels that add partial sums.
    """

    def __init__(self, seed: int, chunk: int | None = None) -> None:
        super().__init__()
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._chunk = chunk

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if not isinstance(out, Tensor) or out.dtype != torch.float64:
            return out
        if function is aten.mm.default:
            a, b = args
            return self._rounded(out, a.shape[1], a.square() @ b.square())
        if function is aten.addmm.default:
            c, a, b = args
            return self._rounded(out, a.shape[1] + 1, c.square() + a.square() @ b.square())
        if function in (aten.sum.default, aten.sum.dim_IntList):
            terms = args[0].numel() / max(out.numel(), 1)
            return self._rounded(out, terms, args[0].square().sum(*args[1:]))
        if function is aten.linalg_vector_norm.default:
            fourth = args[0].pow(4).sum(1, keepdim=True)
            return self._rounded(out.square(), args[0].shape[1], fourth).sqrt()
        if function is aten.logsumexp.default:
            p = (args[0] - out.view(-1, 1)).exp()
            return self._log_of_sum(out.view(-1, 1), p).view_as(out)
        if function is aten._log_softmax.default:
            # Kernels exponentiate logits - lse, a difference of two large numbers, each with a
            # rounding error as large as that of the row's largest logit.
            largest = args[0].abs().amax(1, keepdim=True)
            lse = self._log_of_sum(largest, out.exp()) - largest
            return out + self._once(largest.expand_as(out)) - largest - lse
        if function is aten._log_softmax_backward_data.default:
            slope = args[0]
            return slope - self._once(slope - out)  # p sum(slope), then the difference
        if function in ROUNDED_ONCE:
            return self._once(out)
        return out

    def _rounded(self, c: Tensor, terms: float, squares: Tensor) -> Tensor:
        if self._chunk is not None:
            terms = min(terms, self._chunk + terms / self._chunk)
        deviation = UNIT_ROUNDOFF * math.sqrt(terms) * (c.square() / 9 + squares / 6).sqrt()
        draw = torch.randn(c.shape, generator=self._generator, dtype=c.dtype, device="cpu")
        return c + deviation * draw.to(c.device)

    def _once(self, c: Tensor) -> Tensor:
        return self._rounded(c, 1, c.square())

    def _log_of_sum(self, lse: Tensor, p: Tensor) -> Tensor:
        """`lse` with the roundings of its sum of exponentials; p is the softmax."""
        ones = torch.ones_like(lse)
        sums = self._rounded(ones, p.shape[1], p.square().sum(1, keepdim=True))
        return self._once(lse + sums.log())


class Bfloat16Operands(TorchDispatchMode):
    """Float64 operations, but the operands of matrix products are rounded to bfloat16."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if function in (aten.mm.default, aten.addmm.default):
            *added, a, b = args
            args = (*added, a.bfloat16().to(a.dtype), b.bfloat16().to(b.dtype))
        return function(*args, **(kwargs or {}))


ROUNDED_ONCE = (
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.logaddexp.default,
)
