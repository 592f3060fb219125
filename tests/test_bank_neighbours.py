"""`ckd bank neighbours`: its results against float64, kills, damage, other settings and banks."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ckd
from ckd import _lock, cli
from ckd import neighbours as computation
from ckd._lock import locked_folder
from ckd.bank import BankError, BankWriter, EmbeddingBank, Neighbours
from ckd.bank.manifest import MANIFEST_NAME
from ckd.bank.neighbours import FOLDER
from ckd.bank.shards import encode_shard
from ckd.neighbours import build_neighbours
from ckd.ops.top_k import TILE_ELEMENTS
from tests.bank_tools import change_manifest, files_of, flip_bit, replace_shard, write_bank
from tests.test_bank_resume import Steps
from tests.test_files import ODD_FILES, make_odd_file


@pytest.fixture(params=[1 << 21, 50])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All cosines in one tile, and blocks of 4 students with tiles of 12 rows."""
    monkeypatch.setitem(TILE_ELEMENTS, "cpu", request.param)
    monkeypatch.setattr(computation, "STUDENTS", 256 if request.param > 50 else 4)


def build(path: Path, **options: Any) -> Neighbours:
    options = {"k": 5, "rows_per_part": 16, "progress": False} | options
    return build_neighbours(path, **options)


def write_rows(path: Path, rows: Tensor, **settings: Any) -> EmbeddingBank:
    with BankWriter(path, rows.shape[1], rows_per_shard=16, **settings) as writer:
        writer.write(torch.arange(len(rows)), rows)
    return EmbeddingBank.open(path)


def cosines(bank: EmbeddingBank) -> tuple[Tensor, Tensor]:
    """float64 unit rows, and their cosines."""
    rows = bank.embeddings().double()
    norm = rows.norm(dim=1, keepdim=True)
    unit = rows / norm.masked_fill(norm == 0, 1)
    return unit, unit @ unit.T


def check(found: Neighbours, bank: EmbeddingBank) -> None:
    """Everything against float64: float32 cosines of 8 numbers are exact to 4e-7."""
    unit, table = cosines(bank)
    logits, off = table / found.temperature, 4e-7 / found.temperature
    q, lse = logits.softmax(1), logits.logsumexp(1)
    n, k = len(bank), found.k
    assert (found.rows.dtype, found.weights.dtype, found.lse.dtype) == (
        torch.int32,
        torch.float16,
        torch.float32,
    )
    assert found.rows.shape == found.weights.shape == (n, k)
    assert all(len(set(row)) == k for row in found.rows.tolist())
    chosen = found.rows.long()
    assert (table.gather(1, chosen) - table.topk(k, dim=1).values).abs().max() < 4e-7
    assert (found.weights.float().diff(dim=1) <= 0).all()
    expected = q.gather(1, chosen)
    rounding = (2**-11 + 2 * off) * expected + 2**-25
    assert ((found.weights.double() - expected).abs() <= rounding).all()
    assert ((found.lse - lse).abs() <= 2 * off + 1e-6 * lse.abs()).all()
    left = 1 - expected.sum(1)
    assert ((found.left_out - left).abs() <= rounding.sum(1) + 1e-6).all()
    assert abs(found.left_out_mean - left.mean().item()) <= 2 * off + 1e-6
    assert abs(found.left_out_max - left.max().item()) <= 2 * off + 1e-6
    if found.exact:
        assert found.mean is not None
        mean = q @ unit
        assert (found.mean.dtype, found.mean.shape) == (torch.float16, mean.shape)
        assert (found.mean.double() - mean).abs().max() <= 2**-11 + 2 * off
    else:
        assert found.mean is None


# One row; the row itself alone; all rows; parts, shards and tiles that do not fit one another.
@pytest.mark.parametrize(("rows", "k"), [(1, 1), (50, 1), (50, 7), (50, 50), (33, 32)])
@pytest.mark.parametrize("normalize", [False, True])
def test_what_is_stored_matches_float64(
    tmp_path: Path, rows: int, k: int, normalize: bool, tile: None
) -> None:
    bank = write_bank(tmp_path / "bank", rows=rows, normalize=normalize)
    for exact in (False, True):
        shutil.rmtree(bank.path / FOLDER, ignore_errors=True)
        found = build(bank.path, k=k, exact=exact)
        assert (len(found), found.k, found.temperature) == (rows, k, 0.07)
        check(found, bank)


@pytest.mark.parametrize("temperature", [1e-3, 0.01, 1.0, 1000.0])
def test_peaked_and_flat_softmax_match_float64(tmp_path: Path, temperature: float) -> None:
    bank = write_bank(tmp_path / "bank")
    check(build(bank.path, k=50, temperature=temperature, exact=True), bank)


@pytest.mark.skipif("cpu" not in ckd.backends.available(), reason="needs the C++ kernels")
@pytest.mark.parametrize("temperature", [0.07, 0.005])  # exp(-1 / 0.005) underflows
def test_equal_rows_and_rows_of_zeros(tmp_path: Path, tile: None, temperature: float) -> None:
    rows = torch.randn(6, 8)[torch.arange(40) % 6]
    rows[[3, 20]] = 0.0
    bank = write_rows(tmp_path / "bank", rows)
    found = build(bank.path, k=9, exact=True, temperature=temperature)
    check(found, bank)
    _, table = cosines(bank)
    order = sorted(range(40), key=lambda r: (-round(table[0, r].item(), 6), r))
    assert found.rows[0].tolist() == found.rows[6].tolist() == order[:9]
    for zero in (3, 20):
        assert found.rows[zero].tolist() == list(range(9))
        assert found.lse[zero].item() == pytest.approx(torch.tensor(40.0).log().item())
        assert (found.weights[zero] == torch.tensor(1 / 40).half()).all()


def test_shards_parts_and_blocks_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"k": 7, "exact": True}
    first = build(write_bank(tmp_path / "a").path, **options)
    monkeypatch.setattr(computation, "STUDENTS", 5)
    other = build(write_bank(tmp_path / "b", rows_per_shard=7).path, rows_per_part=50, **options)
    assert torch.equal(first.rows, other.rows)
    assert (first.weights - other.weights).abs().max() <= 2**-10
    torch.testing.assert_close(first.lse, other.lse)
    assert (first.mean - other.mean).abs().max() <= 2**-10  # type: ignore[operator]


def test_one_part_is_the_memory_map_itself(tmp_path: Path) -> None:
    found = build(write_bank(tmp_path / "bank").path, rows_per_part=50)
    assert found.rows.data_ptr() == found._columns[0][0].data_ptr()
    assert found.rows is found.rows


def test_a_row_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    bank = write_bank(tmp_path / "bank", rows=16)
    embedding = bank.embeddings().clone()
    embedding[9, 2] = torch.inf
    replace_shard(bank.path, 0, encode_shard(embedding, bank.labels, bank.sample_ids))
    with pytest.raises(BankError, match=r"not finite.*ckd.bank verify"):
        build(bank.path)


def test_a_pickle_opens_the_folder_again(tmp_path: Path) -> None:
    bank = write_bank(tmp_path / "bank")
    found = build(bank.path, exact=True)
    data = pickle.dumps(found)
    assert len(data) < 1000
    again = pickle.loads(data)
    for name in ("rows", "weights", "lse", "mean", "left_out"):
        assert torch.equal(getattr(found, name), getattr(again, name))
    assert repr(again) == repr(found)
    build(bank.path, k=6, replace=True)
    with pytest.raises(BankError, match="other neighbours than when these were pickled"):
        pickle.loads(data)


def test_a_bank_without_them_says_how_to_make_them(tmp_path: Path) -> None:
    bank = write_bank(tmp_path / "bank")
    with pytest.raises(BankError, match=rf"no neighbours.*ckd.bank neighbours {bank.path}"):
        bank.neighbours()
    with pytest.raises(BankError, match="verify mode 'fats'"):
        bank.neighbours(verify="fats")


# Open, write, fsync, rename, fsync of the folder for 2 parts and 3 manifests, and the bank's.
STEPS, TWO_PARTS = 26, {"rows_per_part": 30}


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_a_full_disk_at_any_step_loses_nothing_but_the_part(tmp_path: Path) -> None:
    bank = write_bank(tmp_path / "bank")
    shutil.copytree(bank.path, tmp_path / "whole")
    build(tmp_path / "whole", **TWO_PARTS)
    whole = tree(tmp_path / "whole")

    def disk_full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for n in range(1, STEPS + 1):
        path = shutil.copytree(bank.path, tmp_path / str(n))
        with pytest.MonkeyPatch.context() as patches:
            steps = Steps(patches, n, disk_full)
            with pytest.raises(OSError, match="No space left"):
                build(path, **TWO_PARTS)
        assert steps.taken == n
        assert not [name for name in tree(path) if ".tmp-" in name], n
        build(path, **TWO_PARTS)
        assert tree(path) == whole, n


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_step_they_resume_to_the_same_bytes(tmp_path: Path) -> None:
    bank = write_bank(tmp_path / "bank")
    shutil.copytree(bank.path, tmp_path / "whole")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # OpenMP's threads do not survive the fork
    build(tmp_path / "whole", **TWO_PARTS)
    whole = tree(tmp_path / "whole")
    for n in range(1, STEPS + 1):
        path = shutil.copytree(bank.path, tmp_path / str(n))
        child = os.fork()
        if child == 0:
            Steps(pytest.MonkeyPatch(), n, lambda: os.kill(os.getpid(), signal.SIGKILL))
            try:
                build(path, **TWO_PARTS)
            finally:
                os._exit(1)  # not reached: the step comes before the end
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        build(path, **TWO_PARTS)
        assert tree(path) == whole, n
    torch.set_num_threads(threads)


def stop_after(parts: int, path: Path, **options: Any) -> None:
    """Build until so many parts are stored."""

    class Stop(Exception):
        pass

    original, calls = computation._nearest, []

    def nearest(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > parts:
            raise Stop
        return original(*args)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(computation, "_nearest", nearest)
        with pytest.raises(Stop):
            build(path, **options)


def test_an_interrupted_one_is_incomplete_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], terminal: None
) -> None:
    bank = write_bank(tmp_path / "bank")
    stop_after(2, bank.path)
    with pytest.raises(BankError, match=r"32 of 50 rows.*go on with: .*--k 5 --temperature 0.07$"):
        bank.neighbours()
    # The stored size of parts is kept.
    build(bank.path, rows_per_part=7, progress=True)
    out, err = capsys.readouterr()
    assert "resuming: 32 rows are stored already" in out
    assert "pairs" in err
    assert sorted(os.listdir(bank.path / FOLDER)) == [
        MANIFEST_NAME,
        *(f"part-{i:05d}.safetensors" for i in range(4)),
    ]


def test_other_settings_are_refused_and_replaced_on_request(tmp_path: Path) -> None:
    bank = write_bank(tmp_path / "bank")
    build(bank.path)
    before = tree(bank.path)
    changes: list[dict[str, Any]] = [{"k": 6}, {"temperature": 0.1}, {"exact": True}]
    for change in changes:
        with pytest.raises(BankError, match=r"other settings: k = 5.*, now k = .*--replace"):
            build(bank.path, **change)
        assert tree(bank.path) == before
    for change in changes:
        replaced = build(bank.path, replace=True, **change)
        check(replaced, bank)
        stop_after(1, bank.path, replace=True)
        with pytest.raises(BankError, match="other settings"):
            build(bank.path, **change)
        assert tree(build(bank.path, replace=True).path.parent) == before  # goes on


def test_settings_may_change_while_no_part_is_stored(tmp_path: Path) -> None:
    bank = write_bank(tmp_path / "bank")
    stop_after(0, bank.path)
    check(build(bank.path, k=3, rows_per_part=20), bank)


def test_those_of_another_bank_are_refused_and_replaced_on_request(tmp_path: Path) -> None:
    bank = write_bank(tmp_path / "bank")
    build(bank.path)
    kept = shutil.move(bank.path / FOLDER, tmp_path / "kept")
    shutil.rmtree(bank.path)
    changed = write_bank(tmp_path / "bank", teacher="another")
    shutil.move(kept, bank.path / FOLDER)
    for call in (changed.neighbours, lambda: build(changed.path)):
        with pytest.raises(BankError, match=r"of another bank than .*--replace"):
            call()
    check(build(changed.path, replace=True), changed)


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    bank = write_bank(tmp_path / "bank", rows=20)
    build(bank.path, exact=True, k=2)
    spans = {"part-00000.safetensors": "rows 0 to 15", "part-00001.safetensors": "rows 16 to 19"}
    for name, data in files_of(bank.path / FOLDER).items():
        file = bank.path / FOLDER / name
        for position in range(0, len(data), 7):
            flip_bit(file, position, bit=position % 8)
            with pytest.raises(BankError, match=rf"{name}.*{spans.get(name, '')}.*--replace"):
                bank.neighbours("full" if position % 2 else "fast")
            file.write_bytes(data)
    bank.neighbours()


def test_damage_is_repaired_on_request_only(tmp_path: Path) -> None:
    bank = write_bank(tmp_path / "bank")
    build(bank.path)
    whole = tree(bank.path)
    for name in (MANIFEST_NAME, "part-00002.safetensors"):
        flip_bit(bank.path / FOLDER / name, -5)
        with pytest.raises(BankError, match=name):
            build(bank.path)
        build(bank.path, replace=True)
        assert tree(bank.path) == whole
    (bank.path / FOLDER / "part-00003.safetensors").unlink()
    with pytest.raises(BankError, match=r"part-00003.safetensors is missing \(rows 48 to 49\)"):
        bank.neighbours(verify="off")


@pytest.mark.parametrize("name", [MANIFEST_NAME, "part-00001.safetensors"])
@pytest.mark.parametrize("kind", [*ODD_FILES, "link"])
def test_only_regular_files_in_the_folder_are_read(tmp_path: Path, name: str, kind: str) -> None:
    bank = write_bank(tmp_path / "bank")
    build(bank.path)
    replace_by(kind, bank.path / FOLDER / name, tmp_path / "moved")
    for call in (lambda: bank.neighbours("off"), lambda: build(bank.path)):
        with pytest.raises(BankError, match=rf"{name}.*(regular file|symbolic link)"):
            call()


@pytest.mark.parametrize("kind", [*(kind for kind in ODD_FILES if kind != "folder"), "link"])
def test_the_folder_is_one(tmp_path: Path, kind: str) -> None:
    bank = write_bank(tmp_path / "bank")
    build(bank.path)
    replace_by(kind, bank.path / FOLDER, tmp_path / "moved")
    for call in (bank.neighbours, lambda: build(bank.path), lambda: build(bank.path, replace=True)):
        with pytest.raises(BankError, match=f"{bank.path / FOLDER}"):
            call()


def replace_by(kind: str, file: Path, moved: Path) -> None:
    file.rename(moved)
    if kind == "link":
        file.symlink_to(moved)
    else:
        make_odd_file(kind, file)


# The checksum is recomputed, so that the value itself is refused.
@pytest.mark.parametrize(
    ("says", "change"),
    [
        ("schema version 2", lambda m: m.update(schema_version=2)),
        ("schema version True", lambda m: m.update(schema_version=True)),
        ("another bank", lambda m: m.update(bank="00")),
        ("bank", lambda m: m.update(bank=None)),
        ("parts", lambda m: m.pop("parts")),
        ("parts", lambda m: m.update(parts=[5])),
        ("k", lambda m: m.pop("k")),
        ("k must be", lambda m: m.update(k=0)),
        ("k must be", lambda m: m.update(k=51)),
        ("k must be", lambda m: m.update(k=True)),
        ("weights is F16|rows is I32", lambda m: m.update(k=6)),
        ("holds", lambda m: m.update(exact=True)),
        ("temperature", lambda m: m.update(temperature="1")),
        ("temperature must be", lambda m: m.update(temperature=0.0)),
        ("temperature must be", lambda m: m.update(temperature=float("nan"))),
        ("temperature must be", lambda m: m.update(temperature=10**400)),
        ("rows_per_part must be", lambda m: m.update(rows_per_part=0)),
        (r"parts\[0\]", lambda m: m.update(rows_per_part=8)),
        (r"parts\[3\]", lambda m: m.update(rows=48)),
        ("2.31", lambda m: m.update(rows=2**40)),
        (r"parts\[0\]", lambda m: m["parts"][0].update(file="../part-00000.safetensors")),
        (r"parts\[0\]", lambda m: m["parts"].reverse()),
        (r"parts\[1\]", lambda m: m["parts"].__setitem__(1, m["parts"][0])),
        (r"parts\[2\].*leaves out", lambda m: m["parts"][2].update(left_out_max=1.5)),
        (r"parts\[2\].*leaves out", lambda m: m["parts"][2].update(left_out_mean=float("nan"))),
        ("left_out_max", lambda m: m["parts"][2].update(left_out_max=None)),
        ("sha256", lambda m: m["parts"][0].pop("sha256")),
        ("truncated", lambda m: m["parts"][0].update(bytes=10**6)),
        ("xxh3", lambda m: m["parts"][0].update(xxh3="0")),
        ("incomplete: 48 of 50 rows", lambda m: m["parts"].pop()),
    ],
)
def test_a_manifest_that_says_what_cannot_be_is_refused(
    tmp_path: Path, says: str, change: Callable[[dict[str, Any]], Any]
) -> None:
    bank = write_bank(tmp_path / "bank")
    build(bank.path)
    change_manifest(bank.path / FOLDER, change)
    with pytest.raises(BankError, match=says):
        bank.neighbours()


def test_foreign_files_stay_and_leftovers_do_not(tmp_path: Path) -> None:
    bank = write_bank(tmp_path / "bank")
    stop_after(1, bank.path)
    folder = bank.path / FOLDER
    for name in (".tmp-part-00001.safetensors", ".tmp-manifest.json", "part-00001.safetensors"):
        (folder / name).write_bytes(b"half a file")
    (folder / "notes.txt").write_text("mine")
    check(build(bank.path), bank)
    assert (folder / "notes.txt").read_text() == "mine"
    assert len(os.listdir(folder)) == 6
    EmbeddingBank.open(bank.path, verify="full")
    with BankWriter(tmp_path / "other", 8) as writer:  # a bank ignores the folder
        (tmp_path / "other" / FOLDER).mkdir()
        writer.write(torch.arange(3), torch.randn(3, 8))


def test_two_processes_do_not_write_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = write_bank(tmp_path / "bank")
    monkeypatch.setattr(_lock, "LOCK_PATIENCE_S", 0.0)
    with locked_folder(bank.path / FOLDER), pytest.raises(BankError, match="another process"):
        build(bank.path)
    check(build(bank.path), bank)
    with locked_folder(bank.path / FOLDER):  # nothing to write
        build(bank.path)


def test_the_command_makes_shows_and_verifies_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank = write_bank(tmp_path / "bank")
    name, folder = str(bank.path), bank.path / FOLDER

    def command(*argv: str) -> tuple[int, str, str]:
        status = cli.main(["bank", *argv])
        return status, *capsys.readouterr()

    assert json.loads(command("info", name, "--json")[1])["neighbours"] is None
    assert "nearest" not in command("info", name)[1]
    status, out, _ = command("neighbours", name, "--k", "4", "--temperature", "0.1", "--exact")
    assert status == 0
    assert f"{folder}: the nearest of 50 rows to each, k = 4, temperature 0.1, with mean" in out
    found = bank.neighbours()
    left = f"leave out {100 * found.left_out_mean:.3g} % of its softmax on average, at most "
    assert left + f"{100 * found.left_out_max:.3g} %" in out
    again = ("neighbours", name, "--k", "4", "--temperature", "0.1", "--exact", "--replace")
    before = os.stat(folder / MANIFEST_NAME)
    assert "complete already" in command(*again)[1]
    assert os.stat(folder / MANIFEST_NAME) == before
    status, out, err = command("neighbours", name)
    assert (status, out) == (2, "")
    assert "made with other settings" in err

    facts = json.loads(command("info", name, "--json")[1])["neighbours"]
    assert facts == {
        "k": 4,
        "temperature": 0.1,
        "exact": True,
        "bytes": found.nbytes,
        "left_out_mean": found.left_out_mean,
        "left_out_max": found.left_out_max,
    }
    out = command("info", name)[1]
    assert "nearest  4 rows of each and mean rows at temperature 0.1" in out
    assert f"they leave out {100 * found.left_out_mean:.3g} %" in out
    assert f"{folder} is whole" in command("verify", name, "--full")[1]

    flip_bit(folder / "part-00000.safetensors", -1)
    status, _, err = command("verify", name)
    assert status == 2
    assert "part-00000.safetensors is damaged (rows 0 to 49)" in err
    assert "part-00000" in json.loads(command("info", name, "--json")[1])["neighbours"]["error"]
    status, out, _ = command("info", name)
    assert status == 0
    assert "part-00000.safetensors is damaged" in out
    assert command(*again)[0] == 0
    assert command("verify", name)[0] == 0
