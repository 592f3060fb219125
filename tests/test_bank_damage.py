"""Damage of every kind is a BankError that names the file and its rows, never anything else."""

from __future__ import annotations

import random
from typing import Any

import pytest
import safetensors.torch
import torch

from ckd.bank import BankError, BankWriter, EmbeddingBank
from ckd.bank.manifest import MANIFEST_NAME
from ckd.bank.shards import encode_shard
from ckd.bank.summary import describe
from tests.bank_tools import (
    DIM,
    change_manifest,
    files_of,
    flip_bit,
    replace_shard,
    sample,
    write_bank,
)
from tests.test_files import ODD_FILES, make_odd_file


def test_random_damage_is_found_or_harmless(tmp_path):
    """Flipped bits, other bytes, cuts, insertions and appended bytes, anywhere in any file."""
    bank = write_bank(tmp_path / "bank", rows=24, rows_per_shard=10)
    content, meta = _content(bank), dict(bank.meta)
    chance = random.Random(0)
    found = 0
    for name, data in files_of(tmp_path / "bank").items():
        for _ in range(150):
            (tmp_path / "bank" / name).write_bytes(_damage(data, chance))
            try:
                opened = EmbeddingBank.open(tmp_path / "bank", verify="fast")
            except BankError as error:
                found += name in str(error)
            else:
                assert _content(opened) == content
                assert dict(opened.meta) == meta
        (tmp_path / "bank" / name).write_bytes(data)
    assert found >= 580  # of 600; a byte may be replaced by itself


def test_without_verification_random_damage_raises_bank_errors_or_nothing(tmp_path):
    write_bank(tmp_path / "bank", rows=24, rows_per_shard=10)
    chance = random.Random(1)
    file = tmp_path / "bank" / "shard-00001.safetensors"
    data = file.read_bytes()
    refused = 0
    for _ in range(300):
        file.write_bytes(_damage(data, chance))
        try:
            bank = EmbeddingBank.open(tmp_path / "bank", verify="off")
            bank.centroids()
            bank.rows(bank.sample_ids)
        except BankError:
            refused += 1
    assert 150 < refused < 300  # sizes, headers, labels and ids are looked at; embeddings are not


def test_every_bit_of_a_manifest_matters(tmp_path):
    write_bank(tmp_path / "bank", rows=3)
    file = tmp_path / "bank" / MANIFEST_NAME
    data = file.read_bytes()
    for position in range(len(data)):
        flip_bit(file, position, bit=position % 8)
        with pytest.raises(BankError, match=r"manifest\.json"):
            EmbeddingBank.open(tmp_path / "bank", verify="off")
        file.write_bytes(data)


def test_full_verification_finds_what_a_forged_xxh3_hides(tmp_path):
    write_bank(tmp_path / "bank")
    file = tmp_path / "bank" / "shard-00001.safetensors"
    flip_bit(file, -1)
    with pytest.raises(BankError, match="xxh3"):
        EmbeddingBank.open(tmp_path / "bank")
    data, sha256 = file.read_bytes(), EmbeddingBank.open(tmp_path / "bank", verify="off").meta
    replace_shard(tmp_path / "bank", 1, data)
    old = sha256["shards"][1]["sha256"]
    change_manifest(tmp_path / "bank", lambda values: values["shards"][1].update(sha256=old))
    EmbeddingBank.open(tmp_path / "bank", verify="fast")
    with pytest.raises(BankError, match=r"shard-00001.*rows 16 to 31.*sha256"):
        EmbeddingBank.open(tmp_path / "bank", verify="full")


@pytest.mark.parametrize("verify", ["fast", "full", "off"])
def test_a_truncated_lengthened_or_missing_shard_is_named_with_its_rows(tmp_path, verify):
    write_bank(tmp_path / "bank")
    file = tmp_path / "bank" / "shard-00003.safetensors"
    data = file.read_bytes()
    for changed, says in ((data[:-1], "truncated"), (b"", "truncated"), (data + b"\0", "too long")):
        file.write_bytes(changed)
        with pytest.raises(BankError, match=rf"shard-00003.*rows 48 to 49.*{says}"):
            EmbeddingBank.open(tmp_path / "bank", verify=verify)
    file.unlink()
    with pytest.raises(BankError, match=r"shard-00003\.safetensors is missing \(rows 48 to 49\)"):
        EmbeddingBank.open(tmp_path / "bank", verify=verify)
    file.mkdir()
    with pytest.raises(BankError, match="not a regular file"):
        EmbeddingBank.open(tmp_path / "bank", verify=verify)


# The checksum is recomputed, so that the value itself is refused.
@pytest.mark.parametrize(
    ("says", "change"),
    [
        ("schema version 3", lambda m: m.update(schema_version=3)),
        ("schema version '1'", lambda m: m.update(schema_version="1")),
        ("schema version True", lambda m: m.update(schema_version=True)),
        ("'dim'", lambda m: m.pop("dim")),
        ("'extra'", lambda m: m.update(extra=1)),
        ("dim must be an integer of at least 1, got -8", lambda m: m.update(dim=-8)),
        ("dim must be", lambda m: m.update(dim="8")),
        ("dim must be", lambda m: m.update(dim=8.0)),
        ("dim must be", lambda m: m.update(dim=True)),
        ("dim must be", lambda m: m.update(dim=1 << 62)),
        ("rows_per_shard must be", lambda m: m.update(rows_per_shard=10**400)),
        ("nested more than", lambda m: m.update(teacher=_nested(100))),
        ("NUL", lambda m: m.update(dataset="a\0b")),
        ("surrogate", lambda m: m.update(class_names=["ant", "bee", "\ud800"])),
        ("shard-00000.*embedding is F16", lambda m: m.update(dim=9)),
        ("dtype must be 'float16'", lambda m: m.update(dtype="float32")),
        ("normalized must be", lambda m: m.update(normalized=0)),
        ("complete must be", lambda m: m.update(complete="yes")),
        ("rows_per_shard must be", lambda m: m.update(rows_per_shard=0)),
        ("rows must be", lambda m: m.update(rows=-1)),
        ("rows must be the sum", lambda m: m.update(rows=51)),
        ("teacher must be a dict", lambda m: m.update(teacher=["t"])),
        ("fingerprint must be a str", lambda m: m.update(fingerprint=12)),
        ("class_names must be", lambda m: m.update(class_names="abc")),
        ("class_names must be strings", lambda m: m.update(class_names=[1, 2, 3])),
        ("versions must be", lambda m: m.update(versions=None)),
        ("shards must be", lambda m: m.update(shards={})),
        (r"shards\[0\] must be", lambda m: m.update(shards=[5])),
        (r"shards\[0\] must be", lambda m: m["shards"][0].pop("xxh3")),
        ("at least 1 in a whole bank", lambda m: m.update(shards=[], rows=0)),
        ("must be shard-00001", lambda m: m["shards"][1].update(file="../shard-00001")),
        ("must be shard-00001", lambda m: m["shards"][1].update(file="/etc/passwd")),
        ("must be shard-00000", lambda m: m["shards"].reverse()),
        ("must be shard-00001", lambda m: m["shards"].__setitem__(1, m["shards"][0])),
        ("first_row must be 16", lambda m: m["shards"][1].update(first_row=15)),
        (r"shards\[1\].rows must be", lambda m: m["shards"][1].update(rows=-16)),
        ("rows must be at most 16", lambda m: m["shards"][1].update(rows=17)),
        ("rows must be 16", lambda m: m["shards"][1].update(rows=15)),
        ("bytes must be", lambda m: m["shards"][1].update(bytes=-1)),
        ("bytes must be", lambda m: m["shards"][1].update(bytes=1e30)),
        ("xxh3 must be", lambda m: m["shards"][1].update(xxh3="0x12")),
        ("sha256 must be", lambda m: m["shards"][1].update(sha256=None)),
        ("rows 48 to 49.*too long", lambda m: m["shards"][3].update(bytes=17)),
        ("expected -1 to 1", lambda m: m.update(class_names=["ant", "bee"])),
        ("incomplete: 48 rows", lambda m: (m["shards"].pop(), m.update(complete=False, rows=48))),
        ("rows must be 16", lambda m: m.update(complete=False)),
    ],
)
def test_a_manifest_that_says_what_cannot_be_is_refused(tmp_path, says, change):
    write_bank(tmp_path / "bank")
    change_manifest(tmp_path / "bank", change)
    with pytest.raises(BankError, match=says):
        EmbeddingBank.open(tmp_path / "bank")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '"', "\xff", "[" * 100_000, "1" * 5000, '{"schema_version": 1}', "NaN"],
)
def test_a_manifest_that_is_not_one_is_refused(tmp_path, text):
    write_bank(tmp_path / "bank")
    (tmp_path / "bank" / MANIFEST_NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(BankError, match=r"manifest\.json"):
        EmbeddingBank.open(tmp_path / "bank")


@pytest.mark.parametrize(
    ("says", "tensors"),
    [
        ("it holds", {"label": torch.zeros(16).long()}),
        ("embedding is F32", {"embedding": torch.zeros(16, DIM)}),
        ("embedding is F16", {"embedding": torch.zeros(DIM, 16).half()}),
        ("embedding is F16", {"embedding": torch.zeros(16, DIM, 1).half()}),
        ("label is I32", {"label": torch.zeros(16).int()}),
        ("sample_id is I64", {"sample_id": torch.zeros(15).long()}),
        ("it holds", {"surplus": torch.zeros(1)}),
        ("label -2", {"label": torch.full((16,), -2)}),
        ("label 3", {"label": torch.full((16,), 3)}),
        ("duplicate sample_id 5 in rows 16 and 17", {"sample_id": torch.full((16,), 5)}),
    ],
)
def test_a_shard_with_other_tensors_than_the_manifest_says_is_refused(tmp_path, says, tensors):
    write_bank(tmp_path / "bank")
    good = {
        "embedding": torch.zeros(16, DIM).half(),
        "label": torch.zeros(16).long(),
        "sample_id": torch.arange(16) + 10_000,
    }
    replaced = tensors if says == "it holds" else good | tensors
    replace_shard(tmp_path / "bank", 1, safetensors.torch.save(replaced))
    with pytest.raises(BankError, match=rf"shard-00001.*{says}"):
        EmbeddingBank.open(tmp_path / "bank")


def test_a_shard_that_is_no_safetensors_file_is_refused(tmp_path):
    write_bank(tmp_path / "bank")
    replace_shard(tmp_path / "bank", 2, b"\x80\x04not a tensor in sight" * 20)
    with pytest.raises(BankError, match=r"shard-00002.*rows 32 to 47"):
        EmbeddingBank.open(tmp_path / "bank")


def test_ids_that_repeat_in_different_shards_are_refused(tmp_path):
    write_bank(tmp_path / "bank")
    ids, embeddings, labels = sample()
    second = encode_shard(embeddings[16:32].half(), labels[16:32], ids[:16])
    replace_shard(tmp_path / "bank", 1, second)
    with pytest.raises(BankError, match=r"shard-00001.*duplicate sample_id"):
        EmbeddingBank.open(tmp_path / "bank")


def test_a_folder_that_is_no_bank_is_refused(tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(BankError, match=r"not a bank.*manifest\.json"):
            EmbeddingBank.open(path)
    with pytest.raises(BankError, match=r"verify mode 'fats'.*fast"):
        EmbeddingBank.open(write_bank(tmp_path / "bank").path, verify="fats")


def _content(bank: EmbeddingBank) -> list[bytes]:
    return [t.numpy().tobytes() for t in (bank.embeddings(), bank.labels, bank.sample_ids)]


def _damage(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    few = chance.randbytes(chance.randint(1, 9))
    return chance.choice(
        [
            data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :],
            data[:at] + few + data[at + len(few) :],
            data[:at],
            data[:at] + few + data[at:],
            data + few,
        ]
    )


def _nested(levels: int) -> dict[str, Any]:
    return {"a": _nested(levels - 1)} if levels else {}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"teacher": _nested(100)}, "nested"),
        ({"teacher": _nested(900)}, "nested"),
        ({"dataset": "a\0b"}, "NUL"),
        ({"class_names": ["\ud800"]}, "surrogate"),
        ({"rows_per_shard": 1 << 62}, "rows_per_shard"),
    ],
)
def test_settings_that_no_reader_would_take_are_not_written(tmp_path, settings, says):
    with pytest.raises(BankError, match=says):
        BankWriter(tmp_path / "bank", DIM, **settings)
    assert not (tmp_path / "bank").exists()


@pytest.mark.parametrize("name", [MANIFEST_NAME, "shard-00000.safetensors"])
@pytest.mark.parametrize("kind", [*ODD_FILES, "link to the file"])
@pytest.mark.parametrize("verify", ["fast", "off"])
def test_only_regular_files_in_its_own_folder_make_a_bank(tmp_path, name, kind, verify):
    write_bank(tmp_path / "bank")
    file = tmp_path / "bank" / name
    moved = file.rename(tmp_path / "moved")
    if kind == "link to the file":
        file.symlink_to(moved)
    else:
        make_odd_file(kind, file)
    with pytest.raises(BankError, match=rf"{name}.*(regular file|symbolic link)"):
        EmbeddingBank.open(tmp_path / "bank", verify=verify)


def test_absurd_costs_of_a_teacher_count_as_not_recorded(tmp_path):
    write_bank(tmp_path / "bank")
    absurd = {"flops_per_image": 10**400, "weights_bytes": True, "parameters": 10**400}
    change_manifest(tmp_path / "bank", lambda values: values.update(teacher=absurd))
    assert "not recorded" in describe(EmbeddingBank.open(tmp_path / "bank"))
