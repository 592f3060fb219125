from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ckd.data import DataError, FileImages, MemoryImages, epoch_order, load, training_batches
from tests.image_files import encoded, pixels, write_images, write_parquet


def some(n: int = 10, **options) -> MemoryImages:
    images = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, 4, 4).clone()
    return MemoryImages(images, torch.arange(n) % 3, class_names="abc", **options)


def test_batches_follow_the_order_and_the_last_is_short() -> None:
    data = some(sample_ids=torch.arange(10) * 7)
    order = torch.tensor([9, 0, 3, 3, 5])
    batches = list(data.batches(order, 2))
    assert [len(batch.labels) for batch in batches] == [2, 2, 1]
    assert torch.cat([batch.images[:, 0, 0, 0] for batch in batches]).tolist() == order.tolist()
    assert torch.cat([batch.labels for batch in batches]).tolist() == (order % 3).tolist()
    assert torch.cat([batch.sample_ids for batch in batches]).tolist() == (order * 7).tolist()
    assert batches[0].images.dtype == torch.uint8


def test_batches_of_given_sizes() -> None:
    data = some()
    order = torch.tensor([9, 0, 3, 3, 5])
    batches = list(data.batches(order, [3, 2]))
    assert [len(batch.labels) for batch in batches] == [3, 2]
    assert torch.cat([batch.sample_ids for batch in batches]).tolist() == order.tolist()
    with pytest.raises(DataError, match="batch_size must be at least 1, got 0"):
        data.batches(order, [5, 0])
    assert list(data.batches(order[:0], [])) == []


def test_a_single_last_image_joins_the_batch_before_it() -> None:
    assert training_batches(9, 4) == [4, 5]
    assert training_batches(10, 4) == [4, 4, 2]
    assert training_batches(8, 4) == [4, 4]
    assert training_batches(1, 4) == [1]
    assert training_batches(3, 1) == [1, 1, 1]
    assert training_batches(0, 4) == []
    for n in range(30):
        for size in range(1, 8):
            sizes = training_batches(n, size)
            assert sum(sizes) == n
            for done in range(len(sizes)):  # a resume after any batch
                assert training_batches(n - sum(sizes[:done]), size) == sizes[done:]


def test_empty_order_gives_no_batches() -> None:
    assert list(some().batches(torch.arange(0), 4)) == []


def test_moving_keeps_the_identity() -> None:
    data = some()
    moved = data.to("cpu")
    assert moved.fingerprint == data.fingerprint
    assert moved.class_names == data.class_names


@pytest.mark.parametrize(
    "changed",
    [
        {"images": torch.zeros(3, 1, 2, 2, dtype=torch.uint8)},
        {"images": torch.ones(3, 1, 1, 4, dtype=torch.uint8)},
        {"labels": torch.tensor([0, 1, 0])},
        {"class_names": ["x", "z"]},
        {"sample_ids": torch.tensor([0, 1, 3])},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_fingerprint_changes_with_any_part(changed: dict) -> None:
    parts = {
        "images": torch.ones(3, 1, 2, 2, dtype=torch.uint8),
        "labels": torch.tensor([0, 1, 1]),
        "class_names": ["x", "y"],
        "sample_ids": torch.arange(3),
    }

    def fingerprint(parts: dict) -> str:
        parts = dict(parts)
        return MemoryImages(parts.pop("images"), parts.pop("labels"), **parts).fingerprint

    assert fingerprint(parts) == fingerprint(parts)
    assert fingerprint(parts) != fingerprint(parts | changed)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("storage", ["folder", "parquet"])
def test_streamed_batches_equal_those_from_memory(
    tmp_path: Path, storage: str, workers: int
) -> None:
    if storage == "folder":
        for name in ("a", "b"):
            write_images(tmp_path / "train" / name, pixels(12, size=6, seed=ord(name)))
    else:
        pytest.importorskip("pyarrow")
        rows = [encoded(image) for image in pixels(24, size=6)]
        write_parquet(tmp_path / "train.parquet", rows, [0, 1] * 12, row_group_size=7)
    memory = load(tmp_path, image_size=5)
    stream = load(tmp_path, image_size=5, memory_limit=100)
    assert isinstance(memory, MemoryImages)
    assert isinstance(stream, FileImages)
    assert stream.image_shape == memory.image_shape == (3, 5, 5)
    assert stream.to("cpu") is stream
    order = epoch_order(24, seed=0, epoch=0)[:17]
    state = torch.get_rng_state()
    pairs = list(zip(memory.batches(order, 5), stream.batches(order, 5, workers=workers)))
    assert len(pairs) == 4
    assert torch.equal(torch.get_rng_state(), state)
    for expected, got in pairs:
        for a, b in zip(expected, got):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_in_a_stream_is_one_line_that_names_it(
    tmp_path: Path, workers: int
) -> None:
    write_images(tmp_path / "a", pixels(4))
    (tmp_path / "a" / "2.png").write_bytes(b"\x89PNG broken")
    stream = load(tmp_path, holdout=0, memory_limit=0)
    with pytest.raises(DataError, match=r"2\.png: cannot be read") as caught:
        list(stream.batches(torch.arange(4), 2, workers=workers))
    assert "\n" not in str(caught.value)


AFTER_A_FORK = """
import os, signal, sys, torch, ckd
from ckd.data import load, stream

def compute():
    student, bank = torch.randn(64, 32), torch.randn(4096, 32).half()
    ckd.contrastive_cross_entropy(student, bank, torch.arange(64), weight=torch.randn(32, 32))
    torch.rand(1 << 20).exp()

torch.set_num_threads(2)
compute()
data = load(sys.argv[1], holdout=0, memory_limit=0)
assert sum(len(batch.labels) for batch in data.batches(torch.arange(6), 2, workers=2)) == 6
child = os.fork()
if not child:
    signal.alarm(30)
    stream._start_worker(0)
    compute()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0, "hung"
"""


def test_workers_start_after_a_parallel_region(tmp_path: Path) -> None:
    """libgomp's threads do not survive a fork: a worker that waited for them would hang."""
    write_images(tmp_path / "a", pixels(6))
    command = [sys.executable, "-c", AFTER_A_FORK, str(tmp_path)]
    done = subprocess.run(command, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_many_images_are_decoded_in_order_by_several_threads(tmp_path: Path) -> None:
    # More than two tasks of the thread pool.
    pytest.importorskip("pyarrow")
    images = pixels(600, size=2)
    rows = [encoded(image) for image in images]
    write_parquet(tmp_path / "train.parquet", rows, [0] * 600, row_group_size=100)
    (batch,) = load(tmp_path).batches(torch.arange(600), 600)
    assert torch.equal(batch.images.permute(0, 2, 3, 1), torch.from_numpy(images))
