from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from ckd import data
from ckd.bank.build import build_bank
from ckd.models import (
    Model,
    ModelError,
    Resize,
    class_head,
    create,
    load,
    prepare,
    save,
    weights_hash,
)
from ckd.train.config import Config
from ckd.train.evaluation import evaluate_source

transformers = pytest.importorskip("transformers")

TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


def store(network, folder: Path, preprocessor: bool = True) -> str:
    """The network as a local folder in the hub's format; returns its model name."""
    network.save_pretrained(folder)
    if preprocessor:
        settings = {
            "image_processor_type": "ViTImageProcessor",
            "image_mean": MEAN,
            "image_std": STD,
            "size": {"height": 16, "width": 16},
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return f"hf:{folder}"


def pixels(model: Model) -> torch.Tensor:
    shape = (2, model.in_channels, model.image_size, model.image_size)
    return prepare(model, torch.randint(0, 256, shape, dtype=torch.uint8))


@pytest.fixture
def classifier():
    return transformers.ViTForImageClassification(transformers.ViTConfig(**TINY, num_labels=5))


def test_classifier_gives_its_logits_and_the_class_token(classifier, tmp_path: Path) -> None:
    model = load(store(classifier, tmp_path))
    assert (model.embedding_dim, model.num_classes, model.image_size) == (16, 5, 16)
    assert (model.mean, model.std) == (tuple(MEAN), tuple(STD))
    assert not model.training
    x = pixels(model)
    embedding, logits = model(x)
    expected = classifier.eval()(x, output_hidden_states=True)
    torch.testing.assert_close(logits, expected.logits)
    torch.testing.assert_close(embedding, classifier.vit(x).last_hidden_state[:, 0])


def test_class_head_is_the_classifiers_last_layer(classifier, tmp_path: Path) -> None:
    model = load(store(classifier, tmp_path))
    weight, bias = class_head(model)
    embedding, logits = model(pixels(model))
    torch.testing.assert_close(embedding @ weight.T + bias, logits)
    assert class_head(load(f"hf:{tmp_path}", pool="mean")) is None


def test_convolutional_classifier(tmp_path: Path) -> None:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3
    )
    network = transformers.ResNetForImageClassification(config).eval()
    model = load(store(network, tmp_path), image_size=32)
    assert (model.embedding_dim, model.num_classes) == (12, 3)
    x = pixels(model)
    embedding, logits = model(x)
    assert embedding.shape == (2, 12)
    torch.testing.assert_close(logits, network(x).logits)


def test_vision_transformer_without_classifier_gives_the_class_token(tmp_path: Path) -> None:
    # Not the output of its pooler, which published weights often lack.
    network = transformers.ViTModel(transformers.ViTConfig(**TINY)).eval()
    model = load(store(network, tmp_path))
    x = pixels(model)
    embedding, logits = model(x)
    assert logits is None
    torch.testing.assert_close(embedding, network(x).last_hidden_state[:, 0])


@pytest.mark.parametrize("kind", ["CLIPModel", "CLIPVisionModelWithProjection", "CLIPVisionModel"])
def test_clip_gives_image_embeddings_without_logits(kind: str, tmp_path: Path) -> None:
    vision = transformers.CLIPVisionConfig(**TINY, projection_dim=12)
    if kind == "CLIPModel":
        text = transformers.CLIPTextConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            vocab_size=50, projection_dim=12, eos_token_id=2, bos_token_id=1,
        )  # fmt: skip
        config = transformers.CLIPConfig(
            text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12
        )
    else:
        config = vision
    network = getattr(transformers, kind)(config).eval()
    model = load(store(network, tmp_path))
    x = pixels(model)
    embedding, logits = model(x)
    assert logits is None
    assert model.num_classes is None
    if kind == "CLIPVisionModel":
        expected = network(x).pooler_output
    else:
        vision_model = network.vision_model
        expected = network.visual_projection(vision_model(x).pooler_output)
    assert model.embedding_dim == expected.shape[1]
    torch.testing.assert_close(embedding, expected)
    assert not [name for name in model.state_dict() if "text" in name]


def test_position_embeddings_are_interpolated_to_another_size(classifier, tmp_path: Path) -> None:
    model = load(store(classifier, tmp_path), image_size=24)
    x = pixels(model)
    assert x.shape[-1] == 24
    expected = classifier.eval()(x, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(model(x).logits, expected)


def test_untrained_student_from_a_configuration(classifier, tmp_path: Path) -> None:
    spec = store(classifier, tmp_path / "source")
    model = create(spec, num_classes=7, image_size=8, in_channels=1)
    assert model(pixels(model)).logits.shape == (2, 7)
    assert model.mean == (pytest.approx(0.5),)
    save(model, tmp_path / "m.safetensors", class_names=list("abcdefg"))
    loaded = load(spec, weights=tmp_path / "m.safetensors")
    assert weights_hash(loaded) == weights_hash(model)


def test_untrained_student_without_classes_has_no_classifier(classifier, tmp_path: Path) -> None:
    spec = store(classifier, tmp_path / "source")
    model = create(spec, num_classes=None, image_size=8, in_channels=1)
    assert (model.num_classes, model.class_names) == (None, ())
    assert model(pixels(model)).logits is None
    save(model, tmp_path / "m.safetensors")
    loaded = load(spec, weights=tmp_path / "m.safetensors")
    assert weights_hash(loaded) == weights_hash(model)


def test_pretrained_student_gets_a_new_classifier(classifier, tmp_path: Path) -> None:
    model = create(store(classifier, tmp_path), num_classes=3, image_size=16, pretrained=True)
    assert model.training
    x = pixels(model)
    assert model.eval()(x).logits.shape == (2, 3)
    torch.testing.assert_close(model(x).embedding, classifier.vit.eval()(x).last_hidden_state[:, 0])


@pytest.mark.filterwarnings("ignore:.*preprocessor_config.json")
def test_a_tilde_in_the_folders_name_is_the_home_folder(classifier, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    classifier.save_pretrained(tmp_path / "mine")
    assert load("hf:~/mine").num_classes == 5


def test_a_student_of_a_library_is_loaded_by_name_with_its_run(classifier, tmp_path: Path) -> None:
    spec = store(classifier, tmp_path / "source")
    model = create(spec, num_classes=10, image_size=8, in_channels=1, pool=None)
    model.preprocess_with([0.1], [0.4], Resize(10, True, "bilinear"), False)
    names = data.load("digits").class_names
    save(model, tmp_path / "student.safetensors", class_names=names)
    loaded = load(spec, weights=tmp_path)
    assert (loaded.class_names, loaded.image_size, loaded.mean) == (names, 8, (0.1,))
    assert loaded.resize == model.resize
    assert weights_hash(loaded) == weights_hash(model)
    config = Config(data="digits", device="cpu")
    with pytest.raises(ModelError, match=f"--eval. {spec} --teacher-weights {tmp_path}"):
        evaluate_source(config, str(tmp_path))
    by_name = dataclasses.replace(config, teacher_weights=str(tmp_path))
    assert f"{spec} on digits (test): accuracy" in str(evaluate_source(by_name, spec))
    bank = build_bank(data.load("digits"), loaded, tmp_path / "bank", progress=False)
    assert bank.dim == model.embedding_dim


def test_the_folder_of_a_model_may_have_been_moved(classifier, tmp_path: Path) -> None:
    spec = store(classifier, tmp_path / "source")
    model = create(spec, num_classes=7, image_size=8, in_channels=3)
    save(model, tmp_path / "m.safetensors", class_names=list("abcdefg"))
    (tmp_path / "source").rename(tmp_path / "moved")
    loaded = load(f"hf:{tmp_path / 'moved'}", weights=tmp_path / "m.safetensors")
    assert loaded.class_names == tuple("abcdefg")
    assert weights_hash(loaded) == weights_hash(model)
    with pytest.raises(ModelError, match="was asked for"):
        load("hf:elsewhere", weights=tmp_path / "m.safetensors")


def test_a_stored_pool_is_that_of_the_loaded_model(classifier, tmp_path: Path) -> None:
    spec = store(classifier, tmp_path / "source")
    save(load(spec, pool="mean"), tmp_path / "m.safetensors")
    assert load(spec, weights=tmp_path / "m.safetensors").pool == "mean"
    with pytest.raises(ModelError, match="has pool mean, cls was asked for"):
        load(spec, weights=tmp_path / "m.safetensors", pool="cls")


def test_a_model_at_another_size_than_its_position_embeddings_is_not_saved(
    classifier, tmp_path: Path
) -> None:
    spec = store(classifier, tmp_path)
    with pytest.raises(ModelError, match="run at 24 pixels, with position embeddings of its 16"):
        save(load(spec, image_size=24), tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()
    save(load(spec), tmp_path / "m.safetensors")
    assert load(spec, weights=tmp_path / "m.safetensors").num_classes == 5


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"", "damaged"),
        (b"junk", "could not make"),
    ],
)
def test_damaged_weights_in_a_folder(classifier, content, told, tmp_path: Path) -> None:
    spec = store(classifier, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ModelError, match=told) as error:
        load(spec)
    assert "weights_only=False" not in str(error.value)


def test_a_configuration_of_wrong_types_is_refused(classifier, tmp_path: Path) -> None:
    spec = store(classifier, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": "16"}))
    with pytest.raises(ModelError, match="transformers could not make the model"):
        load(spec)


def test_half_precision_weights_are_computed_in_single(classifier, tmp_path: Path) -> None:
    model = load(store(classifier.half(), tmp_path))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_missing_preprocessor_is_told(classifier, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="normalised with mean 0.5"):
        model = load(store(classifier, tmp_path, preprocessor=False))
    assert model.mean == (0.5, 0.5, 0.5)


def test_weights_that_lack_a_part_are_refused(tmp_path: Path) -> None:
    network = transformers.ViTModel(transformers.ViTConfig(**TINY))
    network.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with (
        pytest.warns(UserWarning, match="preprocessor"),
        pytest.raises(ModelError, match=r"stored weights lack 16 of .*layers?\.2\."),
    ):
        load(f"hf:{tmp_path}")


def test_other_channels_and_classes_than_the_weights_have(classifier, tmp_path: Path) -> None:
    spec = store(classifier, tmp_path)
    with pytest.raises(ModelError, match="takes 3 channels, 1 were asked for"):
        load(spec, in_channels=1)
    with pytest.raises(ModelError, match="num_classes 5, 7 was asked for"):
        load(spec, num_classes=7)
