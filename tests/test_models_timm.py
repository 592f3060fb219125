from __future__ import annotations

import copy
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from PIL import Image

from ckd.models import ModelError, class_head, create, load, prepare, save, weights_hash
from ckd.models.preprocessing import Preprocessing
from ckd.models.spec import parse
from ckd.models.timm_models import TimmModel

timm = pytest.importorskip("timm", exc_type=ImportError)
PLAIN = Preprocessing(8, (0.5,), (0.5,))


@pytest.mark.parametrize(
    ("name", "image_size", "in_channels"),
    [
        ("resnet10t", 32, 1),
        ("mobilenetv3_small_050", 32, 3),  # has a hidden layer between pooling and classifier
        ("vit_tiny_patch16_224", 32, 3),  # position embeddings fix its image size
        ("convnext_atto", None, None),
        ("dla46x_c", 32, 3),  # its classifier is a convolution
        ("efficientvit_m0", 32, 3),  # normalises between embedding and classifier
        ("volo_d1_224", 32, 3),  # adds the logits of a second classifier, for patches
        ("swiftformer_xs", 32, 3),  # two classifiers of one embedding
        ("efficientvim_m1", 32, 3),  # one classifier per stage: the embedding is all their inputs
    ],
)
def test_logits_are_timms_own(name: str, image_size: int | None, in_channels: int | None) -> None:
    model = create(f"timm:{name}", num_classes=5, image_size=image_size, in_channels=in_channels)
    model.eval()
    assert model.image_size == (image_size or 224)
    images = torch.randint(0, 256, (2, model.in_channels, 20, 20), dtype=torch.uint8)
    x = prepare(model, images)
    embedding, logits = model(x)
    assert embedding.shape == (2, model.embedding_dim)
    torch.testing.assert_close(logits, model.embed.network(x))
    assert len(model.mean) == len(model.std) == model.in_channels


@pytest.mark.parametrize(
    ("name", "linear"),
    [
        ("resnet10t", True),
        ("mobilenetv3_small_050", True),
        ("vit_tiny_patch16_224", True),
        ("dla46x_c", False),  # its classifier is a convolution
        ("efficientvit_m0", False),  # normalises between embedding and classifier
        ("swiftformer_xs", False),  # two classifiers of one embedding
    ],
)
def test_class_head_is_the_classifier_where_that_is_linear(name: str, linear: bool) -> None:
    model = create(f"timm:{name}", num_classes=5, image_size=32).eval()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm1d):
            layer.running_mean.fill_(0.5)  # as after training; 0 would change nothing
    found = class_head(model)
    assert (found is not None) == linear
    if found is not None:
        embedding, logits = model(torch.randn(2, 3, 32, 32))
        torch.testing.assert_close(embedding @ found[0].T + found[1], logits)


def test_without_classes_there_are_no_logits() -> None:
    model = create("timm:resnet10t", num_classes=None, image_size=32).eval()
    assert model.num_classes is None
    assert model(torch.zeros(1, 3, 32, 32)).logits is None
    assert class_head(model) is None


def test_saved_student_without_classes_comes_back(tmp_path: Path) -> None:
    model = create("timm:resnet10t", num_classes=None, image_size=32, in_channels=1)
    save(model, tmp_path / "m.safetensors")
    loaded = load("timm:resnet10t", weights=tmp_path / "m.safetensors")
    assert loaded.num_classes is None
    assert weights_hash(loaded) == weights_hash(model)


def test_saved_student_comes_back(tmp_path: Path) -> None:
    model = create("timm:resnet10t", num_classes=5, image_size=32, in_channels=1)
    save(model, tmp_path / "m.safetensors")
    loaded = load("timm:resnet10t", weights=tmp_path / "m.safetensors")
    assert weights_hash(loaded) == weights_hash(model)


def test_unknown_name_lists_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"unknown timm model 'resnt18'.*nearest first: resnet18"):
        create("timm:resnt18", num_classes=5, image_size=32)


def test_several_classifiers_are_refused() -> None:
    with pytest.raises(ModelError, match="several classifiers"):
        create("timm:deit_tiny_distilled_patch16_224", num_classes=5, image_size=224)


@pytest.mark.parametrize("name", ["mobilenetv4_conv_small_035", "efficientvit_m0", "dla46x_c"])
def test_creation_and_a_training_step_count_batches_as_timm_does(name: str) -> None:
    """Not so if the check at creation ran in training mode, or the head ran twice a step."""
    model = create(f"timm:{name}", num_classes=5, image_size=64)
    assert all(module.training for module in model.modules())
    counts = [b for n, b in model.named_buffers() if n.endswith("num_batches_tracked")]
    assert counts
    assert not any(counts)
    network = copy.deepcopy(model.embed.network)
    images = torch.randn(4, 3, 64, 64)
    torch.testing.assert_close(model(images).logits, network(images))
    for mine, own in zip(model.embed.network.buffers(), network.buffers(), strict=True):
        torch.testing.assert_close(mine, own)


def test_dropout_takes_one_mask() -> None:
    model = create("timm:resnet10t", num_classes=5, image_size=32)
    model.embed.network.drop_rate = 0.5
    embedding, logits = model(torch.randn(4, 3, 32, 32))
    assert (embedding == 0).float().mean() > 0.2
    torch.testing.assert_close(logits, model.embed.network.fc(embedding))


def test_compiled_student_has_both_outputs() -> None:
    model = create("timm:resnet10t", num_classes=5, image_size=32).eval()
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images))


class OtherForward(torch.nn.Module):
    """A network whose forward does more than its forward_head."""

    num_classes = 5
    pretrained_cfg: ClassVar[dict[str, object]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(3, 5)
        torch.nn.init.zeros_(self.fc.weight)

    def get_classifier(self) -> torch.nn.Module:
        return self.fc

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x)) + x.amax((1, 2, 3))[:, None]


def test_logits_other_than_the_models_own_are_refused() -> None:
    with pytest.raises(ModelError, match="other logits than the model's forward"):
        TimmModel(
            parse("timm:other"), OtherForward(), image_size=8, in_channels=3, preprocessing=PLAIN
        )


def test_a_folder_of_weights_is_a_name(tmp_path: Path) -> None:
    own = timm.create_model("resnet10t", num_classes=3, in_chans=1)
    timm.models.save_for_hf(own, tmp_path, safe_serialization=True)
    model = create(
        f"timm:local-dir:{tmp_path}",
        num_classes=None,
        image_size=None,
        in_channels=None,
        pretrained=True,
    ).eval()
    assert (model.num_classes, model.in_channels, model.image_size) == (3, 1, 176)
    images = torch.randn(2, 1, 176, 176)
    torch.testing.assert_close(model(images).logits, own.eval()(images))


@pytest.mark.parametrize("damage", ["folder", "config", "architecture", "weights"])
def test_a_folder_without_a_model_is_refused(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "m"
    timm.models.save_for_hf(timm.create_model("test_resnet"), folder, safe_serialization=True)
    if damage == "folder":
        folder = tmp_path / "other"
    elif damage == "weights":
        (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    else:
        (folder / "config.json").write_text({"config": "{", "architecture": "{}"}[damage])
    with pytest.raises(ModelError, match="timm could not make the model"):
        create(f"timm:local-dir:{folder}", num_classes=None, image_size=None, pretrained=True)


def test_sizes_that_do_not_fit_are_refused() -> None:
    for name, size in (("nest_tiny", 50), ("gmlp_ti16_224", 7), ("halonet_h1", 32)):
        with pytest.raises(ModelError, match=r"could not make the model|does not take images"):
            create(f"timm:{name}", num_classes=5, image_size=size)


def test_images_that_are_not_square_need_a_size(tmp_path: Path) -> None:
    own = timm.create_model("test_vit", pretrained_cfg_overlay={"input_size": (3, 64, 32)})
    timm.models.save_for_hf(own, tmp_path)
    with pytest.raises(ModelError, match=r"64 x 32 pixels.*choose an image_size"):
        create(f"timm:local-dir:{tmp_path}", num_classes=5, image_size=None)
    assert create(f"timm:local-dir:{tmp_path}", num_classes=5, image_size=32).image_size == 32


def test_encoders_without_a_head_are_refused() -> None:
    with pytest.raises(ModelError, match="not one vector per image"):
        TimmModel(
            parse("timm:encoder"),
            torch.nn.Identity(),
            image_size=8,
            in_channels=3,
            preprocessing=PLAIN,
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A model on disk as timm writes it, whose preprocessing resizes to 36 pixels and crops 32."""
    path = tmp_path_factory.mktemp("resnet")
    network = timm.create_model("resnet10t", num_classes=3)
    network.pretrained_cfg.update(
        input_size=(3, 32, 32),
        crop_pct=0.875,
        interpolation="bilinear",
    )
    names = {
        "label_names": ["n03", "n01", "n02"],
        "label_descriptions": {"n01": "tench, Tinca tinca", "n02": "goldfish", "n03": "hen"},
    }
    timm.models.save_for_hf(network, str(path), model_config=names)
    return f"timm:local-dir:{path}"


@pytest.mark.parametrize(("image_size", "edge"), [(None, 36), (44, 50)])
def test_preprocessing_is_timms_own_transform(folder: str, image_size, edge: int) -> None:
    model = load(folder, image_size=image_size)
    assert model.image_size == (image_size or 32)
    assert (model.resize.edge, model.resize.filter) == (edge, "bilinear")
    config = timm.data.resolve_data_config({"img_size": image_size}, model=model.embed.network)
    transform = timm.data.create_transform(**config, is_training=False)
    for size in ((32, 32), (70, 51), (200, 301)):
        pixels = smooth_images(size)
        expected = torch.stack(
            [transform(Image.fromarray(p.permute(1, 2, 0).numpy())) for p in pixels]
        )
        error = (prepare(model, pixels) - expected) * model.channel_std * 255
        assert error.abs().max() <= 2


def smooth_images(size: tuple[int, int]) -> torch.Tensor:
    """uint8 [2, 3, *size] with structure at every scale, as photos have."""
    generator = torch.Generator().manual_seed(0)
    images = torch.full((2, 3, *size), 128.0)
    for cells in (2, 5, 13, 40):
        coarse = torch.randn(2, 3, cells, cells, generator=generator) * 60 / cells**0.5
        images += torch.nn.functional.interpolate(coarse, size, mode="bicubic")
    return images.clamp(0, 255).to(torch.uint8)


def test_class_names_are_those_of_the_configuration(folder: str) -> None:
    model = load(folder)
    assert model.class_names == ("hen", "tench, Tinca tinca", "goldfish")
    assert model.other_class_names == (("n03", "n01", "n02"),)
    assert load(folder, weights=weights_of(folder, classes=5)).class_names == ()


def weights_of(folder: str, classes: int) -> Path:
    path = Path(folder.removeprefix("timm:local-dir:")) / "mine.pt"
    network = timm.create_model("resnet10t", num_classes=classes)
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, path)
    return path


@pytest.mark.parametrize("classes", [5, 1000])
def test_own_weights_fit_by_timms_own_names(folder: str, classes: int) -> None:
    path = weights_of(folder, classes)
    model = load("timm:resnet10t", weights=path, image_size=32)
    assert model.num_classes == classes
    network = timm.create_model("resnet10t", num_classes=classes).eval()
    network.load_state_dict(
        {k.removeprefix("module."): v for k, v in torch.load(path)["state_dict"].items()}
    )
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(x).logits, network(x))


def test_weights_of_another_model_are_refused(folder: str) -> None:
    with pytest.raises(ModelError, match=r"mine.pt does not fit 'timm:resnet18'"):
        load("timm:resnet18", weights=weights_of(folder, 5))


def test_pool_is_for_transformers_models() -> None:
    with pytest.raises(ModelError, match="pool='mean' is for hf: models"):
        create("timm:resnet10t", num_classes=5, image_size=32, pool="mean")
