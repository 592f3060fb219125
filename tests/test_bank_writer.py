"""What `BankWriter` stores and refuses, and its lock."""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import numpy as np
import pytest
import torch

from ckd import _lock
from ckd.bank import BankError, BankWriter, EmbeddingBank, arrays
from tests.bank_tools import CLASSES, DIM, files_of, sample, write_bank


# One row; one less than, exactly and one more than a shard (16); several shards and a ragged end.
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 32, 50])
def test_rows_come_back_in_order_as_float16(tmp_path, rows):
    ids, embeddings, labels = sample(rows)
    bank = write_bank(tmp_path / "bank", rows)
    assert len(bank) == rows
    assert bank.dim == DIM
    assert torch.equal(bank.sample_ids, ids)
    assert torch.equal(bank.labels, labels)
    assert torch.equal(bank.embeddings(), embeddings.half())


def test_batch_size_does_not_show_in_the_files(tmp_path):
    for batch in (1, 7, 16, 50):
        write_bank(tmp_path / str(batch), batch=batch)
    first = files_of(tmp_path / "1")
    assert sorted(first) == ["manifest.json", *(f"shard-0000{i}.safetensors" for i in range(4))]
    assert all(files_of(tmp_path / str(batch)) == first for batch in (7, 16, 50))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_float_dtype_is_rounded_to_float16(tmp_path, dtype):
    ids, embeddings, _ = sample()
    embeddings = embeddings.to(dtype)
    with BankWriter(tmp_path / "bank", DIM) as writer:
        writer.write(ids, embeddings)
    bank = EmbeddingBank.open(tmp_path / "bank")
    assert torch.equal(bank.embeddings(), embeddings.half())
    assert torch.equal(bank.labels, torch.full((50,), -1))


def test_numpy_arrays_are_taken_read_only_strided_and_big_endian_too(tmp_path):
    ids, embeddings, labels = (t.numpy() for t in sample())
    swapped = embeddings.astype(">f4")
    swapped.flags.writeable = False
    with BankWriter(tmp_path / "bank", DIM) as writer:
        writer.write(ids[:25].astype(np.int32), swapped[:25], labels[:25].astype(np.uint8))
        writer.write(ids[25:].tolist(), np.asfortranarray(embeddings)[25:], labels[25:])
    bank = EmbeddingBank.open(tmp_path / "bank")
    assert np.array_equal(bank.embeddings().numpy(), embeddings.astype(np.float16))
    assert np.array_equal(bank.labels.numpy(), labels)


def test_numpy_arrays_are_taken_unsigned_and_reversed_too(tmp_path):
    ids, embeddings, labels = np.arange(50), sample()[1].numpy(), sample()[2].numpy()
    with BankWriter(tmp_path / "bank", np.int64(DIM), rows_per_shard=np.int32(16)) as writer:
        writer.write(ids[:20].astype(np.uint16), embeddings[:20], labels[:20].astype(np.uint32))
        writer.write(ids[20:].astype(np.uint64)[::-1], embeddings[20:][::-1], labels[20:][::-1])
    bank = EmbeddingBank.open(tmp_path / "bank")
    assert np.array_equal(bank.rows(ids).numpy(), embeddings.astype(np.float16))
    assert np.array_equal(bank.labels[bank.positions(ids)].numpy(), labels)


def test_class_names_may_come_from_an_iterator(tmp_path):
    bank = write_bank(tmp_path / "bank", class_names=map(str, CLASSES))
    assert bank.class_names == CLASSES


def test_a_new_bank_may_begin_in_a_folder_that_a_mac_has_looked_at(tmp_path):
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / ".DS_Store").write_bytes(b"Bud1")
    assert len(write_bank(tmp_path / "bank")) == 50


def test_the_callers_buffers_may_be_reused(tmp_path):
    ids, embeddings, labels = sample(20)
    buffer, label_buffer = torch.empty(5, DIM, dtype=torch.float16), torch.empty(5).long()
    with BankWriter(tmp_path / "bank", DIM) as writer:
        for start in range(0, 20, 5):
            buffer.copy_(embeddings[start : start + 5])
            label_buffer.copy_(labels[start : start + 5])
            writer.write(ids[start : start + 5], buffer, label_buffer)
    bank = EmbeddingBank.open(tmp_path / "bank")
    assert torch.equal(bank.embeddings(), embeddings.half())
    assert torch.equal(bank.labels, labels)


def test_normalized_rows_have_length_one_whatever_their_size(tmp_path):
    ids, embeddings, labels = sample()
    scales = torch.logspace(-30, 30, 50)[:, None]
    bank = write_bank(tmp_path / "bank", normalize=True)
    with BankWriter(tmp_path / "scaled", DIM, normalize=True) as writer:
        writer.write(ids, embeddings * scales, labels)
    expected = (embeddings.double() / embeddings.double().norm(dim=1, keepdim=True)).half()
    assert torch.equal(bank.embeddings(), expected)
    scaled = EmbeddingBank.open(tmp_path / "scaled").embeddings()
    # The scaling itself rounds to float32, so at most a last bit of float16 may differ.
    assert torch.allclose(scaled.float(), expected.float(), rtol=2**-10, atol=2**-24)
    assert bank.meta["normalized"] is True


@pytest.mark.parametrize(
    ("bad", "says"),
    [(float("nan"), "NaN or inf"), (float("-inf"), "NaN or inf"), (65520.0, "65504")],
)
def test_a_row_that_float16_cannot_hold_is_refused_by_name_and_nothing_is_taken(
    tmp_path, bad, says
):
    ids, embeddings, _ = sample(10)
    poisoned = embeddings.clone()
    poisoned[3, 5] = bad
    with BankWriter(tmp_path / "bank", DIM) as writer:
        with pytest.raises(BankError, match=rf"row 3 .*sample_id {int(ids[3])}\b.*{says}"):
            writer.write(ids, poisoned)
        writer.write(ids, embeddings)  # the same ids: none of them was taken
    assert torch.equal(EmbeddingBank.open(tmp_path / "bank").embeddings(), embeddings.half())


def test_the_largest_values_that_round_into_float16_are_kept(tmp_path):
    rows = torch.tensor([[65519.0, -65504.0, 1e-12, 0.0]])
    with BankWriter(tmp_path / "bank", 4) as writer:
        writer.write([7], rows)
    assert torch.equal(EmbeddingBank.open(tmp_path / "bank").rows([7]), rows.half())


# Rows of this size, and whether float16 keeps their direction (a relative error of 2^-8 at most).
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("scale", "kept"),
    [
        *((1.0, True), (1e-3, True), (1e-5, True), (1e-6, False), (1e-7, False)),
        *((3e-8, False), (1e-9, False), (1e-30, False)),
    ],
)
def test_a_stored_row_keeps_its_direction_or_is_refused(dtype, scale, kept):
    ids, embeddings, _ = sample(64, dim=128)
    embeddings = embeddings.to(dtype) * scale
    exact = embeddings.double()
    lengths = exact.norm(dim=1, keepdim=True)
    if kept:
        half = arrays.to_float16(embeddings, ids, normalize=False).double()
        assert ((half - exact).norm(dim=1) <= 2**-8 * lengths.squeeze(1)).all()
    else:
        says = rf"row 0 .*sample_id {int(ids[0])}\b.*too small for float16.*normalize=True"
        with pytest.raises(BankError, match=says):
            arrays.to_float16(embeddings, ids, normalize=False)
    unit = arrays.to_float16(embeddings, ids, normalize=True).double()
    assert ((unit - exact / lengths).norm(dim=1) <= 2**-11 + 2**-25 * 128**0.5).all()


def test_small_elements_zeros_and_float16_itself_are_not_too_small(tmp_path):
    rows = torch.full((4, 1000), 1e-9)
    rows[0, 3] = 1e-3  # 2^-8 of the length is more than all others
    rows[1] = 0.0
    rows[2:] = 1e-6
    with BankWriter(tmp_path / "bank", 1000) as writer:
        writer.write([0, 1], rows[:2])
        writer.write([2, 3], rows[2:].half())
    assert torch.equal(EmbeddingBank.open(tmp_path / "bank").embeddings(), rows.half())


def test_one_row_that_is_too_small_is_named_among_others(tmp_path):
    ids, embeddings, _ = sample(10)
    embeddings[4] *= 1e-8
    embeddings[7] *= 1e-320  # zero in float32
    with pytest.raises(BankError, match=rf"row 4 .*sample_id {int(ids[4])}\b"):
        arrays.to_float16(embeddings, ids, normalize=False)
    embeddings = sample(10)[1].double()
    embeddings[7] *= 1e-320  # whose square is zero in float64
    with pytest.raises(BankError, match=rf"row 7 .*sample_id {int(ids[7])}\b"):
        arrays.to_float16(embeddings, ids, normalize=False)


@pytest.mark.parametrize("scale", [1e-320, 1e-200, 1e200, 1e305])
def test_float64_rows_are_normalized_where_their_squares_leave_the_range(scale):
    rows = sample(10)[1].double() * scale
    unit = arrays.to_float16(rows, torch.arange(10), normalize=True).double()
    exact = torch.nn.functional.normalize(rows / rows.abs().amax(), dim=1)
    assert ((unit - exact).norm(dim=1) <= 2**-8).all()  # 1e-320 itself has three digits


def test_a_relative_path_and_a_tilde_are_fixed_when_the_writer_is_made(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    ids, embeddings, _ = sample()
    for path in ("bank", "~/other"):
        with BankWriter(path, DIM, rows_per_shard=16) as writer:
            monkeypatch.chdir(tmp_path / "elsewhere")
            writer.write(ids, embeddings)
        assert writer.path == tmp_path / path.removeprefix("~/")
        assert len(EmbeddingBank.open(writer.path)) == 50
        monkeypatch.chdir(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["bank", "elsewhere", "other"]
    assert os.listdir(tmp_path / "elsewhere") == []


def test_duplicate_ids_are_refused_within_a_batch_and_across_batches(tmp_path):
    _, embeddings, _ = sample(4)
    with BankWriter(tmp_path / "bank", DIM, rows_per_shard=2) as writer:
        with pytest.raises(BankError, match=r"duplicate sample_id 5 \(row 2"):
            writer.write([5, 6, 5, 7], embeddings)
        writer.write([5, 6, 7, 8], embeddings)
        with pytest.raises(BankError, match="duplicate sample_id 6"):
            writer.write([9, 6], embeddings[:2])
    assert EmbeddingBank.open(tmp_path / "bank").sample_ids.tolist() == [5, 6, 7, 8]


def test_a_bank_without_rows_is_refused_but_may_be_continued(tmp_path):
    with pytest.raises(BankError, match="empty"), BankWriter(tmp_path / "bank", DIM):
        pass
    ids, embeddings, _ = sample()
    with BankWriter(tmp_path / "bank", DIM) as writer:
        writer.write(ids[:0], embeddings[:0])
        writer.write(ids, embeddings)
    assert len(EmbeddingBank.open(tmp_path / "bank")) == 50


def test_one_writer_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(_lock, "LOCK_PATIENCE_S", 0.0)
    ids, embeddings, _ = sample()
    with BankWriter(tmp_path / "bank", DIM) as writer:
        with (
            pytest.raises(BankError, match="being written by another"),
            BankWriter(tmp_path / "bank", DIM),
        ):
            pass
        writer.write(ids, embeddings)
    assert len(EmbeddingBank.open(tmp_path / "bank")) == 50


def test_a_lock_that_is_released_soon_is_waited_for(tmp_path):
    ids, embeddings, _ = sample()
    with contextlib.suppress(KeyError), BankWriter(tmp_path / "bank", DIM):
        raise KeyError  # an incomplete bank
    held = contextlib.ExitStack()
    held.enter_context(_lock.locked_folder(tmp_path / "bank"))
    threading.Timer(0.3, held.close).start()
    with BankWriter(tmp_path / "bank", DIM) as writer:
        writer.write(ids, embeddings)
    assert len(EmbeddingBank.open(tmp_path / "bank")) == 50


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_that_lives_on_does_not_keep_the_lock_nor_let_go_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(_lock, "LOCK_PATIENCE_S", 0.0)
    lock = _lock.locked_folder(tmp_path)
    with lock:
        leaves = os.fork()
        if leaves == 0:
            lock.gen.close()  # type: ignore[attr-defined]  # the end of the block, in the child
            os._exit(0)
        os.waitpid(leaves, 0)
        with pytest.raises(BlockingIOError), _lock.locked_folder(tmp_path):
            pass
        stays = os.fork()
        if stays == 0:
            signal.pause()
            os._exit(0)
    try:
        with _lock.locked_folder(tmp_path):
            pass
    finally:
        os.kill(stays, signal.SIGKILL)
        os.waitpid(stays, 0)


def test_a_writer_that_is_not_open_does_not_write(tmp_path):
    ids, embeddings, _ = sample()
    writer = BankWriter(tmp_path / "bank", DIM)
    with pytest.raises(BankError, match="not open"):
        writer.write(ids, embeddings)
    assert not (tmp_path / "bank").exists()


def test_the_manifest_records_what_made_the_bank(tmp_path):
    bank = write_bank(
        tmp_path / "bank",
        teacher={"name": "t", "parameters": 12},
        preprocessing={"mean": (0.5, 0.25)},
        dataset="toys (train)",
        fingerprint="abcd",
    )
    assert bank.meta["teacher"] == {"name": "t", "parameters": 12}
    assert bank.meta["preprocessing"] == {"mean": [0.5, 0.25]}
    assert bank.meta["dataset"] == "toys (train)"
    assert bank.meta["fingerprint"] == "abcd"
    assert bank.meta["versions"]["torch"] == torch.__version__
    assert bank.class_names == CLASSES
    with pytest.raises(TypeError):
        bank.meta["dataset"] = "other"
