"""Invalid data sets, and invalid arguments of ckd.data."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ckd.data import Augment, DataError, MemoryImages, load, step_generator
from tests.bad_input import Case
from tests.image_files import encoded, pixels, write_images, write_layout, write_parquet


def _folder(change: Callable[[Path], object], **options: Any) -> Callable[[Path], object]:
    """Load an image folder of two classes after `change(folder)`."""

    def call(tmp_path: Path) -> object:
        for name in ("cat", "dog"):
            write_images(tmp_path / "pets" / name, pixels(3))
        change(tmp_path / "pets")
        return load(tmp_path / "pets", **{"holdout": 0.0, **options})

    return call


def _parquet(images: list[bytes | None], labels: list[int] | None, **options: Any) -> Any:
    def call(tmp_path: Path) -> object:
        write_parquet(tmp_path / "train.parquet", images, labels, **options)
        return load(tmp_path)

    return call


def _npz(**arrays: np.ndarray) -> Callable[[Path], object]:
    def call(tmp_path: Path) -> object:
        np.savez(tmp_path / "set.npz", **arrays)
        return load(tmp_path / "set.npz")

    return call


def _damaged_parquet(tmp_path: Path) -> object:
    path = write_parquet(tmp_path / "train.parquet", _PNGS, [0, 1, 0])
    path.write_bytes(path.read_bytes()[:-20])
    return load(tmp_path)


def _truncated(folder: Path) -> None:
    path = folder / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[:60])


def _two_class_lists(tmp_path: Path) -> object:
    write_parquet(tmp_path / "train-0.parquet", _PNGS, [0, 1, 0], class_names=["a", "b"])
    write_parquet(tmp_path / "train-1.parquet", _PNGS, [0, 1, 0], class_names=["a", "c"])
    return load(tmp_path)


def _extra_test_class(tmp_path: Path) -> object:
    write_images(tmp_path / "train" / "cat", pixels(1))
    write_images(tmp_path / "test" / "dog", pixels(1))
    return load(tmp_path, "test")


def _train_only(tmp_path: Path) -> object:
    write_images(tmp_path / "train" / "cat", pixels(1))
    return load(tmp_path, "test")


def _digits(**options: Any) -> Callable[[Path], object]:
    return lambda _: load("digits", **options)


def _memory(**changed: Any) -> Callable[[Path], object]:
    parts = {
        "images": torch.zeros(3, 1, 2, 2, dtype=torch.uint8),
        "labels": torch.tensor([0, 1, 1]),
        "class_names": ["a", "b"],
    } | changed

    return lambda _: MemoryImages(parts["images"], parts["labels"], **{
        key: value for key, value in parts.items() if key not in ("images", "labels")
    })  # fmt: skip


def _renamed_npy(tmp_path: Path) -> object:
    np.save(tmp_path / "one.npy", pixels(3))
    return load((tmp_path / "one.npy").rename(tmp_path / "one.npz"))


def _damaged_npz(old: bytes, new: bytes) -> Callable[[Path], object]:
    """Load an .npz file with the bytes `old` replaced by `new`, of the same length."""

    def call(tmp_path: Path) -> object:
        path = tmp_path / "set.npz"
        np.savez(path, images=pixels(3), labels=_LABELS)
        content = path.read_bytes()
        assert old in content
        path.write_bytes(content.replace(old, new))
        return load(path)

    return call


def _class_not_utf8(folder: Path) -> None:
    os.rename(folder / "cat", os.fsencode(folder) + b"/caf\xe9")


def _dangling(folder: Path) -> None:
    (folder / "dog" / "9.png").symlink_to(folder / "nowhere.png")


def _special(place: str, make: Callable[[Path], object] = os.mkfifo) -> Callable[[Path], object]:
    """Load an image folder, or the file at `place`, after `make` at that place."""

    def call(tmp_path: Path) -> object:
        write_images(tmp_path / "cat", pixels(2))
        make(tmp_path / place)
        return load(tmp_path if "/" in place else tmp_path / place, holdout=0.0)

    return call


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(path.parent)  # the path of a socket has at most 107 bytes
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


def _hub(make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Load a cache of Hugging Face's hub after `make` of its refs/main."""

    def call(tmp_path: Path) -> object:
        write_images(tmp_path / "snapshots" / "1111" / "cat", pixels(2))
        (tmp_path / "blobs").mkdir()
        (tmp_path / "refs").mkdir()
        make(tmp_path / "refs" / "main")
        return load(tmp_path, holdout=0.0)

    return call


def _sparse(size: int) -> Callable[[Path], object]:
    return lambda path: (path.touch(), os.truncate(path, size))


def _link(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


def _unlabelled_alone(tmp_path: Path) -> object:
    return load(write_layout(tmp_path, "unlabelled"), "test")


def _empty_split(tmp_path: Path) -> object:
    write_images(tmp_path / "test" / "cat", pixels(1))
    (tmp_path / "train").mkdir()
    return load(tmp_path)


def _layout(*folders: str) -> Callable[[Path], object]:
    return lambda tmp_path: load(write_layout(tmp_path, *folders))


def _configurations(*names: str) -> Callable[[Path], object]:
    def call(tmp_path: Path) -> object:
        for name in names:
            write_parquet(tmp_path / name, _PNGS, [0, 1, 0])
        return load(tmp_path)

    return call


def _columns(*names: str) -> Callable[[Path], object]:
    """Load a parquet file whose columns of these names hold images if they are called so."""

    def call(tmp_path: Path) -> object:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = [pa.array(_PNGS if name.startswith("im") else [0, 1, 0]) for name in names]
        table = pa.Table.from_arrays(columns, names=list(names))
        pq.write_table(table, tmp_path / "train.parquet")
        return load(tmp_path)

    return call


def _pointer(name: str) -> Callable[[Path], object]:
    """Load a file that git lfs has not fetched."""

    def call(tmp_path: Path) -> object:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        return load(path if path.parent == tmp_path else tmp_path, holdout=0.0)

    return call


def _text_file(tmp_path: Path) -> object:
    (tmp_path / "set.csv").write_text("a,b")
    return load(tmp_path / "set.csv")


def _empty_folder(tmp_path: Path) -> object:
    (tmp_path / "empty").mkdir()
    return load(tmp_path / "empty")


_PNGS: list[bytes | None] = [encoded(image) for image in pixels(3)]
_LABELS = np.array([0, 1, 0])

CASES = [
    Case("unknown data set", lambda _: load("digit"), DataError,
         ("unknown data set 'digit'", "nearest first: digits", "no file or folder")),
    Case("unknown split", _digits(split="tset"), DataError, ("split 'tset'", "first: test")),
    Case("image size zero", _digits(image_size=0), DataError, ("image_size", "at least 1", "0")),
    Case("holdout of one", _digits(holdout=1.0), DataError, ("holdout", "below 1", "1.0")),
    Case("file of another kind", _text_file, DataError, ("set.csv", ".parquet nor an .npz")),
    Case("empty folder", _empty_folder, DataError, ("empty", "no class folders", "cat")),
    Case("class folder without images", _folder(lambda f: (f / "emu").mkdir()), DataError,
         ("emu", "holds no images", ".png", "remove the class folder")),
    Case("damaged image file", _folder(lambda f: (f / "cat/2.png").write_bytes(b"junk")),
         DataError, ("cat/2.png", "cannot be read as an image")),
    Case("truncated image file", _folder(_truncated), DataError, ("dog/1.png", "cannot be read")),
    Case("empty image file", _folder(lambda f: (f / "cat/0.png").write_bytes(b"")), DataError,
         ("cat/0.png", "cannot be read as an image")),
    Case("images of two sizes",
         _folder(lambda f: (f / "dog/0.png").write_bytes(encoded(pixels(1, size=9)[0]))),
         DataError, ("dog/0.png is 9 x 9", "others are 8 x 8", "--image-size")),
    Case("images of 16 bits",
         _folder(lambda f: (f / "cat/0.png").write_bytes(encoded(np.ones((8, 8), np.uint16)))),
         DataError, ("cat/0.png", "'I;16'", "8 bits")),
    Case("nothing held out", _folder(lambda f: None, split="test"), DataError,
         ("holdout 0.0", "none of the 6 images", "test split")),
    Case("training folder without a test folder", _train_only, DataError,
         ("'train'", "none for the test split", "held out")),
    Case("class of the test folder unknown", _extra_test_class, DataError,
         ("class folders", "has not: dog")),
    Case("class folder whose name is not UTF-8", _folder(_class_not_utf8), DataError,
         ("pets", "caf\\xe9", "not UTF-8", "rename")),
    Case("dangling link in a streamed folder", _folder(_dangling, memory_limit=0), DataError,
         ("dog/9.png", "cannot be read", "No such file")),
    Case("dangling link in a folder", _folder(_dangling), DataError,
         ("dog/9.png", "cannot be read")),
    Case("FIFO among images", _special("cat/x.png"), DataError,
         ("cat/x.png", "cannot be read", "a FIFO, not a regular file", "remove it")),
    Case("link to a device among images", _special("cat/x.png", _link("/dev/zero")), DataError,
         ("cat/x.png", "a device, not a regular file")),
    Case("socket among images", _special("cat/x.png", _socket), DataError,
         ("cat/x.png", "cannot be read")),
    Case("FIFO in a streamed folder", _folder(lambda f: os.mkfifo(f / "cat" / "x.png"),
         memory_limit=0), DataError, ("cat/x.png", "a FIFO, not a regular file")),
    Case("FIFO in place of an npz", _special("x.npz"), DataError, ("x.npz", "a FIFO")),
    Case("device in place of an npz", _special("x.npz", _link("/dev/zero")), DataError,
         ("x.npz", "a device, not a regular file")),
    Case("FIFO in place of a parquet", _special("x.parquet"), DataError, ("x.parquet", "a FIFO")),
    Case("FIFO among parquet files", _special("cat/x.parquet"), DataError,
         ("cat/x.parquet", "a FIFO")),
    Case("link to a device among parquet files", _special("cat/x.parquet", _link("/dev/zero")),
         DataError, ("cat/x.parquet", "a device, not a regular file")),
    Case("FIFO of another kind", _special("x"), DataError, ("/x: ", "a FIFO, not a regular file")),
    Case("FIFO in the hub's cache", _hub(os.mkfifo), DataError, ("refs/main", "a FIFO")),
    Case("device in the hub's cache", _hub(_link("/dev/zero")), DataError,
         ("refs/main", "a device")),
    Case("large revision in the hub's cache", _hub(_sparse(1 << 33)), DataError,
         ("refs/main", "8,589,934,592 bytes", "at most 4,096")),
    Case("huge file among images", _special("cat/x.png", _sparse(1 << 33)), DataError,
         ("cat/x.png", "8,589,934,592 bytes", "at most 603,979,776", "--max-image-pixels")),
    Case("too many pixels", _folder(lambda f: None, max_pixels=63), DataError,
         ("cat/0.png: 8 x 8 pixels", "more than 63", "max_pixels (--max-image-pixels)")),
    Case("pixel limit of zero", _digits(max_pixels=0), DataError, ("max_pixels", "at least 1")),
    Case("empty split folder", _empty_split, DataError,
         ("train", "no class folders and no images")),
    Case("dangling link in place of a class", _folder(lambda f: (f / "emu").symlink_to(f / "gone")),
         DataError, ("emu", "link to nothing", "mend or remove")),
    Case("two folders for one split", _layout("train/cat", "Train/cat", "test/cat"), DataError,
         ("'Train' and 'train'", "remove or rename one")),
    Case("two names for one split", _layout("train/cat", "training/cat", "test/cat"), DataError,
         ("train and training", "same split")),
    Case("two data sets in one folder",
         _layout("cifar_train/a", "cifar_test/a", "mnist_train/b", "mnist_test/b"), DataError,
         ("two folders for one split", "cifar_test", "mnist_test")),
    Case("two data sets below one folder",
         _layout("cifar/train/a", "cifar/test/a", "mnist/train/b", "mnist/test/b"), DataError,
         ("/cifar, ", "/mnist", "pass one")),
    Case("splits below the classes", _layout("cat/train", "cat/test", "dog/train", "dog/test"),
         DataError, ("/cat, ", "/dog", "put the splits above", "train/cat")),
    Case("two folders without labels", _layout("cat", "unlabelled", "Unlabeled"), DataError,
         ("several folders for images without labels", "Unlabeled and unlabelled", "into one")),
    Case("class below the folder without labels", _layout("cat", "unlabelled/cat"), DataError,
         ("unlabelled/cat is named after a class", "move them", "rename 'cat'")),
    Case("empty folder without labels", _folder(lambda f: (f / "unlabelled").mkdir()), DataError,
         ("unlabelled holds no images", "add some or remove")),
    Case("folder without labels of which nothing is held out", _unlabelled_alone, DataError,
         ("no images of the test split", "pass that folder")),
    Case("class folders that look equal", _layout("caf\u00e9", "cafe\u0301"), DataError,
         ("'caf\\xe9'", "'cafe\\u0301'", "look equal", "rename one")),
    Case("image that is a Git LFS pointer", _pointer("cat/1.png"), DataError,
         ("cat/1.png", "Git LFS pointer", "git lfs pull")),
    Case("parquet that is a Git LFS pointer", _pointer("train.parquet"), DataError,
         ("train.parquet", "Git LFS pointer", "git lfs pull")),
    Case("npz that is a Git LFS pointer", _pointer("set.npz"), DataError,
         ("set.npz", "Git LFS pointer", "git lfs pull")),
    Case("several configurations of parquet files",
         _configurations("partition_1/train-0.parquet", "partition_2/train-0.parquet"), DataError,
         ("train files in 2 folders", "partition_1, partition_2", "pass one of the folders")),
    Case("several configurations without splits", _configurations("a/0.parquet", "b/0.parquet"),
         DataError, ("files in 2 folders", "(a, b)", "pass one of the folders")),
    Case("parquet files of Train and train",
         _configurations("Train/0.parquet", "train/0.parquet"), DataError, ("(Train, train)",)),
    Case("parquet files of train and training",
         _configurations("train.parquet", "training.parquet"), DataError, ("train and training",)),
    Case("parquet with two image columns", _columns("img", "image", "label"), DataError,
         ("train.parquet", "2 image columns", "img and image", "remove or rename")),
    Case("parquet with two label columns", _columns("img", "label", "fine_label"), DataError,
         ("train.parquet", "2 label columns", "label and fine_label", "remove or rename")),
    Case("parquet with one label column twice", _columns("img", "label", "label"), DataError,
         ("train.parquet", "2 label columns", "label and label")),
    Case("parquet with labels that are no class indices", _parquet(_PNGS, [0, 10**9, 5]),
         DataError, ("largest label is 1000000000 in 3 rows", "class indices", "class names")),
    Case("parquet without an image column",
         _parquet(_PNGS, [0, 1, 0], image_column="picture"), DataError,
         ("train.parquet", "no image column", "img, image", "found picture, label")),
    Case("parquet without a label column",
         _parquet(_PNGS, [0, 1, 0], label_column="klass"), DataError,
         ("train.parquet", "no label column", "found img, klass")),
    Case("parquet with a damaged image", _parquet([*_PNGS[:2], b"junk"], [0, 1, 0]), DataError,
         ("train.parquet, row 2", "cannot be read as an image")),
    Case("parquet with a missing image", _parquet([_PNGS[0], None], [0, 1]), DataError,
         ("train.parquet, row 1", "no bytes")),
    Case("parquet with a negative label", _parquet(_PNGS, [0, -2, 0]), DataError,
         ("label -2 of row 1", "outside 0..0", "-1 where they are unknown")),
    Case("parquet with a label column of another name by its feature",
         _parquet(_PNGS, [0, 1, 0], label_column="breed", class_names=["a", "b"]), DataError,
         ("no label column", "found img, breed", "or leave it out")),
    Case("parquet with a label beyond the class names",
         _parquet(_PNGS, [0, 1, 7], class_names=["a", "b"]), DataError,
         ("label 7 of row 2", "outside 0..1")),
    Case("parquet with text labels", _parquet(_PNGS, ["a", "b", "a"]), DataError,
         ("'label'", "integer class indices", "string")),
    Case("parquet that is cut short", _damaged_parquet, DataError,
         ("train.parquet", "cannot be read as a parquet file")),
    Case("parquet shards with different classes", _two_class_lists, DataError,
         ("train-0.parquet", "train-1.parquet", "different class names")),
    Case("npz with floating-point images", _npz(images=pixels(3) / 255, labels=_LABELS),
         DataError, ("set.npz", "uint8", "float64")),
    Case("npz with other arrays", _npz(pictures=pixels(3), labels=_LABELS), DataError,
         ("set.npz", "images and labels", "found pictures, labels")),
    Case("npz with labels of another name", _npz(images=pixels(3), targets=_LABELS), DataError,
         ("set.npz", "no array labels for images, but targets", "call it labels, or remove it")),
    Case("npz with labels of another name for one split",
         _npz(x_train=pixels(3), y=_LABELS, x_test=pixels(3), y_test=_LABELS), DataError,
         ("no array y_train for x_train, but y;",)),
    Case("npz with labels below -1", _npz(images=pixels(3), labels=_LABELS - 2), DataError,
         ("label -2 of row 0", "of a set without classes")),
    Case("npz with too few labels", _npz(images=pixels(3), labels=_LABELS[:2]), DataError,
         ("set.npz", "shape (3,)", "(2,)")),
    Case("npz with five channels",
         _npz(images=np.zeros((3, 8, 8, 5), np.uint8), labels=_LABELS), DataError,
         ("set.npz", "1 or 3 channels", "(3, 8, 8, 5)")),
    Case("npz that needs pickle", _npz(images=pixels(3), labels=np.array([{}, {}, {}])),
         DataError, ("set.npz", "cannot be read", "allow_pickle")),
    Case("npz with class names as objects",
         _npz(images=pixels(3), labels=_LABELS, class_names=np.array(["a", "b"], object)),
         DataError, ("set.npz", "'class_names'", "dtype other than object", "str")),
    Case("npz with class names that look equal",
         _npz(images=pixels(3), labels=_LABELS, class_names=np.array(["\u00e9", "e\u0301"])),
         DataError, ("set.npz", "class names", "look equal")),
    Case("npz with two arrays for one split",
         _npz(train_images=pixels(3), train_labels=_LABELS, x_train=pixels(3), y_train=_LABELS),
         DataError, ("set.npz", "train_images and x_train", "remove or rename")),
    Case("npz with labels that are no class indices",
         _npz(images=pixels(3), labels=_LABELS * 10**9), DataError,
         ("set.npz", "largest label is 1000000000 in 3 rows", "class indices", "class names")),
    Case("npz with class names that are not UTF-8",
         _npz(images=pixels(3), labels=_LABELS, class_names=np.array([b"caf\xe9", b"bar"])),
         DataError, ("set.npz", "class_names", "not UTF-8")),
    Case("npy that was renamed npz", _renamed_npy, DataError, ("one.npz", ".npy", "savez")),
    Case("npz with an unclosed header", _damaged_npz(b"'shape': (3, 8,", b"'shape': (3, 8("),
         DataError, ("set.npz", "cannot be read")),
    Case("npz of an unknown compression", _damaged_npz(b"PK\x01\x02\x2d\x03\x2d\x00\x00\x00\x00",
         b"PK\x01\x02\x2d\x03\x2d\x00\x00\x00\x63"), DataError, ("set.npz", "cannot be read")),
    Case("memory images of floats", _memory(images=torch.zeros(3, 1, 2, 2)), DataError,
         ("images", "uint8", "torch.float32")),
    Case("label out of range", _memory(labels=torch.tensor([0, 2, 1])), DataError,
         ("label 2 of row 1", "outside 0..1")),
    Case("labels of floats", _memory(labels=torch.zeros(3)), DataError,
         ("labels", "int64", "torch.float32")),
    Case("sample id twice", _memory(sample_ids=torch.tensor([5, 6, 5])), DataError,
         ("sample id 5", "more than once")),
    Case("batch size zero", lambda _: load("digits").batches(torch.arange(3), 0), DataError,
         ("batch_size", "at least 1")),
    Case("order beyond the data",
         lambda _: load("digits", "test").batches(torch.tensor([0, 360]), 4), IndexError,
         ("0..360", "rows 0..359")),
    Case("order of floats", lambda _: load("digits").batches(torch.zeros(3), 4), DataError,
         ("order", "int64", "torch.float32")),
    Case("negative crop padding", lambda _: Augment(-1), DataError, ("crop_padding", "-1")),
    Case("augmenting floats",
         lambda _: Augment()(torch.zeros(2, 3, 4, 4), step_generator(0, 0, "cpu")), DataError,
         ("images", "uint8", "float32")),
]  # fmt: skip
