"""Building a bank with a teacher, importing one, and the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ckd import data, models
from ckd.bank import BankError, EmbeddingBank
from ckd.bank.__main__ import main
from ckd.bank.build import build_bank
from ckd.bank.npy import import_npy
from tests.bank_tools import DIM, files_of, flip_bit, sample, write_bank

TEACHER = "vit:patch=4,width=16,layers=1,heads=2"


@pytest.fixture
def teacher() -> models.Model:
    torch.manual_seed(0)
    return models.create(TEACHER, num_classes=10, image_size=8, in_channels=1).eval()


@pytest.fixture(scope="module")
def digits() -> data.MemoryImages:
    """The first 100 images of digits, with scattered sample ids."""
    whole = data.load("digits", "test")
    assert isinstance(whole, data.MemoryImages)
    return data.MemoryImages(
        whole.images[:100],
        whole.labels[:100],
        class_names=whole.class_names,
        sample_ids=torch.arange(100).flip(0) * 3,
        name="digits",
    )


class Killed(Exception):
    """Ends a build in the middle."""


def prepare_until(batches: int) -> Any:
    """`models.prepare` for this many batches; the next raises Killed."""
    left = iter(range(batches))

    def prepare(model: models.Model, images: torch.Tensor) -> torch.Tensor:
        if next(left, None) is None:
            raise Killed
        return models.prepare(model, images)

    prepare.__qualname__ = "prepare"
    return prepare


def build(dataset: Any, model: Any, path: Path, **options: Any) -> EmbeddingBank:
    settings = {"batch_size": 12, "rows_per_shard": 32, "progress": False} | options
    return build_bank(dataset, model, path, **settings)


def test_a_built_bank_holds_the_teachers_embeddings(tmp_path, teacher, digits):
    bank = build(digits, teacher, tmp_path / "bank")
    with torch.no_grad():
        expected = teacher(models.prepare(teacher, digits.images)).embedding
    # The teacher rounds a little differently in batches of another size.
    assert torch.allclose(bank.embeddings().float(), expected, rtol=2**-10, atol=1e-4)
    assert torch.equal(bank.labels, digits.labels)
    assert torch.equal(bank.sample_ids, digits.sample_ids)
    bank.check(dim=16, class_names=digits.class_names, fingerprint=digits.fingerprint)
    assert bank.meta["dataset"] == "digits (train)"
    recorded = bank.meta["teacher"]
    assert recorded["name"] == TEACHER
    assert recorded["weights_sha256"] == models.weights_hash(teacher)
    assert recorded["parameters"] == models.parameter_count(teacher)
    assert recorded["flops_per_image"] == models.flops_per_image(teacher) > 0
    assert recorded["weights_bytes"] == 4 * recorded["parameters"]


def test_no_batch_straddles_the_edge_of_a_shard(tmp_path, teacher, digits):
    sizes = []

    def prepare(model, images):
        sizes.append(len(images))
        return models.prepare(model, images)

    build(digits, teacher, tmp_path / "bank", prepare=prepare)
    assert sizes == [12, 12, 8, 12, 12, 8, 12, 12, 8, 4]


@pytest.mark.parametrize("batches", [0, 2, 3, 5, 9])
def test_an_interrupted_build_resumes_to_the_same_bytes(tmp_path, teacher, digits, batches):
    build(digits, teacher, tmp_path / "undisturbed")
    with pytest.raises(Killed):
        build(digits, teacher, tmp_path / "bank", prepare=prepare_until(batches))
    build(digits, teacher, tmp_path / "bank")
    assert files_of(tmp_path / "bank") == files_of(tmp_path / "undisturbed")


def test_stored_rows_are_not_computed_again(tmp_path, teacher, digits):
    with pytest.raises(Killed):
        build(digits, teacher, tmp_path / "bank", prepare=prepare_until(6))
    with pytest.raises(Killed):  # one batch less than what is left after two shards
        build(digits, teacher, tmp_path / "bank", prepare=prepare_until(3))
    build(digits, teacher, tmp_path / "bank", prepare=prepare_until(1))


def test_another_teacher_or_other_data_do_not_continue_a_bank(tmp_path, teacher, digits):
    with pytest.raises(Killed):
        build(digits, teacher, tmp_path / "bank", prepare=prepare_until(4))
    other = models.create(TEACHER, num_classes=10, image_size=8, in_channels=1)
    with pytest.raises(BankError, match="other settings: teacher"):
        build(digits, other, tmp_path / "bank")
    darker = data.MemoryImages(
        digits.images // 2,
        digits.labels,
        class_names=digits.class_names,
        sample_ids=digits.sample_ids,
        name="digits",
    )
    with pytest.raises(BankError, match="other settings: fingerprint"):
        build(darker, teacher, tmp_path / "bank")


def test_the_teacher_runs_in_evaluation_mode_and_is_left_as_it_was(tmp_path, digits):
    model = models.create("resnet8:width=4", num_classes=10, image_size=8, in_channels=1)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    build(digits, model, tmp_path / "bank")
    assert model.training
    # Batch statistics would have moved the running averages.
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_teacher_that_gives_nan_is_stopped_at_the_image(tmp_path, teacher, digits):
    def prepare(model, images):
        prepared = models.prepare(model, images)
        prepared[5] = float("nan")
        return prepared

    with pytest.raises(BankError, match=f"row 5 .*sample_id {int(digits.sample_ids[5])}"):
        build(digits, teacher, tmp_path / "bank", prepare=prepare)


def test_a_disk_that_is_too_small_is_found_before_the_teacher_runs(
    tmp_path, teacher, digits, monkeypatch
):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"needs 4\.69 KiB more, the disk has 0\.977 KiB left"):
        build(digits, teacher, tmp_path / "bank", prepare=prepare_until(0))


def test_progress_tells_the_estimate_and_the_teachers_accuracy(
    tmp_path, teacher, digits, capsys, terminal
):
    with pytest.raises(Killed):
        build(digits, teacher, tmp_path / "bank", prepare=prepare_until(4))
    build(digits, teacher, tmp_path / "bank", progress=True)
    out, err = capsys.readouterr()
    assert "100 rows x 16 float16 of digits (train), about 4.69 KiB" in out
    assert "resuming: 32 rows are stored already" in out
    assert "accuracy on the 68 rows of this run" in out
    assert "100/100" in err
    assert "images/s" in err


@pytest.mark.parametrize("classes", [0, 10])
def test_a_bank_of_images_without_labels(tmp_path, teacher, digits, classes, capsys):
    names = digits.class_names[:classes]
    labels = torch.where(torch.arange(100) < 40, digits.labels, -1) if classes else None
    dataset = data.MemoryImages(
        digits.images,
        torch.full((100,), -1) if labels is None else labels,
        class_names=names,
        name="some",
    )
    bank = build(dataset, teacher, tmp_path / "bank", progress=True)
    out = capsys.readouterr().out
    assert f"of some (train), {4 * classes} labelled, about" in out
    assert ("accuracy on the 40 labelled rows" in out) == bool(classes)
    assert torch.equal(bank.labels, dataset.labels)
    assert bank.class_names == names
    bank.check(class_names=names, fingerprint=dataset.fingerprint)
    rows = digits.labels[:40].unique()
    if classes:
        first = bank.embeddings()[:40][digits.labels[:40] == rows[0]].double().mean(0)
        torch.testing.assert_close(bank.centroids()[0], first.float())
    else:
        with pytest.raises(BankError, match="has no labels, so no centroids"):
            bank.centroids()
    assert main(["verify", str(bank.path)]) == 0
    assert main(["info", str(bank.path), "--plot", str(tmp_path / "bank.png")]) == 0
    told = capsys.readouterr().out
    assert f"and {100 - 4 * classes} rows without a label" in told
    assert ("of centroids, or" in told) == bool(classes)


def test_embeddings_are_imported_from_npy_files(tmp_path):
    ids, embeddings, labels = (t.numpy() for t in sample())
    np.save(tmp_path / "e.npy", np.asfortranarray(embeddings.astype(np.float64)))
    np.save(tmp_path / "l.npy", labels.astype(np.int32))
    np.save(tmp_path / "i.npy", ids)
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    bank = import_npy(
        tmp_path / "e.npy",
        tmp_path / "bank",
        labels=tmp_path / "l.npy",
        ids=tmp_path / "i.npy",
        class_names=tmp_path / "names.txt",
        teacher="somebody's",
        rows_per_shard=16,
    )
    assert np.array_equal(bank.embeddings().numpy(), embeddings.astype(np.float16))
    assert np.array_equal(bank.labels.numpy(), labels)
    assert np.array_equal(bank.sample_ids.numpy(), ids)
    assert bank.class_names == ("ant", "bee", "cat")
    assert bank.meta["teacher"] == {"name": "somebody's"}
    bare = import_npy(tmp_path / "e.npy", tmp_path / "bare")
    assert torch.equal(bare.sample_ids, torch.arange(50))
    assert (bare.labels == -1).all()


def test_the_command_line_builds_tells_draws_and_verifies(tmp_path, teacher, capsys):
    models.save(teacher, tmp_path / "teacher.safetensors")
    bank, picture = tmp_path / "bank", tmp_path / "bank.png"
    arguments = ["--teacher", str(tmp_path / "teacher.safetensors"), "--data", "digits"]
    arguments += ["--split", "test", "--device", "cpu", "--out", str(bank)]
    assert main(["build", *arguments]) == 0
    assert "360 rows" in capsys.readouterr().out
    assert main(["info", str(bank), "--plot", str(picture)]) == 0
    text = capsys.readouterr().out
    assert all(part in text for part in ("360 x 16 float16", TEACHER, "FLOPs an image"))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["info", str(bank), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["rows"] == sum(entry["rows"] for entry in facts["classes"]) == 360
    assert facts["saves"]["bank_bytes_read_per_image"] == 32
    assert main(["verify", str(bank), "--full"]) == 0
    assert "sha256 match" in capsys.readouterr().out


def test_a_complete_bank_is_a_success_for_the_same_command_only(tmp_path, teacher, digits, capsys):
    build(digits, teacher, tmp_path / "bank")
    before = files_of(tmp_path / "bank")
    bank = build(digits, teacher, tmp_path / "bank", prepare=models.prepare, progress=True)
    assert len(bank) == 100
    assert "complete already" in capsys.readouterr().out
    with pytest.raises(BankError, match=r"complete bank of 100 rows.*other settings: normalized"):
        build(digits, teacher, tmp_path / "bank", normalize=True)
    assert files_of(tmp_path / "bank") == before

    np.save(tmp_path / "e.npy", sample()[1].numpy())
    arguments = [
        "build",
        "--from-npy",
        str(tmp_path / "e.npy"),
        "--out",
        str(tmp_path / "imported"),
    ]
    for _ in range(2):
        assert main(arguments) == 0
        assert "imported is complete: 50 rows" in capsys.readouterr().out
    assert main([*arguments, "--normalize"]) == 2
    assert "normalized: False, now True" in capsys.readouterr().err


def test_labels_that_were_wrong_may_be_corrected_and_the_import_run_again(tmp_path):
    np.save(tmp_path / "e.npy", sample()[1].numpy())
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")

    def run(labels: Any) -> EmbeddingBank:
        np.save(tmp_path / "l.npy", labels)
        files = {"labels": tmp_path / "l.npy", "class_names": tmp_path / "names.txt"}
        return import_npy(tmp_path / "e.npy", tmp_path / "bank", **files)

    with pytest.raises(BankError, match=r"l\.npy must be integers"):
        run(sample()[2].numpy().astype(np.float32))
    assert not (tmp_path / "bank").exists()
    with pytest.raises(BankError, match=r"got 3 in row 2 of .*l\.npy"):
        run(sample()[2].numpy() + 1)
    assert len(run(sample()[2].numpy().astype(np.uint32))) == 50


def test_rows_that_an_import_refuses_are_counted_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("ckd.bank.npy._CHUNK_ROWS", 16)
    embeddings = sample()[1].numpy()
    np.save(tmp_path / "e.npy", embeddings)
    np.save(tmp_path / "i.npy", np.arange(50) % 40)
    with pytest.raises(BankError, match=r"duplicate sample_id 0 \(row 40 of .*i\.npy\)"):
        import_npy(tmp_path / "e.npy", tmp_path / "bank", ids=tmp_path / "i.npy")
    embeddings[33, 2] = np.nan
    np.save(tmp_path / "e.npy", embeddings)
    with pytest.raises(BankError, match=r"row 33 of .*e\.npy \(sample_id 33\) holds NaN"):
        import_npy(tmp_path / "e.npy", tmp_path / "bank")


def test_an_import_reads_paths_below_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    ids, embeddings, labels = (t.numpy() for t in sample())
    for name, values in (("e", embeddings), ("l", labels), ("i", ids)):
        np.save(tmp_path / f"{name}.npy", values)
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfant\r\nbee\r\ncat\r\n")
    arguments = ["--from-npy", "~/e.npy", "--labels", "~/l.npy", "--ids", "~/i.npy"]
    assert main(["build", *arguments, "--class-names", "~/names.txt", "--out", "~/bank"]) == 0
    bank = EmbeddingBank.open(tmp_path / "bank")
    assert bank.class_names == ("ant", "bee", "cat")
    assert np.array_equal(bank.sample_ids.numpy(), ids)
    assert main(["info", "~/bank", "--plot", "~/bank.png"]) == 0
    assert (tmp_path / "bank.png").exists()
    assert main(["verify", "~/bank"]) == 0


def test_the_command_line_imports(tmp_path, capsys):
    np.save(tmp_path / "e.npy", sample()[1].numpy())
    arguments = ["--from-npy", str(tmp_path / "e.npy"), "--out", str(tmp_path / "bank")]
    assert main(["build", *arguments, "--normalize", "--teacher-name", "clip"]) == 0
    assert main(["info", str(tmp_path / "bank")]) == 0
    text = capsys.readouterr().out
    assert f"50 x {DIM} float16, scaled to length 1" in text
    assert "teacher  clip" in text
    assert "classes  none" in text
    assert "cost of the teacher was not recorded" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["verify", "BANK"], "shard-00002.safetensors is damaged (rows 32 to 47)"),
        (["info", "TMP"], "not a bank"),
        (["build", "--out", "TMP/new"], "build needs --teacher and --data, or --from-npy"),
        (["build", "--out", "TMP/new", "--data", "digits", "--teacher", "resnet7"], "resnet7"),
        (["build", "--out", "TMP/new", "--data", "digist", "--teacher", "vit"], "digits"),
        (["build", "--out", "TMP/new", "--from-npy", "TMP/none.npy"], "No such file"),
        (["build", "--out", "TMP/new", "--from-npy", "x", "--data", "d"], "--data has no effect"),
        (
            ["build", "--out", "TMP/new", "--from-npy", "x", "--split", "test"],
            "--split has no effect",
        ),
        (["build", "--out", "TMP/new", "--from-npy", "x", "--workers", "2"], "--workers has no"),
        (["info", "BANK", "--method", "umap"], "--method has no effect without --plot"),
        (["info", "BANK", "--plot", "TMP/a.png", "--method", "umap"], "--method takes, nearest"),
        (
            ["build", "--out", "TMP/n", "--teacher", "t", "--data", "d", "--split", "tain"],
            "unknown split 'tain'; --split takes, nearest first: train, test",
        ),
        (["info", "BANK", "--per-class", "3"], "--per-class has no effect without --plot"),
        (
            ["build", "--out", "TMP/n", "--data", "d", "--teacher", "t", "--device", "meta"],
            "--device meta cannot be used",
        ),
        (["build", "--out", "TMP/n", "--teacher", "a", "--data", "b", "--ids", "c"], "--ids goes"),
    ],
)
def test_errors_on_the_command_line_are_one_line_and_exit_code_2(tmp_path, capsys, arguments, says):
    write_bank(tmp_path / "bank")
    flip_bit(tmp_path / "bank" / "shard-00002.safetensors", -5)
    places = {"BANK": str(tmp_path / "bank"), "TMP": str(tmp_path)}
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err


def test_the_module_runs_as_a_program():
    command = [sys.executable, "-m", "ckd.bank", "info", "/nonexistent"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 2
    assert done.stderr.startswith("error: /nonexistent is not a bank")
    assert "Traceback" not in done.stderr
