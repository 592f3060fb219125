"""The learning rate as a pure function of the step, and which parameters decay."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor, nn

# Position embeddings and class tokens are matrices in shape but biases in nature.
NO_DECAY_WORDS = ("position", "pos_embed", "class_token", "class_embedding", "cls_token")


def learning_rate(
    step: int,
    *,
    peak: float,
    steps_per_epoch: int,
    epochs: int,
    warmup_epochs: float = 0.0,
    per_epoch: bool = False,
) -> float:
    """The rate of optimizer step `step` (from 0): linear warm-up, then a cosine down to zero.

    In a warm-up of w steps, peak (step + 1) / w; then, with x the fraction of the remaining steps
    that is done, peak (1 + cos(π x)) / 2. With `per_epoch` all steps of an epoch have the rate of
    its first, as in the paper's code.
    """
    if per_epoch:
        step -= step % steps_per_epoch
    warmup = warmup_epochs * steps_per_epoch
    if step < warmup:
        return peak * min(1.0, (step + 1) / warmup)
    remaining = epochs * steps_per_epoch - warmup
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / remaining))


def parameter_groups(
    modules: Iterable[nn.Module], weight_decay: float, *, decay_all: bool = False
) -> list[dict[str, list[Tensor] | float]]:
    """The trainable parameters of `modules` for AdamW, in two groups: with decay and without.

    Norms, biases, the logit scale (all of fewer than two dimensions), position embeddings and
    class tokens do not decay, unless `decay_all`, as in the paper's code.
    """
    decay: list[Tensor] = []
    no_decay: list[Tensor] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            exempt = parameter.ndim < 2 or any(word in name for word in NO_DECAY_WORDS)
            (no_decay if exempt and not decay_all else decay).append(parameter)
    groups: list[dict[str, list[Tensor] | float]] = [
        {"params": decay, "weight_decay": weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
