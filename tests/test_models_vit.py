from __future__ import annotations

import pytest
import torch
from torch import nn

from ckd.models import create, parameter_count
from ckd.models.vit import ViT

SMALL = "vit:patch=2,width=16,layers=2,heads=4"


def small(**options) -> ViT:
    model = create(SMALL, **{"num_classes": 3, "image_size": 8, "in_channels": 1, **options})
    assert isinstance(model, ViT)
    return model


def test_default_is_the_students_architecture_of_the_paper() -> None:
    model = create("vit", num_classes=10, image_size=32)
    assert (model.embedding_dim, model.image_size, model.in_channels) == (256, 32, 3)
    blocks = 6 * ((3 * 256 + 256 + 8 * 256) * 256 + 9 * 256 + 4 * 256)
    rest = (48 + 1) * 256 + 256 + 65 * 256 + 2 * 256 + 257 * 10
    assert parameter_count(model) == blocks + rest


def test_shapes_and_logits_are_the_head_of_the_embedding() -> None:
    model = small()
    embedding, logits = model(torch.randn(5, 1, 8, 8))
    assert embedding.shape == (5, 16)
    assert logits is not None
    torch.testing.assert_close(logits, embedding @ model.head.weight.T + model.head.bias)
    assert small(num_classes=None)(torch.randn(2, 1, 8, 8)).logits is None


def test_block_equals_torchs_pre_norm_encoder_layer() -> None:
    ours = small().double().blocks[0]
    theirs = nn.TransformerEncoderLayer(
        16, 4, 64, dropout=0.0, batch_first=True, norm_first=True, dtype=torch.float64,
        activation=lambda x: x * torch.sigmoid(1.702 * x),
    )  # fmt: skip
    pairs = {
        "self_attn.in_proj_weight": ours.qkv.weight,
        "self_attn.in_proj_bias": ours.qkv.bias,
        "self_attn.out_proj.weight": ours.out.weight,
        "self_attn.out_proj.bias": ours.out.bias,
        "norm1.weight": ours.norm1.weight,
        "norm1.bias": ours.norm1.bias,
        "norm2.weight": ours.norm2.weight,
        "norm2.bias": ours.norm2.bias,
        "linear1.weight": ours.mlp[0].weight,
        "linear1.bias": ours.mlp[0].bias,
        "linear2.weight": ours.mlp[2].weight,
        "linear2.bias": ours.mlp[2].bias,
    }
    for parameter in pairs.values():
        nn.init.normal_(parameter, std=0.5)
    theirs.load_state_dict(pairs)
    x = torch.randn(2, 17, 16, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


def test_embedding_is_the_class_token_after_the_last_norm() -> None:
    model = small()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    images = torch.randn(3, 1, 8, 8)
    # Patches by hand: row by row, each a dot product with the kernel.
    patches = images.unfold(2, 2, 2).unfold(3, 2, 2).reshape(3, 16, 4)
    tokens = patches @ model.patch_embed.weight.view(16, 4).T + model.patch_embed.bias
    tokens = torch.cat([model.class_token.expand(3, 1, 16), tokens], 1) + model.position
    for block in model.blocks:
        tokens = block(tokens)
    expected = nn.functional.layer_norm(tokens, (16,), model.norm.weight, model.norm.bias)[:, 0]
    torch.testing.assert_close(model(images).embedding, expected)


def test_initialisation_is_truncated_normal_with_zero_biases() -> None:
    model = create("vit:layers=1", num_classes=10, image_size=32)
    for tensor in (model.blocks[0].qkv.weight, model.position, model.head.weight):
        assert tensor.detach().std() == pytest.approx(0.02, rel=0.1)
    assert not model.blocks[0].qkv.bias.any()
    assert not model.head.bias.any()


@pytest.mark.parametrize("spec", [SMALL, "resnet8:width=4"])
def test_compiles_without_a_graph_break(spec: str) -> None:
    model = create(spec, num_classes=3, image_size=8, in_channels=3).eval()
    images = torch.randn(2, 3, 8, 8)
    # backend="eager": what is tested is the tracing, which a compiler would only slow down.
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for ours, expected in zip(compiled(images), model(images)):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("spec", [SMALL, "resnet8:width=4"])
def test_every_parameter_has_a_gradient(spec: str) -> None:
    model = create(spec, num_classes=3, image_size=8, in_channels=3)
    model(torch.randn(4, 3, 8, 8)).logits.square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
