"""Several banks in one run: terms, heads and weights of each, joined by sample id."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import ckd
from ckd import data
from ckd.bank import BankWriter, EmbeddingBank
from ckd.neighbours import build_neighbours
from ckd.train import CheckpointError, Config, ConfigError, Interrupted, checkpoint, curves, train
from ckd.train.__main__ import parse
from ckd.train.methods import method_class
from tests.test_train_methods import CPU, Setting
from tests.test_train_resume import check_resumes, interrupt_at
from tests.test_train_terms import bank_with_head
from tests.train_runs import tiny_config

pytestmark = pytest.mark.usefixtures("quick_runs")


def other_bank(folder: Path, dim: int = 7, name: str = "other", **settings: Any) -> str:
    """Rows of another width for the tiny data, in another order and with rows of other images."""
    whole, path = EmbeddingBank.open(*tiny_config(folder).bank), folder / name
    generator = torch.Generator().manual_seed(dim)
    rows = torch.randn(len(whole) + 20, dim, generator=generator) + 3
    ids = torch.cat([whole.sample_ids.flip(0), torch.arange(1000, 1020)])
    labels = torch.cat([whole.labels.flip(0), torch.full((20,), -1)])
    options = {"class_names": whole.class_names, "teacher": name, "rows_per_shard": 40, **settings}
    with BankWriter(path, dim, **options) as writer:
        writer.write(ids, rows, labels)
    return str(path)


def two_banks(folder: Path) -> tuple[str, str]:
    banks = bank_with_head(folder, teacher="first"), other_bank(folder)
    for bank in banks:
        build_neighbours(bank, k=5, temperature=0.1, progress=False)
    return banks


MIX = "contrastive=0.3,cosine=2,mse,soft=0.7"


def test_each_bank_has_the_terms_of_a_run_with_it_alone(tmp_path):
    """Values in float32 by the modules themselves; what they compute is tested with one bank."""
    banks = two_banks(tmp_path)
    both = Setting(tmp_path, bank=banks, distill=MIX, bank_weights=(1.0, 0.25))
    loss, terms = both.loss()
    names = ("contrastive", "cosine", "mse", "soft")
    assert list(terms) == ["cross_entropy", *(f"{name}_{i}" for i in (1, 2) for name in names)]
    for number, bank in enumerate(banks, 1):
        alone = Setting(tmp_path, bank=bank, distill=MIX)
        own = {
            name.replace(f"_{number}.", ".", 1): tensor
            for name, tensor in both.method.state_dict().items()
            if name.partition(".")[0].endswith(f"_{number}")
        }
        alone.method.load_state_dict(own)
        expected = alone.loss()[1]
        for name in names:
            assert terms[f"{name}_{number}"] == pytest.approx(expected[name], rel=1e-6)
        assert alone.method.numbers() == {
            name.removesuffix(f"_{number}"): value
            for name, value in both.method.numbers().items()
            if name.endswith(f"_{number}")
        }
    weights = {"contrastive": 0.3, "cosine": 2, "mse": 2, "soft": 0.7}
    distilled = sum(
        share * weights[name] * terms[f"{name}_{number}"]
        for number, share in ((1, 1), (2, 0.25))
        for name in names
    )
    assert loss == pytest.approx(terms["cross_entropy"] + distilled, rel=1e-6)


def test_rows_are_joined_by_sample_id(tmp_path):
    banks = two_banks(tmp_path)
    setting = Setting(tmp_path, bank=banks, distill="mse")
    _, terms = setting.loss()
    for number, bank in enumerate(map(EmbeddingBank.open, banks), 1):
        rows = bank.embeddings().double()
        row_of = dict(zip(bank.sample_ids.tolist(), rows))
        own = torch.stack([row_of[sample] for sample in setting.batch.sample_ids.tolist()])
        head = getattr(setting.method, f"head_{number}")
        h = F.linear(
            setting.output.embedding.detach().double(),
            head.net.weight.detach().double(),
            head.net.bias.detach().double(),
        )
        sigma = rows.var(dim=0, correction=0).mean().sqrt()
        expected = ((h - (own - rows.mean(0)) / sigma) ** 2).mean().item()
        assert terms[f"mse_{number}"] == pytest.approx(expected, rel=1e-4)


def test_every_bank_needs_a_row_for_every_image(tmp_path):
    first, _ = two_banks(tmp_path)
    whole = EmbeddingBank.open(first)
    with BankWriter(tmp_path / "fewer", 5, class_names=whole.class_names) as writer:
        writer.write(whole.sample_ids[:80], torch.randn(80, 5), whole.labels[:80])
    with pytest.raises(ConfigError, match="fewer"):
        Setting(tmp_path, bank=(first, str(tmp_path / "fewer")), distill="cosine")
    of_other_classes = other_bank(tmp_path, name="named", class_names=["x", "y", "z"])
    with pytest.raises(ckd.BankError, match="class 0"):
        Setting(tmp_path, bank=(first, of_other_classes))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_logits_acts_on_the_banks_with_a_class_head(tmp_path, capsys, order):
    banks = two_banks(tmp_path)
    config = tiny_config(
        tmp_path, bank=tuple(banks[i] for i in order), distill="cosine,logits", epochs=1
    )
    train(config, verbose=True)
    (line,) = map(json.loads, (config.folder / "metrics.jsonl").read_text().splitlines())
    number = order.index(0) + 1
    assert {"cosine_1", "cosine_2", f"logits_{number}"} <= line.keys()
    assert f"logits_{3 - number}" not in line
    assert f"logits leaves out {banks[1]}" in capsys.readouterr().out
    neither = (banks[1], other_bank(tmp_path, name="third"))
    with pytest.raises(ConfigError, match=r"needs the teacher's class head, and the bank .*other"):
        Setting(tmp_path, bank=neither, distill="logits")
    with pytest.raises(ConfigError, match="other holds no class head, so that it has no part"):
        Setting(tmp_path, bank=banks, distill="logits")


def test_a_student_keeps_a_map_to_each_teacher(tmp_path):
    banks = two_banks(tmp_path)
    config = tiny_config(tmp_path, bank=banks, distill="contrastive,cosine", ema=0.5, epochs=1)
    train(config, verbose=False)
    student = ckd.load_student(config.folder)
    assert [(one.name, one.dim) for one in student.teachers] == [("first", 12), ("other", 7)]
    path = checkpoint.latest(config.folder)
    tensors = checkpoint.load(path).tensors
    x = student.preprocess(data.load(config.data).images[:3])
    for number, bank in enumerate(banks):
        for name, tensor in student.teachers[number].state_dict().items():
            assert torch.equal(tensor, tensors[f"ema_maps.module.{number}.{name}"])
        rows = EmbeddingBank.open(bank).embeddings()
        assert student.embedding(x, number).shape == (3, rows.shape[1])
        assert torch.equal(student.comparable(rows, number), rows.float())


@pytest.mark.parametrize(
    "settings",
    [{"distill": MIX, "bank_weights": (2.0, 0.5), "ema": 0.9}, {"targets": "centroids"}],
    ids=["mix", "centroids"],
)
def test_interrupted_and_resumed_equals_undisturbed(tmp_path, monkeypatch, settings):
    config = tiny_config(tmp_path, bank=two_banks(tmp_path), **settings)
    check_resumes(config, monkeypatch, {1, 8})


@pytest.mark.parametrize("number", [1, 2])
def test_a_resume_with_another_bank_or_other_weights_is_refused(tmp_path, monkeypatch, number):
    banks = two_banks(tmp_path)
    config = tiny_config(tmp_path, bank=banks, distill="cosine")
    interrupt_at(monkeypatch, {3})
    with pytest.raises(Interrupted):
        train(config, verbose=False)
    for changed in ({"bank": banks[::-1]}, {"bank": banks[:1]}, {"bank_weights": (1.0, 2.0)}):
        with pytest.raises(ConfigError, match=f"{next(iter(changed))} was .*, is "):
            train(replace(config, **changed), resume=True, verbose=False)
    place = Path(banks[number - 1])
    place.rename(tmp_path / "away")
    other_bank(tmp_path, name=place.name, rows_per_shard=30)
    with pytest.raises(CheckpointError, match=f"the bank {number} is not what .* was trained with"):
        train(config, resume=True, verbose=False)


def test_one_bank_writes_the_config_of_earlier_versions_and_reads_it(tmp_path):
    for given, stored in (("a", "a"), (("a",), "a"), ((), None), (None, None)):
        config = Config(bank=given)
        settings = config.to_dict()
        assert settings["bank"] == stored
        assert "bank_weights" not in settings
        assert Config.from_dict(settings, tmp_path) == config
        assert config.bank == (() if stored is None else ("a",))


def test_several_banks_survive_config_json(tmp_path):
    config = Config(bank=("a", "b"), bank_weights=(1.0, 0.5))
    config.save(tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text())["bank"] == ["a", "b"]
    assert Config.load(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bank": 3}, "bank"),
        ({"bank": ["a", 3]}, "bank"),
        ({"bank": {"a": "b"}}, "bank"),
        ({"bank": ["a", "a"]}, "--bank names a twice"),
        ({"bank": ["a", "b", "./a/"]}, "--bank names a twice"),
        ({"bank_weights": [1.0]}, "one number for each --bank"),
        ({"bank_weights": ["1"]}, "bank_weights"),
        ({"bank_weights": "12"}, "bank_weights"),
        ({"bank": ["a", "b"], "bank_weights": [1, 0.0]}, "above 0"),
        ({"bank": ["a", "b"], "bank_weights": [1, -1]}, "above 0"),
        ({"bank": ["a", "b"], "bank_weights": [1, float("nan")]}, "above 0"),
        ({"bank": ["a", "b"], "bank_weights": [1, 10**400]}, "above 0"),
    ],
)
def test_banks_and_weights_that_do_not_fit_are_named(tmp_path, changes, says):
    with pytest.raises(ConfigError, match=f"here: .*{says}|here: {says}"):
        Config.from_dict(Config().to_dict() | changes, "here")


def test_flags_name_each_bank_and_replace_those_of_a_resumed_run(tmp_path, monkeypatch):
    given = parse(["--bank", "a", "--bank=b", "--bank-weights", "1", "0.5"]).config
    assert (given.bank, given.bank_weights) == (("a", "b"), (1.0, 0.5))
    banks = two_banks(tmp_path)
    config = tiny_config(tmp_path, bank=banks, distill="cosine")
    interrupt_at(monkeypatch, {2})
    with pytest.raises(Interrupted):
        train(config, verbose=False)
    resume = ["--resume", str(config.folder)]
    assert parse(resume).config.bank == banks
    again = [flag for bank in banks for flag in ("--bank", bank)]
    assert parse([*resume, *again]).config.bank == banks
    assert parse([*resume, "--bank", "c"]).config.bank == ("c",)


def test_centroids_of_a_bank_are_made_for_each(tmp_path):
    banks = two_banks(tmp_path)
    setting = Setting(tmp_path, bank=banks, targets="centroids")
    for number, bank in enumerate(map(EmbeddingBank.open, banks), 1):
        stored = getattr(setting.method, f"contrastive_{number}").bank
        assert torch.equal(stored, bank.centroids().half())


def test_curves_show_the_terms_of_each_bank():
    record = {"loss": 1, "cosine_1": 2, "cosine_2": 3, "logit_scale_1": 4, "logits_2": 5}
    assert [*curves._logged("cosine", record)] == [("cosine_1", "_1"), ("cosine_2", "_2")]
    assert [*curves._logged("loss", record)] == [("loss", "")]
    assert [*curves._logged("soft", {"soft_left_out_1": 1, "soft_1": 2})] == [("soft_1", "_1")]
    assert [*curves._logged("logits", record)] == [("logits_2", "_2")]


def test_a_bank_of_another_method_is_not_opened(tmp_path):
    config = tiny_config(tmp_path, method="plain", bank=("nowhere", "neither"))
    setting = Setting(tmp_path, method="plain", bank=config.bank)
    assert type(setting.method) is method_class(config)
    method_class(config).build(config, setting.student, setting.dataset, CPU)
