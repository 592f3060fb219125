"""Data sets without labels, and with labels for some of their images."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from ckd.data import DataError, FileImages, MemoryImages, MissingSplit, load
from ckd.data.labels import keep_labels
from tests.image_files import encoded, pixels, write_images, write_layout, write_parquet


def summary(data) -> tuple[tuple[str, ...], list[int]]:
    return data.class_names, data.labels.tolist()


def some(labels: list[int], ids: torch.Tensor | None = None, classes: int = 3) -> MemoryImages:
    images = torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8)
    names = [f"class {c}" for c in range(classes)]
    return MemoryImages(images, torch.tensor(labels), class_names=names, sample_ids=ids)


# -- image folders


@pytest.mark.parametrize("memory_limit", [0, 1 << 20])
def test_a_folder_of_images_has_no_classes_and_a_part_held_out(
    tmp_path: Path, memory_limit: int
) -> None:
    write_images(tmp_path / "photos", pixels(60))
    parts = [
        load(tmp_path / "photos", split, holdout=0.3, memory_limit=memory_limit)
        for split in ("train", "test")
    ]
    assert isinstance(parts[0], MemoryImages if memory_limit else FileImages)
    for data in parts:
        assert summary(data) == ((), [-1] * len(data))
        assert data.labelled == 0
    assert 0 < len(parts[1]) < 30
    ids = [set(data.sample_ids.tolist()) for data in parts]
    assert len(ids[0] | ids[1]) == 60
    batch = next(parts[0].batches(torch.arange(5), 5))
    assert batch.labels.tolist() == [-1] * 5


@pytest.mark.parametrize("name", ["unlabelled", "unlabeled", "Unlabeled"])
@pytest.mark.parametrize("below", ["", "/000"])
def test_images_of_a_folder_beside_the_classes_are_for_training(
    tmp_path: Path, name: str, below: str
) -> None:
    for seed, folder in enumerate(("cat", "dog")):
        write_images(tmp_path / folder, pixels(30, seed=seed))
    before = [load(tmp_path, split, holdout=0.3) for split in ("train", "test")]
    write_images(tmp_path / f"{name}{below}", pixels(7, seed=2))
    train, test = (load(tmp_path, split, holdout=0.3) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("cat", "dog")
    assert train.labels.tolist() == [*before[0].labels.tolist(), *[-1] * 7]
    assert train.sample_ids[:-7].tolist() == before[0].sample_ids.tolist()
    assert (train.labelled, len(train)) == (len(before[0]), len(before[0]) + 7)
    assert test.fingerprint == before[1].fingerprint


def test_the_layout_of_stl10(tmp_path: Path) -> None:
    write_layout(tmp_path, "train/cat", "train/dog", "test/cat", "test/dog", "unlabeled")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert summary(load(tmp_path)) == (("cat", "dog"), [0, 0, 1, 1, -1, -1])
        assert summary(load(tmp_path, "test")) == (("cat", "dog"), [0, 0, 1, 1])


def test_images_without_labels_in_a_split_folder_belong_to_that_split(tmp_path: Path) -> None:
    write_layout(tmp_path, "train/cat", "train/unlabelled", "val/cat", "val/unlabelled")
    for split in ("train", "test"):
        assert summary(load(tmp_path, split)) == (("cat",), [0, 0, -1, -1])


def test_a_folder_without_labels_beside_splits_that_are_classes_makes_no_split(
    tmp_path: Path,
) -> None:
    write_layout(tmp_path, "bus", "car", "train", "unlabelled")
    data = load(tmp_path, holdout=0)
    assert summary(data) == (("bus", "car", "train"), [0, 0, 1, 1, 2, 2, -1, -1])
    write_layout(tmp_path / "flat", "train", "test", "unlabelled")
    assert summary(load(tmp_path / "flat")) == ((), [-1] * 4)
    assert summary(load(tmp_path / "flat", "test")) == ((), [-1] * 2)


@pytest.mark.parametrize("bare", ["train", "test"])
def test_a_split_without_class_folders_has_the_classes_of_the_other(
    tmp_path: Path, bare: str
) -> None:
    other = "test" if bare == "train" else "train"
    write_layout(tmp_path, bare, f"{other}/cat", f"{other}/dog")
    with pytest.warns(UserWarning, match=f"{bare} holds no class folders: .* no labels"):
        assert summary(load(tmp_path, bare)) == (("cat", "dog"), [-1, -1])
    assert summary(load(tmp_path, other)) == (("cat", "dog"), [0, 0, 1, 1])


def test_sets_without_a_test_split_say_so(tmp_path: Path) -> None:
    write_layout(tmp_path / "a", "train")
    write_layout(tmp_path / "b", "unlabelled")
    for name in ("a", "b"):
        assert summary(load(tmp_path / name)) == ((), [-1, -1])
        with pytest.raises(MissingSplit):
            load(tmp_path / name, "test")
    assert len(load(tmp_path / "b" / "unlabelled", holdout=0)) == 2


def test_a_single_class_is_pointed_out(tmp_path: Path) -> None:
    one = write_layout(tmp_path / "one", "images")
    with pytest.warns(UserWarning, match="one class, 'images'; .*no labels, call it 'unlabelled'"):
        assert load(one, holdout=0).class_names == ("images",)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(write_layout(tmp_path / "cats", "cat"), holdout=0)
        load(write_layout(tmp_path / "some", "images", "unlabelled"), holdout=0)
    two = write_layout(tmp_path / "two", "train/images/a", "train/images/b", "test/images")
    with pytest.warns(UserWarning, match=r"train holds one class, 'images'; .*, move them into"):
        load(two)


# -- parquet


def test_parquet_without_a_label_column(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [encoded(image) for image in pixels(3)]
    table = pa.table({"image": rows, "text": ["a", "b", "c"], "width": [8, 8, 8]})
    pq.write_table(table, tmp_path / "train.parquet")
    assert summary(load(tmp_path)) == ((), [-1, -1, -1])
    with pytest.raises(MissingSplit, match="no test split"):
        load(tmp_path, "test")


@pytest.mark.parametrize("names", [None, ["a", "b"]])
@pytest.mark.parametrize("unknown", [None, -1])
def test_parquet_with_labels_for_some(tmp_path: Path, names, unknown) -> None:
    rows = [encoded(image) for image in pixels(3)]
    write_parquet(tmp_path / "train.parquet", rows, [1, unknown, 0], class_names=names)
    assert summary(load(tmp_path)) == (tuple(names or "01"), [1, -1, 0])
    write_parquet(tmp_path / "train.parquet", rows, [unknown] * 3, class_names=names)
    assert summary(load(tmp_path)) == (tuple(names or ()), [-1, -1, -1])


def test_parquet_files_with_and_without_a_label_column(tmp_path: Path) -> None:
    rows = [encoded(image) for image in pixels(4)]
    write_parquet(tmp_path / "train-0.parquet", rows[:2], None)
    write_parquet(tmp_path / "train-1.parquet", rows[2:], [0, 1], class_names=["a", "b"])
    assert summary(load(tmp_path)) == (("a", "b"), [-1, -1, 0, 1])


def test_test_rows_do_not_give_way_to_validation_without_labels_either(tmp_path: Path) -> None:
    rows = [encoded(image) for image in pixels(6)]
    for name, n in (("train", 3), ("test", 2), ("validation", 1)):
        write_parquet(tmp_path / f"{name}.parquet", rows[:n], None)
    assert len(load(tmp_path, "test")) == 2


# -- npz


def test_npz_without_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=pixels(40), notes=np.arange(3))
    train, test = (load(tmp_path / "a.npz", split, holdout=0.3) for split in ("train", "test"))
    assert summary(train) == ((), [-1] * len(train))
    assert sorted([*train.sample_ids.tolist(), *test.sample_ids.tolist()]) == list(range(40))


def test_npz_with_labels_for_some(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=pixels(3), labels=np.array([1, -1, 0], np.int8))
    assert summary(load(tmp_path / "a.npz", holdout=0)) == (("0", "1"), [1, -1, 0])


def test_npz_with_labels_for_the_test_images_alone(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=pixels(3), x_test=pixels(2), y_test=np.array([0, 2]))
    assert summary(load(tmp_path / "a.npz")) == (tuple("012"), [-1] * 3)
    assert summary(load(tmp_path / "a.npz", "test")) == (tuple("012"), [0, 2])
    np.savez(tmp_path / "b.npz", train_images=pixels(3))
    assert summary(load(tmp_path / "b.npz")) == ((), [-1] * 3)
    with pytest.raises(MissingSplit):
        load(tmp_path / "b.npz", "test")


def test_npz_images_without_labels_do_not_take_the_place_of_those_with(tmp_path: Path) -> None:
    arrays = {"val_images": pixels(2), "val_labels": np.arange(2), "test_images": pixels(3)}
    np.savez(tmp_path / "a.npz", train_images=pixels(4), train_labels=np.arange(4), **arrays)
    assert load(tmp_path / "a.npz", "test").labels.tolist() == [0, 1]
    np.savez(tmp_path / "b.npz", images=pixels(4), labels=np.arange(4), test_images=pixels(3))
    assert len(load(tmp_path / "b.npz", holdout=0)) == 4


# -- the data set itself


def test_a_data_set_says_how_many_images_are_labelled() -> None:
    data = some([0, -1, 2, -1])
    assert repr(data) == (
        "MemoryImages('memory', 'train': 4 images of 1 x 2 x 2, 3 classes, 2 labelled)"
    )


@pytest.mark.parametrize(("labels", "classes"), [([0, -2], 3), ([0, 3], 3), ([0, -1], 0)])
def test_other_labels_are_refused(labels: list[int], classes: int) -> None:
    with pytest.raises(DataError, match="-1 where they are unknown"):
        some(labels, classes=classes)


# -- labels for a fraction


def counts(data) -> list[int]:
    return data.labels[data.labels >= 0].bincount(minlength=3).tolist()


@pytest.mark.parametrize(
    ("fraction", "kept"),
    [
        *[(0.0, [0, 0, 0]), (0.001, [1, 1, 1]), (0.1, [10, 10, 10]), (0.5, [50, 50, 50])],
        *[(0.104, [10, 10, 10]), (0.106, [11, 11, 11])],  # the total that is nearest
    ],
)
def test_a_fraction_keeps_as_many_labels_in_each_class(fraction: float, kept: list[int]) -> None:
    data = some([0, 1, 2] * 100)
    part = keep_labels(data, fraction, seed=0)
    assert counts(part) == kept
    known = part.labels >= 0
    assert torch.equal(part.labels[known], data.labels[known])
    assert part.fingerprint == data.fingerprint  # the bank of all images fits
    assert data.labelled == 300


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan")])
def test_a_fraction_is_from_0_to_1(fraction: float) -> None:
    with pytest.raises(DataError, match="fraction must be from 0 to 1, got"):
        keep_labels(some([0, 1]), fraction, seed=0)


def test_images_that_are_decoded_on_demand_lose_their_labels_too(tmp_path: Path) -> None:
    write_layout(tmp_path, "train/cat", "train/dog")
    data = keep_labels(load(tmp_path, memory_limit=0), 0.5, seed=0)
    assert isinstance(data, FileImages)
    batch = next(data.batches(torch.arange(4), 4))
    assert torch.equal(batch.labels, data.labels)
    assert sorted(batch.labels.tolist()) == [-1, -1, 0, 1]


def test_the_whole_fraction_changes_nothing() -> None:
    data = some([0, 1, -1, 1])
    assert keep_labels(data, 1.0, seed=0) is data


def test_small_classes_keep_all_their_labels_and_others_make_up_for_them() -> None:
    data = some([0] * 6 + [1] * 97 + [2] * 97 + [-1] * 50)
    assert counts(keep_labels(data, 0.5, seed=0)) == [6, 47, 47]
    assert counts(keep_labels(data, 0.99, seed=0)) == [6, 96, 96]
    assert counts(keep_labels(some([0, 0, 1, -1]), 0.1, seed=0)) == [1, 1, 0]  # no row of class 2


def test_which_labels_are_kept_depends_on_seed_and_ids_alone() -> None:
    ids = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:300]
    labels = torch.arange(300) % 3

    def kept(order: torch.Tensor, fraction: float = 0.1, seed: int = 0) -> set[int]:
        part = keep_labels(some(labels[order].tolist(), ids[order]), fraction, seed)
        return set(part.sample_ids[part.labels >= 0].tolist())

    straight = torch.arange(300)
    assert kept(straight) == kept(straight.flip(0))
    assert kept(straight) < kept(straight, 0.2)  # labels are added, none is exchanged
    assert kept(straight) != kept(straight, seed=1)
