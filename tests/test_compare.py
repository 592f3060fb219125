"""The table and the figure of several runs."""

from __future__ import annotations

import json
import math
import shutil
import urllib.parse
from pathlib import Path
from typing import Any

import pytest

from ckd._json import sealed
from ckd.compare import draw, group_seeds, memory_mib, seed_table, table
from ckd.compare import figure as figure_module
from ckd.compare.__main__ import main
from ckd.compare.find import find_runs, labels, read_curves
from ckd.train import Config, train
from ckd.train.report import markdown
from ckd.train.stored import resume_command
from tests.test_report import check_page
from tests.train_runs import tiny_config

CPU = {"device": "A CPU", "threads": 2, "torch": "2.6", "python": "3.12", "system": "Linux"}


def result(method: str = "plain", **changes: Any) -> dict[str, Any]:
    base = {
        "run": f"{method}-seed0",
        "schema_version": 1,
        "method": method,
        "student": "vit",
        "data": "digits",
        "seed": 0,
        "epochs": 3,
        "parameters": 4_800_000,
        "test_accuracy": 0.5123,
        "test_loss": 1.25,
        "best_test_accuracy": 0.5123,
        "best_epoch": 3,
        "time_per_epoch_s": 54.25,
        "train_time_s": 162.75,
        "images_per_s": 921.6,
        "peak_rss_mib": 900.0,
        "start_rss_mib": 300.0,
        "hardware": CPU,
    }
    return {**base, **changes}


def write(folder: Path, content: dict[str, Any]) -> Path:
    folder.mkdir()
    stored = {name: value for name, value in content.items() if name != "run"}
    (folder / "result.json").write_bytes(sealed(stored))
    return folder


def test_a_name_ends_neither_its_cell_nor_its_row():
    head, rule, row = markdown(["run", "n"], [["a|b\n| forged\x1b[m", "1"]]).splitlines()
    assert row == r"| a\|b\n\| forged\x1b[m | 1 |"
    assert len(head) == len(rule) == len(row)


def test_table_is_markdown_with_one_row_a_run():
    text = table([result(), result("embed-kd", test_accuracy=0.525, parameters=12)])
    lines = text.splitlines()
    assert len({len(line) for line in lines[:4]}) == 1  # aligned as plain text too
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == [
        "plain-seed0",
        "plain",
        "vit",
        "digits",
        "-",
        "4,800,000",
        "51.23%",
        "54.25",
        "922",
        "900",
    ]
    assert lines[1].count("-:") == 6  # numbers are aligned right
    assert "A CPU, CPU threads: 2, torch 2.6" in text


NO_SCORES = dict.fromkeys(("test_accuracy", "test_loss", "best_test_accuracy", "best_epoch"))


def cells(text: str, row: int) -> list[str]:
    return [cell.strip() for cell in text.splitlines()[row].strip("|").split("|")]


@pytest.mark.parametrize("others", [0, 2])
def test_a_run_without_an_accuracy_has_a_dash_and_no_dot(tmp_path, capsys, others):
    runs = [write(tmp_path / "bare", result("embed-kd", **NO_SCORES))]
    runs += [write(tmp_path / f"run{n}", result(test_accuracy=0.5 + n / 10)) for n in range(others)]
    figure = tmp_path / "figure.png"
    assert main([*map(str, runs), "--out", str(figure)]) == 0
    assert cells(capsys.readouterr().out, 2)[6] == "-"
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_means_over_seeds_leave_out_runs_without_an_accuracy():
    bare, scored = result(**NO_SCORES), [result(test_accuracy=a) for a in (0.5, 0.6)]
    text = seed_table({"some": [bare, *scored], "one": [bare, scored[0]], "none": [bare]})
    assert cells(text, 2)[3:6] == ["3", "55.00 ± 7.07", "50.00 to 60.00"]
    assert cells(text, 3)[3:6] == ["2", "50.00", "50.00 to 50.00"]
    assert cells(text, 4)[3:6] == ["1", "-", "-"]


def test_memory_on_the_cpu_is_that_of_the_process_and_on_a_gpu_the_allocators():
    assert memory_mib(result()) == 900.0
    assert memory_mib(result(peak_cuda_mib=77.0)) == 77.0


def test_different_machines_are_pointed_out():
    other = result(hardware={**CPU, "device": "Another"})
    assert "do not compare" in table([result(), other])
    assert "do not compare" not in table([result(), result("embed-kd")])


@pytest.mark.parametrize("count", [1, 4])
def test_figure_is_drawn(tmp_path, count):
    methods = ["plain", "logit-kd", "teacher-kd", "embed-kd"][:count]
    draw([result(method) for method in methods], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_figure_has_accuracies_only_where_a_run_has_one(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figure_module, "save_figure", lambda figure, path: drawn.append(figure))
    for scores in ([None, None], [None, 0.5]):
        draw([result(test_accuracy=score) for score in scores], tmp_path / "figure.png")
    assert [len(figure.axes) for figure in drawn] == [2, 3]
    accuracy = drawn[1].axes[2]
    assert accuracy.get_title(loc="left") == "Test accuracy (%)"
    assert [text.get_text() for text in accuracy.texts] == ["50.00"]


def test_command_prints_the_table_and_draws_the_figure(tmp_path, capsys):
    runs = [write(tmp_path / name, result()) for name in ("one", "two")]
    figure = tmp_path / "figure.png"
    assert main([*map(str, runs), "--out", str(figure)]) == 0
    out = capsys.readouterr().out
    assert "| one " in out
    assert "| two " in out
    assert figure.exists()


def test_a_run_that_cannot_be_compared_is_one_line_and_status_2(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    captured = capsys.readouterr()
    assert (
        captured.err
        == f"error: {tmp_path / 'nowhere'} is not a run folder: it has no config.json\n"
    )
    (write(tmp_path / "torn", {}) / "result.json").write_text('{"run')
    assert main([str(tmp_path / "torn")]) == 2
    assert "result.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": None}, "method"),
        ({"test_accuracy": "high"}, "test_accuracy"),
        ({"time_per_epoch_s": math.nan}, "time_per_epoch_s is nan"),
        ({"images_per_s": 10**400}, "images_per_s is 10000"),
        ({"hardware": {**CPU, "device": 5}}, "device"),
        ({"hardware": {}}, "hardware"),
        ({"test_accuracy": None}, "some of the scores"),
        ({**NO_SCORES, "best_epoch": 3}, "some of the scores"),
        ({"peak_cuda_mib": 1.0}, "peak memory"),
        ({"extra": 1}, "extra"),
    ],
)
def test_values_of_another_kind_are_named(tmp_path, capsys, changes, says):
    folder = write(tmp_path / "run", result(**changes))
    assert main([str(folder)]) == 2
    error = capsys.readouterr().err
    assert "result.json" in error
    assert says in error
    assert "delete it, and resume" in error


def test_a_result_of_another_version_is_left_alone(tmp_path, capsys):
    folder = write(tmp_path / "run", result(schema_version=2))
    assert main([str(folder)]) == 2
    error = capsys.readouterr().err
    assert "schema version 2" in error
    assert "use the version that wrote it" in error


def test_every_flipped_byte_of_a_result_is_noticed(tmp_path, capsys):
    file = write(tmp_path / "run", result()) / "result.json"
    data = file.read_bytes()
    for at in range(len(data)):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert main([str(file.parent)]) == 2
        assert "result.json" in capsys.readouterr().err


def write_run(folder: Path, seed: int, accuracy: float, **settings: Any) -> Path:
    content = result(test_accuracy=accuracy, train_time_s=100.0 + seed)
    write(folder, content)
    Config(seed=seed, out=str(folder), **settings).save(folder / "config.json")
    return folder


def test_runs_that_differ_in_their_seed_alone_are_one_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write_run(tmp_path / f"a-seed{n}", n, 0.5 + 0.01 * n) for n in range(3)]
    runs.append(write_run(tmp_path / "b-0", 0, 0.9, lr=0.2))
    groups = group_seeds(runs)
    assert {name: len(members) for name, members in groups.items()} == {"a": 3, "b": 1}
    first = [cell.strip() for cell in seed_table(groups).splitlines()[2].strip("|").split("|")]
    scores = ["51.00 ± 1.00", "50.00 to 52.00"]
    assert first == ["a", "plain", "digits", "3", *scores, "54.25", "101", "900", "-"]
    assert main(["--seeds", *map(str, runs)]) == 0
    assert "90.00 |" in capsys.readouterr().out


def test_groups_of_one_name_stay_apart(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    runs = [write_run(tmp_path / "a-0", 0, 0.5), write_run(tmp_path / "x" / "a-1", 1, 0.5, lr=9)]
    assert list(group_seeds(runs)) == ["a", "a'"]


def test_seeds_need_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "plain-0", result())
    assert main(["--seeds", str(run)]) == 2
    assert "is not a run folder: it has no config.json" in capsys.readouterr().err


def test_a_group_is_one_bar_with_its_spread_and_a_dot_for_each_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [write_run(tmp_path / f"a-seed{n}", n, 0.5 + 0.01 * n) for n in range(3)]
    runs.append(write_run(tmp_path / "b-0", 0, 0.9, lr=0.2))
    drawn: list[Any] = []
    monkeypatch.setattr(figure_module, "save_figure", lambda figure, path: drawn.append(figure))
    assert main(["--seeds", "--out", str(tmp_path / "a.png"), *map(str, runs)]) == 0
    memory, _, accuracy = drawn[0].axes
    assert len(memory.patches) == 2
    assert [label.get_text() for label in memory.get_yticklabels()] == ["a", "b"]
    assert [text.get_text() for text in accuracy.texts] == ["51.00 ± 1.00", "90.00"]
    dots = [tuple(x) for one in accuracy.collections[:3] for x in one.get_offsets()]
    assert {(50.0, 0.0), (51.0, 0.0), (52.0, 0.0)} <= {(round(x, 6), y) for x, y in dots}


def test_folders_are_searched_for_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("demo", "demo/deep"):
        (tmp_path / name).mkdir()
    write_run(tmp_path / "demo" / "teacher", 0, 0.9)
    write_run(tmp_path / "demo" / "deep" / "plain-seed0", 0, 0.5)
    write_run(tmp_path / "alone", 0, 0.25)
    (tmp_path / "demo" / "bank").mkdir()
    (tmp_path / "demo" / "bank" / "manifest.json").write_text("{}")
    (tmp_path / "demo" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "note.txt").write_text("a file that runs/* names")
    places = [str(path) for path in sorted(tmp_path.iterdir())]
    assert main([*places, places[0], "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert [one["run"] for one in found] == ["alone", "teacher", "plain-seed0"]
    assert found[0]["test_accuracy"] == 0.25
    assert captured.err == f"left out: {tmp_path / 'note.txt'} is no folder\n"


def test_a_run_and_a_link_to_it_are_one_run(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    write_run(tmp_path / "runs" / "a", 0, 0.5)
    (tmp_path / "link").symlink_to(tmp_path / "runs" / "a")
    (tmp_path / "runs" / "loop").symlink_to(tmp_path / "runs")
    found = find_runs([tmp_path / "runs", tmp_path / "link"])
    assert list(found.results) == [tmp_path / "runs" / "a"]
    write_run(tmp_path / "elsewhere", 0, 0.5)
    (tmp_path / "runs" / "b").symlink_to(tmp_path / "elsewhere")
    assert list(find_runs([tmp_path / "runs"]).results) == [tmp_path / "runs" / "a"]


def test_a_bank_alone_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bank").mkdir()
    assert main([str(tmp_path / "bank")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'bank'} holds no run\n"


def test_a_model_of_another_library_is_no_run(tmp_path: Path) -> None:
    model = tmp_path / "models" / "bert"
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"model_type": "bert"}')
    (model / "result.json").write_text('{"loss": 1}')
    write_run(tmp_path / "run", 0, 0.5)
    found = find_runs([tmp_path])
    assert list(found.results) == [tmp_path / "run"]
    assert not found.skipped


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs, in a folder of its own."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_config(folder, out=str(folder / "runs" / "finished"))
    train(config, verbose=False)
    return folder / "runs" / "finished"


def test_each_run_that_is_left_out_has_a_note_that_is_right(
    tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    for name in ("finished", "stopped", "torn"):
        shutil.copytree(trained, runs / name)
    (runs / "stopped" / "result.json").unlink()
    (runs / "torn" / "result.json").write_text('{"run')
    (runs / "failed").mkdir()
    shutil.copy(trained / "config.json", runs / "failed")
    assert main([str(runs)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left")]
    assert len(lines) == 3
    assert f"{runs / 'failed'} has no result: it failed before its first checkpoint" in lines[0]
    assert "--resume" not in lines[0]
    assert lines[1].endswith(f"is not finished; go on with: {resume_command(runs / 'stopped')}")
    assert "result.json is damaged" in lines[2]
    assert main([str(runs), "--quiet"]) == 0
    assert "left out" not in capsys.readouterr().out
    shutil.rmtree(runs / "finished")
    assert main([str(runs)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "before its first checkpoint" in error
    assert "is not finished" in error


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    names = ["a/b", "c/b", "x/c/b", "d", "x/y/e", "z/y/e"]
    shown = labels([tmp_path / name for name in names])
    assert shown[0] == "a/b"
    assert shown[3:] == ["d", "x/y/e", "z/y/e"]
    assert len(set(shown)) == len(names)
    assert shown[2] == "x/c/b"


def test_data_of_one_name_and_other_test_images_are_told_apart() -> None:
    text = table([result(), result(data="cifar10")])
    assert "different data do not compare" in text
    assert [cells(text, row)[3] for row in (2, 3)] == ["digits", "cifar10"]


def test_the_page_has_a_row_a_link_and_curves(tmp_path: Path, trained: Path) -> None:
    runs = tmp_path / "a #1%" / "runs"
    for name in ("one", "two"):
        shutil.copytree(trained, runs / name)
    page = tmp_path / "pages" / "page.html"
    page.parent.mkdir()
    assert main([str(runs), "--html", str(page)]) == 0
    parsed = check_page(page.read_bytes())
    links = [attributes["href"] for attributes in parsed.all("a")]
    assert len(links) == 2
    for link, name in zip(links, ("one", "two")):
        target = page.parent / urllib.parse.unquote(link)
        assert target.resolve() == (runs / name / "report.html").resolve()
    assert len(parsed.all("figure")) == 3
    assert len(parsed.all("tr")) == 3


def test_the_page_of_groups_links_each_seed(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"a-seed{n}", n, 0.5 + 0.01 * n) for n in range(3)]
    for run in runs:
        (run / "report.html").write_text("a page")
    page = tmp_path / "page.html"
    assert main(["--seeds", *map(str, runs), "--html", str(page)]) == 0
    parsed = check_page(page.read_bytes())
    assert [a["href"] for a in parsed.all("a")] == [f"a-seed{n}/report.html" for n in range(3)]
    assert "51.00 ± 1.00 %" in parsed.text()
    assert "No curves of a-seed0, a-seed1, a-seed2" in parsed.text()


@pytest.mark.parametrize("count", [1, 3, 60])
def test_pages_and_figures_of_few_and_many_runs_with_hostile_names(
    tmp_path: Path, count: int
) -> None:
    name = (
        "<script>alert(1)</script>" if count == 1 else "{{7*7}}<img src=x onerror=y> & " + "x" * 150
    )
    runs = tmp_path / "runs"
    for n in range(count):
        folder = runs / f"group{n % 7}" / f"{n} {name.replace('/', '')}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        method = ("plain", "embed-kd", "logit-kd")[n % 3]
        write(folder, result(method, data=f"d{n % 2}<b>", test_accuracy=n / 60, seed=n))
        lines = [
            {"epoch": e, "time_s": 1.5, "loss": 1 / e, "test_accuracy": 0.01 * e, "test_loss": 2.0}
            for e in range(1, 300)
        ]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page, picture = tmp_path / "page.html", tmp_path / "figure.png"
    assert main([str(runs), "--html", str(page), "--out", str(picture)]) == 0
    content = page.read_bytes()
    parsed = check_page(content)
    assert len(parsed.all("tr")) == count + 1
    assert not parsed.all("img")
    assert len(content) < 40_000 + 60_000 * count
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("content", ["{", '{"epoch": 1}', '{"epoch": 1, "time_s": "x", "loss": 1}'])
def test_damaged_metrics_are_no_curve(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(content)
    assert read_curves(tmp_path) == []
    assert read_curves(tmp_path / "nowhere") == []


def test_json_has_null_where_a_loss_is_infinite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write(tmp_path / "run", result(test_loss=math.inf))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert main([str(run), "--json"]) == 0
    (only,) = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert only["test_loss"] is None
    assert (only["run"], only["folder"]) == ("run", str(run))


@pytest.mark.parametrize("flag", ["--out", "--html"])
def test_a_file_that_cannot_be_written_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    run = write(tmp_path / "run", result())
    assert main([str(run), flag, str(tmp_path / "no" / "x")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{flag} {tmp_path / 'no' / 'x'}: there is no folder" in captured.err
    assert main([str(run), flag, str(tmp_path)]) == 2
    assert f"{flag} {tmp_path}: it is no regular file" in capsys.readouterr().err


def test_json_of_groups_has_their_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / f"a-{n}", n, 0.5 + 0.01 * n) for n in range(3)]
    assert main(["--seeds", "--json", *map(str, runs)]) == 0
    (group,) = json.loads(capsys.readouterr().out)
    assert (group["runs"], group["seeds"]) == ("a", 3)
    assert group["test_accuracy"] == pytest.approx(0.51)
    assert group["test_accuracy_std"] == pytest.approx(0.01)
    assert [member["run"] for member in group["members"]] == ["a-0", "a-1", "a-2"]
