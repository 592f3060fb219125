from __future__ import annotations

import contextlib
import json
import os
import random
import struct
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckd import _json
from ckd.models import ModelError, Resize, class_names, create, load, save, weights_hash
from tests.model_files import NAMES, SPECS, description, resealed, saved, write

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


CHANGES: dict[str, Any] = {
    "a value": lambda t: t["norm.bias"].add_(1e-6),
    "a type": lambda t: t.update({"norm.bias": t["norm.bias"].half()}),
    "a type of that size": lambda t: t.update({"norm.bias": t["norm.bias"].view(torch.int32)}),
    "a name": lambda t: t.update({"norm.bias": t["norm.weight"], "norm.weight": t["norm.bias"]}),
    "a shape": lambda t: t.update({"norm.bias": t["norm.bias"].view(4, 4)}),
    "an entry more": lambda t: t.update({"more": torch.zeros(0)}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_the_tensors_is_found(tmp_path: Path, change: Any) -> None:
    path = saved(tmp_path / "m.safetensors")
    text, tensors = resealed(path), load_file(path)
    save_file(tensors, path, {"ckd_model": text})
    assert class_names(path) == NAMES
    load(path)
    change(tensors)
    save_file(tensors, path, {"ckd_model": text})
    for call in (lambda: load(path), lambda: load(SPECS["vit"], weights=path)):
        with pytest.raises(ModelError, match=r"m\.safetensors is damaged.*checksum"):
            call()


@pytest.mark.parametrize("field", ["spec", "class_names", "image_size", "preprocessing", "pool"])
def test_a_change_of_the_description_is_found(tmp_path: Path, field: str) -> None:
    path = saved(tmp_path / "m.safetensors")
    text = resealed(path)
    values = {**json.loads(text), field: "x"}
    save_file(load_file(path), path, {"ckd_model": json.dumps(values)})
    for call in (load, class_names):
        with pytest.raises(ModelError, match=r"m\.safetensors.*checksum"):
            call(path)


@pytest.mark.parametrize("kind", SPECS)
def test_flips_and_cuts_are_found(tmp_path: Path, kind: str) -> None:
    path = saved(tmp_path / "m.safetensors", kind)
    data = path.read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    rng = random.Random(0)
    contents = [data[: rng.randrange(len(data))] for _ in range(20)]
    for end in [header, len(data)] * 100:
        damaged = bytearray(data)
        damaged[rng.randrange(end)] ^= 1 << rng.randrange(8)
        contents.append(bytes(damaged))
    for content in contents:
        path.write_bytes(content)
        for source in ({"source": path}, {"source": SPECS[kind], "weights": path}):
            with pytest.raises(ModelError):
                load(**source)
        with contextlib.suppress(ModelError):
            assert class_names(path) == NAMES


def test_a_file_of_an_earlier_version_is_loaded_with_a_warning(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.safetensors")
    model, values = load(path), description(path)
    del values["tensors"]
    for later in ([], ["preprocessing", "pool"]):
        values = {name: value for name, value in values.items() if name not in later}
        save_file(load_file(path), path, {"ckd_model": json.dumps(values, sort_keys=True)})
        with pytest.warns(UserWarning, match=r"m\.safetensors is of an earlier version.*checksum"):
            assert weights_hash(load(path)) == weights_hash(model)
        with pytest.warns(UserWarning, match="no checksum"):
            assert class_names(path) == NAMES


def test_nothing_is_said_of_whole_and_of_foreign_files(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.safetensors")
    save_file(load_file(path), tmp_path / "foreign.safetensors")
    torch.save(load_file(path), tmp_path / "foreign.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(path)
        for name in ("foreign.safetensors", "foreign.pt"):
            load(SPECS["vit"], weights=tmp_path / name)


FIELDS: dict[str, Any] = {
    "spec": [None, 5, "", "vit:", "vit:width", "resnet9", "resnet20", "hf:~nobody/x", "x" * 5000],
    "num_classes": [0, -1, 4, 3.0, True, "3", 2**31, 2**64, 10**400, float("nan"), [3]],
    "image_size": [None, 0, 4, 6, 4096, 2**31, 2**64, float("inf")],
    "in_channels": [None, 0, 1, 4096, 2**31, 2**64],
    "class_names": [None, "abc", ["a"], ["a", "b", 3], [["a"]], ["a", "b", "\0"]],
    "pool": ["cls", "max", 3],
    "ckd_version": [None, 1],
    "tensors": [None, "", 3, "0" * 16],
    "more": [None],
    "preprocessing": ["x", [], {}, None],
}
MEANS = [[], [0.5], [0.5] * 4, 0.5, ["a"] * 3, [float("nan")] * 3, [1e300] * 3, [10**400] * 3]
PREPROCESSING: dict[str, Any] = {
    "mean": MEANS,
    "std": [*MEANS, [0.0] * 3, [-1.0] * 3, [1e-300] * 3, [0.5, 0.5, None]],
    "flip_channels": [None, 0, "no"],
    "resize": [None, {}, 3],
}
RESIZE: dict[str, Any] = {
    "edge": [0, -1, "8", 8.0, True, 2**40],
    "keep_aspect": [None, 1],
    "filter": ["lanczos", None],
    "half_even": [2],
}
# As in files of earlier versions.
FIT = {"tensors=None", "preprocessing=None"}


def descriptions(path: Path) -> Iterator[tuple[str, str]]:
    """Names and texts of descriptions with a wrong value, whose checksums are right."""
    whole = description(path)
    own = whole["preprocessing"]
    for field, values in FIELDS.items():
        for value in values:
            yield f"{field}={str(value)[:20]}", resealed(path, **{field: value})
    for field, values in PREPROCESSING.items():
        for value in values:
            text = resealed(path, preprocessing={**own, field: value})
            yield f"preprocessing.{field}={str(value)[:20]}", text
    for field, values in RESIZE.items():
        for value in values:
            changed = {**own, "resize": {**own["resize"], field: value}}
            yield f"resize.{field}={value}", resealed(path, preprocessing=changed)
    for field in whole.keys() - {"pool", "preprocessing", "ckd_version", "tensors"}:
        rest = {name: value for name, value in whole.items() if name != field}
        yield f"without {field}", _json.sealed(rest).decode()
    deep = "[" * 100_000
    for text in ("null", "[]", "NaN", "3", '"x"', "", "{", deep, f'{{"spec": {deep}', "9" * 5000):
        yield f"text {text[:9]}", text


@pytest.mark.filterwarnings("ignore:.*earlier version")
def test_values_that_no_model_has_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.safetensors")
    tensors, texts = load_file(path), list(descriptions(path))
    assert len(texts) > 90
    told = {}
    for name, text in texts:
        save_file(tensors, path, {"ckd_model": text})
        try:
            load(path)
        except ModelError as error:
            told[name] = str(error)
    assert {name for name, _ in texts} - told.keys() == FIT
    assert [name for name in told if str(path) not in told[name]] == []


def test_a_file_costs_what_it_weighs(tmp_path: Path) -> None:
    """In time and memory, whatever it declares."""
    folder = tmp_path / "files"
    folder.mkdir()
    whole = saved(tmp_path / "m.safetensors")
    shapes = {name: list(tensor.shape) for name, tensor in load_file(whole).items()}
    for spec in (
        *("vit:width=4096,layers=4", "vit:layers=20000", "vit:layers=999999999", "resnet9998"),
        *("vit:width=999999999,heads=1", "vit:patch=1,width=8192", "resnet8:width=100000"),
        "vit:patch=4096,width=4096,layers=1",
    ):
        for size, tensors in ((8, {"x": [1]}), (4096, shapes)):
            text = resealed(whole, spec=spec, tensors=None, image_size=size)
            write(folder / f"{spec} {size}.safetensors", text, tensors)
    for number, sizes in enumerate(({"num_classes": 2**31 - 1}, {"image_size": 4096})):
        text = resealed(whole, **{"class_names": [], **sizes}, tensors=None)
        write(folder / f"{number}.safetensors", text, shapes)
    size = 2**31 - 1
    teacher = {"name": "", "dim": size, "head": "linear", "hidden": None, "projection": "affine"}
    mlp = {**teacher, "head": "mlp", "hidden": size}
    wide = {**teacher, "dim": 1 << 24}  # a gigabyte, which a machine has
    for number, teachers in enumerate(([teacher], [mlp], [wide], [teacher] * 8_000)):
        text = resealed(whole, teachers=teachers, tensors=None)
        write(folder / f"teachers {number}.safetensors", text, shapes)
    for name, shape in (
        ("head.weight", [1 << 40, 0]),
        ("patch_embed.weight", [0, 1 << 40, 4, 4]),
        ("patch_embed.weight", [0, 4096, 4, 4]),
        ("position", [1, 1 << 60, 0]),
    ):
        # As weights: sizes are read from the shapes.
        file = folder / f"{SPECS['vit']}@{name}{len(shape)}{shape[1]}.safetensors"
        write(file, "", {**shapes, name: shape})
        content = file.read_bytes()
        file.write_bytes(content.replace(b'"ckd_model"', b'"any_entry"'))
        views = {name: torch.zeros(1).expand([max(side, 1) for side in shape])}
        for legacy in (False, True):
            torch.save(
                {**load_file(whole), **views},
                folder / f"{SPECS['vit']}@{name}{len(shape)}{shape[1]}{legacy}.pt",
                _use_new_zipfile_serialization=not legacy,
            )
    data = whole.read_bytes()
    for length in (0, 2**60, 2**64 - 1):
        (folder / f"length {length}.safetensors").write_bytes(struct.pack("<Q", length) + data[8:])
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.model_files", folder],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert {outcome for outcome, _ in found["outcomes"].values()} == {"refused"}, found
    assert max(seconds for _, seconds in found["outcomes"].values()) < 1, found
    assert found["grown_mib"] < 64, found


def test_a_file_alone_names_no_library(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    path = saved(tmp_path / "run" / "student.safetensors")
    for spec in ("hf:someone/model", "timm:resnet18", "timm:local-dir:/etc", "timm:hf-hub:a/b"):
        save_file(load_file(path), path, {"ckd_model": resealed(path, spec=spec)})
        for source in (path, tmp_path / "run"):
            with pytest.raises(ModelError) as caught:
                load(source)
            assert f"load({spec!r}, weights={str(path)!r})" in str(caught.value)
            assert f"{spec} --teacher-weights {path}" in str(caught.value)
        assert class_names(path) == NAMES


def test_weights_of_a_file_that_names_another_model(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.safetensors")
    with pytest.raises(
        ModelError, match=r"m\.safetensors holds 'vit:patch=4,.*'vit' was asked for"
    ):
        load("vit", weights=path)
    with pytest.raises(ModelError, match="has image_size 8, 32 was asked for"):
        load(SPECS["vit"], weights=path, image_size=32)


def test_weights_of_a_file_bring_its_description(tmp_path: Path) -> None:
    model = create(SPECS["resnet"], num_classes=3, image_size=8, in_channels=1)
    model.preprocess_with([0.1], [0.4], Resize(10, True, "bilinear"), False)
    save(model, tmp_path / "student.safetensors", class_names=NAMES)
    for weights in (tmp_path / "student.safetensors", tmp_path):
        loaded = load(SPECS["resnet"], weights=weights)
        assert (loaded.image_size, loaded.class_names) == (8, NAMES)
        assert (loaded.mean, loaded.std, loaded.resize) == (model.mean, model.std, model.resize)
        assert torch.equal(loaded.channel_mean, model.channel_mean)
        assert weights_hash(loaded) == weights_hash(model)


def test_loading_takes_no_random_numbers(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.safetensors", "resnet")
    before = torch.get_rng_state()
    load(path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["FIFO", "device", "link to a device", "folder", "link"])
def test_a_students_file_must_be_a_regular_file(tmp_path: Path, kind: str) -> None:
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "student.safetensors"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(saved(tmp_path / "m.safetensors"))
    elif kind == "device" and os.geteuid() == 0:
        with contextlib.suppress(PermissionError):  # in a container
            os.mknod(path, 0o20666, os.makedev(1, 5))
    if not os.path.lexists(path):
        path.symlink_to("/dev/zero")
    message = "symbolic link" if path.is_symlink() else "not a regular file"
    for call in (load, class_names):
        with pytest.raises(ModelError, match=f"student.safetensors cannot be read .*{message}"):
            call(tmp_path / "run")
    if kind in ("FIFO", "device", "link to a device"):
        for options in ({"source": path}, {"source": "resnet8", "weights": path}):
            with pytest.raises(ModelError, match="not a regular file"):
                load(**options)
    elif kind == "link":  # the user may name one
        load(path)


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """As a user whom permissions bind."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("locked", ["run/student.safetensors", "run"])
def test_an_unreadable_student_is_not_called_missing(
    tmp_path: Path, locked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # its parents may be closed to others
    tmp_path.chmod(0o755)
    Path("run").mkdir()
    load(saved(Path("run/student.safetensors")))
    Path(locked).chmod(0)
    try:
        for source in ("run", "run/student.safetensors"):
            for options in ({"source": source}, {"source": SPECS["vit"], "weights": source}):
                with (
                    without_privileges(),
                    pytest.raises(ModelError, match=r"cannot be read \(Permission denied"),
                ):
                    load(**options)
    finally:
        Path(locked).chmod(0o755)
