from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ckd.data import DataError, MemoryImages, load
from tests.image_files import pixels


def test_digits_are_complete_and_scaled() -> None:
    train, test = load("digits"), load("digits", "test")
    assert isinstance(train, MemoryImages)
    assert (len(train), len(test)) == (1437, 360)
    assert train.image_shape == (1, 8, 8)
    assert train.class_names == tuple("0123456789")
    assert int(train.images.max()) == 255
    assert int(train.images.min()) == 0
    assert test.sample_ids.tolist() == list(range(360))
    assert train.fingerprint != test.fingerprint


def test_digits_equal_scikit_learns() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    original = datasets.load_digits()
    ours = [load("digits", split) for split in ("train", "test")]
    images = torch.cat([data.images[:, 0] for data in ours]).double()
    expected = torch.from_numpy(original.images) * 255 / 16
    assert (images - expected).abs().max() <= 0.5
    assert torch.cat([d.labels for d in ours]).tolist() == original.target.tolist()


def test_digits_at_another_size() -> None:
    data = load("digits", image_size=16)
    assert data.image_shape == (1, 16, 16)
    coarse = load("digits").images.float()
    smoothed = torch.nn.functional.avg_pool2d(data.images.float(), 2)
    assert (smoothed - coarse).abs().mean() < 12


@pytest.mark.parametrize("layout", ["NHW", "NHWC", "NCHW"])
def test_npz_layouts(tmp_path: Path, layout: str) -> None:
    images = pixels(40)
    stored = {"NHW": images[..., 0], "NHWC": images, "NCHW": images.transpose(0, 3, 1, 2)}[layout]
    np.savez(tmp_path / "a.npz", images=stored, labels=np.arange(40) % 4)
    data = load(tmp_path / "a.npz", holdout=0)
    expected = images[..., :1] if layout == "NHW" else images
    got = next(data.batches(torch.arange(40), 40)).images
    np.testing.assert_array_equal(got.permute(0, 2, 3, 1).numpy(), expected)
    assert data.name == "a"


@pytest.mark.parametrize(
    "keys",
    [
        ("train_images", "train_labels", "val_images", "val_labels"),
        ("x_train", "y_train", "x_test", "y_test"),
    ],
)
def test_npz_with_splits(tmp_path: Path, keys: tuple[str, str, str, str]) -> None:
    arrays = (pixels(6), np.arange(6)[:, None], pixels(2, seed=1), np.array([[1], [2]]))
    np.savez(tmp_path / "a.npz", **dict(zip(keys, arrays)))
    train, test = load(tmp_path / "a.npz"), load(tmp_path / "a.npz", "test")
    assert (len(train), len(test)) == (6, 2)
    assert test.labels.tolist() == [1, 2]
    assert test.class_names == train.class_names == tuple("012345")


def test_npz_without_splits_is_divided(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "a.npz",
        images=pixels(60),
        labels=np.arange(60) % 2,
        class_names=np.array(["even", "odd"]),
    )
    train, test = (load(tmp_path / "a.npz", split, holdout=0.25) for split in ("train", "test"))
    assert sorted(train.sample_ids.tolist() + test.sample_ids.tolist()) == list(range(60))
    assert train.class_names == ("even", "odd")
    assert test.labels.tolist() == [i % 2 for i in test.sample_ids.tolist()]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint64, np.int32])
def test_npz_labels_of_any_integer_type(tmp_path: Path, dtype: type) -> None:
    np.savez(tmp_path / "a.npz", images=pixels(4), labels=np.array([0, 1, 2, 1], dtype))
    data = load(tmp_path / "a.npz", holdout=0)
    assert data.labels.tolist() == [0, 1, 2, 1]
    assert data.class_names == ("0", "1", "2")


def test_npz_class_count_is_from_the_labels_of_the_splits_alone(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "A.NPZ.npz",
        x_train=pixels(3),
        y_train=np.array([0, 1, 0]),
        x_val=pixels(2),
        y_val=np.array([2, 0]),
        y_mean=np.array([90]),
        coarse_labels=np.array([50, 0, 0]),
    )
    path = (tmp_path / "A.NPZ.npz").rename(tmp_path / "A.NPZ")  # the suffix in either case
    assert load(path).class_names == ("0", "1", "2")


def test_npz_class_names_may_be_bytes(tmp_path: Path) -> None:
    names = np.array(["caf\u00e9".encode(), b"bar"])
    np.savez(tmp_path / "a.npz", images=pixels(2), labels=np.arange(2), class_names=names)
    assert load(tmp_path / "a.npz", holdout=0).class_names == ("caf\u00e9", "bar")


def test_a_part_of_a_thousand_classes_has_all_their_numbers(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=pixels(2), labels=np.array([999, 3]))
    assert len(load(tmp_path / "a.npz", holdout=0).class_names) == 1000


def test_fingerprint_does_not_depend_on_the_image_size(tmp_path: Path) -> None:
    path = tmp_path / "some.npz"
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(30) % 3)
    for source in ("digits", path):
        small, large = load(source), load(source, image_size=16)
        assert large.image_shape[1:] == (16, 16)
        assert large.fingerprint == small.fingerprint
    assert load("digits").fingerprint != load("digits", "test").fingerprint


def test_npz_arrays_that_are_not_needed_are_not_read(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "a.npz", images=pixels(3), labels=np.arange(3), notes=np.array([None, {}, "x"])
    )
    assert load(tmp_path / "a.npz", holdout=0).labels.tolist() == [0, 1, 2]


def test_npz_copies_are_counted_and_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=pixels(4)[[0, 1, 2, 1]], labels=np.arange(4))
    with pytest.warns(UserWarning, match=r"1 of 4 images .* row 3 of images of .* row 1 of images"):
        load(tmp_path / "a.npz", holdout=0)


def test_a_class_name_that_no_file_can_hold_is_refused_at_once(tmp_path: Path) -> None:
    arrays = {"images": np.zeros((4, 8, 8), np.uint8), "labels": np.arange(4) % 2}
    np.savez(tmp_path / "a.npz", class_names=np.array(["a\0b", "c"]), **arrays)
    with pytest.raises(DataError, match=r"a\.npz: class_names.*NUL"):
        load(tmp_path / "a.npz", holdout=0)
