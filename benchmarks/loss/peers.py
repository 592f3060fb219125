"""The loss by kernels of other projects, if they are installed.

They take two matrices and compute the cross-entropy of their product, so plain torch normalises
the rows of students and bank for them; its time and memory count. The two losses of open_clip are
other ones (both directions; a sigmoid for each pair): their rows show the cost of a CLIP step, and
each is compared with its own formula in float64.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from loss.problem import Inputs, Problem, unit_rows

Loss = Callable[[Inputs], Tensor]
HEAD_DIMS = (256, 128, 64, 32, 16)  # sizes of a part of a row that Inf-CL's kernels take
SIGLIP_BIAS = -10.0  # its initial value, arXiv 2303.15343


def torch_linear() -> Loss:
    """torch's chunked loss of a linear layer, with the bank's unit rows as the layer's weights."""
    options = torch.nn.LinearCrossEntropyOptions()

    def loss(inputs: Inputs) -> Tensor:
        u, n = unit_rows(inputs)
        return F.linear_cross_entropy(
            inputs.logit_scale * u, n.contiguous(), inputs.target, options=options
        )

    return loss


def liger() -> Loss:
    module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    fused = module.LigerFusedLinearCrossEntropyLoss()

    def loss(inputs: Inputs) -> Tensor:
        u, n = unit_rows(inputs)
        result: Tensor = fused(n, inputs.logit_scale * u, inputs.target)
        return result

    return loss


def cut_cross_entropy() -> Loss:
    fused = importlib.import_module("cut_cross_entropy").linear_cross_entropy

    def loss(inputs: Inputs) -> Tensor:
        u, n = unit_rows(inputs)
        queries = (inputs.logit_scale * u).bfloat16()
        result: Tensor = fused(queries, n.bfloat16(), inputs.target)
        return result.float()

    return loss


def inf_cl() -> Loss:
    fused = importlib.import_module("inf_cl").cal_flash_loss

    def loss(inputs: Inputs) -> Tensor:
        u, n = unit_rows(inputs)
        head = next(size for size in HEAD_DIMS if u.shape[1] % size == 0)
        result: Tensor = fused(u, n.contiguous(), inputs.target, inputs.logit_scale, head)
        return result.mean()

    return loss


def clip() -> Loss:
    module = importlib.import_module("open_clip.loss").ClipLoss()
    return lambda inputs: module(*unit_rows(inputs), inputs.logit_scale)


def siglip() -> Loss:
    module = importlib.import_module("open_clip.loss").SigLipLoss()
    return lambda inputs: module(
        *unit_rows(inputs), inputs.logit_scale, torch.tensor(SIGLIP_BIAS).to(inputs.student.device)
    )


def clip_truth(inputs: Inputs) -> Tensor:
    """Cross-entropy in both directions, arXiv 2103.00020."""
    u, n = unit_rows(inputs)
    logits = inputs.logit_scale * u @ n.T
    return (F.cross_entropy(logits, inputs.target) + F.cross_entropy(logits.T, inputs.target)) / 2


def siglip_truth(inputs: Inputs) -> Tensor:
    """-log sigmoid(±logit), summed over all pairs, / B: + for i = j, else -; arXiv 2303.15343."""
    u, n = unit_rows(inputs)
    logits = inputs.logit_scale * u @ n.T + SIGLIP_BIAS
    sign = 2 * torch.eye(*logits.shape, dtype=logits.dtype, device=logits.device) - 1
    return F.softplus(-sign * logits).sum() / len(u)


def needs(package: str) -> Callable[[], str | None]:
    """A function that gives the reason why a package cannot be imported, or None."""

    def missing() -> str | None:
        if importlib.util.find_spec(package) is None:
            return "not installed"
        try:
            importlib.import_module(package)
        except Exception as error:  # noqa: BLE001  # a package can raise any error
            return f"cannot be imported: {error}".splitlines()[0][:120]
        return None

    return missing


def no_linear_cross_entropy() -> str | None:
    return None if hasattr(F, "linear_cross_entropy") else "torch has it from 2.13 on"


def only_in_batch(problem: Problem) -> str | None:
    return None if problem.is_in_batch else "only where the bank is the batch"


def head_fits(problem: Problem) -> str | None:
    fits = problem.student_dim % HEAD_DIMS[-1] == 0
    return None if fits else f"takes widths that are multiples of {HEAD_DIMS[-1]}"
