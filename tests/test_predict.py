"""`ckd predict`: the classes of image files, as evaluation sees them."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ckd
from ckd import cli, data, models
from ckd._json import parse_object
from ckd.bank import BankWriter, EmbeddingBank
from ckd.eval import evaluate_student
from ckd.predict import files
from ckd.predict.classify import By, by_bank
from ckd.train import Config, train
from tests.train_runs import tiny_bank, tiny_config

pytestmark = pytest.mark.usefixtures("quick_runs")
CLASSES = ("ant", "bee", "cat")
HOSTILE = "\x1b]0;owned\x07\u202etxt.png"


def image_folder(root: Path) -> Path:
    """Images of three classes that are not square, for training and for testing."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 7)):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 100, (10, 13, 3)) + 70 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return root


def trained(folder: Path, **settings: Any) -> Config:
    """A run on images of files, with a bank of their teacher."""
    root = image_folder(folder / "images")
    bank = tiny_bank(folder / "rows", data.load(root, image_size=8))
    options: dict[str, Any] = {
        "data": str(root),
        "image_size": 8,
        "epochs": 2,
        "distill": "cosine=1",
    }
    options["bank"] = str(bank)
    config = tiny_config(folder, **{**options, **settings})
    train(config, verbose=False)
    return config


def predicted(argv: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert cli.main(["predict", "--device", "cpu", "--json", *argv]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return parse_object(out.encode())


def test_predictions_are_what_evaluation_sees(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = trained(tmp_path)
    test = tmp_path / "images" / "test"
    told = predicted([str(config.folder), str(test), "--batch-size", "4"], capsys)
    paths = [one["image"] for one in told["predictions"]]
    assert paths == sorted(str(path) for path in test.rglob("*.png"))
    assert told["failed"] == []

    images = data.load(config.data, "test", image_size=8)
    model = models.load(config.folder)
    with torch.no_grad():
        logits = model(models.prepare(model, images.images)).logits
    order = [[*map(str, sorted(test.rglob("*.png")))].index(path) for path in paths]
    expected = logits.double().softmax(dim=1)[order]
    for one, probabilities in zip(told["predictions"], expected):
        ranks = probabilities.argsort(descending=True).tolist()
        assert [entry["label"] for entry in one["top"]] == ranks
        assert [entry["class"] for entry in one["top"]] == [CLASSES[rank] for rank in ranks]
        given = torch.tensor([entry["probability"] for entry in one["top"]], dtype=torch.float64)
        torch.testing.assert_close(given, probabilities[ranks], rtol=1e-5, atol=0)
        assert (one["class"], one["label"], one["probability"]) == (
            one["top"][0]["class"],
            one["top"][0]["label"],
            one["top"][0]["probability"],
        )
    right = sum(one["class"] == Path(one["image"]).parent.name for one in told["predictions"])
    argv = ["--eval", str(config.folder), "--data", config.data, "--image-size", "8"]
    assert cli.main(["train", *argv, "--device", "cpu"]) == 0
    assert f"({right} of {len(paths)} images)" in capsys.readouterr().out

    student = ckd.load_student(config.folder)
    again = student.predict([Image.open(path) for path in paths])
    assert [row[0].class_name for row in again] == [one["class"] for one in told["predictions"]]


def test_a_gray_student_sees_files_as_its_data_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, epochs=1)
    train(config, verbose=False)
    images = data.load(config.data, "test")
    assert images.image_shape[0] == 1
    for number, image in enumerate(images.images):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{number:02}.png")
    told = predicted([str(config.folder), *map(str, sorted(tmp_path.glob("*.png")))], capsys)
    student = ckd.load_student(config.folder)
    expected = student.logits(student.preprocess(images.images)).softmax(dim=1)
    for one, probabilities in zip(told["predictions"], expected):
        given = sorted((entry["label"], entry["probability"]) for entry in one["top"])
        torch.testing.assert_close(torch.tensor([value for _, value in given]), probabilities)


@pytest.mark.parametrize(("by", "figure"), [("knn", "knn_20"), ("means", "class_means")])
def test_by_a_bank_the_first_class_is_that_of_evaluation(
    by: str, figure: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = trained(tmp_path, label_fraction=0.0)
    test, bank = tmp_path / "images" / "test", tmp_path / "rows" / "bank"
    told = predicted([str(config.folder), str(test), "--bank", str(bank), "--by", by], capsys)
    assert told["by"] == by
    right = [one["class"] == Path(one["image"]).parent.name for one in told["predictions"]]
    splits = [data.load(config.data, split, image_size=8) for split in ("train", "test")]
    report = evaluate_student(
        ckd.load_student(config.folder), *splits, EmbeddingBank.open(bank), figures=(figure,)
    )
    assert np.mean(right) == pytest.approx(report[figure].value)
    for one in told["predictions"]:
        assert [entry["label"] for entry in one["top"]] != []
        assert sum(entry["probability"] for entry in one["top"]) == pytest.approx(1)


def test_shares_of_votes_are_those_of_the_definition(tmp_path: Path) -> None:
    config = trained(tmp_path)
    student, bank = ckd.load_student(config.folder), EmbeddingBank.open(tmp_path / "rows" / "bank")
    x = torch.randn(5, 3, 8, 8)
    rows = torch.nn.functional.normalize(bank.embeddings().double(), dim=1)
    cosines = torch.nn.functional.normalize(student.embedding(x).double(), dim=1) @ rows.T
    near = cosines.topk(20, dim=1)
    expected = torch.zeros(5, 3, dtype=torch.float64)
    expected.scatter_add_(1, bank.labels[near.indices], (near.values / 0.07).exp())
    expected /= expected.sum(dim=1, keepdim=True)
    given = by_bank(student, bank, "knn", None).probabilities(x)
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-6)

    means = torch.stack([bank.embeddings()[bank.labels == c].double().mean(0) for c in range(3)])
    means = torch.nn.functional.normalize(means, dim=1)
    cosines = torch.nn.functional.normalize(student.embedding(x).double(), dim=1) @ means.T
    given = by_bank(student, bank, "means", None).probabilities(x)
    torch.testing.assert_close(given, (cosines / 0.07).softmax(dim=1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("by", ["knn", "means"])
def test_rows_without_a_label_have_no_vote(by: By, tmp_path: Path) -> None:
    config = trained(tmp_path)
    student, bank = ckd.load_student(config.folder), EmbeddingBank.open(tmp_path / "rows" / "bank")
    labels = torch.where(torch.arange(len(bank)) % 3 == 0, -1, bank.labels)
    known = labels >= 0
    for name, rows in (("some", slice(None)), ("labelled", known)):
        with BankWriter(tmp_path / name, bank.dim, class_names=bank.class_names) as writer:
            writer.write(bank.sample_ids[rows], bank.embeddings()[rows], labels[rows])
    x = torch.randn(5, 3, 8, 8)
    given, expected = (
        by_bank(student, EmbeddingBank.open(tmp_path / name), by, 0).probabilities(x)
        for name in ("some", "labelled")
    )
    torch.testing.assert_close(given, expected)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run of an untrained student of RGB images."""
    folder = tmp_path / "run"
    folder.mkdir()
    torch.manual_seed(1)
    model = models.create("resnet8:width=4", num_classes=3, image_size=8)
    models.save(model, folder / "student.safetensors", class_names=CLASSES)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(1)
    for name in ("b.png", "a.jpg", "more/c.PNG", "notes.txt", ".hidden.png"):
        pixels = rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name, "PNG")
    return folder


def test_text_is_aligned_and_csv_and_json_hold_the_same(
    run: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["predict", "run", "photos", "--top", "2", "--device", "cpu"]
    assert cli.main([*argv, "--csv", "--out", str(tmp_path / "all.json")]) == 0
    rows = [*csv.reader(io.StringIO(capsys.readouterr().out))]
    assert rows[0] == ["image", "class", "probability", "class_2", "probability_2"]
    names = ["photos/a.jpg", "photos/b.png", "photos/more/c.PNG"]
    assert [row[0] for row in rows[1:]] == names
    document = json.loads((tmp_path / "all.json").read_text())
    assert (document["student"], document["by"], document["classes"]) == ("run", "class head", 3)
    for row, one in zip(rows[1:], document["predictions"]):
        told = [str(one["image"])]
        for entry in one["top"]:
            told += [entry["class"], f"{entry['probability']:.6g}"]
        assert row == told

    assert cli.main(argv) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for line, row in zip(lines, rows[1:]):
        place = head.index("class")
        assert line[:place].rstrip() == row[0]
        end = head.index("probability") + len("probability")
        assert line[place:end].split() == [row[1], f"{float(row[2]):.1%}"]
        assert line[end:].strip() == f"{row[3]} {float(row[4]):.1%}"

    assert cli.main([*argv, "--csv", "--out", str(tmp_path / "all.csv")]) == 0
    assert (tmp_path / "all.csv").read_text() == capsys.readouterr().out


def test_files_that_are_no_images_are_named_and_the_others_go_on(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "a.jpg").write_bytes(b"text")
    Image.new("RGB", (40, 50)).save(photos / "more" / "large.png")
    argv = ["predict", str(run), str(photos), str(photos / "notes.txt"), "--device", "cpu"]
    argv += ["--max-image-pixels", "1999", "--batch-size", "1"]
    assert cli.main([*argv, "--json", "--out", str(tmp_path / "all.csv")]) == 2
    out, err = capsys.readouterr()
    document = json.loads(out)
    done = [str(photos / name) for name in ("b.png", "more/c.PNG", "notes.txt")]
    assert [one["image"] for one in document["predictions"]] == done
    assert [row[0] for row in csv.reader((tmp_path / "all.csv").open())][1:] == done
    failed = [str(photos / name) for name in ("a.jpg", "more/large.png")]
    assert [one["image"] for one in document["failed"]] == failed
    lines = err.splitlines()
    assert lines[0].startswith(f"{failed[0]}: cannot be read as an image (it is in none of")
    assert lines[1].startswith(f"{failed[1]}: 40 x 50 pixels are more than 1,999")
    assert "--max-image-pixels" in lines[1]
    assert lines[2:] == ["error: 2 of 5 files could not be predicted"]


def test_a_file_that_is_named_twice_counts_twice(
    run: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "a.jpg").write_bytes(b"text")
    argv = ["predict", str(run), *[str(photos / "a.jpg")] * 2, "--json", "--device", "cpu"]
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert len(json.loads(out)["failed"]) == 2
    assert err.splitlines()[-1] == "error: 2 of 2 files could not be predicted"


def test_an_output_that_is_not_finite_is_no_prediction(
    run: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = models.Student.logits

    def logits(self: Any, x: torch.Tensor) -> torch.Tensor:
        out = right(self, x)
        out[1] = torch.nan
        return out

    monkeypatch.setattr(models.Student, "logits", logits)
    assert cli.main(["predict", str(run), str(photos), "--csv", "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert [line.partition(",")[0] for line in out.splitlines()[1:]] == [
        str(photos / "a.jpg"),
        str(photos / "more" / "c.PNG"),
    ]
    assert err.startswith(f"{photos / 'b.png'}: the student's output is not finite\n")


def test_memory_is_that_of_two_batches(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    decode: Callable[..., Any] = files.decode

    def counted(source: Any, position: int, size: int | None) -> Any:
        begun.append(position)
        return decode(source, position, size)

    monkeypatch.setattr(files, "decode", counted)
    paths = [str(photos / "b.png")] * 40
    seen = 0
    for batch in files.decoded(paths, 8, 3, 4, data.MAX_PIXELS):
        seen += len(batch.paths)
        assert batch.pixels.shape == (4, 3, 8, 8)
        assert len(begun) <= seen + 4
    assert (seen, sorted(begun)) == (40, [*range(40)])


def test_the_reader_of_the_output_may_leave_and_the_file_is_whole(
    run: Path, photos: Path, tmp_path: Path
) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "ckd", "predict", str(run), str(photos), "--device", "cpu"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "all.csv")],
        stdout=write,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 4


def test_an_interruption_leaves_no_part_of_the_file(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Any, x: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    out = tmp_path / "all.csv"
    out.write_text("before")
    monkeypatch.setattr(models.Student, "logits", interrupted)
    assert cli.main(["predict", str(run), str(photos), "--out", str(out), "--device", "cpu"]) == 130
    assert out.read_text() == "before"
    assert {path.name for path in tmp_path.iterdir()} == {"run", "photos", "all.csv"}


def test_names_cannot_command_the_terminal_and_keep_their_bytes_in_files(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [HOSTILE, os.fsdecode(b"\xff.png"), 'a,"b\n.png']
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / name, "PNG")
    out = tmp_path / "all.csv"
    argv = ["predict", str(run), *(str(tmp_path / name) for name in names), "--device", "cpu"]
    for form in ([], ["--csv", "--out", str(out)], ["--json"]):
        assert cli.main([*argv, *form]) == 0
        printed = capsys.readouterr().out
        if not form:  # a name forges no line
            assert len(printed.splitlines()) == 1 + len(names)
        assert not {*printed} & {"\x1b", "\x07", "\u202e"}
    assert [one["image"] for one in json.loads(printed)["predictions"]] == argv[2:5]
    with out.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        assert [row[0] for row in csv.reader(file)][1:] == argv[2:5]


def test_progress_is_shown_where_the_lines_are_not(
    run: Path,
    photos: Path,
    terminal: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    assert cli.main(["predict", str(run), str(photos), "--csv", "--device", "cpu"]) == 0
    assert "images" in capsys.readouterr().err
    assert cli.main(["predict", str(run), str(photos), "--csv", "--quiet", "--device", "cpu"]) == 0
    assert capsys.readouterr().err == ""
