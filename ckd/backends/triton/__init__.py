"""The ops in Triton kernels (triton_kernels/, installed as ckd._triton), for NVIDIA and AMD GPUs.

The bank is projected and normalised into a workspace, one chunk at a time: in float16 where half
precision is permitted, else in float32 (matrix units use tf32 if torch's float32 matmul precision
allows it). All other kernels read these unit rows. No logits in memory, no atomics on results. The
host synchronises only to measure which tiles are fastest, once for each kind of problem.

With TRITON_INTERPRET=1 the same kernels run on CPU tensors, slowly, for tests.

Importing Triton takes a second, so the functions here import the modules that launch kernels.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from ckd.backends.device import Gpu, Simulated, beyond_limits, elsewhere
from ckd.backends.interface import (
    Forward,
    Gradients,
    Inputs,
    Keep,
    Needs,
    Plan,
    Problem,
    Saved,
    Split,
    Targets,
    Upstream,
    check_targets,
)
from ckd.backends.triton import layout

_installed = importlib.util.find_spec("triton") is not None
# Triton too reads this variable only once, when kernels are imported.
_interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
gpu = Simulated() if _interpreted else Gpu()


def missing() -> str | None:
    """Why this installation cannot run the backend at all, or None."""
    if not _installed:
        return "triton is not installed; pip install triton"
    reason = gpu.missing()
    return reason and f"{reason} (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)"


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter."""
    return _interpreted


def unsupported(problem: Problem) -> str | None:
    return (
        elsewhere(problem, gpu)  # first, since a query of the GPUs takes longer
        or missing()
        or beyond_limits(problem, spare_rows=1024)
        or _too_many_targets(problem)
    )


def _too_many_targets(problem: Problem) -> str | None:
    if problem.batch * problem.targets >= 2**31 - 1024:
        return "has 32-bit indices: fewer than 2^31 - 1024 targets of all students"
    return None


def contrastive_ce_cache_bytes(problem: Problem) -> int:
    return layout.cache_bytes(
        problem.batch,
        problem.bank_rows,
        problem.student_dim,
        problem.allow_half,
        problem.cache_limit,
    )


def split_targets(
    target: Tensor,
    weight: Tensor | None,
    bank_rows: int,
    ignore_index: int,
    label_smoothing: float,
    dtype: torch.dtype,
) -> Split:
    from ckd.backends.triton import targets

    assert dtype == torch.float32  # that of every logit scale but a float64 student's
    return targets.split(gpu, target, weight, bank_rows, ignore_index, label_smoothing)


def contrastive_ce_forward(inputs: Inputs, targets: Targets, plan: Plan, keep: Keep) -> Forward:
    from ckd.backends.triton import contrastive_ce

    check_targets(targets, len(inputs.bank))
    return contrastive_ce.forward(gpu, inputs, targets, plan, keep)


def contrastive_ce_backward(
    upstream: Upstream, inputs: Inputs, targets: Targets, plan: Plan, saved: Saved, needs: Needs
) -> Gradients:
    from ckd.backends.triton import contrastive_ce

    return contrastive_ce.backward(gpu, upstream, inputs, targets, plan, saved, needs)


def similarity_forward(inputs: Inputs, plan: Plan) -> Tensor:
    from ckd.backends.triton import similarity

    return similarity.forward(gpu, inputs, plan)


def similarity_backward(d_logits: Tensor, inputs: Inputs, plan: Plan, needs: Needs) -> Gradients:
    from ckd.backends.triton import similarity

    return similarity.backward(gpu, d_logits, inputs, plan, needs)
