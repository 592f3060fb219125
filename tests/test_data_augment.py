from __future__ import annotations

import pytest
import torch

from ckd.data import Augment, epoch_order, step_generator


def images(batch: int = 64, size: int = 5) -> torch.Tensor:
    """All pixels of an image differ, so that a shift can be read off."""
    one = torch.arange(1, size * size + 1, dtype=torch.uint8).view(1, 1, size, size)
    return torch.cat([one, one + 100], dim=1).expand(batch, 2, size, size).contiguous()


def test_every_result_is_one_of_the_possible_crops_and_flips() -> None:
    padding, size, source = 2, 5, images(400)
    out = Augment(padding, flip=True)(source, step_generator(0, 0, "cpu"))
    padded = torch.nn.functional.pad(source[0], (padding,) * 4)
    possible = {}
    for y in range(2 * padding + 1):
        for x in range(2 * padding + 1):
            crop = padded[:, y : y + size, x : x + size]
            possible[crop.numpy().tobytes()] = (y, x, False)
            possible[crop.flip(2).contiguous().numpy().tobytes()] = (y, x, True)
    seen = [possible[image.contiguous().numpy().tobytes()] for image in out]
    # 400 draws from 50 equally likely ones: all but certain to see nearly all.
    assert len(set(seen)) >= 48
    assert 140 < sum(flipped for _, _, flipped in seen) < 260


def test_flip_alone_keeps_or_mirrors() -> None:
    source = images()
    out = Augment(0, flip=True)(source, step_generator(1, 0, "cpu"))
    kept = (out == source).flatten(1).all(1)
    mirrored = (out == source.flip(3)).flatten(1).all(1)
    assert (kept ^ mirrored).all()
    assert 0 < kept.sum() < len(source)


def test_without_either_nothing_changes() -> None:
    source = images()
    out = Augment(0, flip=False)(source, step_generator(0, 0, "cpu"))
    assert torch.equal(out, source)


def test_augmentation_depends_on_seed_and_step_alone() -> None:
    source, augment = images(), Augment(2)
    first = augment(source, step_generator(3, 7, "cpu"))
    torch.rand(100)  # the global generator plays no part
    assert torch.equal(first, augment(source, step_generator(3, 7, "cpu")))
    assert not torch.equal(first, augment(source, step_generator(3, 8, "cpu")))
    assert not torch.equal(first, augment(source, step_generator(4, 7, "cpu")))


def test_step_streams_of_neighbouring_steps_are_unrelated() -> None:
    draws = torch.stack(
        [torch.rand(64, generator=step_generator(seed, step, "cpu"))
         for seed in range(8) for step in range(8)]
    )  # fmt: skip
    correlation = torch.corrcoef(draws).fill_diagonal_(0)
    assert correlation.abs().max() < 0.6
    assert draws[:, 0].std() == pytest.approx(12**-0.5, abs=0.06)


def test_epoch_order_is_a_new_permutation_each_epoch_and_stateless() -> None:
    orders = [epoch_order(100, seed=1, epoch=epoch) for epoch in range(3)]
    for order in orders:
        assert order.dtype == torch.int64
        assert sorted(order.tolist()) == list(range(100))
    assert not torch.equal(orders[0], orders[1])
    assert torch.equal(orders[2], epoch_order(100, seed=1, epoch=2))
    assert not torch.equal(orders[2], epoch_order(100, seed=2, epoch=2))
