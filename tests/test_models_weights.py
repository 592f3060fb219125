from __future__ import annotations

import argparse
import datetime
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from ckd.models import ModelError, create, load

SPEC = "resnet8:width=4"


def weights() -> dict[str, Tensor]:
    return create(SPEC, num_classes=3, image_size=32).state_dict()


def prefixed(*prefixes: str) -> dict[str, Tensor]:
    return {"".join(prefixes) + name: tensor for name, tensor in weights().items()}


@pytest.mark.parametrize(
    "content",
    [
        prefixed("module."),
        prefixed("_orig_mod.", "module."),  # torch.compile(DDP(model))
        prefixed("module.", "_orig_mod."),
        prefixed("module.", "module.", "_orig_mod."),
        {"model_state_dict": weights()},
        {"module": weights()},  # DeepSpeed
        {**prefixed("module."), "n_averaged": torch.tensor(3)},  # AveragedModel
        {"state_dict": prefixed("net._orig_mod.")},
        {"state_dict": prefixed("model.module.")},
        {
            "state_dict": weights(),
            "scores": np.arange(3.0),
            "when": datetime.datetime(2026, 1, 2),
            "seen": {1, 2},
        },
        {"state_dict": prefixed("net.")},  # of a module that holds the network (Lightning)
        *({key: weights()} for key in ("net", "model", "state_dict", "state_dict_ema")),
        {"model": {"state_dict": prefixed("module.")}, "epoch": 3},
        {
            "state_dict": weights(),
            "state_dict_ema": None,
            "arch": "resnet8",
            "args": argparse.Namespace(lr=0.1, out=Path("runs"), decay=np.float32(0.5)),
            "metric": np.float64(0.93),
            "best": np.int64(3),
            "dtype": np.dtype("float16"),
            "flag": np.bool_(True),
        },
    ],
)
def test_wrappers_and_prefixes_of_training_code(content, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pt")
    model = load(SPEC, weights=tmp_path / "w.pt")
    assert model.num_classes == 3
    assert model.state_dict().keys() == weights().keys()


def test_the_average_of_the_weights_comes_first(tmp_path: Path) -> None:
    raw, average = weights(), weights()
    torch.save({"state_dict": raw, "state_dict_ema": average}, tmp_path / "w.pt")
    stored = load(SPEC, weights=tmp_path / "w.pt").state_dict()
    assert torch.equal(stored["conv1.weight"], average["conv1.weight"])
    assert not torch.equal(stored["conv1.weight"], raw["conv1.weight"])


def test_code_in_a_file_does_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": weights(), "args": CallsOnLoad(tmp_path / "ran")}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"weights_only=True: it holds objects of .*open"):
        load(SPEC, weights=tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()


class CallsOnLoad:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory) -> Path:
    """A classifier of two classes, with random weights and without image processor."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("vit")
    transformers.ViTForImageClassification(transformers.ViTConfig(**TINY)).save_pretrained(folder)
    return folder


@pytest.fixture
def fine_tuned():
    """A classifier of the same shape, but of seven classes."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(**TINY, num_labels=7)
    return transformers.ViTForImageClassification(config).eval()


@pytest.mark.filterwarnings("ignore:.*preprocessor_config.json")
@pytest.mark.parametrize("prefix", ["", "module.", "model._orig_mod.", "_orig_mod.net."])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_own_names_of_a_transformers_model(vit_folder, fine_tuned, suffix, prefix, tmp_path):
    path = tmp_path / f"mine.{suffix}"
    content = {prefix + name: tensor for name, tensor in fine_tuned.state_dict().items()}
    (torch.save if suffix == "pt" else safetensors.torch.save_file)(content, path)
    model = load(f"hf:{vit_folder}", weights=path)
    assert model.num_classes == 7
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(x).logits, fine_tuned(x).logits)


@pytest.mark.filterwarnings("ignore:.*preprocessor_config.json")
def test_a_classifiers_weights_for_its_tokens(vit_folder, fine_tuned, tmp_path) -> None:
    torch.save(fine_tuned.state_dict(), tmp_path / "w.pt")
    model = load(f"hf:{vit_folder}", weights=tmp_path / "w.pt", pool="mean")
    x = torch.randn(2, 3, 16, 16)
    tokens = fine_tuned.vit(x).last_hidden_state
    torch.testing.assert_close(model(x).embedding, tokens[:, 1:].mean(dim=1))
    with pytest.raises(ModelError, match=r"2 missing .*pooler"):
        load(f"hf:{vit_folder}", weights=tmp_path / "w.pt", pool="pooler")


@pytest.mark.filterwarnings("ignore:.*preprocessor_config.json")
def test_weights_that_do_not_fit_a_transformers_model(vit_folder, fine_tuned, tmp_path) -> None:
    content = fine_tuned.state_dict()
    del content["vit.layernorm.bias"]
    torch.save({**content, "extra.weight": torch.zeros(3)}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"w\.pt does not fit .*1 missing .*1 unexpected .extra"):
        load(f"hf:{vit_folder}", weights=tmp_path / "w.pt")
    torch.save(
        {**fine_tuned.state_dict(), "vit.layernorm.bias": torch.zeros(17)}, tmp_path / "w.pt"
    )
    with pytest.raises(ModelError, match=r"of another shape .*vit\.layernorm\.bias"):
        load(f"hf:{vit_folder}", weights=tmp_path / "w.pt")
    torch.save(fine_tuned.state_dict(), tmp_path / "w.pt")
    with pytest.raises(ModelError, match="num_classes 7, 5 was asked for"):
        load(f"hf:{vit_folder}", weights=tmp_path / "w.pt", num_classes=5)


def test_a_path_that_is_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "w\udcff.pt"
    with file.open("wb") as opened:
        torch.save(weights(), opened)
    assert load(SPEC, weights=file, image_size=32).num_classes == 3
