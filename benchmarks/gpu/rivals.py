"""Losses over pairs by other projects' kernels: two towers of one batch, row i belonging to row i.

They are other losses than ckd's: their rows say what such a step costs, on the case of pairs alone.
Each gets the unit rows in half precision, as its documentation shows, from plain torch.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import peers
import torch
from problem import LOGIT_SCALE, Inputs, unit_rows
from torch import Tensor

Loss = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Rival:
    package: str
    note: str  # in what its loss differs
    make: Callable[[], Loss]

    def missing(self) -> str | None:
        return peers.needs(self.package)()


def memeff_lit() -> Loss:
    module = importlib.import_module("memeff")
    fused = module.MemoryEfficientLiTLoss(temperature=1 / LOGIT_SCALE, normalized_inputs=True)

    def loss(inputs: Inputs) -> Tensor:
        u, n = unit_rows(inputs)
        result: Tensor = fused(u.half(), n.half())
        return result

    return loss


def siglip() -> Loss:
    fused = importlib.import_module("siglip_kernel").fused_siglip_loss

    def loss(inputs: Inputs) -> Tensor:
        u, n = unit_rows(inputs)
        bias = torch.tensor(peers.SIGLIP_BIAS, device=u.device, requires_grad=True)
        scale = torch.tensor(math.log(LOGIT_SCALE), device=u.device, requires_grad=True)
        result: Tensor = fused(u.bfloat16(), n.bfloat16(), scale, bias)
        return result

    return loss


RIVALS = {
    "memeff": Rival("memeff", "LiT: both directions, one tower's gradient", memeff_lit),
    "siglip-kernel": Rival("siglip_kernel", "a sigmoid for each pair", siglip),
}
