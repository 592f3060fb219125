from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from ckd.data import DataError, load
from ckd.data.parquet import open_split
from tests.image_files import encoded, pixels, write_parquet

pytest.importorskip("pyarrow")


def all_images(data) -> torch.Tensor:
    (batch,) = data.batches(torch.arange(len(data)), len(data))
    return batch.images.permute(0, 2, 3, 1)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize(
    ("image_column", "label_column"), [("img", "label"), ("image", "fine_label")]
)
def test_rows_come_in_order_through_shards_and_row_groups(
    tmp_path: Path, kind: str, image_column: str, label_column: str
) -> None:
    images, labels = pixels(23), [i % 3 for i in range(23)]
    rows = [encoded(image, kind) if kind == "PNG" else _lossless_webp(image) for image in images]
    # Two shards, the first of three row groups with a ragged last one.
    options = {
        "image_column": image_column,
        "label_column": label_column,
        "class_names": ["a", "b", "c"],
        "row_group_size": 5,
    }
    folder = tmp_path / "set" / "data"
    write_parquet(folder / "train-00001-of-00002.parquet", rows[13:], labels[13:], **options)
    write_parquet(folder / "train-00000-of-00002.parquet", rows[:13], labels[:13], **options)
    write_parquet(folder / "test-00000-of-00001.parquet", rows[:2], labels[:2], **options)
    data = load(tmp_path / "set")
    assert (data.name, data.class_names) == ("set", ("a", "b", "c"))
    assert data.labels.tolist() == labels
    assert data.sample_ids.tolist() == list(range(23))
    np.testing.assert_array_equal(all_images(data).numpy(), images)
    assert len(load(tmp_path / "set", "test")) == 2


def _lossless_webp(image: np.ndarray) -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", lossless=True, exact=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "names", [("train.parquet", "val.parquet"), ("train/0.parquet", "validation/0.parquet")]
)
def test_split_names_in_files_and_folders(tmp_path: Path, names: tuple[str, str]) -> None:
    rows = [encoded(image) for image in pixels(5)]
    write_parquet(tmp_path / names[0], rows[:3], [0, 1, 2])
    write_parquet(tmp_path / names[1], rows[3:], [0, 1])
    test = load(tmp_path, "test")
    assert (len(load(tmp_path)), len(test)) == (3, 2)
    # Without stored names the classes are numbered, up to the largest label of any split.
    assert test.class_names == ("0", "1", "2")


def test_single_file_without_a_split_name_is_divided(tmp_path: Path) -> None:
    rows = [encoded(image) for image in pixels(50)]
    file = write_parquet(tmp_path / "birds.parquet", rows, [i % 2 for i in range(50)])
    train, test = load(file, holdout=0.2), load(file, "test", holdout=0.2)
    assert sorted(train.sample_ids.tolist() + test.sample_ids.tolist()) == list(range(50))
    assert 0 < len(test) < 25
    np.testing.assert_array_equal(all_images(test).numpy(), pixels(50)[test.sample_ids.numpy()])


def test_single_file_of_one_split_does_not_serve_the_other(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "train.parquet", [encoded(pixels(1)[0])], [0])
    assert len(load(file)) == 1
    with pytest.raises(DataError, match=r"no test split \(found: train\)"):
        load(file, "test")


@pytest.mark.parametrize("name", ["a/b/c/train-0.parquet", "train.PARQUET"])
def test_files_at_any_depth_and_of_either_case(tmp_path: Path, name: str) -> None:
    file = write_parquet(tmp_path / name, [encoded(pixels(1)[0])], [0])
    assert len(load(tmp_path)) == len(load(file)) == 1


def test_foreign_metadata_give_no_class_names(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"image": [encoded(image) for image in pixels(3)], "label": [0, 1, 0]})
    for metadata in (b"\xff\xfe", b"[]", b"{"):
        named = table.replace_schema_metadata({b"huggingface": metadata})
        pq.write_table(named, tmp_path / "train.parquet")
        with pytest.warns(UserWarning, match="class names in the metadata of .* are passed over"):
            assert load(tmp_path).class_names == ("0", "1")


def test_rows_that_expand_beyond_all_images_are_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"image": [bytes(10 << 20)] * 12, "label": [0] * 12})
    pq.write_table(table, tmp_path / "train.parquet", compression="zstd", use_dictionary=False)
    with pytest.raises(DataError, match=r"train\.parquet.*bytes are to become 125,"):
        load(tmp_path)


def test_files_beside_those_of_splits_are_passed_over(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [encoded(pixels(1)[0])], [0])
    write_parquet(tmp_path / "metadata.parquet", [], [], image_column="notes")
    assert len(load(tmp_path)) == 1


def test_plain_binary_column(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"image": [encoded(image) for image in pixels(3)], "label": [0, 1, 0]})
    pq.write_table(table, tmp_path / "train.parquet")
    np.testing.assert_array_equal(all_images(load(tmp_path)).numpy(), pixels(3))


def test_source_survives_the_way_into_another_process(tmp_path: Path) -> None:
    rows = [encoded(image) for image in pixels(4)]
    write_parquet(tmp_path / "train.parquet", rows, [0, 1, 0, 1], row_group_size=2)
    source = open_split(tmp_path, "train", 0.1)
    assert bytes(source.read(3)) == rows[3]
    copy = pickle.loads(pickle.dumps(source))
    assert [bytes(copy.read(i)) for i in range(4)] == rows
    assert copy.where(3) == f"{tmp_path / 'train.parquet'}, row 3"


def test_fingerprint_sees_a_changed_pixel_and_a_changed_label(tmp_path: Path) -> None:
    images = pixels(4)
    labels = [0, 1, 0, 1]

    def fingerprint() -> str:
        write_parquet(tmp_path / "train.parquet", [encoded(i) for i in images], labels)
        return load(tmp_path).fingerprint

    first = fingerprint()
    assert fingerprint() == first
    images[2, 0, 0, 0] ^= 1
    second = fingerprint()
    labels[3] = 0
    assert len({first, second, fingerprint()}) == 3


@pytest.mark.parametrize(
    "names",
    [
        ("data/train-0.parquet", "data/test-0.parquet"),
        ("ds/ds/train-0.parquet", "ds/ds/test-0.parquet"),
        ("default/train/0.parquet", "default/test/0.parquet"),
        ("train/a/0.parquet", "test/0.parquet"),
        ("train_data/0.parquet", "test_data/0.parquet"),
    ],
)
def test_one_configuration_in_folders(tmp_path: Path, names: tuple[str, str]) -> None:
    rows = [encoded(image) for image in pixels(5)]
    write_parquet(tmp_path / names[0], rows[:3], [0, 1, 2])
    write_parquet(tmp_path / names[1], rows[3:], [0, 1])
    assert (len(load(tmp_path)), len(load(tmp_path, "test"))) == (3, 2)


def test_parts_of_a_split_may_lie_in_folders_below_its_own(tmp_path: Path) -> None:
    rows = [encoded(image) for image in pixels(4)]
    write_parquet(tmp_path / "train" / "a" / "0.parquet", rows[:2], [0, 1])
    write_parquet(tmp_path / "train" / "b" / "0.parquet", rows[2:], [0, 1])
    np.testing.assert_array_equal(all_images(load(tmp_path)).numpy(), pixels(4))


@pytest.fixture
def hub_cache(tmp_path: Path) -> Path:
    """The hub's cache of one data set: two snapshots, linked to the same files."""
    root = tmp_path / "datasets--org--birds"
    rows = [encoded(image) for image in pixels(3)]
    write_parquet(root / "blobs" / "0a1b", rows, [0, 1, 2])
    for revision in ("1111", "2222"):
        folder = root / "snapshots" / revision / "data"
        folder.mkdir(parents=True)
        (folder / "train-00000-of-00001.parquet").symlink_to("../../../blobs/0a1b")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("2222")
    return root


def test_two_snapshots_of_one_file_are_read_once(hub_cache: Path) -> None:
    assert len(load(hub_cache)) == len(load(hub_cache / "snapshots")) == 3


def test_the_hubs_cache_is_read_at_its_main_revision(hub_cache: Path) -> None:
    train = "data/train-00000-of-00001.parquet"
    old = hub_cache / "snapshots" / "1111" / train
    old.unlink()
    write_parquet(old, [encoded(pixels(1, seed=1)[0])], [0])
    np.testing.assert_array_equal(all_images(load(hub_cache)).numpy(), pixels(3))
    with pytest.raises(DataError, match=r"train files in 2 folders \(1111/data, 2222/data\)"):
        load(hub_cache / "snapshots")
    (hub_cache / "refs" / "main").unlink()
    with pytest.raises(DataError, match=r"2 snapshots.*1111.*2222.*pass the one"):
        load(hub_cache)


def test_shards_may_write_the_same_class_name_in_two_ways(tmp_path: Path) -> None:
    rows = [encoded(image) for image in pixels(2)]
    for i, name in enumerate(("caf\u00e9", "cafe\u0301")):
        write_parquet(tmp_path / f"train-{i}.parquet", [rows[i]], [0], class_names=[name])
    assert load(tmp_path).class_names == ("caf\u00e9",)


def test_other_columns_are_not_looked_at(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [[encoded(image) for image in pixels(3)], [0, 1, 0], [2, 2, 2], [None] * 3]
    names = ["img", "fine_label", "coarse_label", "coarse_label"]
    table = pa.Table.from_arrays([pa.array(column) for column in columns], names=names)
    pq.write_table(table, tmp_path / "train.parquet")
    assert load(tmp_path).labels.tolist() == [0, 1, 0]


def test_copies_of_rows_are_counted_and_named(tmp_path: Path) -> None:
    rows = [encoded(image) for image in pixels(3)]
    file = write_parquet(tmp_path / "train.parquet", [*rows, rows[1]], [0, 1, 0, 1])
    with pytest.warns(UserWarning, match=rf"1 of 4 .*{file}, row 3 of {file}, row 1"):
        load(tmp_path)


def shards(folder: Path, *names: str, labels: tuple[int, int] = (0, 1)) -> Path:
    """Two rows in each of these files, all different."""
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_parquet(folder / name, [encoded(i) for i in pixels(2, seed=seed)], list(labels))
    return folder


def test_missing_shards_and_shards_of_two_versions_are_refused(tmp_path: Path) -> None:
    whole = ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet")
    assert len(load(shards(tmp_path / "a", *whole))) == 4
    with pytest.raises(DataError, match=r"lacks 1 of the 3 files train-\*, the first is number 1"):
        load(shards(tmp_path / "b", "train-00000-of-00003.parquet", "train-00002-of-00003.parquet"))
    with pytest.raises(DataError, match=r"train-\* of 1 and of 2"):
        load(shards(tmp_path / "c", *whole, "train-00000-of-00001.parquet"))


def test_test_rows_without_labels_give_way_to_validation(tmp_path: Path) -> None:
    """As in ImageNet: the labels of the test rows are -1."""
    shards(tmp_path / "data", "train-00000-of-00001.parquet", "validation-00000-of-00001.parquet")
    shards(tmp_path / "data", "test-00000-of-00001.parquet", labels=(-1, -1))
    with pytest.warns(UserWarning, match="test files have no labels.*validation is read"):
        data = load(tmp_path, "test")
    assert data.labels.tolist() == [0, 1]
