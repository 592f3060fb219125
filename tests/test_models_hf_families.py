"""Every family of transformers' image models: the embedding is what the model's own forward gives.

The expected values come from transformers alone: the saved model's outputs, hooks on its classifier
and its own `get_image_features`.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ckd.models import Model, ModelError, load
from tests.hf_tiny import MODELS, Tiny, store, title

transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*preprocessor_config"),
]

FAMILIES = [tiny for tiny in MODELS if tiny.rule != "refused"]
REFUSED = [tiny for tiny in MODELS if tiny.rule == "refused"]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()


def stored(tiny: Tiny, folder: Path) -> Any:
    """The saved model; skips classes that this transformers lacks or that need a package."""
    for name in (tiny.model, tiny.config):
        if not hasattr(transformers, name):
            pytest.skip(f"transformers {transformers.__version__} has no {name}")
    try:
        return store(tiny, folder)
    except ImportError as error:
        pytest.skip(str(error).strip().splitlines()[0])


def side(own: Any) -> int | None:
    """Image size in the configuration of a model or of its image tower."""
    for name in (None, "vision_config", "image_config"):
        config = own.config if name is None else getattr(own.config, name, None)
        size = getattr(config, "image_size", None)
        if size is not None:
            return size if isinstance(size, int) else size[0]
    return None


def opened(own: Any, folder: Path, **options: Any) -> tuple[Model, Tensor]:
    """The model as ckd loads it, and images for it. Models that take any size get 64 pixels."""
    if side(own) is None:
        options["image_size"] = 64
    model = load(f"hf:{folder}", **options)
    return model, torch.randn(3, 3, model.image_size, model.image_size)


def base_of(own: Any) -> Any:
    """The model without its head."""
    with_head = re.search("For[A-Z]", type(own).__name__)
    return getattr(own, own.base_model_prefix) if with_head else own


def inputs_of_classifier(own: Any, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """The model's logits, and the input of each linear layer, or of the attribute `classifier`,
    whose output they are."""
    calls: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            calls.append((inputs[0], output))

    heads = [own.classifier] if isinstance(getattr(own, "classifier", None), nn.Module) else []
    linear = [module for module in own.modules() if isinstance(module, nn.Linear)]
    hooks = [module.register_forward_hook(keep) for module in (*heads, *linear)]
    output = own(pixel_values=x)
    logits = output.logits
    for hook in hooks:
        hook.remove()
    found = [
        given.flatten(1)
        for given, output in calls
        if output.numel() == logits.numel() and torch.equal(output.flatten(1), logits)
    ]
    return found, logits


def image_features(own: Any, x: Tensor) -> Tensor:
    features = base_of(own).get_image_features(pixel_values=x)
    return features if isinstance(features, Tensor) else features.pooler_output


def unmasked(own: Any, x: Tensor) -> Tensor:
    """The tokens of a masked autoencoder that sees all patches, by its own layers."""
    network = base_of(own)
    patches = network.embeddings.patch_embeddings(x) + network.embeddings.position_embeddings[:, 1:]
    first = network.embeddings.cls_token + network.embeddings.position_embeddings[:, :1]
    tokens = torch.cat([first.expand(len(x), -1, -1), patches], dim=1)
    for layer in network.layers:
        tokens = layer(tokens)
    return network.layernorm(tokens)


def expected(tiny: Tiny, own: Any, x: Tensor) -> list[tuple[Tensor, Tensor | None]]:
    """The embeddings and logits that are right; several where a definition leaves a choice."""
    rule = tiny.rule
    if rule == "classifier":
        inputs, logits = inputs_of_classifier(own, x)
        return [(given, logits) for given in inputs]
    if rule == "features":
        return [(image_features(own, x), None)]
    if rule == "masked":
        return [(unmasked(own, x)[:, 0], None)]
    output = base_of(own)(pixel_values=x)
    if rule == "embeds":
        return [(output.image_embeds, None)]
    if rule == "pooler":
        return [(output.pooler_output.flatten(1), None)]
    if rule == "cls":
        return [(output.last_hidden_state[:, 0], None)]
    if rule == "mean":
        return [(output.last_hidden_state.mean(1), None)]
    if rule == "cls or map":  # CvT: its class token is not in last_hidden_state
        return [
            (output.cls_token_value[:, 0], None),
            (output.last_hidden_state.mean((2, 3)), None),
        ]
    assert rule == "map", rule
    maps = getattr(output, "feature_maps", None)
    last = output.last_hidden_state if maps is None else maps[-1]
    return [(last.mean((2, 3) if last.dim() == 4 else 1), None)]


def agrees(found: Tensor | None, right: Tensor | None) -> bool:
    if found is None or right is None:
        return found is right
    scale = right.abs().max().item()
    return found.shape == right.shape and torch.allclose(found, right, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("tiny", FAMILIES, ids=title)
@torch.no_grad()
def test_embedding_and_logits_are_the_models_own(tiny: Tiny, tmp_path: Path) -> None:
    own = stored(tiny, tmp_path)
    model, x = opened(own, tmp_path)
    output = model(x)
    right = expected(tiny, own, x)
    assert right
    assert any(
        agrees(output.embedding, embedding) and agrees(output.logits, logits)
        for embedding, logits in right
    ), (output, right)
    assert model.embedding_dim == output.embedding.shape[1]
    assert model.num_classes == (None if output.logits is None else output.logits.shape[1])
    spread = output.embedding.std(0).max() / output.embedding.abs().max()
    assert spread > 1e-3, "the weights must let images differ"
    again = model(x.flip(0))
    assert torch.equal(model(x).embedding, output.embedding)
    assert agrees(again.embedding.flip(0), output.embedding)


@pytest.mark.parametrize("tiny", REFUSED, ids=title)
def test_models_without_an_embedding_that_ckd_finds_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    own = stored(tiny, tmp_path)
    with pytest.raises(ModelError) as told:
        opened(own, tmp_path)
    assert str(tmp_path) in str(told.value)


def test_every_image_model_of_transformers_is_in_the_table() -> None:
    auto = transformers.models.auto.modeling_auto
    types = set(auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
    for name in ("MODEL_FOR_IMAGE_MAPPING_NAMES", "MODEL_FOR_BACKBONE_MAPPING_NAMES"):
        types |= set(getattr(auto, name, ()))
    types |= set(auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES)
    tried = {
        getattr(transformers, tiny.config).model_type
        for tiny in MODELS
        if hasattr(transformers, tiny.config)
    }
    assert types - tried <= OTHER_TYPES, "add them to tests/hf_tiny.py"


# Names for models of the table, parts of models that read text, and models of documents or video.
OTHER_TYPES = {
    "llama4",
    "mlcd",
    "mllama",
    "pp_lcnet_v3",
    "pp_lcnet_v4",
    "shieldgemma2",
    "videoprism",
}


# -- pool ---------------------------------------------------------------------------------------


def entry(name: str, number: int = 0) -> Tiny:
    return [tiny for tiny in MODELS if tiny.model == name][number]


# The model -> which tokens of last_hidden_state are patches, and whether token 0 is a class token.
TOKENS = {
    "ViTModel": (slice(1, None), True),
    "ViTMSNModel": (slice(1, None), True),
    "DeiTModel": (slice(2, None), True),
    "BeitModel": (slice(1, None), True),
    "Data2VecVisionModel": (slice(1, None), True),
    "Dinov2Model": (slice(1, None), True),
    "Dinov2WithRegistersModel": (slice(5, None), True),
    "DINOv3ViTModel": (slice(4, None), True),
    "DINOv3ConvNextModel": (slice(1, None), None),  # token 0 is the mean of the others
    "DPTModel": (slice(1, None), True),
    "PvtModel": (slice(1, None), True),
    "Sapiens2Model": (slice(3, None), True),
    "Tipsv2VisionModel": (slice(2, None), True),
    "YolosModel": (slice(1, -3), True),  # 3 detection tokens
    "CLIPVisionModel": (slice(1, None), True),
    "MLCDVisionModel": (slice(1, None), True),
    "InternVLVisionModel": (slice(1, None), True),
    "IJepaModel": (slice(None), False),
    "SiglipVisionModel": (slice(None), False),
    "Aimv2VisionModel": (slice(None), False),
    "SwinModel": (slice(None), False),
    "HieraModel": (slice(None), False),
}


# Refused, since the patches cannot be told from the other tokens.
TOKENS_UNKNOWN = {"YolosModel", "DINOv3ConvNextModel"}


@pytest.mark.parametrize("name", TOKENS)
@torch.no_grad()
def test_pool_mean_takes_the_patches_alone(name: str, tmp_path: Path) -> None:
    own = stored(entry(name), tmp_path)
    if name in TOKENS_UNKNOWN:
        with pytest.raises(ModelError, match="patches"):
            opened(own, tmp_path, pool="mean")
        return
    model, x = opened(own, tmp_path, pool="mean")
    patches, _ = TOKENS[name]
    right = own(pixel_values=x).last_hidden_state[:, patches].mean(1)
    assert agrees(model(x).embedding, right)
    assert model(x).logits is None


@pytest.mark.parametrize("name", TOKENS)
@torch.no_grad()
def test_pool_cls_takes_the_class_token_or_refuses(name: str, tmp_path: Path) -> None:
    own = stored(entry(name), tmp_path)
    _, class_token = TOKENS[name]
    if class_token is False:
        with pytest.raises(ModelError, match="class token"):
            opened(own, tmp_path, pool="cls")
        return
    if class_token is None:
        pytest.skip("its first token is a class token in name only")
    model, x = opened(own, tmp_path, pool="cls")
    assert agrees(model(x).embedding, own(pixel_values=x).last_hidden_state[:, 0])


@pytest.mark.parametrize("name", ["ResNetModel", "PvtV2Model", "SegformerModel", "ConvNextModel"])
@torch.no_grad()
def test_pool_of_feature_maps(name: str, tmp_path: Path) -> None:
    own = stored(entry(name), tmp_path)
    model, x = opened(own, tmp_path, pool="mean")
    assert agrees(model(x).embedding, own(pixel_values=x).last_hidden_state.mean((2, 3)))
    with pytest.raises(ModelError, match="class token"):
        opened(own, tmp_path, pool="cls")


@pytest.mark.parametrize(
    "name",
    ["ViTModel", "DeiTModel", "Dinov2Model", "BeitModel", "CLIPVisionModel", "SiglipVisionModel",
     "SwinModel", "ResNetModel", "DPTModel", "TextNetModel"],
)  # fmt: skip
@torch.no_grad()
def test_pool_pooler_takes_the_pooled_output(name: str, tmp_path: Path) -> None:
    own = stored(entry(name), tmp_path)
    model, x = opened(own, tmp_path, pool="pooler")
    assert agrees(model(x).embedding, own(pixel_values=x).pooler_output.flatten(1))


@pytest.mark.parametrize(
    ("name", "number"),
    [("ViTMSNModel", 0), ("IJepaModel", 0), ("SiglipVisionModel", 1), ("SegformerModel", 0),
     ("Data2VecVisionModel", 0), ("Dinov2Backbone", 0)],
)  # fmt: skip
def test_pool_pooler_is_refused_where_nothing_is_pooled(
    name: str, number: int, tmp_path: Path
) -> None:
    own = stored(entry(name, number), tmp_path)
    with pytest.raises(ModelError, match="pool"):
        opened(own, tmp_path, pool="pooler")


def test_a_pooler_without_stored_weights_is_refused(tmp_path: Path) -> None:
    # Saved with a classifier, the folder has no pooler; transformers would make a random one.
    own = stored(entry("ViTForImageClassification"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["ViTModel"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="pooler"):
        opened(own, tmp_path, pool="pooler")


@pytest.mark.parametrize("pool", ["cls", "mean", "pooler"])
@pytest.mark.parametrize("name", ["ViTForImageClassification", "CLIPModel"])
@torch.no_grad()
def test_pool_is_not_ignored_where_a_model_has_its_own_embedding(
    name: str, pool: str, tmp_path: Path
) -> None:
    own = stored(entry(name), tmp_path)
    if (name, pool) == ("ViTForImageClassification", "pooler"):  # a classifier is saved without it
        with pytest.raises(ModelError, match="stored weights lack"):
            opened(own, tmp_path, pool=pool)
        return
    model, x = opened(own, tmp_path, pool=pool)
    tower = own.vit if name.startswith("ViT") else own.vision_model
    output = tower(x)
    right = {
        "cls": output.last_hidden_state[:, 0],
        "mean": output.last_hidden_state[:, 1:].mean(1),
        "pooler": output.pooler_output,
    }[pool]
    assert right is not None
    assert agrees(model(x).embedding, right)


def test_an_unknown_pool_is_refused(tmp_path: Path) -> None:
    own = stored(entry("ViTModel"), tmp_path)
    with pytest.raises(ModelError, match=r"max.*cls"):
        opened(own, tmp_path, pool="max")


# -- randomness, and dependence on the other images ----------------------------------------------


@pytest.mark.parametrize("name", ["ViTMAEModel", "ViTMAEForPreTraining"])
@torch.no_grad()
def test_masked_models_see_all_patches_in_order(name: str, tmp_path: Path) -> None:
    own = stored(entry(name), tmp_path)
    model, x = opened(own, tmp_path)
    assert torch.equal(model(x).embedding, model(x).embedding)
    tokens = unmasked(own, x)
    assert agrees(model(x).embedding, tokens[:, 0])
    model, _ = opened(own, tmp_path, pool="mean")
    assert agrees(model(x).embedding, tokens[:, 1:].mean(1))
    assert agrees(model(x[1:2]).embedding, tokens[1:2, 1:].mean(1))


class _OddConfig(transformers.PretrainedConfig):
    model_type = "ckd_test_odd"
    oddity = "random"
    image_size = 8


class _OddModel(transformers.PreTrainedModel):
    """A model whose embedding is random, or depends on the other images."""

    config_class = _OddConfig
    main_input_name = "pixel_values"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.layer = nn.Linear(8 * 8 * 3, 4)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def forward(self, pixel_values: Tensor) -> Any:
        pooled = self.layer(pixel_values.flatten(1))
        if self.config.oddity == "random":
            pooled = pooled + torch.randn_like(pooled)
        if self.config.oddity == "dropout":
            pooled = nn.functional.dropout(pooled, 0.5, training=True)
        if self.config.oddity == "neighbours":
            pooled = pooled - pooled.mean(0)
        if self.config.oddity == "previous":
            pooled = pooled + pooled.roll(1, 0)
        return transformers.modeling_outputs.BaseModelOutputWithPooling(
            last_hidden_state=pooled[:, None], pooler_output=pooled
        )


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "_OddModel", _OddModel, raising=False)
    transformers.AutoConfig.register("ckd_test_odd", _OddConfig, exist_ok=True)
    transformers.AutoModel.register(_OddConfig, _OddModel, exist_ok=True)


@pytest.mark.usefixtures("odd")
@pytest.mark.parametrize("oddity", ["none", "random", "dropout", "neighbours", "previous"])
def test_random_and_batch_dependent_embeddings_are_refused(oddity: str, tmp_path: Path) -> None:
    _OddModel(_OddConfig(oddity=oddity)).eval().save_pretrained(tmp_path)
    if oddity == "none":
        assert load(f"hf:{tmp_path}").embedding_dim == 4
        return
    reason = "random|differ" if oddity in ("random", "dropout") else "other images|batch"
    with pytest.raises(ModelError, match=reason):
        load(f"hf:{tmp_path}")


# -- names of classes, missing packages ----------------------------------------------------------


@pytest.mark.parametrize("names", [("dog", "cat", "a, b"), None])
def test_class_names_are_the_labels_in_order(names: tuple[str, ...] | None, tmp_path: Path) -> None:
    labels = {} if names is None else {
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }  # fmt: skip
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8], depths=[1], **(labels or {"num_labels": 3})
    )
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path)
    model = load(f"hf:{tmp_path}", image_size=32)
    assert model.num_classes == 3
    assert model.class_names == (names or ())


def test_class_names_follow_the_numbers_of_the_labels(tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(12)]
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8], depths=[1], id2label=dict(enumerate(names))
    )
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path)
    # As a program sorts the keys, which are strings in JSON: 0, 1, 10, 11, 2, ...
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored, sort_keys=True))
    assert load(f"hf:{tmp_path}", image_size=32).class_names == tuple(names)


def test_models_without_logits_have_no_class_names(tmp_path: Path) -> None:
    own = stored(entry("ViTModel"), tmp_path)
    assert opened(own, tmp_path)[0].class_names == ()


@pytest.mark.parametrize("model_type", ["dinat", "timm_backbone"])
def test_a_missing_package_is_named(model_type: str, tmp_path: Path) -> None:
    package = {"dinat": "natten", "timm_backbone": "timm"}[model_type]
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    config = {"model_type": model_type, "backbone": "resnet10t"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises((ModelError, ImportError), match=package) as told:
        load(f"hf:{tmp_path}", image_size=32)
    assert "\n" not in str(told.value).strip()


# -- folders ---------------------------------------------------------------------------------------


def test_a_pointer_in_the_place_of_weights_is_refused(tmp_path: Path) -> None:
    own = stored(entry("ViTModel"), tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    with pytest.raises(ModelError, match="LFS"):
        opened(own, tmp_path)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    own = stored(entry("ViTModel"), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError):
        opened(own, tmp_path)


def test_code_in_a_folder_is_neither_run_nor_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(entry("ViTModel"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "other", "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit(3)")
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    with pytest.raises(ModelError):
        load(f"hf:{tmp_path}")
    assert not asked


def test_a_model_whose_classifier_was_taken_off_has_no_logits(tmp_path: Path) -> None:
    tiny = entry("ViTForImageClassification")
    own = stored(tiny._replace(options={**tiny.options, "num_labels": 0}), tmp_path)
    model, x = opened(own, tmp_path)
    assert (model.num_classes, model(x).logits) == (None, None)


def test_an_unknown_backbone_class_is_refused(tmp_path: Path) -> None:
    own = stored(entry("ResNetBackbone"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["NoBackbone"]}))
    with pytest.raises(ModelError, match="NoBackbone"):
        opened(own, tmp_path)


@pytest.mark.parametrize("channels", [1, 2, 4])
@torch.no_grad()
def test_models_of_other_numbers_of_channels(channels: int, tmp_path: Path) -> None:
    own = stored(
        Tiny("ViTModel", "ViTConfig", {**entry("ViTModel").options, "num_channels": channels}, ""),
        tmp_path,
    )
    mean = [0.1 * (channel + 1) for channel in range(channels)]
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 32, "width": 32},
        "image_mean": mean,
        "image_std": [0.5] * channels,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    try:
        model = load(f"hf:{tmp_path}")
    except ModelError as refused:  # Pillow takes the second or fourth channel for transparency
        if channels == 1 or "mixes the channels" not in str(refused):
            raise
        return
    assert model.mean == pytest.approx(mean)
    x = torch.randn(2, channels, 32, 32)
    assert agrees(model(x).embedding, own(pixel_values=x).last_hidden_state[:, 0])
