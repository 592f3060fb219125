"""Invalid models and weights."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ckd.models import (
    ModelError,
    Student,
    TeacherMap,
    class_names,
    create,
    load,
    load_student,
    prepare,
    save,
)
from tests.bad_input import Case
from tests.model_files import description, resealed

_VIT = "vit:patch=4,width=16,layers=1,heads=2"


def _create(spec: str, **options: Any) -> Callable[[Path], object]:
    return lambda _: create(spec, **{"num_classes": 2, "image_size": 8, **options})


def _weights(
    change: Callable[[dict[str, torch.Tensor]], object], spec: str = _VIT
) -> Callable[[Path], object]:
    """Load a ViT's weights into the model `spec` after `change(weights)`."""

    def call(tmp_path: Path) -> object:
        tensors = dict(create(_VIT, num_classes=2, image_size=8).state_dict())
        change(tensors)
        save_file(tensors, tmp_path / "w.safetensors")
        return load(spec, weights=tmp_path / "w.safetensors")

    return call


def _saved(tmp_path: Path) -> Path:
    save(create(_VIT, num_classes=2, image_size=8), tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def _truncated(tmp_path: Path) -> object:
    path = _saved(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    return load(path)


def _header_damaged(tmp_path: Path) -> object:
    path = _saved(tmp_path)
    save_file(load_file(path), path, metadata={"ckd_model": '{"spec": "vit"}'})
    return load(path)


def _other_format(tmp_path: Path) -> object:
    (tmp_path / "w.pth").write_bytes(b"not a pickle")
    return load("resnet20", weights=tmp_path / "w.pth")


def _not_tensors(tmp_path: Path) -> object:
    torch.save([1, 2, 3], tmp_path / "w.pth")
    return load("resnet20", weights=tmp_path / "w.pth")


def _checkpoint(key: Any, value: torch.Tensor) -> Callable[[Path], object]:
    """Load a ViT's weights from torch.save, with one entry replaced or added."""

    def call(tmp_path: Path) -> object:
        tensors = {**create(_VIT, num_classes=2, image_size=8).state_dict(), key: value}
        torch.save(tensors, tmp_path / "w.pt")
        return load(_VIT, weights=tmp_path / "w.pt")

    return call


def _file(name: str, content: bytes) -> Callable[[Path], object]:
    def call(tmp_path: Path) -> object:
        (tmp_path / name).write_bytes(content)
        return load(_VIT, weights=tmp_path / name)

    return call


def _damaged_checkpoint(tmp_path: Path) -> object:
    torch.save({"a": torch.zeros(3)}, tmp_path / "w.pt")
    content = (tmp_path / "w.pt").read_bytes()
    return _file("w.pt", content.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v9"))(tmp_path)


def _header(**changed: object) -> Callable[[Path], object]:
    """Load a saved model with other values in its header's description."""

    def call(tmp_path: Path) -> object:
        path = _saved(tmp_path)
        save_file(load_file(path), path, {"ckd_model": resealed(path, **changed)})
        return load(path)

    return call


def _compressed_checkpoint(tmp_path: Path) -> object:
    torch.save(create(_VIT, num_classes=2, image_size=8).state_dict(), tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_DEFLATED) as compressed,
    ):
        for name in plain.namelist():
            compressed.writestr(name, plain.read(name))
    return load(_VIT, weights=tmp_path / "w.pt")


def _header_renamed(tmp_path: Path) -> object:
    path = _saved(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"ckd_model"', b'"ckd_mobel"'))
    return load(_VIT, weights=path)


def _infinite(tmp_path: Path) -> object:
    model = create(_VIT, num_classes=2, image_size=8)
    torch.nn.init.constant_(model.get_parameter("norm.bias"), float("nan"))
    save(model, tmp_path / "m.safetensors")
    return load(tmp_path / "m.safetensors")


def _renamed(tmp_path: Path) -> object:
    return load(_VIT, weights=_saved(tmp_path).rename(tmp_path / "w.pt"))


def _misnamed(tmp_path: Path) -> object:
    torch.save({"a": torch.zeros(3)}, tmp_path / "w.safetensors")
    return load(_VIT, weights=tmp_path / "w.safetensors")


def _whole_model(tmp_path: Path) -> object:
    torch.save(create(_VIT, num_classes=2, image_size=8), tmp_path / "w.pt")
    return load(_VIT, weights=tmp_path / "w.pt")


def _foreign(tmp_path: Path) -> Path:
    save_file({"a": torch.zeros(2)}, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def _run_folder_without_student(tmp_path: Path) -> object:
    (tmp_path / "run").mkdir()
    return load(tmp_path / "run")


def _student(*teachers: TeacherMap) -> Student:
    return Student(create(_VIT, num_classes=None, image_size=8), teachers)


def _map(dim: int = 5) -> TeacherMap:
    return TeacherMap("clip", dim, weight=torch.nn.Parameter(torch.zeros(16, dim)))


def _map_described(**changed: object) -> Callable[[Path], object]:
    """Load a student with other values in its header's description of the map."""

    def call(tmp_path: Path) -> object:
        path = tmp_path / "m.safetensors"
        save(_student().model, path, teachers=[_map()])
        (about,) = description(path)["teachers"]
        text = resealed(path, teachers=[{**about, **changed}])
        save_file(load_file(path), path, {"ckd_model": text})
        return load_student(path)

    return call


def _images(images: torch.Tensor, in_channels: int = 3) -> Callable[[Path], object]:
    return lambda _: prepare(
        create(_VIT, num_classes=2, image_size=8, in_channels=in_channels), images
    )


CASES = [
    Case("unknown model", _create("vitt"), ModelError, ("unknown model 'vitt'", "first: vit,")),
    Case("ResNet of another depth", _create("resnet18"), ModelError,
         ("6n + 2", "timm:resnet18")),
    Case("unknown option", _create("vit:pach=2"), ModelError, ("option 'pach'", "first: patch")),
    Case("option without a value", _create("vit:patch"), ModelError, ("'patch'", "key=value")),
    Case("option that is no number", _create("vit:patch=two"), ModelError, ("'patch=two'",)),
    Case("option of very many digits", _create("vit:patch=" + "9" * 5000), ModelError,
         ("'vit:patch=999", "...'", "nine digits")),
    Case("ResNet of very many digits", _create("resnet" + "2" * 5000), ModelError,
         ("unknown model",)),
    Case("option given twice", _create("vit:patch=2,patch=4"), ModelError, ("patch", "twice")),
    Case("image size that patches do not fill", _create("vit:patch=3"), ModelError,
         ("image_size 8", "patch size 3", "vit:patch=2")),
    Case("width that heads do not divide", _create("vit:width=30,heads=4"), ModelError,
         ("width 30", "heads 4")),
    Case("no classes", _create("vit", num_classes=0), ModelError, ("num_classes", "at least 1")),
    Case("name missing", _create("timm:"), ModelError, ("timm:NAME",)),
    Case("pretrained student", _create("resnet20", pretrained=True), ModelError,
         ("no weights to download", "weights=FILE")),
    Case("no such Hugging Face folder", _create("hf:./no/such/folder"), ModelError,
         ("hf:./no/such/folder", "transformers could not make the model"), needs="transformers"),
    Case("teacher without weights", lambda _: load("resnet20"), ModelError,
         ("'resnet20'", "--teacher-weights")),
    Case("no such file or name", lambda _: load("resnt20"), ModelError,
         ("unknown model 'resnt20'", "first: resnet20", "nor is there a file")),
    Case("weights file missing", lambda p: load("resnet20", weights=p / "no.safetensors"),
         ModelError, ("no.safetensors", "cannot be read")),
    Case("weights of another kind of model", _weights(lambda t: None, "resnet20"), ModelError,
         ("w.safetensors", "no 'conv1.weight'", "'resnet20'")),
    Case("weights of another width", _weights(lambda t: None, _VIT.replace("16", "32")),
         ModelError, ("w.safetensors", "of another shape", "[64] for [128]")),
    Case("weights with one missing", _weights(lambda t: t.pop("norm.bias")), ModelError,
         ("w.safetensors", "1 missing (norm.bias)")),
    Case("weights with one too many", _weights(lambda t: t.update(x=torch.zeros(1))), ModelError,
         ("w.safetensors", "1 unexpected (x)")),
    Case("weights that are not a state dict", _not_tensors, ModelError, ("w.pth", "state dict")),
    Case("weights of another format", _other_format, ModelError, ("w.pth", "cannot be read")),
    Case("text as a checkpoint", _file("w.pt", b"hello there"), ModelError,
         ("w.pt", "cannot be read by torch.load with weights_only=True", "state_dict()")),
    Case("text as safetensors", _file("w.safetensors", b"hello there"), ModelError,
         ("w.safetensors", "cannot be read as safetensors")),
    Case("Git LFS pointer", _file("w.pt", b"version https://git-lfs.github.com/spec/v1\n"),
         ModelError, ("w.pt", "Git LFS pointer", "git lfs pull")),
    Case("safetensors under another suffix", _renamed, ModelError,
         ("w.pt", "rename it to end in .safetensors")),
    Case("checkpoint under safetensors' suffix", _misnamed, ModelError,
         ("w.safetensors", "rename it to end in .pt")),
    Case("checkpoint of a whole model", _whole_model, ModelError,
         ("w.pt", "weights_only=True", "save model.state_dict()")),
    Case("damaged checkpoint", _damaged_checkpoint, ModelError, ("w.pt", "cannot be read")),
    Case("state dict with a number as a name", _checkpoint(3, torch.zeros(1)), ModelError,
         ("w.pt", "state dict")),
    Case("weights of one dimension", _checkpoint("position", torch.zeros(3)), ModelError,
         ("w.pt", "too few dimensions", _VIT)),
    Case("complex weights", _checkpoint("position", torch.zeros(1, 5, 16, dtype=torch.cfloat)),
         ModelError, ("position", "real numbers", "complex64")),
    Case("sparse weights", _checkpoint("position", torch.zeros(1, 5, 16).to_sparse()),
         ModelError, ("position", "dense", "sparse_coo")),
    Case("weights without values",
         _checkpoint("position", torch.zeros(1, 5, 16, device="meta")), ModelError,
         ("position", "no values", "meta")),
    Case("weights that repeat a value",
         _checkpoint("position", torch.zeros(1).expand(1, 1 << 40, 16)), ModelError,
         ("w.pt", "position", "larger than its file", "contiguous()")),
    Case("weights of integers", _checkpoint("position", torch.zeros(1, 5, 16, dtype=torch.int32)),
         ModelError, ("w.pt", "1 of another type", "position torch.int32 for torch.float32")),
    Case("compressed checkpoint", _compressed_checkpoint, ModelError,
         ("w.pt", "compressed archive")),
    Case("weights that are not finite", _infinite, ModelError,
         ("m.safetensors", "cannot be a teacher", "not finite")),
    Case("header under another name", _header_renamed, ModelError,
         ("m.safetensors", "header is damaged")),
    Case("images of a million pixels a side", _create("vit", image_size=1_000_000), ModelError,
         ("image_size", "at most 4,096", "1000000")),
    Case("header with a number as the model", _header(spec=5), ModelError,
         ("m.safetensors", "header", "spec is 5")),
    Case("header with text as a number", _header(num_classes="3"), ModelError,
         ("m.safetensors", "header", "num_classes is '3'")),
    Case("header with no list of class names", _header(class_names=3), ModelError,
         ("m.safetensors", "header", "class_names is 3")),
    Case("model file cut short", _truncated, ModelError, ("m.safetensors", "cannot be read")),
    Case("model file with a damaged header", _header_damaged, ModelError,
         ("m.safetensors", "damaged", "num_classes")),
    Case("file that does not say its model", lambda p: load(_foreign(p)), ModelError,
         ("w.safetensors", "does not say which model", "weights=")),
    Case("class names of such a file", lambda p: class_names(_foreign(p)), ModelError,
         ("does not say which model",)),
    Case("run folder without a student", _run_folder_without_student, ModelError,
         ("run", "no student.safetensors")),
    Case("other number of classes than stored", lambda p: load(_saved(p), num_classes=3),
         ModelError, ("m.safetensors", "num_classes 2", "3 was asked for")),
    Case("weights for a path", lambda p: load(_saved(p), weights="w.pth"), ModelError,
         ("m.safetensors", "weights=w.pth")),
    Case("class names of another number",
         lambda p: save(create(_VIT, num_classes=2, image_size=8), p / "m", class_names=["a"]),
         ModelError, ("1 class names", "2 classes")),
    Case("rows of a teacher without a map", lambda _: _student().comparable(torch.zeros(2, 5)),
         ModelError, ("no map to a teacher", "--method embed-kd")),
    Case("rows of another teacher", lambda _: _student(_map()).comparable(torch.zeros(2, 4)),
         ModelError, ("[N, 5]", "'clip'", "[2, 4]")),
    Case("teacher that a student has not",
         lambda _: _student(_map()).comparable(torch.zeros(2, 5), 1),
         ModelError, ("below 1", "'clip'", "got 1")),
    Case("logits of a student without a class head",
         lambda _: _student().logits(torch.zeros(1, 3, 8, 8)), ModelError,
         (_VIT, "no class head", "trained without labels")),
    Case("image in channels first to a student",
         lambda _: _student().preprocess(torch.zeros(3, 9, 13, dtype=torch.uint8)), ModelError,
         ("[H, W, 3]", "torch.uint8 of shape [3, 9, 13]", "add the batch's dimension")),
    Case("path to a student", lambda _: _student().preprocess("photo.png"), ModelError,
         ("PIL images", "got str")),
    Case("16-bit picture to a student",
         lambda _: _student().preprocess(Image.new("I;16", (9, 9))), ModelError,
         ("'I;16'", "8 bits")),
    Case("map of another width than the student", lambda p: save(
        create("resnet8", num_classes=2, image_size=8), p / "m", teachers=[_map()]), ModelError,
         ("'clip'", "width 16", "resnet8 has width 64")),
    Case("map without a head or a projection", lambda _: TeacherMap("clip", 5), ModelError,
         ("width 5", "a head, a projection or both")),
    Case("header with a head that its file lacks", _map_described(head="linear"), ModelError,
         ("m.safetensors does not fit 'teacher 0'", "missing", "head.net.weight")),
    Case("header with another width of a teacher", _map_described(dim=6), ModelError,
         ("m.safetensors does not fit 'teacher 0'", "weight [16, 5] for [16, 6]")),
    Case("header with text as a teacher's width", _map_described(dim="5"), ModelError,
         ("m.safetensors", "header", "teachers is")),
    Case("student of a file that is none", lambda p: load_student(_foreign(p)), ModelError,
         ("w.safetensors", "does not say which model")),
    Case("images of floats to prepare", _images(torch.zeros(1, 3, 8, 8)), ModelError,
         ("uint8", "float32")),
    Case("images of other channels",
         _images(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), in_channels=1), ModelError,
         ("takes 1 channels", "images have 3")),
    Case("images of another size to the model",
         lambda _: create(_VIT, num_classes=2, image_size=8)(torch.zeros(1, 3, 12, 12)),
         ModelError, ("3, 8, 8", "[1, 3, 12, 12]", "prepare")),
]  # fmt: skip
