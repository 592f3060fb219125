"""The choice of a backend: an ordered list, each entry of which serves a call or says why not.

A backend is a module of this package that has the functions of `interface.Backend`. Backends differ
in speed, never in results; `ckd/backends/reference.py` defines what they compute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor

from ckd import _hints
from ckd._errors import CkdError
from ckd.backends import cpu, cuda, native, reference, triton
from ckd.backends.interface import Backend, BackendName, Problem, cache_limit, set_cache_limit

# "auto" takes the first that serves the problem, so the order is by speed: a step of
# cuda takes 1.9 times that of triton on an H100 (docs/gpu.md).
ORDER: dict[str, Backend] = {
    "triton": triton,
    "cuda": cuda,
    "cpu": cpu,
    "reference": reference,
}

__all__ = [
    "BackendError",
    "BackendName",
    "Explanation",
    "available",
    "cache_limit",
    "explain",
    "set_cache_limit",
]

OPS = ("contrastive_ce", "similarity")


class BackendError(CkdError, RuntimeError):
    """A backend that was asked for by name cannot serve the call; the message says why."""


@dataclass(frozen=True)
class Explanation:
    """The backend that `auto` takes, and for each backend the reason why it cannot serve the call,
    or None if it can."""

    chosen: str
    reasons: dict[str, str | None]

    def __str__(self) -> str:
        lines = [f"auto takes {self.chosen!r}"]
        for name, reason in self.reasons.items():
            if name != self.chosen:
                lines.append(
                    f"  {name}: {reason or 'could serve it too, but comes later in the order'}"
                )
        return "\n".join(lines)


def available() -> tuple[BackendName, ...]:
    """The names of the backends that this installation can run, fastest first."""
    names = [name for name, module in ORDER.items() if module.missing() is None]
    return cast(tuple[BackendName, ...], tuple(names))


def explain(
    student: Tensor, bank: Tensor, weight: Tensor | None = None, *, op: str = "contrastive_ce"
) -> Explanation:
    """Which backend would serve this call, and why not the others.

    Args:
        student: [B, W], as for the op. bank: [K, D]. weight: [W, D] or None.
        op: "contrastive_ce" or "similarity".

    Raises ValueError for another op, or a student or bank that is not a matrix.

    >>> print(ckd.backends.explain(student, bank, weight))
    """
    if op not in OPS:
        raise ValueError(_hints.unknown("op", op, OPS))
    for name, matrix in (("student", student), ("bank", bank)):
        if matrix.dim() != 2:
            raise ValueError(f"{name} must have two dimensions, got shape {list(matrix.shape)}")
    problem = Problem.of(op, student, bank, weight)
    reasons = _reasons(problem)
    return Explanation(_first_that_serves(problem) or resolve("auto", problem), reasons)


def resolve(name: str, problem: Problem) -> str:
    """The name of the backend that serves the problem; `name` may be "auto".

    Warns once in a process if "auto" takes `reference` because the CPU's kernels were not built.

    Raises:
        ValueError: no backend has that name.
        BackendError: the named backend cannot serve the problem. It never falls back.
    """
    if name == "auto":
        if chosen := _first_that_serves(problem):
            if chosen == "reference" and cpu.missing() and cpu.unfit(problem) is None:
                native.warn_of_reference()
            return chosen
        reasons = "; ".join(f"{k}: {v}" for k, v in _reasons(problem).items())
        raise BackendError(f"no backend serves this problem: {reasons}")
    if name not in ORDER:
        raise ValueError(_hints.unknown("backend", name, ("auto", *ORDER)))
    reason = ORDER[name].unsupported(problem)
    if reason is not None:
        raise BackendError(f"backend {name!r} cannot serve this call: {reason}")
    return name


def _first_that_serves(problem: Problem) -> str | None:
    for name, module in ORDER.items():
        if module.unsupported(problem) is None:
            return name
    return None


def _reasons(problem: Problem) -> dict[str, str | None]:
    return {name: module.unsupported(problem) for name, module in ORDER.items()}
