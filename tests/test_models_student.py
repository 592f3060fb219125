"""Students with their maps to teachers: what a file keeps of them, and what they compute."""

from __future__ import annotations

import copy
import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import ckd
from ckd._fit import fit
from ckd.losses import TeacherSpaceHead
from ckd.models import (
    ModelError,
    Student,
    TeacherMap,
    create,
    load,
    load_student,
    save,
    weights_hash,
)
from ckd.models.description import checksum
from tests.model_files import NAMES, SPECS, description, resealed

W, D = 16, 12  # widths of the student and of the teacher


def teacher_map(head: str | None = "linear", projection: str | None = None, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(5)

    def numbers(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, generator=generator))

    dim, name = options.pop("dim", D), options.pop("name", "a teacher")
    parts: dict[str, Any] = {}
    if head is not None:
        torch.manual_seed(2)
        options = {"mean": torch.linspace(-3, 4, dim), "sigma": 0.5, **options}
        parts["head"] = TeacherSpaceHead(W, dim, head, **options)
    if projection is not None:
        parts["weight"] = numbers(W, dim)
        parts["bias"] = numbers(W) if projection == "affine" else None
    return TeacherMap(name, dim, **parts)


MAPS: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "linear head": [{}],
    "mlp": [{"head": "mlp"}],
    "narrow mlp": [{"head": "mlp", "hidden": 3}],
    "projection": [{"head": None, "projection": "affine"}],
    "projection without a bias": [{"head": None, "projection": "linear"}],
    "both": [{"projection": "affine"}],
    "several": [{"name": ""}, {"head": None, "projection": "affine", "dim": 5}, {"head": "mlp"}],
}


def student_file(path: Path, maps: list[dict[str, Any]], num_classes: int | None = 3) -> Student:
    torch.manual_seed(1)
    model = create(SPECS["vit"], num_classes=num_classes, image_size=8)
    teachers = [teacher_map(**one) for one in maps]
    save(model, path, class_names=NAMES if num_classes else (), teachers=teachers)
    return Student(model, teachers).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", MAPS)
def test_a_student_comes_back_whole(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "student.safetensors"
    saved = student_file(path, MAPS[kind])
    x, rows = torch.randn(4, 3, 8, 8), torch.randn(6, D).half()
    for source in (path, tmp_path, str(tmp_path)):
        student = ckd.load_student(source)
        assert isinstance(student, ckd.Student)
        assert student.class_names == NAMES
        assert weights_hash(student) == weights_hash(saved)
        told = [(one.name, one.dim) for one in student.teachers]
        assert told == [(one.name, one.dim) for one in saved.teachers]
        assert not student.training
        assert not any(parameter.requires_grad for parameter in student.parameters())
        assert torch.equal(student(x), saved(x))
        assert torch.equal(student.features(x), saved.model(x).embedding)
        assert torch.equal(student.logits(x), saved.model(x).logits)
        for number in range(len(MAPS[kind])):
            of = rows[:, : student.teachers[number].dim]
            assert torch.equal(student.comparable(of, number), saved.comparable(of, number))
            assert torch.equal(student.embedding(x, number), saved.embedding(x, number))


@pytest.mark.parametrize("kind", MAPS)
def test_the_plain_model_is_loaded_from_the_same_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m.safetensors"
    saved = student_file(path, MAPS[kind])
    for options in ({"source": path}, {"source": SPECS["vit"], "weights": path}):
        assert weights_hash(load(**options)) == weights_hash(saved.model)
    again = load_student(SPECS["vit"], weights=path)
    assert weights_hash(again) == weights_hash(saved)


def test_equal_students_have_equal_files_and_a_plain_one_says_nothing_of_maps(
    tmp_path: Path,
) -> None:
    for kind, maps in MAPS.items():
        for name in ("a", "b"):
            student_file(tmp_path / name, maps)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        assert ("teachers" in description(tmp_path / "a")) == (kind != "none")


def double(module: Any) -> Any:
    return copy.deepcopy(module).double()


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_with_a_head_the_embedding_lies_in_the_teachers_space(tmp_path: Path, kind: str) -> None:
    student = student_file(tmp_path / "m", [{"head": kind, "projection": "affine"}])
    features = torch.randn(5, W)
    head = student.teachers[0].head
    assert head is not None
    expected = head.mean.double() + 0.5 * double(head.net)(features.double())
    torch.testing.assert_close(
        student.to_embedding(features).double(), expected, rtol=1e-5, atol=1e-5
    )
    rows = torch.randn(7, D).half()
    assert torch.equal(student.comparable(rows), rows.float())  # the projection is not used


def test_with_a_projection_rows_are_brought_to_the_student(tmp_path: Path) -> None:
    student = student_file(tmp_path / "m", [{"head": None, "projection": "affine"}])
    features, rows = torch.randn(5, W), torch.randn(7, D).half()
    assert student.to_embedding(features) is features
    one = student.teachers[0]
    assert one.weight is not None
    assert one.bias is not None
    expected = rows.double() @ one.weight.double().T + one.bias.double()
    torch.testing.assert_close(student.comparable(rows).double(), expected, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(student.comparable(rows), one.comparable(rows.float()))
        assert student.comparable(rows).dtype == torch.float32
    # The cosines are those of the contrastive loss.
    found = ckd.top_k(features, student.comparable(rows), 3)
    assert torch.equal(found.rows, ckd.top_k(features, rows, 3, one.weight, one.bias).rows)


def test_rows_come_to_the_students_device() -> None:
    model = create(SPECS["vit"], num_classes=3, image_size=8)
    student = Student(model, [teacher_map()]).to("meta")
    assert student.comparable(torch.zeros(2, D)).device.type == "meta"


def test_without_a_map_the_embedding_is_the_students_own(tmp_path: Path) -> None:
    student = student_file(tmp_path / "m", [], num_classes=None)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(student(x), student.model(x).embedding)
    assert student.teachers == ()
    assert student.class_names == ()
    with pytest.raises(ModelError, match="no map to a teacher"):
        student.comparable(torch.randn(2, D))
    with pytest.raises(ModelError, match="no map to a teacher"):
        student.embedding(x, teacher=1)
    with pytest.raises(ModelError, match="no class head"):
        student.logits(x)


def test_a_teacher_that_is_none_and_rows_of_another_one_are_refused(tmp_path: Path) -> None:
    student = student_file(tmp_path / "m", MAPS["several"])
    for number in (3, -1):
        with pytest.raises(ModelError, match=r"below 3 \('', 'a teacher', 'a teacher'\), got"):
            student.comparable(torch.randn(2, D), number)
    for shape in ((2, D), (5,), (1, 2, 5)):
        with pytest.raises(ModelError, match=r"rows must be \[N, 5\], those of the teacher"):
            student.comparable(torch.randn(shape), 1)


def test_maps_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    head = TeacherSpaceHead(W, D)
    weight = nn.Parameter(torch.zeros(W + 1, D))
    for parts in ({}, {"head": TeacherSpaceHead(W, D + 1)}, {"head": head, "weight": weight}):
        with pytest.raises(ModelError, match=f"a map to a teacher of width {D} needs"):
            TeacherMap("", D, **parts)
    flat = nn.Parameter(torch.zeros(D))
    with pytest.raises(ModelError, match=f"a map to a teacher of width {D} needs"):
        TeacherMap("", D, weight=flat)
    for parts in ({"weight": weight, "bias": flat}, {"head": head, "bias": flat}):
        with pytest.raises(ModelError, match=r"bias must be \[1[67]\] and goes with a weight, got"):
            TeacherMap("", D, **parts)
    model = create(SPECS["resnet"], num_classes=3, image_size=8)
    with pytest.raises(ModelError, match="of a student of width 17, resnet8:width=4 has width 16"):
        save(model, tmp_path / "m", teachers=[TeacherMap("t", D, weight=weight)])
    assert not (tmp_path / "m").exists()


def changed(path: Path, change: Any) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"ckd_model": resealed(path)})


CHANGES: dict[str, Any] = {
    "a value": lambda t: t["teachers.0.head.sigma"].mul_(1.001),
    "a name": lambda t: t.update({"teachers.0.head.mean2": t.pop("teachers.0.head.mean")}),
    "a shape": lambda t: t.update({"teachers.0.bias": t["teachers.0.bias"][:-1].clone()}),
    "an entry less": lambda t: t.pop("teachers.0.weight"),
    "an entry more": lambda t: t.update({"teachers.1.weight": torch.zeros(W, D)}),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("read", [load, load_student])
def test_a_change_of_a_map_is_found(tmp_path: Path, name: str, read: Any) -> None:
    path = tmp_path / "m.safetensors"
    student_file(path, MAPS["both"])
    changed(path, CHANGES[name])
    with pytest.raises(ModelError, match=r"m\.safetensors is damaged.*checksum"):
        read(path)


def test_flips_and_cuts_are_found(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    student_file(path, MAPS["both"])
    data, rng = path.read_bytes(), random.Random(0)
    header = 8 + struct.unpack("<Q", data[:8])[0]
    contents = [data[: rng.randrange(len(data))] for _ in range(20)]
    for end in [header, len(data)] * 100:
        damaged = bytearray(data)
        damaged[rng.randrange(end)] ^= 1 << rng.randrange(8)
        contents.append(bytes(damaged))
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(ModelError):
            load_student(path)


GOOD = {"name": "t", "dim": D, "head": "linear", "hidden": None, "projection": "affine"}
BAD: dict[str, list[Any]] = {
    "name": [None, 3, "x" * 5000, "\0"],
    "dim": [None, 0, -1, 13, 12.0, True, "12", 2**31 - 1, 2**31, 10**400],
    "head": ["mlp", "MLP", 3, None],
    "hidden": [12, 0, "x", 2**40],
    "projection": ["linear", True, None, 3],
    "more": [None],
}


def wrong_maps() -> dict[str, Any]:
    found: dict[str, Any] = {
        f"{field}={str(value)[:20]}": [{**GOOD, field: value}]
        for field, values in BAD.items()
        for value in values
    }
    found |= {f"without {field}": [{k: v for k, v in GOOD.items() if k != field}] for field in GOOD}
    mlps = {f"mlp of {n}": [{**GOOD, "head": "mlp", "hidden": n}] for n in (None, 1, 2**31 - 1)}
    nothing = [{**GOOD, "head": None, "projection": None}]
    others = {"none": [], "two": [GOOD, GOOD], "many": [GOOD] * 10_000, "a number": 3, "null": None}
    return found | mlps | others | {"nothing": nothing, "an object": GOOD, "numbers": [3]}


def test_descriptions_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    student_file(path, MAPS["both"])
    assert description(path)["teachers"] == [{**GOOD, "name": "a teacher"}]
    tensors, cases = load_file(path), wrong_maps()
    texts = {name: resealed(path, teachers=maps) for name, maps in cases.items()}
    assert len(cases) > 40
    told = {}
    for name, text in texts.items():
        save_file(tensors, path, {"ckd_model": text})
        for read in (load, load_student):
            try:
                read(path)
            except ModelError as error:
                told[name, read] = str(error)
    assert {(name, read) for name in cases for read in (load, load_student)} - told.keys() == set()
    assert [name for name in told if str(path) not in told[name]] == []
    assert "more than 256 teachers" in told["many", load]  # before each is checked


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="a dtype of torch 2.8")
@pytest.mark.parametrize("name", ["teachers.0.weight", "norm.weight"])
def test_numbers_of_four_bits_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.safetensors"
    student_file(path, MAPS["both"])
    tensors = load_file(path)
    packed = torch.zeros(tensors[name].shape, dtype=torch.uint8)
    tensors[name] = packed.view(torch.float4_e2m1fn_x2)
    text = resealed(path, tensors=checksum(tensors))
    save_file(tensors, path, {"ckd_model": text})
    with pytest.raises(ModelError, match=r"1 of another type \(.*float4"):
        load_student(path)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_numbers_that_no_map_has_are_refused(tmp_path: Path, value: float) -> None:
    path = tmp_path / "m.safetensors"
    torch.manual_seed(0)
    teacher = teacher_map()
    teacher.head.sigma.fill_(value)
    save(create(SPECS["vit"], num_classes=3, image_size=8), path, teachers=[teacher])
    with pytest.raises(ModelError, match=r"m\.safetensors cannot be used: .* the map to teacher 0"):
        load_student(path)


def test_a_file_of_an_earlier_version_has_no_maps(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    saved = student_file(path, [])
    values = description(path)
    assert "teachers" not in values
    del values["tensors"]
    save_file(load_file(path), path, {"ckd_model": json.dumps(values, sort_keys=True)})
    with pytest.warns(UserWarning, match="earlier version"):
        student = load_student(path)
    assert weights_hash(student) == weights_hash(saved)


def picture(mode: str = "RGB", size: tuple[int, int] = (13, 9)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def prepared(student: Student, image: Image.Image) -> Tensor:
    square = np.array(fit(image, 8)).reshape(8, 8, -1)
    return ckd.models.prepare(student.model, torch.from_numpy(square).permute(2, 0, 1)[None])


def test_preprocess_takes_pictures_arrays_batches_and_lists(tmp_path: Path) -> None:
    student = student_file(tmp_path / "m", [])
    image = picture()
    pixels = np.asarray(image)
    expected = prepared(student, image)
    assert expected.shape == (1, 3, 8, 8)
    tensor = torch.from_numpy(pixels.copy())
    for same in (image, pixels, tensor, tensor.permute(2, 0, 1)[None], [image], (pixels,)):
        assert torch.equal(student.preprocess(same), expected)
    mirrored = prepared(student, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert torch.equal(student.preprocess(pixels[:, ::-1]), mirrored)
    gray = student.preprocess(np.asarray(picture("L")))
    assert torch.equal(gray, prepared(student, picture("L")))
    mixed = student.preprocess([image, picture(size=(5, 20)), picture("RGBA"), picture("P")])
    assert mixed.shape == (4, 3, 8, 8)
    assert torch.equal(mixed[0], expected[0])
    assert torch.equal(mixed[2], expected[0])
    student(mixed)


@pytest.mark.parametrize("size", [(9, 8), (8, 13), (30, 17)])
def test_the_square_is_cut_from_the_very_centre(size: tuple[int, int]) -> None:
    """Half a pixel on each side, where the sides differ by an odd number."""
    image, turn = picture(size=size), Image.Transpose.ROTATE_180
    turned = fit(image.transpose(turn), 8)
    difference = np.array(turned, int) - np.array(fit(image, 8).transpose(turn), int)
    assert np.abs(difference).max() <= 1  # roundings of Pillow's passes


def test_the_square_is_scaled_bicubically_with_antialiasing() -> None:
    image = picture(size=(22, 22))
    square = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double()
    expected = F.interpolate(square, 8, mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    found = torch.from_numpy(np.array(fit(image, 8)))
    assert (found - expected.clamp(0, 255)).abs().max() <= 1  # roundings of Pillow's passes


def test_preprocess_turns_a_photo_upright(tmp_path: Path) -> None:
    student = student_file(tmp_path / "m", [])
    photo, exif = picture(size=(16, 16)), Image.Exif()
    exif[0x0112] = 6  # to be turned by 270 degrees
    photo.save(tmp_path / "photo.png", exif=exif)
    turned = student.preprocess(Image.open(tmp_path / "photo.png"))
    upright = photo.transpose(Image.Transpose.ROTATE_270)
    assert torch.equal(turned, student.preprocess(upright))
    assert not torch.equal(turned, student.preprocess(photo))


def test_preprocess_makes_a_picture_gray_for_a_student_of_one_channel() -> None:
    student = Student(create(SPECS["vit"], num_classes=3, image_size=8, in_channels=1))
    gray = student.preprocess(np.asarray(picture("L")))
    assert torch.equal(student.preprocess(picture()), gray)


@pytest.mark.parametrize("shape", [(2, 9, 13, 3), (2, 4, 9, 13), (2, 2, 8, 8)])
def test_preprocess_says_where_the_channels_of_a_batch_are(shape: tuple[int, ...]) -> None:
    student = Student(create(SPECS["vit"], num_classes=3, image_size=8))
    with pytest.raises(ModelError, match=r"\[B, 3, H, W\], got torch.uint8 of shape \[2, "):
        student.preprocess(torch.zeros(shape, dtype=torch.uint8))


@pytest.mark.parametrize(
    "images",
    [
        [],
        "photo.png",
        np.zeros((9, 13, 3)),
        np.zeros((9, 13, 4), np.uint8),
        torch.zeros(3, 9, 13, dtype=torch.uint8),
        torch.zeros(1, 3, 8, 8),
        torch.zeros(0, 3, 8, 8, dtype=torch.uint8),
        torch.zeros(1, 3, 0, 8, dtype=torch.uint8),
        torch.zeros(8, dtype=torch.uint8),
        torch.zeros(1, 1, 3, 8, 8, dtype=torch.uint8),
        np.zeros((1, 5, 8, 8), np.uint8),
        picture("F"),
        [picture(), None],
    ],
    ids=lambda images: type(images).__name__ + str(getattr(images, "shape", ""))[:30],
)
def test_preprocess_refuses_what_is_no_image(images: Any) -> None:
    student = Student(create(SPECS["vit"], num_classes=3, image_size=8))
    with pytest.raises(ModelError):
        student.preprocess(images)
