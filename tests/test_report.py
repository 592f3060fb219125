"""report.html: what it shows, and that nothing in it can act."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ckd import _console, data, models
from ckd.report.charts import POINTS, Series, chart
from ckd.report.errors import IMAGES, Outcomes, confusion, png_uri
from ckd.report.run import RunReport, Scored
from ckd.report.words import duration, interval, number, peak_mib, short, short_all
from ckd.train import Config, train
from ckd.train import loop as loop_module
from ckd.train import page as page_module
from ckd.train.__main__ import parse
from ckd.train.evaluation import evaluate, labelled_rows, scored_batches
from ckd.train.page import train_command
from tests.train_runs import tiny_config

HOSTILE = '</script><script>alert(1)</script>{{7*7}}"&\x1b\x07\u202e'
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Parses a page, and notes what it holds. Raises AssertionError where tags do not nest."""

    def __init__(self, content: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(content.decode())
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, text: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", text))

    def text(self, *without: str) -> str:
        return " ".join(
            text for tag, text in self.texts if tag not in ("script", "style", *without)
        )

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def check_page(content: bytes) -> Page:
    """A page that is well-formed, asks for nothing outside, and runs only its own script."""
    page = Page(content)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name != "style", "the content security policy forbids it"
            if name == "src":
                assert tag == "img"
                assert value.startswith("data:image/png;base64,")
            if name == "href":
                assert not re.match(r"[a-z+.-]+:|//", value or "", re.IGNORECASE), value
    assert b"url(" not in content
    assert b"http:" not in content.replace(b"http://www.w3.org/2000/svg", b"")
    assert b"https:" not in content
    scripts = [text for tag, text in page.texts if tag == "script"]
    kinds = [attributes.get("type") for attributes in page.all("script")]
    assert kinds.count(None) == 1
    assert kinds[-1] is None
    for text in scripts[:-1]:
        json.loads(text)
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv"))
    digest = base64.b64encode(hashlib.sha256(scripts[-1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    for image in page.all("img"):
        assert image["alt"]
    for table_start in re.finditer(rb"<table[^>]*>\s*(<[a-z]+)", content):
        assert table_start[1] == b"<caption"
    return page


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without curves.png, which takes longer than the run."""
    monkeypatch.setattr(loop_module, "draw_curves", lambda *args: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def read_page(config: Config) -> Page:
    return check_page((config.folder / "report.html").read_bytes())


@pytest.mark.usefixtures("quick")
def test_a_run_ends_with_a_page_that_shows_its_figures(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, epochs=3)
    result = train(config, verbose=False)
    text = read_page(config).text()
    correct = round(20 * result["test_accuracy"])
    assert f"{correct} of 20 test images" in text
    assert f"{100 * result['test_accuracy']:.2f} %" in text
    assert f"{result['parameters']:,}" in text
    assert f"{result['peak_rss_mib']:,.0f} MiB" in text
    assert result["hardware"]["device"] in text
    assert str(config.bank[0]) in text
    assert f"ckd predict {config.folder} image.png" in text
    assert f'ckd.load_student("{config.folder}")' in text
    assert not list(config.folder.glob(".tmp-*"))


@pytest.mark.usefixtures("quick")
def test_the_same_run_gives_the_same_bytes_but_for_its_times(
    tmp_path: Path, monkeypatch: Any
) -> None:
    pages: list[RunReport] = []
    monkeypatch.setattr(RunReport, "html", lambda self: pages.append(self) or b"")
    for _ in range(2):
        config = tiny_config(tmp_path, epochs=1, out=str(tmp_path / str(len(pages)) / "run"))
        train(config, verbose=False)
    monkeypatch.undo()
    first, second = (replace(p, result=pages[0].result, records=pages[0].records) for p in pages)
    second = replace(second, settings=first.settings, commands=first.commands)
    assert first.html() == second.html()


@pytest.mark.usefixtures("quick")
def test_the_python_lines_of_the_page_run(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    config = tiny_config(tmp_path, epochs=1)
    train(config, verbose=False)
    code = re.search(r"import ckd, torch.*?argmax\(\)\]\)", read_page(config).text(), re.DOTALL)
    Image.fromarray(np.zeros((9, 11), np.uint8)).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    exec(code[0], {})
    assert capsys.readouterr().out.startswith("class ")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "plain", "flip": False, "lr": 3e-4, "bank": ()},
        {"bank": ("a b", "-c"), "bank_weights": (1.0, 0.5), "distill": "cosine=1,mse=2"},
        {"paper_compat": True, "learn_logit_scale": True, "data": "-x'y", "seed": 7},
        {"log_to": ("none",), "crop_padding": 0, "label_fraction": 0.1},
    ],
)
def test_the_command_trains_with_the_same_settings(settings: dict[str, Any]) -> None:
    config = Config(**{"bank": ("bank",), **settings})
    words = shlex.split(train_command(config))
    assert words[:2] == ["ckd", "train"]
    again = parse(words[2:]).config
    assert again.folder.name == config.folder.name + "-again"
    assert replace(again, out=None) == replace(config, out=None)


@pytest.mark.usefixtures("quick")
def test_hostile_names_are_text(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    with np.load(config.data) as file:
        arrays = dict(file)
    arrays["class_names"] = np.array([HOSTILE, "${x}`'", "c"])
    path = tmp_path / "a'&<b>\udcff.npz"
    np.savez(path, **arrays)
    out = tmp_path / "<img src=x onerror=alert(1)>"
    config = replace(config, data=str(path), method="plain", bank=(), out=str(out))
    train(config, verbose=False)
    content = (out / "report.html").read_bytes()
    page = check_page(content)
    assert len(page.all("script")) == 3  # two charts and the page's own
    assert all("onerror" not in image for image in page.all("img"))
    assert "<script>alert(1)</script>" in page.text()
    assert "{{7*7}}" in page.text()
    for control in (b"\x1b", b"\x07", "\u202e".encode()):
        assert control not in content
    assert "\\udcff.npz" in page.text()


def outcomes(labels: list[int], predicted: list[int]) -> Outcomes:
    n = len(labels)
    right = torch.tensor(labels) == torch.tensor(predicted)
    true = torch.where(right, 0.0, -1.0 - torch.arange(n))
    return Outcomes(
        torch.arange(n), torch.tensor(labels), torch.tensor(predicted), torch.ones(n), true
    )


def test_confusion_counts_by_class_and_pair() -> None:
    found = confusion(outcomes([0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 0, 2]), ["a", "b", "c"])
    assert [[n for n, _ in cells] for _, cells in found["matrix"]["rows"]] == [
        [1, 2, 0],
        [1, 1, 0],
        [0, 0, 1],
    ]
    assert found["classes"][0] == ("a", 1, 3, 1 / 3)
    assert found["pairs"] == [("a", "b", 2, 3), ("b", "a", 1, 2)]
    levels = [[level for _, level in cells] for _, cells in found["matrix"]["rows"]]
    assert levels[0] == [4, 7, 0]


def test_a_class_without_test_images_is_no_worst_class() -> None:
    found = confusion(outcomes([2, 2], [2, 0]), ["a", "b", "c"])
    assert [name for name, *_ in found["classes"]] == ["c"]


def test_twenty_thousand_classes_have_pairs_and_no_matrix() -> None:
    found = confusion(outcomes([19_999, 5], [0, 5]), [f"c{i}" for i in range(20_000)])
    assert found["matrix"] is None
    assert found["pairs"] == [("c19999", "c0", 1, 1)]


def test_worst_images_are_wrong_ones_by_the_probability_of_their_label() -> None:
    one = outcomes([0] * 40, [0, 1] * 20)
    assert one.worst.tolist() == [*range(39, 39 - 2 * IMAGES, -2)][:20]
    assert len(outcomes([0] * 90, [1] * 90).worst) == IMAGES
    assert not len(outcomes([1, 2], [1, 2]).worst)


@pytest.mark.parametrize(
    ("shape", "mode", "size"),
    [
        ((1, 8, 8), "L", (8, 8)),
        ((3, 32, 32), "RGB", (32, 32)),
        ((2, 5, 5), "L", (5, 5)),
        ((4, 200, 100), "RGB", (28, 56)),
    ],
)
def test_images_are_pngs_of_at_most_56_pixels(shape: Any, mode: str, size: Any) -> None:
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    image = Image.open(io.BytesIO(base64.b64decode(png_uri(pixels).partition(",")[2])))
    assert (image.format, image.mode, image.size) == ("PNG", mode, size)
    if max(shape) <= 56:
        expected = pixels[0].numpy() if mode == "L" else pixels.permute(1, 2, 0).numpy()
        assert np.array_equal(np.asarray(image), expected)


@pytest.mark.parametrize("classes", [2, 16, 17, 50, 51, 100])
def test_a_page_of_many_images_and_classes_stays_small(classes: int) -> None:
    content = page_of(classes, 10_000, size=64)
    page = check_page(content)
    assert len(content) < 500_000
    assert len(page.all("img")) == IMAGES
    assert ("matrix" in str(page.all("table"))) == (classes <= 50)


RESULT = {
    "schema_version": 1,
    "method": "plain",
    "student": "vit",
    "data": "digits",
    "seed": 0,
    "epochs": 3,
    "parameters": 4_800_000,
    "test_accuracy": 0.5,
    "test_loss": 1.25,
    "best_test_accuracy": 0.5,
    "best_epoch": 3,
    "time_per_epoch_s": 54.25,
    "train_time_s": 162.75,
    "images_per_s": 921.6,
    "peak_rss_mib": 900.0,
    "start_rss_mib": 300.0,
    "hardware": {"device": "A", "threads": 2, "torch": "2", "python": "3", "system": "L"},
}


def record(epoch: int, **changes: Any) -> dict[str, Any]:
    base = {"epoch": epoch, "step": epoch, "loss": 1 / epoch, "mse": 0.5, "test_accuracy": 0.5}
    return {**base, "test_loss": 1.0, "lr": 0.1, "time_s": 2.0, "images_per_s": 9.0, **changes}


def page_of(classes: int, images: int, *, size: int = 8, epochs: int = 500) -> bytes:
    generator = torch.Generator().manual_seed(0)
    draw = {"generator": generator}
    labels = torch.randint(0, classes, (images,), **draw)
    predicted = torch.randint(0, classes, (images,), **draw)
    share = torch.rand(images, **draw)
    tested = Outcomes(torch.arange(images), labels, predicted, share, share.log())
    pixels = [torch.randint(0, 256, (3, size, size), dtype=torch.uint8, **draw)] * IMAGES
    names = [f"a class of the long name {i}, {'x' * 200}" for i in range(classes)]
    return RunReport(
        name="run",
        settings=[("lr", "1", "2"), ("data", "x", "x")],
        result=RESULT,
        records=[record(n) for n in range(1, epochs + 1)],
        banks=("bank",),
        commands=[("Train", "ckd train")],
        tested=Scored(tested, pixels, names),
    ).html()


def test_one_epoch_is_a_table_and_no_curve() -> None:
    page = check_page(page_of(3, 30, epochs=1))
    assert not page.all("figure")
    assert "there is no curve to draw" in page.text()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("settings", "kept", "why"),
    [
        ({"label_fraction": 0.0, "bank": "bank"}, {}, "no class head"),
        ({}, {"test_labels": None}, "no test image has a label"),
    ],
)
def test_what_cannot_be_scored_is_left_out_with_the_reason(
    tmp_path: Path, settings: dict[str, Any], kept: dict[str, Any], why: str
) -> None:
    config = tiny_config(tmp_path, epochs=2)
    if kept:
        with np.load(config.data) as file:
            arrays = dict(file)
        arrays["test_labels"] = np.full_like(arrays["test_labels"], -1)
        np.savez(tmp_path / "bare.npz", **arrays)
        config = replace(config, data=str(tmp_path / "bare.npz"), method="plain", bank=())
    else:
        config = replace(config, label_fraction=0.0)
    train(config, verbose=False)
    page = read_page(config)
    assert why in page.text()
    assert not page.all("img")
    assert "confusions" not in page.text()
    assert ("ckd predict" in page.text()) == bool(kept)
    assert len(page.all("figure")) == 1


@pytest.mark.usefixtures("quick")
def test_a_page_that_cannot_be_written_loses_no_run(tmp_path: Path, monkeypatch: Any) -> None:
    config = tiny_config(tmp_path, epochs=1)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device", "report.html")

    monkeypatch.setattr(page_module, "atomic_write", fail)
    with pytest.raises(OSError, match="No space"):
        train(config, verbose=False)
    assert not (config.folder / "result.json").exists()
    monkeypatch.undo()
    result = train(config, resume=True, verbose=False)
    assert result["epochs"] == 1
    read_page(config)


def test_the_pass_for_the_page_shows_one_bar(tmp_path: Path, monkeypatch: Any) -> None:
    shown, real = [], _console._Bar

    def bar(**options: Any) -> Any:
        shown.append(options["desc"])
        return real(**options)

    monkeypatch.setattr(_console, "_Bar", bar)
    train(tiny_config(tmp_path, method="plain", epochs=1), verbose=False)
    found = [name for name in shown if "test images" in name]
    assert found == ["scoring test images"] * 2  # of the epoch, and of the page


def test_the_pass_for_the_page_is_that_of_the_evaluation(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    test_set = data.load(config.data, "test")
    labels = test_set.labels.clone()
    labels[3] = -1
    test_set = test_set.with_labels(labels)
    torch.manual_seed(0)
    model = models.create(config.student, num_classes=3, image_size=8, in_channels=1).train()
    device = torch.device("cpu")
    rows = labelled_rows(model, test_set)
    assert rows.tolist() == [i for i in range(20) if i != 3]
    pairs = list(scored_batches(model, test_set, rows, 7, device))
    assert model.training
    hits = torch.cat([logits.argmax(1) == batch.labels for batch, logits in pairs])
    assert int(hits.sum()) == evaluate(model, test_set, batch_size=7, device=device).correct
    bare = models.create(config.student, num_classes=None, image_size=8, in_channels=1)
    assert not len(labelled_rows(bare, test_set))


def test_lines_have_gaps_where_a_value_is_not_finite() -> None:
    drawn = chart(
        "t", [Series("a", [1, 2, 3, 4], [1.0, math.inf, 2.0, 3.0])], kind="lines", x_label="x"
    )
    assert drawn["series"][0]["path"].count("M") == 2
    assert drawn["data"]["series"][0]["y"][1] is None
    assert len(drawn["series"][0]["marks"]) == 2  # the last, and the one without neighbours
    assert chart("t", [Series("a", [1], [None])], kind="lines", x_label="x") is None


@pytest.mark.parametrize(
    "values",
    [
        *([0.0, 0.0], [5.0, 5.0], [1e-9, 2e-9], [-3.0, 4.0], [1e12, 3e12], [0.25, 1.0]),
        *([1e300, 1e300], [-1e300, 1e300], [1e-320, 1e-310], [1.0, 1.0 + 1e-15]),
    ],
)
def test_axes_hold_their_values_and_have_few_ticks(values: list[float]) -> None:
    drawn = chart("t", [Series("a", [1, 2], values)], kind="lines", x_label="x")
    for name in ("x_axis", "y_axis"):
        axis = drawn[name]
        assert 1 <= len(axis.ticks) <= 9
        low, high = sorted((axis.start, axis.end))
        assert all(low - 0.1 <= at <= high + 0.1 for at, _ in axis.ticks)
        assert len({text for _, text in axis.ticks}) == len(axis.ticks)
    for at in drawn["data"]["series"][0]["y"]:
        assert 0 <= at <= 250


@pytest.mark.parametrize("value", [1e308, -1e308, math.nan, math.inf, None])
@pytest.mark.parametrize("kind", ["lines", "curves", "points"])
def test_values_that_no_axis_holds_are_left_out(value: float | None, kind: Any) -> None:
    series = [Series("a", [1.0, 0.0, 500.0], [0.5, value, 0.7])]
    drawn = chart("t", series, kind=kind, x_label="s", x_log=kind == "points", percent=True)
    assert drawn["data"]["series"][0]["y"][1] is None
    json.dumps(drawn["data"], allow_nan=False)
    if value is not None:
        wide = [Series("a", [1.0, value, 500.0], [0.5, 0.6, 0.7])]
        drawn = chart("t", wide, kind=kind, x_label="s", x_log=kind == "points")
        assert len(drawn["data"]["series"][0]["y"]) == 2


def test_long_lines_are_thinned_and_keep_their_ends() -> None:
    n = 10_000
    thin = Series("a", list(range(n)), [float(i) for i in range(n)]).thinned()
    assert len(thin.x) == POINTS
    assert (thin.x[0], thin.x[-1]) == (0, n - 1)
    assert list(thin.x) == sorted(set(thin.x))


def test_a_logarithmic_axis_is_taken_for_wide_ranges_alone() -> None:
    points = [Series("a", [x], [0.5]) for x in (1.0, 1000.0)]
    wide = chart("t", points, kind="points", x_label="s", x_log=True)
    assert wide["x_label"] == "s (logarithmic)"
    near = chart("t", points[:1] * 2, kind="points", x_label="s", x_log=True)
    assert near["x_label"] == "s"


def test_words() -> None:
    assert [duration(x) for x in (0.4, 12.34, 99.99, 245, 7384)] == [
        "0.40 s",
        "12.3 s",
        "1 min 40 s",
        "4 min 05 s",
        "2 h 03 min",
    ]
    assert [number(x) for x in (0, 1e-7, 0.12345, 12345.6, None, math.inf)] == [
        "0",
        "1.000e-07",
        "0.1235",
        "12,346",
        "–",
        "inf",
    ]
    assert short("a" * 100, 11) == "aaaaa…aaaaa"
    names = ["a" * 40 + str(n) + "b" * 40 for n in range(2)] + ["c" * 90]
    assert short_all(names, 11) == [*names[:2], "ccccc…ccccc"]
    assert peak_mib({"peak_rss_mib": 5.0, "start_rss_mib": 4.0}) == 5.0
    assert peak_mib({"peak_cuda_mib": 7.0}) == 7.0


def test_the_interval_is_wilsons() -> None:
    # Its ends are the p from which the measured share is 1.96 standard errors of p away.
    for end in interval(14, 46):
        assert abs(14 / 46 - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / 46))
    assert interval(0, 5)[0] == 0.0
    assert interval(5, 5)[1] == 1.0
