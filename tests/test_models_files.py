from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckd.models import class_names, create, load, save, weights_hash

VIT = "vit:patch=4,width=16,layers=1,heads=2"


@pytest.mark.parametrize("spec", [VIT, "resnet8:width=4"])
@pytest.mark.parametrize("num_classes", [3, None])
def test_saved_model_comes_back_whole(tmp_path: Path, spec: str, num_classes: int | None) -> None:
    model = create(spec, num_classes=num_classes, image_size=8, in_channels=1)
    names = ["a", "b", "c"] if num_classes else []
    save(model, tmp_path / "student.safetensors", class_names=names)
    for source in (tmp_path / "student.safetensors", str(tmp_path)):
        loaded = load(source)
        assert weights_hash(loaded) == weights_hash(model)
        assert loaded.spec == spec
        assert (loaded.num_classes, loaded.image_size, loaded.in_channels) == (num_classes, 8, 1)
        assert class_names(source) == tuple(names)
        assert not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(loaded(images).embedding, model.eval()(images).embedding)


def test_equal_models_have_equal_files(tmp_path: Path) -> None:
    model = create("resnet8:width=4", num_classes=2, image_size=8)
    for name in ("a", "b"):
        save(model, tmp_path / name, class_names=["x", "y"])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_saved_model_is_known_by_its_content_not_its_suffix(tmp_path: Path) -> None:
    model = create(VIT, num_classes=2, image_size=8)
    save(model, tmp_path / "m.pt")
    assert weights_hash(load(tmp_path / "m.pt")) == weights_hash(model)


def test_compiled_model_is_saved_as_the_plain_one(tmp_path: Path) -> None:
    model = create(VIT, num_classes=2, image_size=8)
    save(torch.compile(model, backend="eager"), tmp_path / "m.safetensors")
    assert weights_hash(load(tmp_path / "m.safetensors")) == weights_hash(model)


@pytest.mark.parametrize("spec", [VIT, "resnet8:width=4"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_foreign_weights_tell_their_shape(
    tmp_path: Path, spec: str, prefix: str, suffix: str
) -> None:
    model = create(spec, num_classes=5, image_size=32, in_channels=1)
    # As published: without the counters of the batch norms.
    tensors = {
        prefix + name: tensor
        for name, tensor in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": tensors, "epoch": 3}, path)
    else:
        save_file(tensors, path)
    loaded = load(spec, weights=path)
    assert (loaded.num_classes, loaded.image_size, loaded.in_channels) == (5, 32, 1)
    assert weights_hash(loaded) == weights_hash(model)


def test_weights_hash_sees_values_names_and_types() -> None:
    model = create("resnet8:width=4", num_classes=2, image_size=8)
    hashes = {weights_hash(model)}
    assert weights_hash(model.train()) in hashes
    with torch.no_grad():
        model.linear.bias[0] += 1e-6
    hashes.add(weights_hash(model))
    hashes.add(weights_hash(model.bfloat16()))
    model.renamed = model.linear
    del model.linear
    hashes.add(weights_hash(model))
    assert len(hashes) == 4


def test_run_folder_is_told_from_a_models_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "first").mkdir()
    model = create("resnet8:width=4", num_classes=2, image_size=8)
    save(model, tmp_path / "first" / "student.safetensors")
    monkeypatch.chdir(tmp_path)
    assert weights_hash(load("first")) == weights_hash(model)


def test_refused_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save(create(VIT, num_classes=2, image_size=8), path)
    before = load_file(path)
    with pytest.raises(ValueError, match="3 class names"):
        save(create(VIT, num_classes=2, image_size=8), path, class_names=["a", "b", "c"])
    after = load_file(path)
    assert all(torch.equal(before[name], after[name]) for name in before)
