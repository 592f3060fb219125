"""`ckd export` of students of timm and transformers, and of those whose network timm has."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from ckd.export import ExportError, export_student, weights
from ckd.models import Student, create
from tests.export_tools import NAMES, check_program, with_maps
from tests.test_export import MAPS, needs_onnx, student_of

needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="needs timm")
# A convolutional one, and a transformer whose position embeddings are of one image size.
TIMM = ["timm:resnet10t", "timm:vit_tiny_patch16_224", "timm:mobilenetv3_small_050"]


def timm_student(spec: str, classes: int | None = 3, head: bool = True) -> Student:
    torch.manual_seed(1)
    model = create(spec, num_classes=classes, image_size=32)
    model.class_names = NAMES if classes else ()
    student = with_maps(model, [])
    if head:
        from ckd.heads import TeacherSpaceHead
        from ckd.models import TeacherMap

        options: dict[str, Any] = {"mean": torch.linspace(-3, 4, 5), "sigma": 0.5}
        made = TeacherSpaceHead(model.embedding_dim, 5, "mlp", **options)
        student = Student(model, [TeacherMap("a teacher", 5, head=made)])
    return student.eval().requires_grad_(False)


@needs_timm
@pytest.mark.parametrize("spec", TIMM)
@pytest.mark.parametrize("classes", [3, None])
def test_timm_loads_its_student(tmp_path: Path, spec: str, classes: int | None) -> None:
    import timm

    student = timm_student(spec, classes)
    exported = check_program(student, tmp_path, "s.safetensors", "safetensors")
    options: dict[str, Any] = {"img_size": 32} if "vit" in spec else {}
    network = timm.create_model(
        spec.removeprefix("timm:"),
        num_classes=classes or 0,
        checkpoint_path=str(exported.files[-1]),
        **options,
    ).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = student.features(x) if classes is None else student.logits(x)
    torch.testing.assert_close(network(x), expected)


@needs_timm
@pytest.mark.parametrize("maps", ["linear", "mlp", "none"])
@pytest.mark.parametrize("classes", [3, None])
def test_timm_loads_the_package_s_own_vision_transformer(
    tmp_path: Path, maps: str, classes: int | None
) -> None:
    check_program(student_of("vit", maps, classes), tmp_path, "s.safetensors", "safetensors")


@needs_timm
@pytest.mark.parametrize("spec", TIMM)
def test_graphs_of_timm_students_give_the_same_outputs(tmp_path: Path, spec: str) -> None:
    check_program(timm_student(spec), tmp_path, "s.pt2", "torch-export")


@needs_timm
@needs_onnx
@pytest.mark.parametrize("spec", TIMM)
def test_onnx_of_timm_students_gives_the_same_outputs(tmp_path: Path, spec: str) -> None:
    check_program(timm_student(spec), tmp_path, "s.onnx", "onnx")


def test_the_names_of_the_vision_transformer_are_timms() -> None:
    network = weights.network_of(student_of("vit"))
    assert {*network.tensors} == {
        *("cls_token", "pos_embed", "norm.weight", "norm.bias", "head.weight", "head.bias"),
        *("patch_embed.proj.weight", "patch_embed.proj.bias"),
        *(
            f"blocks.{block}.{layer}.{kind}"
            for block in range(2)
            for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
            for kind in ("weight", "bias")
        ),
    }


def hf_student(folder: Path, classes: int | None = 3) -> Student:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    config.save_pretrained(folder / "vit")
    torch.manual_seed(1)
    model = create(f"hf:{folder / 'vit'}", num_classes=classes, image_size=8)
    model.class_names = NAMES if classes else ()
    return with_maps(model, MAPS["linear"])


def test_transformers_loads_its_student(tmp_path: Path) -> None:
    student = hf_student(tmp_path)
    exported = check_program(student, tmp_path / "out", "s.safetensors", "safetensors")
    with safe_open(exported.files[-1], "pt") as file:
        assert "classifier.weight" in {*file.keys()}
        assert str(tmp_path) not in file.metadata()["ckd.json"].replace(student.spec, "")


def test_a_graph_of_a_transformers_student_gives_the_same_outputs(tmp_path: Path) -> None:
    check_program(hf_student(tmp_path), tmp_path / "out", "s.pt2", "torch-export")


@needs_onnx
def test_onnx_of_a_transformers_student_gives_the_same_outputs(tmp_path: Path) -> None:
    check_program(hf_student(tmp_path), tmp_path / "out", "s.onnx", "onnx")


def test_a_transformers_student_without_classes_needs_a_graph(tmp_path: Path) -> None:
    student = hf_student(tmp_path, None)
    with pytest.raises(ExportError, match="use torch-export or onnx"):
        export_student(student, tmp_path / "s.safetensors")
    assert not [*tmp_path.glob("s*")]
    check_program(student, tmp_path / "out", "s.pt2", "torch-export")
