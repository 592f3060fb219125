"""`ckd export`: files and printed programs that give ckd's own outputs without ckd."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import ckd
from ckd import cli, models
from ckd.export import ExportError, Format, export_student, graph, portable
from ckd.models import Resize, Student, create
from tests.export_tools import NAMES, check_program, with_maps
from tests.model_files import SPECS

MAPS: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "linear": [{}],
    "mlp": [{"head": "mlp"}],
    "projection": [{"head": None, "projection": "affine"}],
    "several": [{}, {"head": None, "projection": "linear", "dim": 5}, {"head": "mlp"}],
}
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs onnx, onnxscript and onnxruntime",
)


def student_of(kind: str = "vit", maps: str = "linear", classes: int | None = 3) -> Student:
    torch.manual_seed(1)
    channels = 1 if kind == "resnet" else 3
    model = create(SPECS[kind], num_classes=classes, image_size=8, in_channels=channels)
    model.class_names = NAMES if classes else ()
    return with_maps(model, MAPS[maps])


CASES = [
    pytest.param("vit", "several", 3, id="vit"),
    pytest.param("resnet", "none", 3, id="resnet of gray images"),
    pytest.param("vit", "mlp", None, id="vit without classes", marks=pytest.mark.slow),
    pytest.param("vit", "projection", 3, id="vit with a projection", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "maps", "classes"), CASES)
def test_the_program_of_torch_export_gives_the_same_outputs(
    tmp_path: Path, kind: str, maps: str, classes: int | None
) -> None:
    if kind == "resnet":
        # Its width of 16 is that of the maps.
        assert student_of(kind).model.embedding_dim == 16
    student = student_of(kind, maps, classes)
    exported = check_program(student, tmp_path / "o'ne \u65e5", "s.pt2", "torch-export")

    extra = {"ckd.json": ""}
    program = torch.export.load(exported.files[0], extra_files=extra)
    assert json.loads(extra["ckd.json"]) == exported.metadata
    run = program.module()
    for batch in (1, 2, 5):
        pixels = portable.example(student, batch)
        outputs = run(pixels)
        assert list(outputs) == list(exported.metadata["outputs"])
        x = (pixels - student.model.channel_mean) / student.model.channel_std
        for name, number in portable.embeddings_of(student):
            torch.testing.assert_close(outputs[name], student.embedding(x, number))
            assert list(outputs[name].shape[1:]) == exported.metadata["outputs"][name]["shape"][1:]


@needs_onnx
@pytest.mark.parametrize(("kind", "maps", "classes"), CASES)
def test_the_program_of_onnx_gives_the_same_outputs(
    tmp_path: Path, kind: str, maps: str, classes: int | None
) -> None:
    import onnx

    student = student_of(kind, maps, classes)
    exported = check_program(student, tmp_path / "o'ne \u65e5", "s.onnx", "onnx")
    file = onnx.load(exported.files[0])
    onnx.checker.check_model(file, full_check=True)
    assert [one.name for one in file.graph.input] == ["images"]
    assert [one.name for one in file.graph.output] == list(exported.metadata["outputs"])
    sides = file.graph.input[0].type.tensor_type.shape.dim
    assert [one.dim_param or one.dim_value for one in sides][1:] == exported.metadata["inputs"][
        "images"
    ]["shape"][1:]
    assert {one.type.tensor_type.shape.dim[0].dim_param for one in file.graph.output} == {"batch"}
    assert sides[0].dim_param == "batch"
    told = {entry.key: entry.value for entry in file.metadata_props}
    assert json.loads(told["ckd.json"]) == exported.metadata
    assert [*exported.files[0].parent.glob("*.data")] == []  # weights are in the file


@pytest.mark.parametrize(("maps", "classes"), [("none", 3), ("linear", None), ("mlp", 3)])
def test_the_program_of_safetensors_is_a_whole_resnet(
    tmp_path: Path, maps: str, classes: int | None
) -> None:
    student = student_of("resnet", maps, classes)
    exported = check_program(student, tmp_path, "s.safetensors", "safetensors")
    assert "timm" not in exported.program
    with safe_open(exported.files[-1], "pt") as file:
        assert {*file.keys()} == student.model.state_dict().keys()
        about = json.loads(file.metadata()["ckd.json"])
    assert about["class_names"] == [*NAMES][: classes or 0]
    assert about["library"] == "torch"
    assert len(exported.files) == (1 if maps == "none" else 2)


@pytest.mark.parametrize("name", ["s.pt2", "s.safetensors"])
def test_a_student_that_is_exported_can_be_trained_on(tmp_path: Path, name: str) -> None:
    student = student_of("resnet").train().requires_grad_(True)
    export_student(student, tmp_path / name)
    assert student.training
    assert student.model.training
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_metadata_say_what_the_student_takes_and_gives() -> None:
    about = portable.metadata(student_of(maps="several"), normalised=True)
    assert about["class_names"] == list(NAMES)
    assert (about["image_size"], about["in_channels"], about["channels"]) == (8, 3, "RGB")
    assert (about["mean"], about["std"]) == ([0.5] * 3, [0.5] * 3)
    assert about["inputs"]["images"]["shape"] == ["batch", 3, 8, 8]
    assert about["inputs"]["images"]["values"] == "pixels in 0..1"
    space = {"space": "teacher", "teacher": "a teacher"}
    assert about["outputs"] == {
        "logits": {"shape": ["batch", 3]},
        "embedding": {"shape": ["batch", 12], **space},
        "embedding_2": {"shape": ["batch", 12], **space},
    }
    own = portable.metadata(student_of(maps="projection", classes=None), normalised=False)
    assert own["inputs"]["images"]["values"] == "(pixels in 0..1 - mean) / std"
    assert own["outputs"] == {
        "embedding": {"shape": ["batch", 16], "space": "student", "teacher": "a teacher"}
    }


def test_the_file_holds_no_path_of_this_machine() -> None:
    data = graph.torch_export(student_of())
    assert str(Path(ckd.__file__).parent).encode() not in data
    assert b"site-packages" not in data


def test_a_graph_that_gives_other_outputs_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(self: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.student.logits(images)}  # not normalised

    student, right = student_of(), portable.Portable.forward
    program = graph._program(student)
    monkeypatch.setattr(portable.Portable, "forward", wrong)
    wrong_program = graph._program(student)
    monkeypatch.setattr(portable.Portable, "forward", right)
    portable.check_same(student, program.module(), "it", (1, 3))
    monkeypatch.setattr(graph, "_program", lambda student: wrong_program)
    with pytest.raises(ExportError, match="gives other logits than the student"):
        export_student(student, tmp_path / "s.pt2")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_without_the_extra_onnx_says_what_to_install(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnx", type(sys)("onnx"))
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"pip install 'ckd\[onnx\]'"):
        export_student(student_of(), tmp_path / "s.onnx")
    assert [*tmp_path.iterdir()] == []


def test_a_student_that_prepares_images_otherwise_is_refused(tmp_path: Path) -> None:
    student = student_of()
    formats: list[Format] = ["torch-export", "onnx", "safetensors"]
    for resize, flip in ((Resize(edge=10), False), (Resize(), True)):
        student.model.preprocess_with((0.5,) * 3, (0.5,) * 3, resize, flip)
        for format in formats:
            if format == "onnx" and importlib.util.find_spec("onnx") is None:
                continue
            with pytest.raises(ExportError, match="prepares images as its library does"):
                export_student(student, tmp_path / "s", format)
    assert [*tmp_path.iterdir()] == []


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run."""
    folder = tmp_path / "run"
    folder.mkdir()
    student = student_of("resnet")
    path = folder / "student.safetensors"
    models.save(student.model, path, class_names=NAMES, teachers=student.teachers)
    return folder


def test_the_command_prints_the_program_and_its_file_is_that_of_the_function(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s.safetensors"
    expected = export_student(ckd.load_student(run), out)
    before = [file.read_bytes() for file in expected.files]
    for file in expected.files:
        file.unlink()
    assert cli.main(["export", str(run), "--out", str(out), "--quiet"]) == 0
    assert capsys.readouterr() == (expected.program, "")
    assert [file.read_bytes() for file in expected.files] == before
    assert cli.main(["export", str(run), "--out", str(out)]) == 0
    note, _, program = capsys.readouterr().out.partition("\n\n")
    assert program == expected.program
    assert note == f"# wrote {expected.files[0]} ({len(before[0]):,} bytes), {out} " + (
        f"({len(before[1]):,} bytes); this program loads it without ckd:"
    )

    assert cli.main(["export", str(run), "--out", str(out), "--json"]) == 0
    told, err = capsys.readouterr()
    document = json.loads(told)
    assert err == ""
    assert (document["format"], document["program"]) == ("safetensors", expected.program)
    assert document["metadata"] == expected.metadata
    assert [one["file"] for one in document["files"]] == [str(file) for file in expected.files]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--out", "s.pth"], "s.pth ends in none of .safetensors, .pt2, .onnx; end it so"),
        (["--out", "s.onnx", "--format", "safetensors"], "s.onnx is named as onnx"),
        (["--out", "s", "--format", "onxx"], "unknown format 'onxx'"),
        (["--out", "nowhere/s.pt2"], "there is no folder nowhere"),
        (["--out", "run/student.safetensors"], "is the student itself; name another file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_place_that_takes_no_file_is_refused_before_the_work(
    run: Path,
    options: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(run.parent)
    before = (run / "student.safetensors").read_bytes()
    assert cli.main(["export", "run", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert (run / "student.safetensors").read_bytes() == before
    assert [*run.parent.iterdir()] == [run]


def test_a_student_is_not_replaced_by_the_file_of_its_embedding(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "s.embedding.safetensors"
    source.write_bytes((run / "student.safetensors").read_bytes())
    argv = ["export", str(source), "--out", str(tmp_path / "s.safetensors")]
    assert cli.main(argv) == 2
    assert f"{source} is the student itself" in capsys.readouterr().err
    assert source.read_bytes() == (run / "student.safetensors").read_bytes()


def test_a_suffix_is_free_where_the_format_is_named(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.bin"
    argv = ["export", str(run), "--format", "torch-export", "--out", str(out), "--quiet"]
    assert cli.main(argv) == 0
    assert "logits" in torch.export.load(io.BytesIO(out.read_bytes())).module()(
        torch.rand(1, 1, 8, 8)
    )
