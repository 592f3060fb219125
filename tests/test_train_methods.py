"""The loss of each method against the formula it claims, written out in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ckd import data, models
from ckd.bank import BankWriter, EmbeddingBank
from ckd.data import Batch
from ckd.models import ModelOutput
from ckd.train import Config
from ckd.train.methods import METHODS, Method, method_class
from tests.train_runs import STUDENT, tiny_config

CPU = torch.device("cpu")


class Setting:
    """A method built from a tiny configuration, and one batch for it."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.config: Config = tiny_config(folder, **settings)
        self.dataset = data.load(self.config.data)
        torch.manual_seed(0)
        self.student = models.create(STUDENT, num_classes=3, image_size=8, in_channels=1)
        build = method_class(self.config).build
        self.method: Method = build(self.config, self.student, self.dataset, CPU)
        positions = torch.tensor([5, 17, 42, 3])
        self.batch: Batch = next(self.dataset.batches(positions, 4))
        self.output: ModelOutput = self.student(models.prepare(self.student, self.batch.images))

    def loss(self) -> tuple[float, dict[str, float]]:
        loss, terms = self.method(self.output, self.batch, self.batch.images)
        return loss.item(), {name: term.item() for name, term in terms.items()}

    @property
    def logits(self) -> Tensor:
        return self.output.logits.detach().double()

    @property
    def teacher(self) -> ModelOutput:
        model = models.load(self.config.teacher)
        output = model(models.prepare(model, self.batch.images))
        return ModelOutput(output.embedding.double(), output.logits.double())

    def contrastive(self, bank: Tensor, target: Tensor, scale: float) -> float:
        """The contrastive term with the method's own projection, in float64 by eager torch."""
        loss = self.method.contrastive
        u = F.normalize(self.output.embedding.detach().double(), dim=1)
        z = bank.half().double() @ loss.weight.detach().double().t() + loss.bias.detach().double()
        return F.cross_entropy(scale * u @ F.normalize(z, dim=1).t(), target).item()


def test_the_table_holds_the_four_methods_of_the_paper():
    assert set(METHODS) == {"plain", "logit-kd", "teacher-kd", "embed-kd"}


def test_plain_is_the_smoothed_cross_entropy(tmp_path):
    setting = Setting(tmp_path, method="plain", label_smoothing=0.2)
    loss, terms = setting.loss()
    expected = F.cross_entropy(setting.logits, setting.batch.labels, label_smoothing=0.2).item()
    assert loss == pytest.approx(expected, rel=1e-5)
    assert terms == {"cross_entropy": loss}


def test_logit_kd_is_the_tempered_kl_divergence(tmp_path):
    setting = Setting(tmp_path, method="logit-kd", temperature=3.0, distill_weight=0.7)
    loss, terms = setting.loss()
    p = (setting.teacher.logits / 3).softmax(1)
    q = (setting.logits / 3).softmax(1)
    kl = 9 * (p * (p / q).log()).sum(1).mean().item()
    assert terms["kl"] == pytest.approx(kl, rel=1e-3)
    assert loss == pytest.approx(terms["cross_entropy"] + 0.7 * kl, rel=1e-5)


def test_teacher_kd_contrasts_with_the_teachers_embeddings_of_the_batch(tmp_path):
    setting = Setting(tmp_path, method="teacher-kd", logit_scale=5.0)
    loss, terms = setting.loss()
    expected = setting.contrastive(setting.teacher.embedding, torch.arange(4), 5.0)
    assert terms["contrastive"] == pytest.approx(expected, rel=1e-4)
    assert loss == pytest.approx(terms["cross_entropy"] + 0.5 * expected, rel=1e-4)


@pytest.mark.parametrize("scale", [3e-6, 1e6])
def test_teacher_kd_keeps_embeddings_that_float16_cannot_hold(tmp_path, scale):
    setting = Setting(tmp_path, method="teacher-kd")
    bank = scale * setting.teacher.embedding.float()
    setting.method.teacher = lambda images: ModelOutput(bank, None)
    loss = setting.method.contrastive
    torch.nn.init.zeros_(loss.bias)  # beside it, small embeddings would not matter
    _, terms = setting.loss()
    u = F.normalize(setting.output.embedding.detach().double(), dim=1)
    z = bank.double() @ loss.weight.detach().double().t() + loss.bias.detach().double()
    expected = F.cross_entropy(14.2857 * u @ F.normalize(z, dim=1).t(), torch.arange(4)).item()
    assert terms["contrastive"] == pytest.approx(expected, rel=1e-4)


def test_embed_kd_contrasts_with_the_class_centroids(tmp_path):
    setting = Setting(tmp_path, method="embed-kd", targets="centroids")
    centroids = EmbeddingBank.open(*setting.config.bank).centroids().double()
    _, terms = setting.loss()
    expected = setting.contrastive(centroids, setting.batch.labels, 14.2857)
    assert terms["contrastive"] == pytest.approx(expected, rel=1e-4)


def test_centroids_too_small_for_float16_keep_their_direction(tmp_path):
    tiny_config(tmp_path)
    # float16 holds rows like these, but not their means, which are six times smaller.
    rows = 1e-5 * torch.randn(90, 12, generator=torch.Generator().manual_seed(0))
    with BankWriter(tmp_path / "small", 12) as writer:
        writer.write(torch.arange(90), rows, torch.arange(90) % 3)
    setting = Setting(
        tmp_path, method="embed-kd", targets="centroids", bank=str(tmp_path / "small")
    )
    centroids = EmbeddingBank.open(tmp_path / "small").centroids()
    assert F.cosine_similarity(centroids.half().double(), centroids.double()).min() < 0.99995
    assert torch.equal(setting.method.contrastive.bank, centroids)


def test_embed_kd_contrasts_with_each_samples_own_row(tmp_path):
    setting = Setting(tmp_path, method="embed-kd", distill="contrastive")
    bank = EmbeddingBank.open(*setting.config.bank)
    _, terms = setting.loss()
    own = bank.positions(setting.batch.sample_ids)
    expected = setting.contrastive(bank.embeddings().double(), own, 14.2857)
    assert terms["contrastive"] == pytest.approx(expected, rel=1e-4)


def test_paper_compat_applies_the_softmax_twice_and_no_logit_scale(tmp_path):
    setting = Setting(tmp_path, method="embed-kd", paper_compat=True, centroids_per_class=7)
    loss, terms = setting.loss()
    twice = F.cross_entropy(setting.logits.softmax(1), setting.batch.labels).item()
    bank = EmbeddingBank.open(*setting.config.bank).centroids(7, seed=0).double()
    contrastive = setting.contrastive(bank, setting.batch.labels, 1.0)
    assert terms["cross_entropy"] == pytest.approx(twice, rel=1e-5)
    assert loss == pytest.approx(twice + 0.5 * contrastive, rel=1e-4)
    assert not any("logit_scale" in name for name, _ in setting.method.named_parameters())


def test_paper_compat_logit_kd_is_the_published_cross_entropy_of_probabilities(tmp_path):
    setting = Setting(tmp_path, method="logit-kd", paper_compat=True)
    loss, _ = setting.loss()
    q = setting.logits.softmax(1)
    p = setting.teacher.logits.softmax(1)
    published = F.cross_entropy(q, setting.batch.labels) + 0.5 * F.cross_entropy(q, p)
    assert loss == pytest.approx(published.item(), rel=1e-5)


@pytest.mark.parametrize("method", ["logit-kd", "teacher-kd"])
def test_the_teacher_is_no_part_of_the_method_and_gets_no_gradient(tmp_path, method):
    setting = Setting(tmp_path, method=method)
    loss, _ = setting.method(setting.output, setting.batch, setting.batch.images)
    loss.backward()
    names = {name.split(".")[0] for name in setting.method.state_dict()}
    assert names <= {"contrastive"}
    assert all(p.grad is not None for p in setting.method.parameters())


def test_the_bank_stays_out_of_the_checkpoint(tmp_path):
    setting = Setting(tmp_path, method="embed-kd", targets="samples")
    assert set(setting.method.state_dict()) == {
        "contrastive.weight",
        "contrastive.bias",
        "contrastive.log_logit_scale",
    }


def test_methods_share_the_students_initial_weights(tmp_path):
    students = [Setting(tmp_path, method=method).student for method in METHODS]
    hashes = {models.weights_hash(student) for student in students}
    assert len(hashes) == 1


def test_compile_includes_the_teacher_that_runs_beside_the_student(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    Setting(tmp_path, method="teacher-kd", compile=True).loss()
    assert len(compiled) == 1
