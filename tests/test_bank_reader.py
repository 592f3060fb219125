"""Rows, positions, centroids and checks of an `EmbeddingBank`."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch

from ckd.bank import BankError, BankWriter, EmbeddingBank
from tests.bank_tools import CLASSES, DIM, files_of, sample, write_bank


# One shard, and four of which the last is ragged.
@pytest.mark.parametrize("rows_per_shard", [64, 16])
def test_rows_are_found_by_sample_id_in_the_order_asked(tmp_path, rows_per_shard):
    ids, embeddings, _ = sample()
    bank = write_bank(tmp_path / "bank", rows_per_shard=rows_per_shard)
    wanted = torch.tensor([49, 0, 17, 17, 16, 15, 31, 32])
    assert torch.equal(bank.positions(ids[wanted]), wanted)
    assert torch.equal(bank.rows(ids[wanted]), embeddings.half()[wanted])
    assert bank.rows(ids[:0]).shape == (0, DIM)
    assert torch.equal(bank.rows(ids[wanted].numpy()), bank.rows(ids[wanted].tolist()))


@pytest.mark.parametrize("ids", [range(50), range(100, 150)])
def test_an_unknown_id_is_named(tmp_path, ids):
    with BankWriter(tmp_path / "bank", DIM, rows_per_shard=16) as writer:
        writer.write(list(ids), sample()[1])
    bank = EmbeddingBank.open(tmp_path / "bank")
    assert torch.equal(bank.positions(list(ids)), torch.arange(50))
    for unknown in (-1, ids[0] - 1, ids[-1] + 1, 2**62):
        with pytest.raises(BankError, match=f"sample_id {unknown} is not in the bank"):
            bank.rows([ids[3], unknown])


def test_a_bank_is_pickled_and_copied_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_bank(tmp_path / "bank")
    bank = EmbeddingBank.open("bank")
    data = pickle.dumps(bank)
    assert len(data) < 1000
    monkeypatch.chdir("/")
    again = pickle.loads(data)
    assert torch.equal(again.embeddings(), bank.embeddings())
    assert dict(again.meta) == dict(bank.meta)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(copy.deepcopy(bank).sample_ids, bank.sample_ids)


def test_a_bank_opened_by_a_relative_path_stays_itself_after_chdir(tmp_path, monkeypatch):
    for folder, rows in (("a", 30), ("b", 40)):
        write_bank(tmp_path / folder / "bank", rows)
    monkeypatch.chdir(tmp_path / "a")
    bank = EmbeddingBank.open("bank")
    assert bank.path == tmp_path / "a" / "bank"
    monkeypatch.chdir(tmp_path / "b")
    for again in (pickle.loads(pickle.dumps(bank)), copy.copy(bank), copy.deepcopy(bank)):
        assert len(again) == 30
        assert again.path == bank.path


def test_a_bank_that_was_replaced_is_not_taken_for_the_pickled_one(tmp_path):
    bank = write_bank(tmp_path / "one")
    write_bank(tmp_path / "two", teacher="another")
    (tmp_path / "latest").symlink_to("one")
    data = pickle.dumps(EmbeddingBank.open(tmp_path / "latest"))
    assert torch.equal(pickle.loads(data).embeddings(), bank.embeddings())
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("two")
    with pytest.raises(BankError, match=r"latest holds another bank"):
        pickle.loads(data)
    (tmp_path / "latest").unlink()
    write_bank(tmp_path / "latest")  # built again from the same rows
    assert torch.equal(pickle.loads(data).embeddings(), bank.embeddings())


def test_a_leading_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_bank(tmp_path / "bank")
    assert EmbeddingBank.open("~/bank").path == tmp_path / "bank"


def test_positions_do_not_share_memory_with_the_ids_that_were_asked_for(tmp_path):
    with BankWriter(tmp_path / "bank", DIM) as writer:
        writer.write(torch.arange(50), sample()[1])
    ids = torch.tensor([3, 4])
    EmbeddingBank.open(tmp_path / "bank").positions(ids).zero_()
    assert ids.tolist() == [3, 4]


def test_embeddings_of_one_shard_are_the_mapped_file_and_writes_stay_in_memory(tmp_path):
    bank = write_bank(tmp_path / "bank", rows_per_shard=64)
    before = files_of(tmp_path / "bank")
    address = bank.embeddings().data_ptr()
    assert _file_mapped_at(address).endswith("shard-00000.safetensors")
    bank.embeddings()[0] = 7.0
    assert files_of(tmp_path / "bank") == before


def test_shards_are_mapped_and_cover_the_bank(tmp_path):
    bank = write_bank(tmp_path / "bank")
    first_rows = [first for first, _ in bank.shards()]
    assert first_rows == [0, 16, 32, 48]
    assert torch.equal(torch.cat([e for _, e in bank.shards()]), bank.embeddings())
    assert all(_file_mapped_at(e.data_ptr()) for _, e in bank.shards())
    sizes = [p.stat().st_size for p in (tmp_path / "bank").glob("shard-*")]
    assert bank.nbytes == sum(sizes)


def test_an_open_bank_outlives_its_files(tmp_path):
    bank = write_bank(tmp_path / "bank")
    for file in (tmp_path / "bank").iterdir():
        file.unlink()
    assert torch.equal(bank.embeddings(), sample()[1].half())


def test_centroids_match_float64_means(tmp_path):
    _, embeddings, labels = sample()
    bank = write_bank(tmp_path / "bank")
    stored = embeddings.half().double()
    for per_class in (None, 1, 5, 16, 1000):
        expected = [stored[labels == c][:per_class].mean(0) for c in range(3)]
        assert torch.equal(bank.centroids(per_class), torch.stack(expected).float()), per_class


def test_shard_sizes_do_not_show_in_centroids(tmp_path):
    banks = [write_bank(tmp_path / str(n), rows_per_shard=n) for n in (1, 7, 16, 64)]
    assert len({bank.centroids(9, seed=3).numpy().tobytes() for bank in banks}) == 1


def test_seeded_centroids_are_means_of_distinct_random_rows_of_the_class(tmp_path):
    bank = write_bank(tmp_path / "bank")
    # No class has more than 17 rows, so every seed chooses all.
    assert torch.equal(bank.centroids(17, seed=1), bank.centroids())
    assert torch.equal(bank.centroids(4, seed=1), bank.centroids(4, seed=1))
    assert not torch.equal(bank.centroids(4, seed=1), bank.centroids(4, seed=2))
    # With one row per class the centroid is that row; other seeds choose other rows.
    stored, labels = bank.embeddings().float(), bank.labels
    seen = set()
    for seed in range(100):
        for label, centroid in enumerate(bank.centroids(1, seed=seed)):
            row = int((stored == centroid).all(dim=1).nonzero().squeeze())
            assert int(labels[row]) == label
            seen.add(row)
    assert len(seen) >= 45  # of 50; each is missed by 100 draws with probability 0.2 %


def test_seeded_centroids_leave_the_global_generator_alone(tmp_path):
    bank = write_bank(tmp_path / "bank")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    bank.centroids(4, seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_centroids_pass_over_rows_without_a_label(tmp_path):
    ids, embeddings, labels = sample()
    labels = labels.clone()
    labels[::4] = -1
    with BankWriter(tmp_path / "bank", DIM) as writer:
        writer.write(ids, embeddings, labels)
    centroids = EmbeddingBank.open(tmp_path / "bank").centroids()
    expected = [embeddings.half().double()[labels == c].mean(0) for c in range(3)]
    assert torch.equal(centroids, torch.stack(expected).float())


def test_a_class_without_rows_is_named(tmp_path):
    ids, embeddings, labels = sample()
    few = labels != 1
    with BankWriter(tmp_path / "named", DIM, class_names=CLASSES) as writer:
        writer.write(ids[few], embeddings[few], labels[few])
    with pytest.raises(BankError, match="class 1 \\('bee'\\) has no row"):
        EmbeddingBank.open(tmp_path / "named").centroids()
    with BankWriter(tmp_path / "huge", DIM) as writer:
        writer.write(ids[:2], embeddings[:2], [0, 2**61])
    with pytest.raises(BankError, match="class 1 has no row"):
        EmbeddingBank.open(tmp_path / "huge").centroids()
    with BankWriter(tmp_path / "bare", DIM) as writer:
        writer.write(ids, embeddings)
    with pytest.raises(BankError, match="no labels"):
        EmbeddingBank.open(tmp_path / "bare").centroids()


def test_check_passes_what_fits_and_compares_only_what_is_known(tmp_path):
    write_bank(tmp_path / "bank").check(dim=DIM, class_names=CLASSES, fingerprint="f00d")
    bare = write_bank(tmp_path / "bare", class_names=None, fingerprint=None)
    bare.check(dim=DIM, class_names=("x", "y", "z", "more"), fingerprint="1234")
    bare.check()


def test_data_without_classes_fit_any_banks_classes(tmp_path):
    write_bank(tmp_path / "named").check(class_names=())
    write_bank(tmp_path / "bare", class_names=None).check(class_names=())


@pytest.mark.parametrize(
    ("expected", "says"),
    [
        ({"dim": 9}, ["width 8", "9", "teacher_dim=8"]),
        ({"fingerprint": "beef"}, ["f00d", "beef", "build a bank"]),
        ({"class_names": ("ant", "bee")}, ["3 class names", "2"]),
        ({"class_names": ("ant", "cat", "bee")}, ["class 1", "'bee'", "'cat'"]),
    ],
)
def test_check_names_both_values_and_a_remedy(tmp_path, expected, says):
    bank = write_bank(tmp_path / "bank")
    with pytest.raises(BankError) as caught:
        bank.check(**expected)
    assert all(part in str(caught.value) for part in says)


def test_check_takes_composed_and_decomposed_names_as_equal_and_shows_other_differences(tmp_path):
    names = ("caf\xe9", "bee", "cat")
    bank = write_bank(tmp_path / "bank", class_names=names)
    bank.check(class_names=("cafe\u0301", "bee", "cat"))
    assert len(write_bank(tmp_path / "bank2", class_names=names)) == 50
    same = {"class_names": ("cafe\u0301", "bee", "cat"), "teacher": "t", "fingerprint": "f00d"}
    assert BankWriter(tmp_path / "bank2", DIM, rows_per_shard=16, **same).is_complete()
    for other, shown in (
        ("\u0441af\xe9", r"'\u0441af\xe9'"),  # a Cyrillic letter
        ("caf\xe9 ", r"'caf\xe9 '"),
        ("caf\xe9\u200b", r"'caf\xe9\u200b'"),
        ("cafe", "'cafe'"),
    ):
        for attempt in (
            lambda given: bank.check(class_names=given),
            lambda given: BankWriter(
                tmp_path / "bank2", DIM, rows_per_shard=16, **(same | {"class_names": given})
            ).is_complete(),
        ):
            with pytest.raises(BankError) as caught:
                attempt((other, "bee", "cat"))
            assert all(text in str(caught.value) for text in ("class 0", r"'caf\xe9'", shown))


def test_check_refuses_labels_beyond_the_class_names(tmp_path):
    bank = write_bank(tmp_path / "bank", class_names=None)
    with pytest.raises(BankError, match="labels up to 2"):
        bank.check(class_names=("ant", "bee"))


def _file_mapped_at(address: int) -> str:
    """The file whose mapping covers this address; empty if it is ordinary memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return line.split(maxsplit=5)[5] if len(line.split()) > 5 else ""
    return ""
