"""Stateless randomness: every epoch and every step has its own generator, derived from the seed.

A run resumed at any step therefore draws the same numbers as an uninterrupted one.
"""

from __future__ import annotations

import torch
import xxhash
from torch import Tensor


def epoch_order(n: int, *, seed: int, epoch: int) -> Tensor:
    """The permutation of 0..n-1 (int64 [n], CPU) in which `epoch` visits the data."""
    return torch.randperm(n, generator=_generator("epoch", seed, epoch, "cpu"))


def training_batches(n: int, batch_size: int) -> list[int]:
    """The sizes of the batches in which `n` images are trained on.

    A last batch of a single image joins the one before it: one image has no batch statistics, and
    nothing to be contrasted with. A resume in mid-epoch, with `n` the images that remain, gets the
    remaining batches of the whole epoch.
    """
    full, rest = divmod(n, batch_size)
    sizes = [batch_size] * full
    if full and rest == 1:
        sizes[-1] += 1
    elif rest:
        sizes.append(rest)
    return sizes


def step_generator(seed: int, step: int, device: str | torch.device) -> torch.Generator:
    """A generator on `device` for the random draws of one training step."""
    return _generator("step", seed, step, device)


def _generator(kind: str, seed: int, index: int, device: str | torch.device) -> torch.Generator:
    # Hashed, since nearby seeds give correlated first draws in some generators. `kind` keeps epoch
    # e and step e apart.
    mixed = xxhash.xxh3_64_intdigest(f"{kind} {seed} {index}".encode())
    return torch.Generator(device).manual_seed(mixed & 0x7FFF_FFFF_FFFF_FFFF)
