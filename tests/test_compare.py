"""The table and the figure of several runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from ckd import compare as compare_module
from ckd._json import sealed
from ckd.compare import draw, group_seeds, main, memory_mib, seed_table, table
from ckd.train import Config

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


def test_table_is_markdown_with_one_row_a_run():
    text = table([result(), result("embed-kd", test_accuracy=0.525, parameters=12)])
    lines = text.splitlines()
    assert len({len(line) for line in lines[:4]}) == 1  # aligned as plain text too
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == [
        "plain-seed0",
        "plain",
        "vit",
        "4,800,000",
        "51.23%",
        "54.25",
        "922",
        "600",
    ]
    assert lines[1].count("-:") == 5  # numbers are aligned right
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
    assert cells(capsys.readouterr().out, 2)[4] == "-"
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_means_over_seeds_leave_out_runs_without_an_accuracy():
    bare, scored = result(**NO_SCORES), [result(test_accuracy=a) for a in (0.5, 0.6)]
    text = seed_table({"some": [bare, *scored], "one": [bare, scored[0]], "none": [bare]})
    assert cells(text, 2)[2:5] == ["3", "55.00 ± 7.07", "50.00 to 60.00"]
    assert cells(text, 3)[2:5] == ["2", "50.00", "50.00 to 50.00"]
    assert cells(text, 4)[2:5] == ["1", "-", "-"]


def test_memory_on_the_cpu_is_above_the_idle_process_and_on_a_gpu_the_allocators():
    assert memory_mib(result()) == 600.0
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
    monkeypatch.setattr(compare_module, "save_figure", lambda figure, path: drawn.append(figure))
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
    assert first == ["a", "plain", "3", "51.00 ± 1.00", "50.00 to 52.00", "54.25", "101"]
    assert main(["--seeds", *map(str, runs)]) == 0
    assert "90.00 |" in capsys.readouterr().out


def test_groups_of_one_name_stay_apart(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    runs = [write_run(tmp_path / "a-0", 0, 0.5), write_run(tmp_path / "x" / "a-1", 1, 0.5, lr=9)]
    assert list(group_seeds(runs)) == ["a", "a'"]


def test_seeds_need_settings_and_draw_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write(tmp_path / "plain-0", result())
    assert main(["--seeds", str(run)]) == 2
    assert "is not a run folder: it has no config.json" in capsys.readouterr().err
    assert main(["--seeds", "--out", str(tmp_path / "a.png"), str(run)]) == 2
    assert "--out draws single runs" in capsys.readouterr().err
