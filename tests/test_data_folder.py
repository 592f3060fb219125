from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ckd.data import DataError, MemoryImages, load
from ckd.data.decode import fit
from tests.image_files import encoded, pixels, write_images, write_layout


def whole(data) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (batch,) = data.batches(torch.arange(len(data)), len(data))
    return batch


@pytest.fixture
def flowers(tmp_path: Path) -> Path:
    """Class folders without splits: 30 roses and 30 tulips."""
    for seed, name in enumerate(("rose", "tulip")):
        write_images(tmp_path / "flowers" / name, pixels(30, seed=seed))
    return tmp_path / "flowers"


def test_split_folders_give_pixels_labels_and_names(tmp_path: Path) -> None:
    cats, dogs, test_dogs = pixels(3, seed=1), pixels(2, seed=2), pixels(1, seed=3)
    write_images(tmp_path / "train" / "cat", cats)
    write_images(tmp_path / "train" / "dog", dogs)
    write_images(tmp_path / "val" / "dog", test_dogs)
    train, test = load(tmp_path, "train"), load(str(tmp_path), "test")
    assert train.class_names == test.class_names == ("cat", "dog")
    assert train.image_shape == (3, 8, 8)
    assert train.name == tmp_path.name
    assert train.labels.tolist() == [0, 0, 0, 1, 1]
    expected = torch.from_numpy(np.concatenate([cats, dogs])).permute(0, 3, 1, 2)
    torch.testing.assert_close(whole(train)[0], expected, rtol=0, atol=0)
    # The label is the training folder's, although this folder has no cats.
    assert test.labels.tolist() == [1]
    torch.testing.assert_close(
        whole(test)[0], torch.from_numpy(test_dogs).permute(0, 3, 1, 2), rtol=0, atol=0
    )


def test_test_split_is_preferred_to_validation(tmp_path: Path) -> None:
    for name, n in (("train", 1), ("validation", 2), ("test", 3)):
        write_images(tmp_path / name / "cat", pixels(n))
    assert len(load(tmp_path, "test")) == 3


def test_holdout_divides_a_folder_and_never_moves_an_image(flowers: Path) -> None:
    train, test = load(flowers, "train", holdout=0.3), load(flowers, "test", holdout=0.3)
    assert len(train) + len(test) == 60
    assert 5 <= len(test) <= 30
    assert not set(train.sample_ids.tolist()) & set(test.sample_ids.tolist())
    # After adding one image and removing another, all others stay in their split.
    (flowers / "rose" / "new.png").write_bytes(encoded(pixels(1, seed=9)[0]))
    (flowers / "rose" / "0.png").unlink()
    ids = set(train.sample_ids.tolist()), set(test.sample_ids.tolist())
    later = load(flowers, "train", holdout=0.3), load(flowers, "test", holdout=0.3)
    assert not set(later[0].sample_ids.tolist()) & ids[1]
    assert not set(later[1].sample_ids.tolist()) & ids[0]


def test_sample_ids_do_not_depend_on_where_the_folder_lies(flowers: Path, tmp_path: Path) -> None:
    before = load(flowers)
    flowers.rename(tmp_path / "elsewhere")
    after = load(tmp_path / "elsewhere")
    assert after.sample_ids.tolist() == before.sample_ids.tolist()
    assert after.fingerprint == before.fingerprint
    assert len(set(before.sample_ids.tolist())) == len(before)
    assert int(before.sample_ids.min()) >= 0


def test_nested_hidden_and_other_files(tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "cat" / "indoors", pixels(2))
    write_images(tmp_path / "train" / ".cache", pixels(1))
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "cat" / "._1.png").write_bytes(b"not an image either")
    data = load(tmp_path)
    write_images(tmp_path / "train" / "cat" / ".thumbnails", pixels(3))
    assert len(load(tmp_path)) == len(data) == 2
    assert data.class_names == ("cat",)


def test_links_that_lead_back_are_not_followed(flowers: Path) -> None:
    before = load(flowers)
    (flowers / "self").symlink_to(".")
    (flowers / "up").symlink_to("..")
    (flowers / "rose" / "self").symlink_to(".")
    (flowers / "rose" / "up").symlink_to("..")
    (flowers / "rose" / "absolute").symlink_to(flowers.parent)
    data = load(flowers)
    assert data.class_names == before.class_names
    assert data.sample_ids.tolist() == before.sample_ids.tolist()


def test_ordinary_links_are_followed(flowers: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    (linked / "train" / "plant").mkdir(parents=True)
    (linked / "train" / "plant" / "roses").symlink_to(flowers / "rose")
    (linked / "train" / "plant" / "again").symlink_to(flowers / "rose")  # each image once
    (linked / "train" / "tulip").symlink_to(flowers / "tulip")
    (linked / "test").symlink_to("train")
    assert len(load(linked)) == len(load(linked, "test")) == 60
    assert load(linked).class_names == ("plant", "tulip")


def test_a_farm_of_links_is_read_as_its_files(flowers: Path, tmp_path: Path) -> None:
    farm = tmp_path / "farm"
    for path in flowers.rglob("*.png"):
        link = farm / path.relative_to(flowers)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    assert load(farm).fingerprint == load(flowers).fingerprint


def test_file_names_need_not_be_utf8(tmp_path: Path) -> None:
    write_images(tmp_path / "cat", pixels(2))
    before = load(tmp_path, holdout=0)
    try:
        os.rename(tmp_path / "cat" / "1.png", os.fsencode(tmp_path / "cat") + b"/caf\xe9.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    for memory_limit in (0, 1 << 20):
        data = load(tmp_path, holdout=0, memory_limit=memory_limit)
        assert int(data.sample_ids[0]) == int(before.sample_ids[0])
        assert len(whole(data)[0]) == 2


def test_class_that_is_called_like_a_split(tmp_path: Path) -> None:
    for name in ("car", "bus", "train"):
        write_images(tmp_path / name, pixels(2))
    assert load(tmp_path, holdout=0).class_names == ("bus", "car", "train")


def test_folder_beside_those_of_splits_is_passed_over(tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "cat", pixels(2))
    write_images(tmp_path / "docs", pixels(1))
    assert len(load(tmp_path)) == 2


def test_fingerprint_follows_content_not_size_or_storage(flowers: Path) -> None:
    first = load(flowers).fingerprint
    assert load(flowers).fingerprint == first
    assert load(flowers, image_size=4).fingerprint == first
    assert load(flowers, memory_limit=0).fingerprint == first
    assert load(flowers, "test").fingerprint != first
    victim = load(flowers).sample_ids  # any image of the training split
    assert len(victim)
    paths = sorted(flowers.rglob("*.png"))
    content = {path: path.read_bytes() for path in paths}
    for path in paths:
        path.write_bytes(encoded(255 - pixels(1, seed=77)[0]))
        if load(flowers).fingerprint != first:
            break
        path.write_bytes(content[path])
    else:
        pytest.fail("no changed image changed the fingerprint")


def test_renaming_a_class_changes_the_fingerprint(flowers: Path) -> None:
    first = load(flowers).fingerprint
    (flowers / "tulip").rename(flowers / "tulipa")
    assert load(flowers).fingerprint != first


@pytest.mark.parametrize(("width", "height"), [(40, 20), (20, 40), (16, 16), (33, 17)])
def test_image_size_scales_the_shorter_side_and_cuts_the_centre(
    tmp_path: Path, width: int, height: int
) -> None:
    # Colour runs along the longer side, so the centre square has the middle values.
    ramp = np.linspace(0, 255, max(width, height))
    image = np.broadcast_to(ramp[:, None] if height > width else ramp, (height, width))
    image = np.repeat(image[..., None], 3, axis=2).astype(np.uint8)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(encoded(image))
    data = load(tmp_path, image_size=8, holdout=0)
    assert data.image_shape == (3, 8, 8)
    got = whole(data)[0][0, 0].float()
    assert got.mean() == pytest.approx(127.5, abs=4)
    step = 255 / (max(width, height) - 1) * min(width, height) / 8
    along = 0 if height > width else 1
    ends = got.select(along, -1).mean() - got.select(along, 0).mean()
    assert ends == pytest.approx(7 * step, abs=12)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    (tmp_path / "a").mkdir()
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.new(mode, (8, 8)).save(tmp_path / "a" / f"1.{suffix}")
    assert load(tmp_path, holdout=0).image_shape == (3, 8, 8)


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, :4] = 255  # stored: left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: upper half white
    (tmp_path / "a").mkdir()
    Image.fromarray(image).save(tmp_path / "a" / "1.png", exif=exif)
    upright = whole(load(tmp_path, holdout=0))[0][0, 0]
    assert upright[:4].min() == 255
    assert upright[4:].max() == 0


def test_small_data_lie_in_memory(flowers: Path) -> None:
    data = load(flowers)
    assert isinstance(data, MemoryImages)
    assert data.images.dtype == torch.uint8


def test_fingerprint_of_very_large_data_reads_only_sizes(
    flowers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckd.data.decode.FINGERPRINT_BYTES", 100)
    first = load(flowers).fingerprint
    assert load(flowers).fingerprint == first
    for path in flowers.rglob("*.png"):
        path.write_bytes(path.read_bytes() + b"\0")
    assert load(flowers).fingerprint != first


def test_a_long_thin_image_is_fitted_without_growing() -> None:
    thin = Image.fromarray(np.full((1, 60_000, 3), 77, np.uint8))
    fitted = fit(thin, 512)  # scaled before it is cropped it would take 47 GB
    assert fitted.size == (512, 512)
    assert np.asarray(fitted.resize((1, 1))).ravel().tolist() == [77, 77, 77]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Train", "Test"),
        ("train_data", "test_data"),
        ("train_images", "val_images"),
        ("ILSVRC2012_img_train", "ILSVRC2012_img_val"),
        ("cifar_train", "cifar_test"),
        ("train2017", "val2017"),
        ("train", "test_images"),
        ("train_data", "val imgs"),
    ],
)
def test_split_folders_with_more_words_than_the_splits_name(
    tmp_path: Path, train: str, test: str
) -> None:
    write_layout(tmp_path, f"{train}/cat", f"{train}/dog", f"{test}/cat")
    (tmp_path / "__MACOSX").mkdir()
    assert load(tmp_path).labels.tolist() == [0, 0, 1, 1]
    assert load(tmp_path, "test").labels.tolist() == [0, 0]
    assert load(tmp_path, "test").class_names == ("cat", "dog")


@pytest.mark.parametrize(
    "folders",
    [
        ("bullet-train", "test tube", "validator"),
        ("bullet-train", "test tube"),
        ("bullet-train/japan", "test tube/glass"),
        ("bullet-train/japan", "car", "test tube/glass"),
        ("Train", "bus", "car"),
    ],
)
def test_classes_with_a_splits_name_among_their_words(
    tmp_path: Path, folders: tuple[str, ...]
) -> None:
    classes = tuple(folder.partition("/")[0] for folder in folders)
    assert load(write_layout(tmp_path, *folders), holdout=0).class_names == classes


@pytest.mark.parametrize("above", ["ds", "ds/ds", "a/b/c"])
def test_split_folders_below_a_single_folder_are_found_and_named(
    tmp_path: Path, above: str
) -> None:
    splits = [f"{above}/{split}/{name}" for split in ("train", "val") for name in ("cat", "dog")]
    write_layout(tmp_path, *splits)
    for beside in ("docs", "__MACOSX/ds/train/cat"):
        (tmp_path / beside).mkdir(parents=True)
    for split in ("train", "test"):
        with pytest.warns(UserWarning, match=f"deeper: {tmp_path / above} is read"):
            data = load(tmp_path, split)
        inside = load(tmp_path / above, split)
        assert data.class_names == ("cat", "dog")
        assert data.sample_ids.tolist() == inside.sample_ids.tolist()
        assert data.fingerprint == inside.fingerprint


def test_class_folders_below_a_single_folder_are_pointed_out(tmp_path: Path) -> None:
    write_layout(tmp_path, "ds/cat", "ds/dog")
    with pytest.warns(UserWarning, match=rf"one class, 'ds'; .* 'cat', pass {tmp_path / 'ds'}"):
        assert load(tmp_path, holdout=0).class_names == ("ds",)


def test_images_beside_class_folders_are_pointed_out(tmp_path: Path) -> None:
    write_layout(tmp_path, "cat", "dog")
    (tmp_path / "9.PNG").write_bytes(encoded(pixels(1)[0]))
    with pytest.warns(UserWarning, match=r"left out \(1, such as '9.PNG'\)"):
        assert len(load(tmp_path, holdout=0)) == 4


def test_what_systems_and_editors_leave_is_passed_over(tmp_path: Path) -> None:
    write_layout(tmp_path, "cat", "dog", "@eaDir", "cat/@eaDir", "cat/.ipynb_checkpoints")
    write_images(tmp_path / "__MACOSX" / "cat", pixels(1))
    for name in ("Thumbs.db", "._0.png", "desktop.ini"):
        (tmp_path / "cat" / name).write_bytes(b"no image")
    (tmp_path / "cat" / "9.JPEG").write_bytes(encoded(pixels(1, seed=9)[0], "JPEG"))
    data = load(tmp_path, holdout=0)
    assert data.class_names == ("cat", "dog")
    assert data.labels.tolist() == [0, 0, 0, 1, 1]


def test_a_linked_file_is_read_once_in_its_class(flowers: Path) -> None:
    for name in ("again.png", "0 first.png"):
        (flowers / "rose" / name).symlink_to(flowers / "rose" / "0.png")
    assert len(load(flowers, holdout=0)) == 60


def test_copies_are_counted_and_named(flowers: Path) -> None:
    image = (flowers / "rose" / "3.png").read_bytes()
    for copy in ("rose/9999.png", "tulip/0.png"):
        (flowers / copy).write_bytes(image)
    for memory_limit in (0, 1 << 20):
        with pytest.warns(UserWarning, match="2 of 61 images are copies") as caught:
            load(flowers, holdout=0, memory_limit=memory_limit)
        (warning,) = caught
        assert f"{flowers / 'rose/9999.png'} of {flowers / 'rose/3.png'}" in str(warning.message)


def test_sets_without_copies_load_without_a_warning(flowers: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(flowers)


def test_class_folders_match_if_they_look_equal(tmp_path: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    write_layout(tmp_path, f"train/{composed}", "train/bar", f"test/{decomposed}")
    if len(list((tmp_path / "train").iterdir())) < 2:
        pytest.skip("this file system composes names")
    assert load(tmp_path).class_names == ("bar", composed)
    test = load(tmp_path, "test")
    assert test.class_names == ("bar", composed)
    assert test.labels.tolist() == [1, 1]


def test_home_folder(flowers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(flowers.parent))
    assert len(load("~/flowers", holdout=0)) == 60


def test_animated_and_transparent_images(tmp_path: Path) -> None:
    first = Image.new("RGB", (8, 8), (10, 20, 30))
    (tmp_path / "a").mkdir()
    more = {"save_all": True, "append_images": [Image.new("RGB", (8, 8))]}
    first.save(tmp_path / "a" / "1.gif", **more)
    first.save(tmp_path / "a" / "2.webp", lossless=True, **more)
    first.save(tmp_path / "a" / "3.png", **more)
    first.convert("P").save(tmp_path / "a" / "4.png", transparency=bytes(256))
    Image.fromarray(np.full((8, 8), 10, np.uint8)).save(tmp_path / "a" / "5.png", transparency=10)
    images = whole(load(tmp_path, holdout=0))[0]
    # The first frame, whatever its transparency.
    for image in images[:3]:
        assert image[:, 0, 0].tolist() == [10, 20, 30]
    assert images[4].unique().tolist() == [10]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train/train", "test/test"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("training_set/training_set", "test_set/test_set"),
    ],
)
def test_split_folders_that_hold_themselves(tmp_path: Path, train: str, test: str) -> None:
    classes = ("cat", "dog")
    write_layout(tmp_path, *(f"{split}/{c}" for split in (train, test) for c in classes))
    for split in ("train", "test"):
        with pytest.warns(UserWarning, match="is read: it is all that"):
            data = load(tmp_path, split)
        assert (len(data), data.class_names) == (4, classes)


@pytest.mark.filterwarnings("ignore:.* is read")
@pytest.mark.parametrize(
    "folders",
    [
        ("train", "test1"),
        ("train/train", "test1/test1"),
        ("train_images", "test_images"),
        ("train/unlabelled", "test/unlabeled"),
    ],
)
def test_splits_without_class_folders_are_no_classes(tmp_path: Path, folders) -> None:
    write_layout(tmp_path, *folders)
    for split in ("train", "test"):
        data = load(tmp_path, split)
        assert (data.class_names, data.labels.tolist()) == ((), [-1, -1])


def test_a_test_folder_without_labels_gives_way_to_validation(tmp_path: Path) -> None:
    write_layout(tmp_path, "train/cat", "train/dog", "val/cat", "val/dog", "test")
    with pytest.warns(UserWarning, match="test holds no class folders and is passed over"):
        data = load(tmp_path, "test")
    assert (len(data), data.class_names) == (4, ("cat", "dog"))


def test_a_folder_named_after_both_splits_is_held_out_from(tmp_path: Path) -> None:
    write_layout(tmp_path / "train_val_images", "cat", "dog")
    data = load(tmp_path / "train_val_images", holdout=0.0)
    assert (len(data), data.class_names) == (4, ("cat", "dog"))


def test_no_message_or_warning_has_control_characters(tmp_path: Path) -> None:
    """A terminal obeys them. The names themselves stay as they are."""
    odd = "a\x1b[31m\r\n\a\x9b\u202e\u2028b"
    write_images(tmp_path / odd / odd, pixels(3)[[0, 1, 1]])
    write_images(tmp_path / odd / "c", pixels(1, seed=1))
    write_images(tmp_path / "more" / odd, pixels(1))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert load(tmp_path / odd, holdout=0).class_names == (odd, "c")
        load(tmp_path, holdout=0)
    texts = [str(warning.message) for warning in warned]
    (tmp_path / odd / odd / "1.png").write_bytes(b"\x89PNG broken")
    names = np.array([odd, odd])
    np.savez(tmp_path / odd / "a.npz", images=pixels(3), labels=np.arange(3), class_names=names)
    for path in (tmp_path / odd, tmp_path / odd / "a.npz", tmp_path / odd / "nowhere"):
        with pytest.raises(DataError) as caught:
            load(path, holdout=0)
        texts.append(str(caught.value))
    assert len(texts) == 5
    for text in texts:
        assert text.replace("\n", "").isprintable()
        assert "a\\x1b[31m\\r\n\\x07\\x9b\\u202e\\u2028b" in text.replace("\\n", "\n")
