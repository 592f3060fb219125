"""The terms of --distill: their formulas in float64, what they store, refuse and train."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ckd import data, models
from ckd.bank import BankWriter, ClassHead, EmbeddingBank, Neighbours
from ckd.data import Batch
from ckd.models import ModelOutput
from ckd.neighbours import build_neighbours
from ckd.train import CheckpointError, ConfigError, Interrupted, checkpoint, curves, terms, train
from ckd.train.method import cross_entropy
from ckd.train.methods import method_class
from ckd.train.mix import HEAD_TERMS, TERM_NAMES
from ckd.train.terms import TERMS
from tests.test_bank_statistics import as_version_1
from tests.test_train_methods import CPU, Setting
from tests.test_train_resume import check_resumes, interrupt_at
from tests.train_runs import outcome, tiny_config

NAMES = ("class 0", "class 1", "class 2")
pytestmark = pytest.mark.usefixtures("quick_runs")


def class_head(order: tuple[int, ...] = (0, 1, 2)) -> ClassHead:
    """A head whose logit order[c] is that of class c."""
    generator = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(3, 12, generator=generator), torch.tensor([0.5, -1.0, 0.0])
    names = [""] * 3
    for label, logit in enumerate(order):
        names[logit] = NAMES[label]
    return ClassHead(weight, bias, names, order)


def bank_with_head(folder: Path, head: ClassHead | None = None, **settings: Any) -> str:
    """The rows of the tiny bank in two shards, far from zero, with a class head."""
    config = tiny_config(folder)
    old, path = EmbeddingBank.open(*config.bank), folder / "with head"
    options = {"fingerprint": old.meta["fingerprint"], "class_names": old.class_names, **settings}
    options |= {"class_head": head or class_head(), "rows_per_shard": 50}
    with BankWriter(path, 12, **options) as writer:
        writer.write(old.sample_ids, 2 * old.embeddings() + 10, old.labels)
    return str(path)


NEIGHBOURS = {"k": 5, "temperature": 0.1}


@pytest.fixture(params=[True, False], ids=["exact", "top"])
def exact(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Every bank has neighbours."""
    opened = EmbeddingBank.neighbours

    def neighbours(bank: EmbeddingBank) -> Neighbours:
        with monkeypatch.context() as patch:
            patch.setattr(EmbeddingBank, "neighbours", opened)
            options = {"exact": request.param, "replace": True, "progress": False}
            return build_neighbours(bank.path, **NEIGHBOURS, **options)

    monkeypatch.setattr(EmbeddingBank, "neighbours", neighbours)
    return request.param


def double(setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    """h and the standardised own rows by their formulas in float64, and all rows of the bank."""
    bank = EmbeddingBank.open(*setting.config.bank)
    rows = bank.embeddings().double()
    sigma = rows.var(dim=0, correction=0).mean().sqrt()
    net = setting.method.head.net
    h = setting.output.embedding.detach().double() @ net.weight.detach().double().T + net.bias
    own = (rows[bank.positions(setting.batch.sample_ids)] - rows.mean(0)) / sigma
    return h.detach(), own, rows


def test_every_term_of_the_table_can_be_named():
    assert tuple(TERMS) == TERM_NAMES
    assert {name for name, term in TERMS.items() if term.uses_head} == HEAD_TERMS
    assert TERMS.keys() <= curves._TERMS.keys()  # or their line would be missing in curves.png


def test_cosine_and_mse_compare_with_the_standardised_own_row(tmp_path):
    setting = Setting(tmp_path, bank=bank_with_head(tmp_path), distill="cosine=2,mse=0.25")
    loss, terms = setting.loss()
    h, own, _ = double(setting)
    assert terms["cosine"] == pytest.approx((1 - F.cosine_similarity(h, own)).mean().item(), 1e-4)
    assert terms["mse"] == pytest.approx(((h - own) ** 2).mean().item(), rel=1e-4)
    expected = terms["cross_entropy"] + 2 * terms["cosine"] + 0.25 * terms["mse"]
    assert loss == pytest.approx(expected, rel=1e-6)
    assert list(terms) == ["cross_entropy", "cosine", "mse"]


def test_soft_is_the_kl_of_similarities_to_all_rows(tmp_path, exact):
    setting = Setting(tmp_path, bank=bank_with_head(tmp_path), distill="soft")
    _, terms = setting.loss()
    h, own, rows = double(setting)
    sigma, mean = rows.var(dim=0, correction=0).mean().sqrt(), rows.mean(0)
    unit = F.normalize(rows, dim=1)
    p, q = ((F.normalize(mean + sigma * x, dim=1) @ unit.T / 0.1).softmax(1) for x in (h, own))
    if not exact:
        q = torch.where(q >= q.topk(5, dim=1).values[:, -1:], q, 0)
        q = q / q.sum(1, keepdim=True)
    kl = (torch.xlogy(q, q) - q * p.log()).sum(1).mean().item()
    assert terms["soft"] == pytest.approx(kl, rel=5e-3)
    left_out = setting.method.numbers()
    assert set(left_out) == (set() if exact else {"soft_left_out"})
    assert all(0 < share < 1 for share in left_out.values())


def test_the_mass_left_out_is_that_of_the_training_images(tmp_path):
    """The bank has rows of other images, too."""
    config = tiny_config(tmp_path, distill="soft")
    part = copy.copy(data.load(config.data))
    part.sample_ids = part.sample_ids[7:30]
    bank = EmbeddingBank.open(*config.bank)
    neighbours = build_neighbours(bank.path, **NEIGHBOURS, progress=False)
    term = TERMS["soft"].build(terms.Setting(config, bank, part, None, CPU))
    own = neighbours.left_out[bank.positions(part.sample_ids)]
    assert term.numbers() == {"soft_left_out": own.mean().item()}
    assert own.mean() != neighbours.left_out.mean()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_logits_are_those_of_the_class_head_in_the_order_of_the_data(tmp_path, order):
    bank = bank_with_head(tmp_path, class_head(order))
    setting = Setting(tmp_path, bank=bank, distill="logits", temperature=3.0)
    _, terms = setting.loss()
    head, stored = class_head(order), EmbeddingBank.open(bank)
    rows = stored.rows(setting.batch.sample_ids).double()
    teacher = (rows @ head.weight.double().T + head.bias)[:, list(order)]
    p, q = (teacher / 3).softmax(1), (setting.logits / 3).softmax(1)
    expected = 9 * (p * (p / q).log()).sum(1).mean().item()
    assert terms["logits"] == pytest.approx(expected, rel=1e-4)


def test_a_class_head_without_an_order_is_matched_by_names_or_by_the_file_of_names(tmp_path):
    named = replace(class_head((2, 0, 1)), order=None)
    setting = Setting(tmp_path, bank=bank_with_head(tmp_path, named), distill="logits")
    expected = named.weight[[2, 0, 1]]
    assert torch.equal(setting.method.logits.weight, expected)
    (tmp_path / "names.txt").write_text("class 1\nclass 2\nclass 0\n")
    other = replace(setting.config, teacher_classes=str(tmp_path / "names.txt"))
    method = method_class(other).build(other, setting.student, setting.dataset, CPU)
    assert torch.equal(method.logits.weight, expected)
    (tmp_path / "names.txt").write_text("class 0\nclass 1\nclass 2\n")  # the user knows better
    (tmp_path / "with head").rename(tmp_path / "old")
    bank_with_head(tmp_path, class_head((2, 0, 1)))
    method = method_class(other).build(other, setting.student, setting.dataset, CPU)
    assert torch.equal(method.logits.weight, named.weight)


def test_autocast_leaves_the_teachers_logits_and_its_rows_in_float32(tmp_path):
    setting = Setting(tmp_path, bank=bank_with_head(tmp_path), distill="logits")
    expected = setting.loss()[1]["logits"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert setting.loss()[1]["logits"] == expected


def test_a_mix_is_the_sum_of_its_terms_with_their_weights(tmp_path):
    bank = bank_with_head(tmp_path)
    mix = "logits=0.1, contrastive ,cosine=1"
    setting = Setting(tmp_path, bank=bank, distill=mix, distill_weight=0.7, label_weight=3.0)
    loss, terms = setting.loss()
    assert list(terms) == ["cross_entropy", "contrastive", "cosine", "logits"]
    weights = {"cross_entropy": 3, "contrastive": 0.7, "cosine": 1, "logits": 0.1}
    assert loss == pytest.approx(sum(weights[name] * terms[name] for name in terms), rel=1e-6)
    alone = Setting(tmp_path, bank=bank, distill="contrastive")
    assert terms["contrastive"] == alone.loss()[1]["contrastive"]  # the same first projection


def test_contrastive_with_centroids_goes_with_terms_of_the_own_row(tmp_path):
    setting = Setting(
        tmp_path, bank=bank_with_head(tmp_path), distill="contrastive,cosine", targets="centroids"
    )
    _, terms = setting.loss()
    bank = EmbeddingBank.open(*setting.config.bank)
    expected = setting.contrastive(bank.centroids().double(), setting.batch.labels, 14.2857)
    assert terms["contrastive"] == pytest.approx(expected, rel=1e-4)


def test_a_mix_with_centroids_needs_a_row_for_every_image_before_it_trains(tmp_path):
    config = tiny_config(tmp_path, targets="centroids")
    whole, path = EmbeddingBank.open(*config.bank), tmp_path / "fewer"
    settings = {"class_names": whole.class_names, "fingerprint": whole.meta["fingerprint"]}
    with BankWriter(path, 12, **settings) as writer:
        writer.write(whole.sample_ids[:80], whole.embeddings()[:80], whole.labels[:80])
    Setting(tmp_path, bank=str(path), targets="centroids")
    with pytest.raises(ConfigError, match="contrastive --targets centroids needs no row for every"):
        Setting(tmp_path, bank=str(path), targets="centroids", distill="contrastive,cosine")


@pytest.mark.parametrize(
    ("mix", "heads", "expected"),
    [
        ("contrastive", "linear", {"contrastive.weight", "contrastive.bias", "contrastive.log_*"}),
        ("cosine", "linear", {"head.net.weight", "head.net.bias", "head.mean", "head.sigma"}),
        ("logits", "linear", set()),
        (
            "mse,soft",
            "mlp",
            {f"head.net.{i}.{name}" for i in (0, 1, 3) for name in ("weight", "bias")}
            | {"head.mean", "head.sigma"},
        ),
    ],
)
def test_only_what_a_mix_trains_is_made_and_stored(tmp_path, exact, mix, heads, expected):
    setting = Setting(tmp_path, bank=bank_with_head(tmp_path), distill=mix, head=heads)
    names = {n.replace("log_logit_scale", "log_*") for n in setting.method.state_dict()}
    assert names == expected
    setting.method(setting.output, setting.batch, setting.batch.images)[0].backward()
    assert all(p.grad is not None for p in setting.method.parameters())


def test_each_parameter_of_the_student_and_the_head_gets_a_gradient_of_float64(tmp_path):
    """The gradient of a mix at the head's weight, against finite differences."""
    bank = bank_with_head(tmp_path)
    setting = Setting(tmp_path, bank=bank, distill="cosine=1,mse=1", label_weight=0.0)
    method = setting.method.double()
    output = ModelOutput(setting.output.embedding.detach().double(), None)
    weight = method.head.net.weight

    def loss() -> Tensor:
        return method(output, setting.batch, setting.batch.images)[0]

    (gradient,) = torch.autograd.grad(loss(), weight)
    for index in ((0, 0), (5, 3), (11, 15)):
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                weight[index] += step
                values.append(loss().item())
                weight[index] -= step
        assert gradient[index].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("batch", [1, 14, 64, 1000])
def test_cross_entropy_of_labelled_rows_keeps_every_bit(smoothing, batch):
    generator = torch.Generator().manual_seed(batch)
    logits = torch.randn(batch, 10, generator=generator).requires_grad_()
    labels = torch.randint(10, (batch,), generator=generator)
    losses = (
        cross_entropy(logits, labels, smoothing),
        F.cross_entropy(logits, labels, label_smoothing=smoothing),
    )
    assert torch.equal(*losses)
    assert torch.equal(*(torch.autograd.grad(loss, logits)[0] for loss in losses))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_the_sum_over_the_labels_per_row(smoothing):
    logits = torch.randn(6, 3).requires_grad_()
    labels = torch.tensor([2, -1, 0, -1, -1, 1])
    loss, known = cross_entropy(logits, labels, smoothing), labels >= 0
    expected = F.cross_entropy(logits[known], labels[known], label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected * 3 / 6)
    loss.backward()
    assert logits.grad[~known].abs().max() == 0
    logits.grad = None
    none = cross_entropy(logits, torch.full((6,), -1), smoothing)
    assert none.item() == 0
    none.backward()
    assert logits.grad.abs().max() == 0
    with torch.no_grad():
        logits[2] = torch.nan
    assert cross_entropy(logits, labels, smoothing).isnan()


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "plain"},
        {"method": "logit-kd"},
        {"method": "teacher-kd"},
        {"method": "embed-kd"},
        {"method": "embed-kd", "targets": "centroids"},
        {"method": "embed-kd", "distill": "contrastive,cosine,mse,soft,logits"},
        {"method": "embed-kd", "paper_compat": True},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
@pytest.mark.parametrize("labels", [[-1, 2, -1, 0], [-1, -1, -1, -1]])
@pytest.mark.parametrize("exact", [True], indirect=True)
def test_batches_with_few_labels_or_none_have_a_finite_loss_and_gradient(
    tmp_path, exact, settings, labels
):
    setting = Setting(tmp_path, **settings, bank=bank_with_head(tmp_path))
    setting.batch = setting.batch._replace(labels=torch.tensor(labels))
    loss, terms = setting.method(setting.output, setting.batch, setting.batch.images)
    loss.backward()
    known = torch.tensor(labels) >= 0
    logits = setting.logits.softmax(1) if setting.config.paper_compat else setting.logits
    label_term = F.cross_entropy(logits[known], torch.tensor(labels)[known], reduction="sum") / 4
    assert terms["cross_entropy"].item() == pytest.approx(float(label_term), rel=1e-5)
    gradients = [p.grad for p in (*setting.student.parameters(), *setting.method.parameters())]
    assert all(g is None or bool(g.isfinite().all()) for g in gradients)
    if settings.get("targets") == "centroids":
        assert (terms["contrastive"].item() == 0) == (not any(known))


def test_a_student_without_a_class_head_trains_on_the_terms_alone(tmp_path):
    setting = Setting(tmp_path, bank=bank_with_head(tmp_path), distill="cosine")
    output = ModelOutput(setting.output.embedding, None)
    _, terms = setting.method(output, setting.batch, setting.batch.images)
    assert list(terms) == ["cosine"]


@pytest.mark.parametrize(
    ("settings", "trains"),
    [
        ({}, True),
        ({"label_weight": 0.0}, False),
        ({"label_weight": 0.0, "distill": "cosine"}, False),
        ({"label_weight": 0.0, "distill": "cosine,logits"}, True),
        ({"label_weight": 0.0, "method": "logit-kd"}, True),
        ({"label_weight": 0.0, "method": "teacher-kd"}, False),
    ],
)
def test_whether_the_class_head_is_trained(tmp_path, settings, trains):
    config = tiny_config(tmp_path, **settings)
    assert method_class(config).trains_class_head(config, data.load(config.data)) == trains


def test_without_label_weight_no_label_has_any_influence(tmp_path):
    bank = bank_with_head(tmp_path)
    config = tiny_config(tmp_path, bank=bank, distill="cosine", label_weight=0.0, epochs=1)
    setting = Setting(tmp_path, bank=bank, distill="cosine", label_weight=0.0)
    results = []
    for labels in (setting.batch.labels, torch.full((4,), -1)):
        setting.batch = setting.batch._replace(labels=labels)
        results.append(setting.loss())
    assert results[0] == results[1]
    train(config, verbose=False)
    line = json.loads((config.folder / "metrics.jsonl").read_text())
    assert "cross_entropy" not in line
    assert line["loss"] == pytest.approx(5 * line["cosine"])


MIXES: dict[str, dict[str, Any]] = {
    "cosine": {"distill": "cosine", "amp": "bf16"},
    "mlp": {"distill": "mse=1,contrastive", "head": "mlp", "accumulate": 2, "ema": 0.9},
    "soft": {"distill": "soft=1", "label_weight": 0.0},
    "logits": {"distill": "logits=0.2,contrastive", "targets": "centroids"},
    "all": {"distill": "contrastive,cosine,mse,soft,logits", "amp": "fp16"},
}


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("exact", [True], indirect=True)
def test_interrupted_and_resumed_equals_undisturbed(tmp_path, monkeypatch, exact, name):
    config = tiny_config(tmp_path, bank=bank_with_head(tmp_path), **MIXES[name])
    check_resumes(config, monkeypatch, {1, 4})
    names = checkpoint.load(checkpoint.latest(config.folder)).tensors
    has_head = any(name.startswith("method.head.net.") for name in names)
    assert has_head == (name != "logits")
    assert not any("bank" in name or "method.logits" in name for name in names)


@pytest.mark.parametrize("exact", [True], indirect=True)
@pytest.mark.parametrize("term", ["soft", "logits"])
def test_a_resume_with_another_class_head_or_other_neighbours_is_refused(
    tmp_path, monkeypatch, exact, term
):
    config = tiny_config(tmp_path, bank=bank_with_head(tmp_path), distill=term)
    interrupt_at(monkeypatch, {3})
    with pytest.raises(Interrupted):
        train(config, verbose=False)
    if term == "soft":
        monkeypatch.setitem(NEIGHBOURS, "temperature", 0.2)
    else:
        (tmp_path / "with head").rename(tmp_path / "old")
        bank_with_head(tmp_path, replace(class_head(), bias=torch.zeros(3)))
    what = {"soft": "neighbours", "logits": "class head"}[term]
    with pytest.raises(
        CheckpointError, match=f"the {what} of the bank is not what .* was trained with"
    ):
        train(config, resume=True, verbose=False)


def test_a_bank_of_the_first_version_trains_to_the_same_bytes(tmp_path):
    results = []
    for version in (2, 1):
        config = tiny_config(tmp_path, distill="cosine", epochs=1, out=str(tmp_path / f"{version}"))
        if version == 1:
            as_version_1(Path(*config.bank))
        train(config, verbose=False)
        results.append(outcome(config.folder)["student"])
    assert results[0] == results[1]


def test_a_head_lets_the_student_take_the_teachers_place(tmp_path):
    """After training on cosine alone, the nearest class centroid of the teacher classifies."""
    config = tiny_config(
        tmp_path, distill="cosine=1", label_weight=0.0, epochs=20, lr=5e-3, crop_padding=0
    )
    train(config, verbose=False)
    tensors = checkpoint.load(checkpoint.latest(config.folder)).tensors
    student, test = models.load(config.folder), data.load(config.data, "test")
    with torch.no_grad():
        embedding = student(models.prepare(student, test.images)).embedding
    h = embedding @ tensors["method.head.net.weight"].T + tensors["method.head.net.bias"]
    z = tensors["method.head.mean"] + tensors["method.head.sigma"] * h
    centroids = EmbeddingBank.open(*config.bank).centroids()
    classes = (F.normalize(z, dim=1) @ F.normalize(centroids, dim=1).T).argmax(1)
    assert (classes == test.labels).float().mean() > 0.9


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"distill": "cosin"}, "unknown term 'cosin'; --distill takes, nearest first: cosine, "),
        ({"distill": ""}, "--distill must name terms, as in contrastive=0.5,cosine=1, got ''"),
        ({"distill": "cosine,,mse"}, "must name terms"),
        ({"distill": "cosine,"}, "must name terms"),
        ({"distill": "=1"}, "must name terms"),
        ({"distill": "cosine,mse,cosine=2"}, "--distill names cosine twice"),
        ({"distill": "cosine=-1"}, "weight of cosine must be a number above 0, got '-1'; leave"),
        ({"distill": "cosine=0,mse=0"}, "weight of cosine must be a number above 0, got '0'"),
        ({"distill": "cosine=nan"}, "got 'nan'"),
        ({"distill": "cosine=inf"}, "got 'inf'"),
        ({"distill": "cosine="}, "got ''"),
        ({"distill": "cosine=1=2"}, "got '1=2'"),
        ({"distill": "cosine", "distill_weight": 0.0}, "cosine has weight 0, the --distill-weight"),
        ({"distill": "cosine", "method": "plain"}, "--distill goes with --method embed-kd"),
        ({"distill": "contrastive", "method": "teacher-kd"}, "--distill goes with --method embed"),
        ({"distill": "cosine", "paper_compat": True}, "--paper-compat trains by the published"),
        ({"head": "mlp", "targets": "samples"}, "--head goes with --distill cosine, mse or soft"),
        (
            {"logit_scale": 2.0},
            "--logit-scale and --no-learn-logit-scale go with the term contrast",
        ),
        ({"learn_logit_scale": False, "distill": "mse,soft"}, "(its terms: mse, soft): name it in"),
        ({"distill": 5}, "--distill must be a string, as in contrastive=0.2,mse=2, got 5"),
        ({"head": "mlp", "distill": "logits,contrastive"}, "--head goes with"),
        ({"head": "conv", "distill": "cosine"}, "unknown head 'conv'; --head takes"),
        ({"distill": "cosine", "targets": "centroids"}, "--targets goes with the term contrastive"),
        ({"label_weight": -1.0}, "--label-weight must be at least 0, got -1"),
        ({"label_weight": float("nan")}, "--label-weight"),
        ({"label_weight": 0.0, "method": "plain"}, "--label-weight 0 leaves nothing to learn from"),
        ({"label_weight": 0.0, "distill_weight": 0.0}, "nothing to learn from"),
    ],
)
def test_mixes_that_cannot_work_are_refused_before_anything_is_made(tmp_path, settings, says):
    config = tiny_config(tmp_path, **settings)
    with pytest.raises(ConfigError) as caught:
        train(config, verbose=False)
    assert says in str(caught.value)
    assert not config.folder.exists()


def test_a_weight_is_parsed_as_python_does(tmp_path):
    mix = tiny_config(tmp_path, distill=" mse = 1e-3 ,contrastive=.5").mix
    assert mix == {"contrastive": 0.5, "mse": 1e-3}


def test_a_term_named_alone_has_its_own_weight_or_the_distill_weight(tmp_path):
    every = ",".join(TERMS)
    own = {"contrastive": 0.5, "cosine": 5, "mse": 2, "soft": 1, "logits": 1}
    assert tiny_config(tmp_path, distill=every).mix == own
    assert tiny_config(tmp_path, distill=every, distill_weight=2.0).mix == dict.fromkeys(own, 2)


def test_without_a_mix_the_term_is_mse_or_what_targets_goes_with(tmp_path):
    assert tiny_config(tmp_path).mix == {"mse": 2}
    assert tiny_config(tmp_path, distill_weight=0.3).mix == {"mse": 0.3}
    assert tiny_config(tmp_path, targets="samples").mix == {"contrastive": 0.5}
    assert tiny_config(tmp_path, targets="centroids", distill_weight=2.0).mix == {"contrastive": 2}
    assert tiny_config(tmp_path, logit_scale=3.0, targets="samples").mix == {"contrastive": 0.5}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"distill": "logits"}, "holds none; make a bank of a teacher with a linear class head"),
        ({"distill": "soft"}, "python -m ckd.bank neighbours"),
    ],
)
def test_what_a_bank_lacks_is_refused_before_training_with_the_command(tmp_path, settings, says):
    config = tiny_config(tmp_path, **settings)
    with pytest.raises(ValueError, match=says):
        train(config, verbose=False)
    assert not (config.folder / "metrics.jsonl").exists()
    assert checkpoint.latest(config.folder) is None


def test_a_class_head_of_other_classes_is_refused(tmp_path):
    four = ClassHead(torch.zeros(4, 12), torch.zeros(4))
    config = tiny_config(tmp_path, bank=bank_with_head(tmp_path, four), distill="logits")
    with pytest.raises(ConfigError, match=r"data has 3 \(class 0, class 1, class 2\), the class"):
        train(config, verbose=False)


def test_rows_that_are_all_the_same_cannot_be_standardised(tmp_path):
    config = tiny_config(tmp_path)
    old = EmbeddingBank.open(*config.bank)
    with BankWriter(tmp_path / "same", 12) as writer:
        writer.write(old.sample_ids, torch.ones(90, 12), old.labels)
    same = replace(config, bank=str(tmp_path / "same"), distill="mse")
    with pytest.raises(ConfigError, match=r"rows of the bank .*same are all the same"):
        train(same, verbose=False)


def test_a_batch_is_looked_up_by_sample_id(tmp_path):
    """Rows in another order than the data's: positions come from ids, in every term."""
    every = {"distill": ",".join(TERM_NAMES)}
    bank = EmbeddingBank.open(bank_with_head(tmp_path))
    build_neighbours(bank.path, **NEIGHBOURS, progress=False)
    setting = Setting(tmp_path, bank=str(bank.path), **every)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(2))
    path, options = tmp_path / "shuffled", {"class_head": class_head(), "rows_per_shard": 40}
    with BankWriter(path, 12, class_names=bank.class_names, **options) as writer:
        writer.write(bank.sample_ids[order], bank.embeddings()[order], bank.labels[order])
    build_neighbours(path, **NEIGHBOURS, progress=False)
    other = Setting(tmp_path, bank=str(path), **every)
    assert other.loss()[1] == pytest.approx(setting.loss()[1], rel=1e-5)
    assert isinstance(setting.batch, Batch)


def test_logits_of_data_without_classes_are_refused(tmp_path):
    config = tiny_config(tmp_path, bank=bank_with_head(tmp_path), distill="logits")
    nameless = copy.copy(data.load(config.data))
    nameless.class_names = ()
    nameless.labels = torch.full_like(nameless.labels, -1)
    method = method_class(config)
    assert not method.trains_class_head(config, nameless)
    student = models.create(config.student, num_classes=None, image_size=8, in_channels=1)
    bank = EmbeddingBank.open(*config.bank)
    with pytest.raises(ConfigError, match=r"compares logits of classes, and .* has no classes"):
        TERMS["logits"].build(terms.Setting(config, bank, nameless, student, CPU))
