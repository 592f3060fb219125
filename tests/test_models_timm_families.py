"""Every family of timm (a module of timm.models), and every kind of head within a family: the
smallest model of each, with random weights and small images, few of the repeated blocks where the
smallest has hundreds of millions of weights."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ckd.models import ModelError, create

timm = pytest.importorskip("timm", exc_type=ImportError)
pytestmark = pytest.mark.slow

# The size of the images; 32 for the others. These need more, or their own.
SIZES = {
    "crossvit_tiny_240": 240,
    "csatv2": 64,
    "deepseek_vit_412m": 42,
    "efficientformer_l1": 224,
    "gemma4_vit_167m": 48,
    "ghostnetv3_050": 64,
    "inception_resnet_v2": 75,
    "inception_v3": 75,
    "inception_v4": 75,
}
# Arguments for timm that leave out blocks or features.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": {"depth": 2},
    "deepseek_vit_412m": {"depth": 1},
    "deepseek_vit_412m_enc": {"depth": 1},
    "gemma4_vit_167m": {"depth": 1},
    "gemma4_vit_167m_enc": {"depth": 1},
    "qwen3_vit_88m": {"depth": 2},
    "qwen3_vit_88m_enc": {"depth": 2},
    "samvit_base_patch16_224": {"depth": 2},
    "vgg11": {"mlp_ratio": 0.1},
}
# Whose input the embedding is, where it is not the layer that timm's configuration names: timm's
# classifier begins with BatchNorm or a hidden layer, or is one of several.
CLASSIFIERS = {
    "caformer_s18": ("head.fc",),
    "crossvit_tiny_240": ("head.0", "head.1"),
    "efficientvim_m1": ("heads.0", "heads.1", "heads.2", "heads.3"),
    "efficientvim_m1_dist": ("heads.0", "heads.1", "heads.2", "heads.3"),
    "efficientvit_m0": ("head",),
    "iformer_t": ("head",),
    "levit_128s": ("head",),
    "levit_256d": ("head",),
    "repvit_m1": ("head",),
    "shvit_s1": ("head",),
    "volo_d1_224": ("head",),
}
# Multiplies the tokens by the classifier before it takes the pooled one.
CLASSIFIES_TOKENS = {"resnet50_clip"}
FAMILIES = {
    "beit": ("beit_base_patch16_224",),
    "byoanet": ("lambda_resnet26t",),
    "byobnet": ("test_byobnet", "resnet50_clip", "resnet50_mlp"),
    "cait": ("cait_xxs24_224",),
    "coat": ("coat_tiny",),
    "convit": ("convit_tiny",),
    "convmixer": ("convmixer_768_32",),
    "convnext": ("test_convnext", "convnext_tiny_hnf"),
    "cpubone": ("cpubone_nano",),
    "crossvit": ("crossvit_tiny_240",),
    "csatv2": ("csatv2",),
    "cspnet": ("cs3darknet_focus_s",),
    "cspnext": ("cspnext_tiny",),
    "davit": ("davit_tiny",),
    "deepseek_vit": ("deepseek_vit_412m",),
    "deit": ("deit_tiny_patch16_224",),
    "densenet": ("densenet121",),
    "dla": ("dla46x_c",),
    "dpn": ("dpn48b",),
    "edgenext": ("edgenext_xx_small",),
    "efficientformer": ("efficientformer_l1",),
    "efficientformer_v2": ("efficientformerv2_s0",),
    "efficientnet": ("test_efficientnet",),
    "efficientvim": ("efficientvim_m1", "efficientvim_m1_dist"),
    "efficientvit_mit": ("efficientvit_b0", "efficientvit_l1"),
    "efficientvit_msra": ("efficientvit_m0",),
    "eva": (
        "vit_tiny_patch16_dinov3_qkvb",
        "vit_pe_core_tiny_patch16_384",
        "vit_small_patch16_lingbot",
    ),
    "fasternet": ("fasternet_t0",),
    "fastvit": ("fastvit_t8",),
    "focalnet": ("focalnet_tiny_srf",),
    "gcvit": ("gcvit_xxtiny",),
    "gemma4_vit": ("gemma4_vit_167m",),
    "ghostnet": ("ghostnet_050", "ghostnetv3_050"),
    "hardcorenas": ("hardcorenas_b",),
    "hgnet": ("hgnetv2_b0",),
    "hiera": ("hiera_tiny_224",),
    "hieradet_sam2": ("sam2_hiera_tiny",),
    "hrnet": ("hrnet_w18_small",),
    "iformer": ("iformer_t",),
    "inception_next": ("inception_next_atto",),
    "inception_resnet_v2": ("inception_resnet_v2",),
    "inception_v3": ("inception_v3",),
    "inception_v4": ("inception_v4",),
    "lcnetv2": ("lcnetv2_small",),
    "levit": ("levit_128s", "levit_256d"),
    "lowformer": ("lowformer_b0",),
    "mambaout": ("test_mambaout", "mambaout_femto"),
    "maxxvit": ("test_coatnet", "coatnet_0_224"),
    "metaformer": ("poolformerv2_s12", "caformer_s18"),
    "mlp_mixer": ("gmlp_ti16_224",),
    "mobilenetv3": ("lcnet_035", "mobilenetv3_small_050", "mobilenetv4_conv_small_035"),
    "mobilenetv5": ("mobilenetv5_base",),
    "mobilevit": ("mobilevit_xxs",),
    "mvitv2": ("mvitv2_tiny", "mvitv2_small_cls"),
    "naflexvit": (
        "naflexvit_base_patch16_parfac_gap",
        "naflexvit_base_patch16_siglip",
        "naflexvit_base_patch16_radio_v3",
    ),
    "nasnet": ("nasnetalarge",),
    "nest": ("nest_tiny",),
    "nextvit": ("nextvit_small",),
    "nfnet": ("test_nfnet",),
    "pit": ("pit_ti_224",),
    "pnasnet": ("pnasnet5large",),
    "pvt_v2": ("pvt_v2_b0",),
    "qwen3_vit": ("qwen3_vit_88m",),
    "rdnet": ("rdnet_tiny",),
    "regnet": ("regnetx_002",),
    "repghost": ("repghostnet_050",),
    "repvit": ("repvit_m1",),
    "res2net": ("res2next50",),
    "resnest": ("resnest14d",),
    "resnet": ("test_resnet",),
    "resnetv2": ("resnetv2_18",),
    "rexnet": ("rexnet_100",),
    "selecsls": ("selecsls42",),
    "senet": ("legacy_seresnet18",),
    "sequencer": ("sequencer2d_s",),
    "shvit": ("shvit_s1",),
    "sknet": ("skresnet18",),
    "starnet": ("starnet_s050",),
    "swiftformer": ("swiftformer_xs",),
    "swin_transformer": ("swin_tiny_patch4_window7_224",),
    "swin_transformer_v2": ("swinv2_tiny_window8_256",),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224",),
    "tiny_vit": ("tiny_vit_5m_224",),
    "tnt": ("tnt_s_legacy_patch16_224",),
    "tresnet": ("tresnet_m",),
    "twins": ("twins_svt_small",),
    "vgg": ("vgg11",),
    "visformer": ("visformer_tiny",),
    "vision_transformer": ("test_vit", "test_vit2", "test_vit3"),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224",),
    "vision_transformer_relpos": ("test_vit_relpos", "vit_relpos_medium_patch16_cls_224"),
    "vision_transformer_sam": ("samvit_base_patch16_224",),
    "vitamin": ("vitamin_small_224",),
    "volo": ("volo_d1_224",),
    "vovnet": ("ese_vovnet19b_slim_dw",),
    "xception": ("legacy_xception",),
    "xception_aligned": ("xception41p",),
    "xcit": ("xcit_nano_12_p8_224",),
}
REFUSED = {
    "deit_tiny_distilled_patch16_224": "several classifiers",  # each of a token of its own
    "pit_ti_distilled_224": "several classifiers",
    "deepseek_vit_412m_enc": "gives tokens",
    "gemma4_vit_167m_enc": "gives tokens",
    "mobilenetv5_300m_enc": "gives tokens",
    "qwen3_vit_88m_enc": "gives tokens",
}


@pytest.fixture(autouse=True)
def fewer_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    name = request.node.callspec.params["name"] if hasattr(request.node, "callspec") else ""
    if name and not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    smaller = functools.partial(timm.create_model, **ARGUMENTS.get(name, {}))
    monkeypatch.setattr(timm, "create_model", smaller)


def test_all_families_are_tested() -> None:
    assert set(timm.list_modules()) <= set(FAMILIES)
    for family in timm.list_modules():
        assert set(FAMILIES[family]) <= set(timm.list_models(module=family))


@torch.no_grad()
@pytest.mark.parametrize("name", [name for names in FAMILIES.values() for name in names])
def test_outputs_are_timms_own(name: str) -> None:
    size = SIZES.get(name, 32)
    torch.manual_seed(0)
    model = create(f"timm:{name}", num_classes=5, image_size=size).eval()
    network = model.embed.network
    # Other values than the initial ones, which hide a difference: identities in normalisation
    # layers, zeros in classifiers.
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.BatchNorm1d)):
            for tensor in (module.weight, module.bias):
                if tensor is not None and (tensor == tensor.flatten()[0]).all():
                    tensor.add_(torch.rand_like(tensor) * 0.2)
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)):
            module.running_mean += torch.rand_like(module.running_mean) * 0.1

    names = CLASSIFIERS.get(name) or network.pretrained_cfg["classifier"]
    taken: list[Tensor] = []
    for layer in [names] if isinstance(names, str) else names:
        network.get_submodule(layer).register_forward_pre_hook(lambda _, x: taken.append(x[0]))
    images = torch.randn(2, 3, size, size)
    expected = network(images)
    inputs = [x for i, x in enumerate(taken) if all(x is not y for y in taken[:i])]
    embedding, logits = model(images)
    assert logits is not None
    assert expected.shape == (2, 5)
    assert embedding.shape == (2, model.embedding_dim)
    assert expected.std() > 0
    torch.testing.assert_close(logits, expected)
    if name not in CLASSIFIES_TOKENS:
        torch.testing.assert_close(embedding, torch.cat(inputs, dim=1).flatten(1))


@pytest.mark.parametrize("name", REFUSED)
def test_models_without_one_embedding_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match=REFUSED[name]):
        create(f"timm:{name}", num_classes=5, image_size=SIZES.get(name, 32))
