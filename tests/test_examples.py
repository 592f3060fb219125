"""The programs and notebooks of examples/, in small settings: what they print and make."""

from __future__ import annotations

import base64
import importlib
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import ckd
from ckd import data

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))
# Programs outside of this process find the same ckd, also where it is not installed.
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(
        [str(Path(ckd.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    ),
    "OMP_NUM_THREADS": "1",
}

Load = Callable[[str], ModuleType]


def run(program: str, *arguments: str) -> str:
    """What an example prints, run as a user does."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / program), *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bank of the digits' teacher, trained for 4 epochs instead of 12."""
    out = tmp_path_factory.mktemp("digits") / "banks"
    printed = run("digits_bank.py", "--out", str(out), "--epochs", "4")
    assert "1,437 rows of 128 numbers" in printed
    return str(out / "bank")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Imports an example by name; threads and random state are restored after the test."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        yield importlib.import_module
    torch.set_num_threads(threads)


def test_own_loop_gains_by_the_bank(
    load: Load, digits: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--bank", digits, "--seeds", "2", "--epochs", "6"]
    scores = load("own_loop").main(arguments)
    means = {name: statistics.mean(values) for name, values in scores.items()}
    assert all(len(values) == 2 for values in scores.values())
    assert means["mse"] > means["labels alone"] + 5
    assert means["contrastive"] > 20  # chance: 10
    printed = capsys.readouterr().out
    assert "1,437 images, 50 of them labelled" in printed
    for name, mean in means.items():
        assert re.search(rf"^{name} +{mean:.1f} ± ", printed, re.MULTILINE)


def test_own_loop_with_all_labels(
    load: Load, digits: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--bank", digits, "--seeds", "1", "--epochs", "2", "--labels-per-class", "0"]
    scores = load("own_loop").main(arguments)
    assert min(scores["labels alone"]) > 30
    printed = capsys.readouterr().out
    assert "1,437 of them labelled" in printed
    assert "(one seed)" in printed


def test_own_loop_takes_a_bank_of_bare_embeddings(load: Load, digits: str, tmp_path: Path) -> None:
    """One without class names and labels, such as `bank_from_embeddings.py --npy` makes."""
    rows = ckd.EmbeddingBank.open(digits).embeddings().numpy()
    np.save(tmp_path / "rows.npy", rows)
    ckd.bank.import_npy(tmp_path / "rows.npy", tmp_path / "bank")
    arguments = ["--seeds", "1", "--epochs", "1", "--bank"]
    bare = load("own_loop").main([*arguments, str(tmp_path / "bank")])
    assert bare == load("own_loop").main([*arguments, digits])


def test_own_loop_refuses_no_seeds(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        load("own_loop").main(["--seeds", "0"])
    assert "--seeds and --epochs must be at least 1" in capsys.readouterr().err


def test_search_finds_the_class_without_labels(
    load: Load, digits: str, capsys: pytest.CaptureFixture[str]
) -> None:
    results = load("label_free_search").main(["--bank", digits, "--epochs", "3"])
    assert set(results) == {"by image", "by class", "classified"}
    assert min(results.values()) > 0.5  # chance: 0.1
    printed = capsys.readouterr().out
    for value in results.values():
        assert f"{value:.1%}" in printed


def test_search_trains_its_student_without_a_label(load: Load, digits: str, tmp_path: Path) -> None:
    example = load("label_free_search")
    bank = ckd.EmbeddingBank.open(digits)
    student = example.student_without_labels(bank, tmp_path / "student", epochs=1)
    assert student.class_names == ()
    assert json.loads((tmp_path / "student/config.json").read_text())["label_fraction"] == 0


def test_bank_of_a_transformers_model(load: Load, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    example = load("bank_from_embeddings")
    bank = example.main(["--out", str(tmp_path / "bank")])
    digits = data.load("digits", "train")
    assert (len(bank), bank.dim) == (1437, 64)
    assert bank.sample_ids.equal(digits.sample_ids)
    assert bank.labels.equal(digits.labels)
    bank.check(dim=64, class_names=digits.class_names, fingerprint=digits.fingerprint)

    # The rows are those of their images, whatever the batch they are computed in.
    embed = example.embed_with_transformers(example.save_tiny_clip(tmp_path / "clip"))
    for ids, images, _ in list(example.pictures(digits, batch_size=100))[3:5]:
        with torch.inference_mode():
            expected = embed(images)
        torch.testing.assert_close(bank.rows(ids).float(), expected, atol=2e-3, rtol=2e-3)
    again = example.main(["--out", str(tmp_path / "bank")])
    assert again.checksum == bank.checksum


def test_bank_of_a_vision_transformer_is_its_class_token(load: Load, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    model = transformers.ViTModel(config).eval()
    model.save_pretrained(tmp_path)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    example = load("bank_from_embeddings")
    _, images, _ = next(example.pictures(data.load("digits"), batch_size=3))
    with torch.inference_mode():
        found = example.embed_with_transformers(tmp_path)(images)
        pixels = np.stack([np.asarray(image.resize((32, 32), 2)) for image in images])  # bilinear
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
        expected = model(x).last_hidden_state[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_bank_of_a_timm_model(load: Load, tmp_path: Path) -> None:
    pytest.importorskip("timm", exc_type=ImportError)
    example = load("bank_from_embeddings")
    embed = example.embed_with_timm("resnet10t", pretrained=False)
    digits = data.load("digits", "test")
    example.bank_of_model(tmp_path / "bank", digits, embed, "resnet10t")
    bank = ckd.EmbeddingBank.open(tmp_path / "bank")
    assert (len(bank), bank.dim, bank.teacher_name) == (360, 512, "resnet10t")
    bank.check(fingerprint=digits.fingerprint)


def test_bank_of_a_npy_file(load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 4
    centres = rng.normal(size=(4, 8))
    rows = (centres[labels] + 0.01 * rng.normal(size=(40, 8))).astype(np.float32)
    np.save(tmp_path / "clip.npy", rows)
    np.save(tmp_path / "labels.npy", labels)
    files = ["--npy", str(tmp_path / "clip.npy"), "--labels", str(tmp_path / "labels.npy")]
    bank = load("bank_from_embeddings").main(["--out", str(tmp_path / "bank"), *files])
    assert bank.embeddings().equal(torch.from_numpy(rows).half())
    assert bank.labels.tolist() == labels.tolist()
    assert bank.sample_ids.tolist() == list(range(40))
    assert "of the same class: 100.0%" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("program", ["own_loop.py", "label_free_search.py"])
def test_program_makes_its_own_bank(program: str) -> None:
    printed = run(program, "--epochs", "1")
    assert printed.startswith("training the teacher")
    assert re.search(r"\d\d\.\d", printed)


def test_readme_names_every_example() -> None:
    readme = (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.iterdir():
        if path.suffix in (".py", ".ipynb"):
            assert f"({path.name})" in readme


def cells(notebook: str) -> list[dict[str, Any]]:
    found = json.loads((EXAMPLES / notebook).read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook_is_stored_as_it_ran(notebook: str) -> None:
    """In order, without errors and warnings, with small pictures, and no path of the machine."""
    found = cells(notebook)
    assert [cell["execution_count"] for cell in found] == list(range(1, len(found) + 1))
    outputs = [output for cell in found for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data"}
    assert {output["name"] for output in outputs if "name" in output} == {"stdout"}
    pictures = [output["data"]["image/png"] for output in outputs if "data" in output]
    assert len(pictures) >= 2
    assert max(len(base64.b64decode(picture)) for picture in pictures) < 100_000
    texts = [output for output in outputs if "data" not in output]
    assert not re.search(r"/(tmp|home|root|Users|private)\b", json.dumps(texts))


def percentages(code_cells: list[Any]) -> list[float]:
    """All percentages that the cells have printed."""
    outputs = [output for cell in code_cells for output in cell["outputs"]]
    texts = ["".join(output["text"]) for output in outputs if output["output_type"] == "stream"]
    return [float(number) for text in texts for number in re.findall(r"([\d.]+)%", text)]


def executed(notebook: str, folder: Path, epochs: int | None = None) -> list[Any]:
    """The code cells of a notebook that ran in `folder`, with at most this many epochs."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    read = nbformat.read(EXAMPLES / notebook, as_version=4)
    changed = 0
    for cell in read.cells if epochs is not None else ():
        cell.source, count = re.subn(r"\bepochs=\d+", f"epochs={epochs}", cell.source)
        changed += count
    assert epochs is None or changed > 1
    client = nbclient.NotebookClient(
        read, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env={**ENVIRONMENT, "TMPDIR": str(folder)})  # raises where a cell fails
    return [cell for cell in read.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook_runs(notebook: str, tmp_path: Path) -> None:
    """With one epoch for each training."""

    def kinds(code_cells: list[Any]) -> list[set[str]]:
        # Sets: prints that are seconds apart are outputs of their own.
        return [{output["output_type"] for output in cell["outputs"]} for cell in code_cells]

    assert kinds(executed(notebook, tmp_path, epochs=1)) == kinds(cells(notebook))


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook_gives_what_it_shows(notebook: str, tmp_path: Path) -> None:
    """Other processors round otherwise, so that trained accuracies differ by some points."""
    found, shown = percentages(executed(notebook, tmp_path)), percentages(cells(notebook))
    assert len(found) == len(shown) > 2
    if notebook == "quickstart.ipynb":
        _, alone, distilled = found[:3]  # further ones are of single images
        assert distilled > alone + 5
        found, shown = found[:3], shown[:3]
    assert found == pytest.approx(shown, abs=8)


@pytest.mark.slow
def test_commands_of_the_quickstart(tmp_path: Path) -> None:
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    text = "".join(notebook["cells"][-1]["source"])
    commands = text.split("```bash\n")[1].split("```")[0].splitlines()
    assert len(commands) == 4
    for command in commands:
        quick = re.sub(r"--epochs \d+", "--epochs 1", command)
        assert quick.startswith("ckd ")
        done = subprocess.run(
            [sys.executable, "-m", *quick.split()],
            cwd=tmp_path,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs/distilled/student.safetensors").exists()
    assert "student's class head" in done.stdout
