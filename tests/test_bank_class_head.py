"""The teacher's class head in a bank: what is stored, what is not, and that damage is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from ckd import models
from ckd.bank import BankError, BankWriter, ClassHead, EmbeddingBank
from ckd.bank.__main__ import main
from ckd.models import ModelOutput
from tests.bank_tools import DIM, change_manifest, files_of, flip_bit, sample
from tests.test_bank_build import Killed, build, digits, prepare_until, teacher
from tests.test_bank_resume import begin
from tests.test_bank_statistics import as_version_1

__all__ = ["digits", "teacher"]  # fixtures

FILE = "class_head.safetensors"


def head(classes: int = 3, **settings: Any) -> ClassHead:
    generator = torch.Generator().manual_seed(5)
    weight, bias = torch.randn(classes, DIM, generator=generator), torch.arange(float(classes))
    return ClassHead(weight, bias, **settings)


def write(path: Path, **settings: Any) -> EmbeddingBank:
    with BankWriter(path, DIM, rows_per_shard=16, **settings) as writer:
        writer.write(*sample())
    return EmbeddingBank.open(path)


def test_it_gives_the_teachers_logits_of_the_stored_rows(tmp_path, teacher, digits):
    bank = build(digits, teacher, tmp_path / "bank")
    stored = bank.class_head()
    with torch.no_grad():
        expected = teacher(models.prepare(teacher, digits.images)).logits
    logits = bank.embeddings().float() @ stored.weight.T + stored.bias
    torch.testing.assert_close(logits, expected, rtol=1e-2, atol=1e-3)  # rows are float16
    assert torch.equal(stored.weight, teacher.head.weight)
    assert stored.class_names == ()
    assert stored.order is None


def test_its_classes_are_ordered_as_those_of_the_data(tmp_path, teacher, digits):
    teacher.class_names = tuple(reversed(digits.class_names))
    stored = build(digits, teacher, tmp_path / "bank").class_head()
    assert stored.class_names == teacher.class_names
    assert stored.order == tuple(range(9, -1, -1))
    teacher.class_names = tuple(f"other {c}" for c in range(10))
    assert build(digits, teacher, tmp_path / "other").class_head().order is None


@pytest.mark.parametrize("batches", [0, 3, 9])
def test_an_interrupted_build_resumes_to_the_same_bytes(tmp_path, teacher, digits, batches):
    build(digits, teacher, tmp_path / "undisturbed")
    with pytest.raises(Killed):
        build(digits, teacher, tmp_path / "bank", prepare=prepare_until(batches))
    assert FILE not in files_of(tmp_path / "bank")  # it comes with completion
    build(digits, teacher, tmp_path / "bank")
    assert files_of(tmp_path / "bank") == files_of(tmp_path / "undisturbed")
    assert FILE in files_of(tmp_path / "bank")


def test_a_complete_bank_of_an_earlier_version_is_left_as_it_is(tmp_path, teacher, digits):
    build(digits, teacher, tmp_path / "bank")
    as_version_1(tmp_path / "bank")
    (tmp_path / "bank" / FILE).unlink()
    before = files_of(tmp_path / "bank")
    assert build(digits, teacher, tmp_path / "bank").class_head() is None
    assert files_of(tmp_path / "bank") == before


class Cosine(models.Model):
    """A teacher whose logits are cosines: no linear map of its embedding. `direct`: they are one;
    `wide`: of twice the embedding."""

    def __init__(self, direct: bool = False, wide: bool = False) -> None:
        settings: dict[str, Any] = {"embedding_dim": 6, "num_classes": 10, "image_size": 8}
        super().__init__(spec="cosine", in_channels=1, mean=[0.5], std=[0.5], **settings)
        self.features, self.last = nn.Linear(64, 6), nn.Linear(12 if wide else 6, 10)
        self.direct, self.wide = direct, wide

    @property
    def classifier(self) -> nn.Module:
        return self.last

    def forward(self, images: torch.Tensor) -> ModelOutput:
        embedding = self.features(images.flatten(1))
        unit = nn.functional.normalize(embedding, dim=1)
        if self.wide:
            return ModelOutput(embedding, self.last(torch.cat([embedding, unit], dim=1)))
        return ModelOutput(embedding, self.last(embedding if self.direct else unit))


def test_a_head_that_is_not_linear_in_the_embedding_is_not_stored(tmp_path, digits, capsys):
    assert build(digits, Cosine(), tmp_path / "bank", progress=True).class_head() is None
    assert "head is not stored: its logits are not known to be a linear" in capsys.readouterr().out
    assert build(digits, Cosine(wide=True), tmp_path / "wide").class_head() is None
    assert build(digits, Cosine(direct=True), tmp_path / "direct").class_head() is not None


def test_rows_of_length_1_come_without_a_head(tmp_path, teacher, digits, capsys):
    bank = build(digits, teacher, tmp_path / "bank", normalize=True, progress=True)
    assert bank.class_head() is None
    assert "not stored: rows scaled to length 1 do not give its logits" in capsys.readouterr().out
    with pytest.raises(BankError, match="class_head and normalize exclude each other"):
        BankWriter(tmp_path / "other", DIM, normalize=True, class_head=head())


def test_a_teacher_without_classes_has_none(tmp_path, digits, capsys):
    model = models.create("resnet8:width=4", num_classes=None, image_size=8, in_channels=1)
    assert build(digits, model, tmp_path / "bank", progress=True).class_head() is None
    assert "class head" not in capsys.readouterr().out


@pytest.mark.parametrize("spec", ["vit:patch=4,width=16,layers=1,heads=2", "resnet8:width=4"])
def test_the_models_of_this_package_expose_theirs(spec):
    model = models.create(spec, num_classes=3, image_size=8, in_channels=1)
    was = model.training
    weight, bias = models.class_head(model)
    assert (weight.shape, bias.shape) == ((3, 16), (3,))
    assert model.training == was
    assert weight.data_ptr() != model.classifier.weight.data_ptr()  # training goes on elsewhere


def test_one_of_ones_own_is_stored_with_any_rows(tmp_path, capsys):
    bank = write(tmp_path / "bank", class_head=head(class_names=["a", "b", "c"], order=(2, 0, 1)))
    stored = bank.class_head()
    assert torch.equal(stored.weight, head().weight)
    assert torch.equal(stored.bias, head().bias)
    assert (stored.class_names, stored.order) == (("a", "b", "c"), (2, 0, 1))
    assert main(["info", str(bank.path)]) == 0
    assert "with its class head of 3 classes (a, b, c)" in capsys.readouterr().out
    assert main(["info", str(bank.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["class_head"] == {
        "classes": 3,
        "class_names": ["a", "b", "c"],
        "order": [2, 0, 1],
    }


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (ClassHead(torch.zeros(3, DIM + 1), torch.zeros(3)), r"weight \[C, 8\] and a bias \[C\]"),
        (ClassHead(torch.zeros(3, DIM), torch.zeros(2)), r"got \[3, 8\] and \[2\]"),
        (ClassHead(torch.zeros(0, DIM), torch.zeros(0)), r"got \[0, 8\]"),
        (ClassHead(torch.full((3, DIM), torch.nan), torch.zeros(3)), "holds NaN or inf"),
        (head(class_names=["a"]), "3 logits and 1 class names"),
        (head(order=(0, 0, 1)), "must be that of 3 logits"),
    ],
)
def test_a_head_that_cannot_be_is_refused_before_anything_is_written(tmp_path, given, says):
    with pytest.raises(BankError, match=says):
        BankWriter(tmp_path / "bank", DIM, class_head=given)
    assert not (tmp_path / "bank").exists()


@pytest.mark.parametrize("verify", ["fast", "full", "off"])
def test_a_truncated_lengthened_or_missing_file_is_named(tmp_path, verify):
    write(tmp_path / "bank", class_head=head())
    file = tmp_path / "bank" / FILE
    data = file.read_bytes()
    for changed, says in ((data[:-1], "truncated"), (data + b"\0", "too long")):
        file.write_bytes(changed)
        with pytest.raises(BankError, match=rf"{FILE}.*the teacher's class head.*{says}"):
            EmbeddingBank.open(tmp_path / "bank", verify=verify)
    file.unlink()
    with pytest.raises(BankError, match=rf"{FILE} is missing \(the teacher's class head\)"):
        EmbeddingBank.open(tmp_path / "bank", verify=verify)


def test_every_bit_of_the_file_matters(tmp_path, capsys):
    write(tmp_path / "bank", class_head=head())
    file = tmp_path / "bank" / FILE
    data = file.read_bytes()
    for position in range(len(data)):
        flip_bit(file, position, bit=position % 8)
        with pytest.raises(BankError, match=FILE):
            EmbeddingBank.open(tmp_path / "bank")
        file.write_bytes(data)
    flip_bit(file, -1)
    assert main(["verify", str(tmp_path / "bank")]) == 2
    assert FILE in capsys.readouterr().err


@pytest.mark.parametrize(
    ("says", "change"),
    [
        ("class_head must be an object", lambda h: h.pop("order")),
        (r"class_head\.classes must be", lambda h: h.update(classes=0)),
        (r"class_head\.class_names must be 3 names or none", lambda h: h.update(class_names=["a"])),
        (r"class_head\.class_names must be", lambda h: h.update(class_names=[1, 2, 3])),
        (r"class_head\.order must be", lambda h: h.update(order=[0, 1, 1])),
        (r"class_head\.order must be", lambda h: h.update(order=[0, 1, 3])),
        (r"class_head\.order must be", lambda h: h.update(order="012")),
        (r"class_head\.xxh3 must be", lambda h: h.update(xxh3="no")),
        (r"class_head\.bytes must be", lambda h: h.update(bytes=0)),
        (f"{FILE}.*weight is F32", lambda h: h.update(classes=4)),
    ],
)
def test_an_entry_that_says_what_cannot_be_is_refused(tmp_path, says, change):
    write(tmp_path / "bank", class_head=head())
    change_manifest(tmp_path / "bank", lambda values: change(values["class_head"]))
    with pytest.raises(BankError, match=says):
        EmbeddingBank.open(tmp_path / "bank")


def test_a_file_that_no_manifest_lists_is_removed_by_the_writer(tmp_path):
    begin(tmp_path / "bank", 20, rows_per_shard=16)
    for name in (FILE, f".tmp-{FILE}"):
        (tmp_path / "bank" / name).write_bytes(b"half a file")
    assert FILE not in files_of(write(tmp_path / "bank").path)
    assert f".tmp-{FILE}" not in files_of(tmp_path / "bank")


def test_bytes_are_those_of_safetensors(tmp_path):
    write(tmp_path / "bank", class_head=head())
    tensors = safetensors.torch.load_file(tmp_path / "bank" / FILE)
    assert {name: list(t.shape) for name, t in tensors.items()} == {"weight": [3, DIM], "bias": [3]}
