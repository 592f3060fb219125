"""Tiny models of transformers with random weights: one or more of every family that takes images.

The rule of a model says what its embedding must be; tests/test_models_hf_families.py computes that
from the model's own forward. A model that the installed transformers lacks is left out.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Tiny(NamedTuple):
    """A class of transformers, its configuration's class and options, and a rule:

    classifier    the input of the classifier, and the model's own logits
    features      `get_image_features`: the projected image embedding of a two-tower model
    masked        the class token of a masked autoencoder that sees all patches
    embeds        `image_embeds`
    pooler        `pooler_output`
    cls           the class token, `last_hidden_state[:, 0]`
    mean          the mean of `last_hidden_state` over the tokens
    map           the mean over the positions of the last feature map, [B, C, H, W] or [B, N, C]
    cls or map    either, where the class token is not in `last_hidden_state`
    refused       ModelError: no embedding of one image, or one that ckd does not find
    """

    model: str
    config: str
    options: Mapping[str, Any]
    rule: str


V = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
V_RATIO = {key: value for key, value in V.items() if key != "intermediate_size"}  # mlp_ratio 4
NAFLEX = {**V, "patch_size": 4, "num_patches": 64}
LAST = {"out_features": ["stage2"]}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
BLIP2 = {
    "vision_config": V,
    "num_query_tokens": 3,
    "qformer_config": {**TEXT, "encoder_hidden_size": 16, "cross_attention_frequency": 1},
    "text_config": {**TEXT, "model_type": "opt", "ffn_dim": 16, "word_embed_proj_dim": 16},
}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1]}
STAGES4 = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 12, 16]}
SWIN = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
}
PYRAMID = {
    **STAGES4,
    "sr_ratios": [4, 2, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
    "mlp_ratios": [2, 2, 2, 2],
}
EFFICIENT = {
    "image_size": 32,
    "width_coefficient": 0.25,
    "depth_coefficient": 0.5,
    "hidden_dim": 320,
    "kernel_sizes": [3, 3],
    "in_channels": [32, 16],
    "out_channels": [16, 24],
    "strides": [1, 2],
    "num_block_repeats": [1, 1],
    "expand_ratios": [1, 6],
}
LCNET = {
    "scale": 0.5,
    "block_configs": [
        [[3, 16, 16, 1, False]],
        [[3, 16, 32, 2, False]],
        [[3, 32, 32, 1, True]],
        [[3, 32, 32, 2, False]],
        [[5, 32, 32, 1, True]],
    ],
}
LEVIT = {
    "image_size": 64,
    "hidden_sizes": [16, 16, 24],
    "num_attention_heads": [1, 1, 2],
    "depths": [1, 1, 1],
    "key_dim": [8, 8, 8],
}
CVT = {"embed_dim": [8, 8, 16], "num_heads": [1, 1, 2], "depth": [1, 2, 3]}
PVT = {
    **STAGES4,
    "image_size": 64,
    "sequence_reduction_ratios": [4, 2, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
    "mlp_ratios": [2, 2, 2, 2],
    "num_labels": 3,
}
FOCAL = {
    "image_size": 32,
    "embed_dim": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "focal_levels": [1, 1],
    "focal_windows": [3, 3],
}
HGNET = {
    "embedding_size": 8,
    "hidden_sizes": [16, 24],
    "depths": [1, 1],
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 16],
    "stage_mid_channels": [8, 8],
    "stage_out_channels": [16, 24],
    "stage_num_blocks": [1, 1],
    "stage_downsample": [False, True],
    "stage_downsample_strides": [2, 2],
    "stage_light_block": [False, True],
    "stage_kernel_size": [3, 3],
    "stage_numb_of_layers": [1, 1],
}
TEXTNET = {
    "image_size": [64, 64],
    "stem_out_channels": 8,
    "hidden_sizes": [8, 8, 8, 12, 16],
    "conv_layer_kernel_sizes": [[[3, 3]], [[3, 1]], [[1, 3]], [[3, 3]]],
    "conv_layer_strides": [[1], [2], [2], [2]],
}
MOBILEVIT2 = {
    "image_size": 64,
    "width_multiplier": 0.125,
    "n_attn_blocks": [1, 1, 1],
    "base_attn_unit_dims": [64, 64, 64],
}
DETR = {
    "backbone_config": {"model_type": "resnet", **RESNET, **LAST},
    "use_timm_backbone": False,
    "backbone": None,
    "num_queries": 3,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}
HIERA = {
    "embed_dim": 8,
    "image_size": [32, 32],
    "patch_stride": [4, 4],
    "depths": [1, 1],
    "num_heads": [1, 2],
    "num_query_pool": 1,
    "masked_unit_size": [2, 2],
    "masked_unit_attention": [True, False],
}
PERCEIVER = {
    "num_latents": 4,
    "d_latents": 16,
    "d_model": 16,
    "num_self_attends_per_block": 1,
    "num_self_attention_heads": 2,
    "num_cross_attention_heads": 1,
    "image_size": 32,
}
MOBILEVIT = {
    "image_size": 64,
    "hidden_sizes": [8, 12, 16],
    "neck_hidden_sizes": [8, 8, 8, 12, 12, 16, 24],
    "num_attention_heads": 2,
}
TIMM_RESNET = {"architecture": "resnet10t"}


def _towers(**options: Any) -> dict[str, Any]:
    return {"text_config": TEXT, "vision_config": V, "projection_dim": 12, **options}


MODELS = (
    # -- vision transformers ------------------------------------------------------------------
    Tiny("ViTModel", "ViTConfig", V, "cls"),
    Tiny("ViTForImageClassification", "ViTConfig", V, "classifier"),
    Tiny("ViTForMaskedImageModeling", "ViTConfig", {**V, "encoder_stride": 8}, "cls"),
    Tiny("ViTMSNModel", "ViTMSNConfig", V, "cls"),
    Tiny("ViTMSNForImageClassification", "ViTMSNConfig", V, "classifier"),
    Tiny("ViTMAEModel", "ViTMAEConfig", V, "masked"),
    Tiny(
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        {
            **V,
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 16,
        },
        "masked",
    ),
    Tiny("DeiTModel", "DeiTConfig", V, "cls"),
    Tiny("DeiTForImageClassification", "DeiTConfig", V, "classifier"),
    Tiny("DeiTForImageClassificationWithTeacher", "DeiTConfig", V, "cls"),
    Tiny("DeiTForMaskedImageModeling", "DeiTConfig", {**V, "encoder_stride": 8}, "cls"),
    Tiny("BeitModel", "BeitConfig", V, "pooler"),
    Tiny("BeitModel", "BeitConfig",
         {**V, "use_relative_position_bias": True, "use_mean_pooling": False}, "pooler"),
    Tiny("BeitForImageClassification", "BeitConfig", V, "classifier"),
    Tiny("BeitForMaskedImageModeling", "BeitConfig", {**V, "use_mask_token": True}, "refused"),
    Tiny("BeitBackbone", "BeitConfig", {**V, **LAST}, "map"),
    Tiny("Data2VecVisionModel", "Data2VecVisionConfig", V, "cls"),
    Tiny("Data2VecVisionForImageClassification", "Data2VecVisionConfig", V, "classifier"),
    Tiny("Dinov2Model", "Dinov2Config", V_RATIO, "pooler"),
    Tiny("Dinov2ForImageClassification", "Dinov2Config", V_RATIO, "classifier"),
    Tiny("Dinov2Backbone", "Dinov2Config", {**V_RATIO, **LAST}, "map"),
    Tiny("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", V_RATIO, "pooler"),
    Tiny(
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        V_RATIO,
        "classifier",
    ),
    Tiny("Dinov2WithRegistersBackbone", "Dinov2WithRegistersConfig", {**V_RATIO, **LAST}, "map"),
    Tiny("DINOv3ViTModel", "DINOv3ViTConfig", {**V, "num_register_tokens": 3}, "pooler"),
    Tiny("DINOv3ViTBackbone", "DINOv3ViTConfig", {**V, **LAST}, "map"),
    Tiny("IJepaModel", "IJepaConfig", V, "mean"),
    Tiny("IJepaForImageClassification", "IJepaConfig", V, "classifier"),
    Tiny("PixioModel", "PixioConfig", {**V_RATIO, "n_cls_tokens": 2}, "pooler"),
    Tiny("PixioBackbone", "PixioConfig", {**V_RATIO, **LAST, "n_cls_tokens": 2}, "map"),
    Tiny("VitDetModel", "VitDetConfig", {**V_RATIO, "pretrain_image_size": 32}, "map"),
    Tiny("VitDetBackbone", "VitDetConfig", {**V_RATIO, **LAST, "pretrain_image_size": 32}, "map"),
    Tiny("VitPoseBackbone", "VitPoseBackboneConfig",
         {**V_RATIO, **LAST, "image_size": [32, 32], "patch_size": [8, 8]}, "map"),
    Tiny("Sapiens2Model", "Sapiens2Config",
         {**V, "num_key_value_heads_per_layer": [2, 2], "num_key_value_attention_heads": 2,
          "num_register_tokens": 2}, "pooler"),
    Tiny("Sapiens2Backbone", "Sapiens2Config",
         {**V, **LAST, "num_key_value_heads_per_layer": [2, 2],
          "num_key_value_attention_heads": 2, "num_register_tokens": 2}, "map"),
    Tiny("LwDetrViTBackbone", "LwDetrViTConfig",
         {**V_RATIO, **LAST, "pretrain_image_size": 32, "num_windows": 4, "num_windows_side": 2},
         "map"),
    Tiny("RfDetrDinov2Backbone", "RfDetrDinov2Config",
         {**V_RATIO, **LAST, "num_windows": 2, "window_block_indexes": [0]}, "map"),
    Tiny("DPTModel", "DPTConfig",
         {**V, "backbone_out_indices": [0, 0, 1, 1], "neck_hidden_sizes": [8, 8, 8, 8]}, "cls"),
    Tiny("EomtForUniversalSegmentation", "EomtConfig",
         {**V_RATIO, "num_blocks": 1, "num_queries": 3, "num_upscale_blocks": 1}, "refused"),
    # -- hierarchical transformers ------------------------------------------------------------
    Tiny("SwinModel", "SwinConfig", SWIN, "pooler"),
    Tiny("SwinForImageClassification", "SwinConfig", SWIN, "classifier"),
    Tiny("SwinForMaskedImageModeling", "SwinConfig", {**SWIN, "encoder_stride": 8}, "mean"),
    Tiny("SwinBackbone", "SwinConfig", {**SWIN, **LAST}, "map"),
    Tiny("Swinv2Model", "Swinv2Config", SWIN, "pooler"),
    Tiny("Swinv2ForImageClassification", "Swinv2Config", SWIN, "classifier"),
    Tiny("Swinv2ForMaskedImageModeling", "Swinv2Config", {**SWIN, "encoder_stride": 8}, "mean"),
    Tiny("Swinv2Backbone", "Swinv2Config", {**SWIN, **LAST}, "map"),
    Tiny("MaskFormerSwinModel", "MaskFormerSwinConfig", SWIN, "pooler"),
    Tiny("MaskFormerSwinBackbone", "MaskFormerSwinConfig", {**SWIN, **LAST}, "map"),
    Tiny("DonutSwinModel", "DonutSwinConfig", SWIN, "pooler"),
    Tiny("DonutSwinForImageClassification", "DonutSwinConfig", SWIN, "classifier"),
    Tiny("HieraModel", "HieraConfig", HIERA, "pooler"),
    Tiny("HieraForImageClassification", "HieraConfig", HIERA, "classifier"),
    Tiny("HieraForPreTraining", "HieraConfig",
         {**HIERA, "decoder_hidden_size": 8, "decoder_depth": 1, "decoder_num_heads": 2},
         "refused"),
    Tiny("HieraBackbone", "HieraConfig", {**HIERA, **LAST}, "map"),
    Tiny("CvtModel", "CvtConfig",
         CVT, "cls or map"),
    Tiny("CvtForImageClassification", "CvtConfig",
         CVT, "classifier"),
    Tiny("LevitModel", "LevitConfig",
         LEVIT, "pooler"),
    Tiny("LevitForImageClassification", "LevitConfig",
         LEVIT, "classifier"),
    Tiny("LevitForImageClassificationWithTeacher", "LevitConfig",
         LEVIT, "pooler"),
    Tiny("PvtModel", "PvtConfig",
         PVT, "cls"),
    Tiny("PvtForImageClassification", "PvtConfig",
         PVT, "classifier"),
    Tiny("PvtV2Model", "PvtV2Config", {**PYRAMID, "image_size": [64, 64]}, "map"),
    Tiny("PvtV2ForImageClassification", "PvtV2Config", {**PYRAMID, "image_size": [64, 64]},
         "classifier"),
    Tiny("PvtV2Backbone", "PvtV2Config",
         {**PYRAMID, "image_size": [64, 64], "out_features": ["stage4"]}, "map"),
    Tiny("SegformerModel", "SegformerConfig", PYRAMID, "map"),
    Tiny("SegformerForImageClassification", "SegformerConfig", PYRAMID, "classifier"),
    Tiny("SegformerForSemanticSegmentation", "SegformerConfig",
         {**PYRAMID, "decoder_hidden_size": 8}, "map"),
    Tiny("GLPNModel", "GLPNConfig", PYRAMID, "map"),
    Tiny("DinatModel", "DinatConfig", {}, "refused"),  # needs the package natten
    # -- convolutions -------------------------------------------------------------------------
    Tiny("ResNetModel", "ResNetConfig", RESNET, "pooler"),
    Tiny("ResNetForImageClassification", "ResNetConfig", RESNET, "classifier"),
    Tiny("ResNetBackbone", "ResNetConfig", {**RESNET, **LAST}, "map"),
    Tiny("RTDetrResNetBackbone", "RTDetrResNetConfig", {**RESNET, **LAST}, "map"),
    Tiny("RegNetModel", "RegNetConfig", {**RESNET, "groups_width": 4}, "pooler"),
    Tiny("RegNetForImageClassification", "RegNetConfig", {**RESNET, "groups_width": 4},
         "classifier"),
    Tiny("BitModel", "BitConfig", {**RESNET, "num_groups": 1, "hidden_sizes": [8, 16]}, "pooler"),
    Tiny("BitForImageClassification", "BitConfig",
         {**RESNET, "num_groups": 1, "hidden_sizes": [8, 16]}, "classifier"),
    Tiny("BitBackbone", "BitConfig",
         {**RESNET, **LAST, "num_groups": 1, "hidden_sizes": [8, 16]}, "map"),
    Tiny("ConvNextModel", "ConvNextConfig", {**STAGES4, "image_size": 64}, "pooler"),
    Tiny("ConvNextForImageClassification", "ConvNextConfig", {**STAGES4, "image_size": 64},
         "classifier"),
    Tiny("ConvNextBackbone", "ConvNextConfig",
         {**STAGES4, "image_size": 64, "out_features": ["stage4"]}, "map"),
    Tiny("ConvNextV2Model", "ConvNextV2Config", {**STAGES4, "image_size": 64}, "pooler"),
    Tiny("ConvNextV2ForImageClassification", "ConvNextV2Config", {**STAGES4, "image_size": 64},
         "classifier"),
    Tiny("ConvNextV2Backbone", "ConvNextV2Config",
         {**STAGES4, "image_size": 64, "out_features": ["stage1", "stage4"]}, "map"),
    Tiny("DINOv3ConvNextModel", "DINOv3ConvNextConfig", {**STAGES4, "image_size": 64}, "pooler"),
    Tiny("DINOv3ConvNextBackbone", "DINOv3ConvNextConfig",
         {**STAGES4, "image_size": 64, "out_features": ["stage4"]}, "map"),
    Tiny("EfficientNetModel", "EfficientNetConfig", EFFICIENT, "pooler"),
    Tiny("EfficientNetForImageClassification", "EfficientNetConfig", EFFICIENT, "classifier"),
    Tiny("FocalNetModel", "FocalNetConfig",
         FOCAL, "pooler"),
    Tiny("FocalNetForImageClassification", "FocalNetConfig",
         FOCAL, "classifier"),
    Tiny("FocalNetForMaskedImageModeling", "FocalNetConfig",
         {**FOCAL, "encoder_stride": 8}, "mean"),
    Tiny("FocalNetBackbone", "FocalNetConfig",
         {**FOCAL, **LAST}, "map"),
    Tiny("HGNetV2ForImageClassification", "HGNetV2Config", HGNET, "classifier"),
    Tiny("HGNetV2Backbone", "HGNetV2Config", {**HGNET, **LAST}, "map"),
    Tiny("MobileNetV1Model", "MobileNetV1Config", {"image_size": 64, "depth_multiplier": 0.25},
         "pooler"),
    Tiny("MobileNetV1ForImageClassification", "MobileNetV1Config",
         {"image_size": 64, "depth_multiplier": 0.25}, "classifier"),
    Tiny("MobileNetV2Model", "MobileNetV2Config", {"image_size": 64, "depth_multiplier": 0.25},
         "pooler"),
    Tiny("MobileNetV2ForImageClassification", "MobileNetV2Config",
         {"image_size": 64, "depth_multiplier": 0.25}, "classifier"),
    Tiny("MobileViTModel", "MobileViTConfig", MOBILEVIT, "pooler"),
    Tiny("MobileViTForImageClassification", "MobileViTConfig", MOBILEVIT, "classifier"),
    Tiny("MobileViTV2Model", "MobileViTV2Config",
         MOBILEVIT2, "pooler"),
    Tiny("MobileViTV2ForImageClassification", "MobileViTV2Config",
         MOBILEVIT2, "classifier"),
    Tiny("PoolFormerModel", "PoolFormerConfig", STAGES4, "map"),
    Tiny("PoolFormerForImageClassification", "PoolFormerConfig", STAGES4, "classifier"),
    # Gives its logits as last_hidden_state.
    Tiny("PPLCNetForImageClassification", "PPLCNetConfig", LCNET, "refused"),
    Tiny("PPLCNetBackbone", "PPLCNetConfig", {**LCNET, "out_features": ["stage3"]}, "map"),
    Tiny("SwiftFormerModel", "SwiftFormerConfig",
         {"image_size": 64, "depths": [1, 1, 1, 1], "embed_dims": [8, 8, 12, 16]}, "map"),
    # Two classifiers whose logits are averaged.
    Tiny("SwiftFormerForImageClassification", "SwiftFormerConfig",
         {"image_size": 64, "depths": [1, 1, 1, 1], "embed_dims": [8, 8, 12, 16]}, "refused"),
    Tiny("TextNetModel", "TextNetConfig",
         TEXTNET, "pooler"),
    Tiny("TextNetForImageClassification", "TextNetConfig",
         TEXTNET, "classifier"),
    Tiny("TextNetBackbone", "TextNetConfig",
         {**TEXTNET, "out_features": ["stage4"]}, "map"),
    Tiny("UVDocBackbone", "UVDocBackboneConfig", {
        "resnet_head": [[3, 8], [8, 8]],
        "resnet_configs": [[[8, 8, 1, False]], [[8, 16, 1, True]]],
        "stage_configs": [[[16, 1]], [[16, 2]]]}, "map"),
    # -- other image models -------------------------------------------------------------------
    # Saved under the name of a class for one of three kinds of input.
    Tiny("PerceiverForImageClassificationLearned", "PerceiverConfig", PERCEIVER, "refused"),
    Tiny("PerceiverForImageClassificationFourier", "PerceiverConfig", PERCEIVER, "refused"),
    Tiny("PerceiverForImageClassificationConvProcessing", "PerceiverConfig", PERCEIVER, "refused"),
    Tiny("ImageGPTModel", "ImageGPTConfig", {
        "vocab_size": 17, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}, "refused"),
    Tiny("ImageGPTForImageClassification", "ImageGPTConfig", {
        "vocab_size": 17, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}, "refused"),
    # timm: loads them.
    Tiny("TimmWrapperModel", "TimmWrapperConfig", TIMM_RESNET, "refused"),
    Tiny("TimmWrapperForImageClassification", "TimmWrapperConfig", TIMM_RESNET, "refused"),
    Tiny("TimmBackbone", "TimmBackboneConfig", {"backbone": "resnet10t"}, "refused"),
    # -- image towers -------------------------------------------------------------------------
    Tiny("CLIPVisionModel", "CLIPVisionConfig", V, "pooler"),
    Tiny("CLIPVisionModelWithProjection", "CLIPVisionConfig", {**V, "projection_dim": 12},
         "embeds"),
    Tiny("CLIPForImageClassification", "CLIPConfig", _towers(), "classifier"),
    Tiny("MetaClip2VisionModel", "MetaClip2VisionConfig", V, "pooler"),
    Tiny("MetaClip2VisionModelWithProjection", "MetaClip2VisionConfig",
         {**V, "projection_dim": 12}, "embeds"),
    Tiny("MetaClip2ForImageClassification", "MetaClip2Config", _towers(), "classifier"),
    Tiny("SiglipVisionModel", "SiglipVisionConfig", V, "pooler"),
    Tiny("SiglipVisionModel", "SiglipVisionConfig", {**V, "vision_use_head": False}, "mean"),
    Tiny("SiglipForImageClassification", "SiglipConfig", _towers(), "classifier"),
    # Takes images as rows of patches (NaFlex).
    Tiny("Siglip2VisionModel", "Siglip2VisionConfig", NAFLEX, "refused"),
    Tiny("Siglip2ForImageClassification", "Siglip2Config",
         _towers(vision_config=NAFLEX), "refused"),
    Tiny("AltCLIPVisionModel", "AltCLIPVisionConfig", V, "pooler"),
    Tiny("ChineseCLIPVisionModel", "ChineseCLIPVisionConfig", V, "pooler"),
    Tiny("BlipVisionModel", "BlipVisionConfig", V, "pooler"),
    Tiny("Blip2VisionModel", "Blip2VisionConfig", V, "pooler"),
    Tiny("InstructBlipVisionModel", "InstructBlipVisionConfig", V, "pooler"),
    Tiny("CLIPSegVisionModel", "CLIPSegVisionConfig", V, "pooler"),
    Tiny("GroupViTVisionModel", "GroupViTVisionConfig",
         {**V, "depths": [1, 1], "num_group_tokens": [4, 0], "num_output_groups": [4, 4]},
         "pooler"),
    Tiny("OwlViTVisionModel", "OwlViTVisionConfig", V, "pooler"),
    Tiny("Owlv2VisionModel", "Owlv2VisionConfig", V, "pooler"),
    Tiny("AlignVisionModel", "AlignVisionConfig", EFFICIENT, "pooler"),
    Tiny("FlavaImageModel", "FlavaImageConfig", V, "cls"),
    Tiny("Aimv2VisionModel", "Aimv2VisionConfig", V, "pooler"),
    Tiny("Aimv2VisionModel", "Aimv2VisionConfig", {**V, "use_head": False}, "mean"),
    Tiny("MLCDVisionModel", "MLCDVisionConfig", V, "pooler"),
    Tiny("Tipsv2VisionModel", "Tipsv2VisionConfig", V_RATIO, "pooler"),
    Tiny("Tipsv2VisionBackbone", "Tipsv2VisionConfig", {**V_RATIO, **LAST}, "map"),
    Tiny("GitVisionModel", "GitVisionConfig", V, "cls"),
    # Gives class tokens under a name of its own, `summary`.
    Tiny("RadioModel", "RadioConfig",
         {**V_RATIO, "num_cls_tokens": 2, "num_registers": 1, "summary_idxs": [0],
          "max_img_size": 32, "image_size": 32}, "refused"),
    # Gives tokens as [B, H, W, C].
    Tiny("Sam2HieraDetModel", "Sam2HieraDetConfig",
         {"hidden_size": 8, "image_size": [64, 64], "num_query_pool_stages": 1,
          "blocks_per_stage": [1, 2], "embed_dim_per_stage": [8, 16],
          "num_attention_heads_per_stage": [1, 1], "window_size_per_stage": [4, 4],
          "global_attention_blocks": [2]}, "refused"),
    Tiny("InternVLVisionModel", "InternVLVisionConfig",
         {**V, "image_size": [32, 32], "patch_size": [8, 8]}, "cls"),
    Tiny("SamVisionModel", "SamVisionConfig",
         {**V, "output_channels": 12, "global_attn_indexes": [1], "window_size": 2,
          "num_pos_feats": 8, "mlp_dim": 32}, "map"),
    Tiny("JanusVisionModel", "JanusVisionConfig", V, "pooler"),
    Tiny("Idefics3VisionTransformer", "Idefics3VisionConfig", V, "mean"),
    Tiny("PixtralVisionModel", "PixtralVisionConfig", {**V, "head_dim": 8}, "refused"),
    Tiny("Llama4VisionModel", "Llama4VisionConfig",
         {**V, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
         "refused"),
    Tiny("MllamaVisionModel", "MllamaVisionConfig",
         {**V, "attention_heads": 2, "num_global_layers": 1, "intermediate_layers_indices": [0],
          "vision_output_dim": 32, "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]},
         "refused"),
    # -- two towers ---------------------------------------------------------------------------
    Tiny("CLIPModel", "CLIPConfig", _towers(), "features"),
    Tiny("MetaClip2Model", "MetaClip2Config", _towers(), "features"),
    Tiny("SiglipModel", "SiglipConfig", _towers(), "features"),
    Tiny("Siglip2Model", "Siglip2Config", _towers(vision_config=NAFLEX), "refused"),
    Tiny("AltCLIPModel", "AltCLIPConfig",
         _towers(text_config={**TEXT, "project_dim": 12, "max_position_embeddings": 10}),
         "features"),
    Tiny("ChineseCLIPModel", "ChineseCLIPConfig", _towers(), "features"),
    Tiny("BlipModel", "BlipConfig", _towers(text_config={**TEXT, "encoder_hidden_size": 16}),
         "features"),
    Tiny("BlipForImageTextRetrieval", "BlipConfig",
         _towers(text_config={**TEXT, "encoder_hidden_size": 16}, image_text_hidden_size=12),
         "refused"),
    Tiny("BlipForConditionalGeneration", "BlipConfig",
         _towers(text_config={**TEXT, "encoder_hidden_size": 16}, image_text_hidden_size=12),
         "refused"),
    Tiny("Blip2Model", "Blip2Config", BLIP2, "features"),
    Tiny("Blip2VisionModelWithProjection", "Blip2Config",
         {**BLIP2, "image_text_hidden_size": 12}, "refused"),
    Tiny("LlavaModel", "LlavaConfig",
         {"vision_config": {**V, "model_type": "clip_vision_model"},
          "text_config": {**TEXT, "model_type": "llama", "num_key_value_heads": 2},
          "vision_feature_layer": -1}, "refused"),
    Tiny("PaliGemmaModel", "PaliGemmaConfig",
         {"vision_config": {**V, "model_type": "siglip_vision_model"}, "projection_dim": 16,
          "text_config": {**TEXT, "model_type": "gemma", "head_dim": 8,
                          "num_key_value_heads": 2}}, "refused"),
    Tiny("Kosmos2Model", "Kosmos2Config",
         {"vision_config": V, "latent_query_num": 2,
          "text_config": {"vocab_size": 50, "embed_dim": 16, "layers": 1, "ffn_dim": 16,
                          "attention_heads": 2, "max_position_embeddings": 16}}, "refused"),
    Tiny("GitModel", "GitConfig", {**TEXT, "vision_config": V}, "refused"),
    Tiny("SamModel", "SamConfig",
         {"vision_config": {**V, "output_channels": 12, "global_attn_indexes": [1],
                            "window_size": 2, "num_pos_feats": 6, "mlp_dim": 32},
          "prompt_encoder_config": {"hidden_size": 12, "image_size": 32, "patch_size": 8,
                                    "mask_input_channels": 4},
          "mask_decoder_config": {"hidden_size": 12, "mlp_dim": 12, "num_hidden_layers": 1,
                                  "num_attention_heads": 2, "iou_head_hidden_dim": 8}}, "refused"),
    Tiny("PerceiverModel", "PerceiverConfig", PERCEIVER, "refused"),
    Tiny("LayoutLMv3Model", "LayoutLMv3Config",
         {**TEXT, "hidden_size": 24, "input_size": 32, "patch_size": 8, "coordinate_size": 4,
          "shape_size": 4, "max_2d_position_embeddings": 16, "image_size": 32}, "cls"),
    Tiny("CLIPSegModel", "CLIPSegConfig", _towers(), "features"),
    Tiny("CLIPSegForImageSegmentation", "CLIPSegConfig",
         _towers(extract_layers=[0, 1, 1], reduce_dim=8, decoder_num_attention_heads=2,
                 decoder_intermediate_size=8), "features"),
    Tiny("GroupViTModel", "GroupViTConfig",
         _towers(
             projection_intermediate_dim=16,
             vision_config={**V, "depths": [1, 1], "num_group_tokens": [4, 0],
                            "num_output_groups": [4, 4]}), "features"),
    Tiny("OwlViTModel", "OwlViTConfig", _towers(), "features"),
    Tiny("OwlViTForObjectDetection", "OwlViTConfig", _towers(), "features"),
    Tiny("Owlv2Model", "Owlv2Config", _towers(), "features"),
    Tiny("AlignModel", "AlignConfig",
         _towers(vision_config=EFFICIENT, projection_dim=24), "features"),
    Tiny("Aimv2Model", "Aimv2Config", _towers(), "features"),
    Tiny("Tipsv2Model", "Tipsv2Config", {"text_config": TEXT, "vision_config": V_RATIO},
         "features"),
    # Calls the configuration of its image tower image_config, and projects each token.
    Tiny("FlavaModel", "FlavaConfig",
         {"text_config": TEXT, "image_config": V, "projection_dim": 12, "hidden_size": 16,
          "multimodal_config": {"hidden_size": 16, "num_hidden_layers": 1,
                                "num_attention_heads": 2, "intermediate_size": 16}},
         "refused"),
    Tiny("XCLIPModel", "XCLIPConfig",
         _towers(vision_config={**V, "mit_hidden_size": 12, "mit_intermediate_size": 12,
                                "mit_num_hidden_layers": 1, "mit_num_attention_heads": 2,
                                "num_frames": 2}, prompt_num_attention_heads=2), "refused"),
    Tiny("BridgeTowerModel", "BridgeTowerConfig",
         {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1,
          "text_config": {**TEXT, "hidden_size": 64},
          "vision_config": {"hidden_size": 64, "num_hidden_layers": 2, "patch_size": 8,
                            "image_size": 32}}, "refused"),
    Tiny("ViltModel", "ViltConfig",
         {**V, "vocab_size": 50, "max_position_embeddings": 8}, "refused"),
    Tiny("VisionTextDualEncoderModel", "VisionTextDualEncoderConfig",
         {"vision_config": {**V, "model_type": "vit"},
          "text_config": {**TEXT, "model_type": "bert"}, "projection_dim": 12}, "features"),
    Tiny("Cohere2VisionModel", "Cohere2VisionConfig",
         {"vision_config": {**V, "model_type": "siglip_vision_model"},
          "text_config": {**TEXT, "model_type": "cohere2", "num_key_value_heads": 2},
          "alignment_intermediate_size": 16}, "refused"),
    Tiny("TrOCRForCausalLM", "TrOCRConfig",
         {"vocab_size": 50, "d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2,
          "decoder_ffn_dim": 16, "max_position_embeddings": 8}, "refused"),
    # -- several images, or none in sight -----------------------------------------------------
    Tiny("VideoMAEModel", "VideoMAEConfig", {**V, "num_frames": 2}, "refused"),
    Tiny("TimesformerModel", "TimesformerConfig", {**V, "num_frames": 2}, "refused"),
    Tiny("VivitModel", "VivitConfig", {**V, "num_frames": 2, "tubelet_size": [2, 8, 8]},
         "refused"),
    Tiny("VideoPrismVisionModel", "VideoPrismVisionConfig",
         {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "image_size": 32,
          "num_frames": 2, "tubelet_size": [1, 8, 8], "num_spatial_layers": 1,
          "num_temporal_layers": 1, "num_auxiliary_layers": 1}, "refused"),
    Tiny("VJEPA2Model", "VJEPA2Config",
         {"patch_size": 8, "crop_size": 32, "frames_per_clip": 2, "hidden_size": 48,
          "num_attention_heads": 2, "num_hidden_layers": 1, "num_pooler_layers": 1,
          "pred_hidden_size": 48, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1},
         "refused"),
    Tiny("BertModel", "BertConfig", TEXT, "refused"),
    # -- detection, depth, restoration --------------------------------------------------------
    Tiny("YolosModel", "YolosConfig",
         {**V, "image_size": [32, 32], "num_detection_tokens": 3}, "cls"),
    Tiny("DetrModel", "DetrConfig", DETR, "refused"),
    Tiny("ConditionalDetrModel", "ConditionalDetrConfig", DETR, "refused"),
    Tiny("DabDetrModel", "DabDetrConfig", {**DETR, "hidden_size": 16}, "refused"),
    Tiny("DeformableDetrModel", "DeformableDetrConfig",
         {**DETR, "d_model": 32, "num_feature_levels": 1}, "refused"),
    Tiny("TableTransformerModel", "TableTransformerConfig", DETR, "refused"),
    Tiny("DepthProModel", "DepthProConfig", {
        "patch_size": 16, "fusion_hidden_size": 8, "intermediate_hook_ids": [0],
        "intermediate_feature_dims": [8], "scaled_images_ratios": [0.5, 1.0],
        "scaled_images_overlap_ratios": [0.0, 0.2], "scaled_images_feature_dims": [8, 8],
        **{f"{name}_model_config": {
            **V_RATIO, "model_type": "dinov2", "image_size": 16, "patch_size": 4}
           for name in ("image", "patch", "fov")}}, "cls"),
    Tiny("Swin2SRModel", "Swin2SRConfig",
         {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2],
          "window_size": 4}, "map"),
    Tiny("SuperPointForKeypointDetection", "SuperPointConfig", {}, "refused"),
)  # fmt: skip


def title(tiny: Tiny) -> str:
    """The entry's name for pytest: the class, and a number where the class has several entries."""
    same = [other for other in MODELS if other.model == tiny.model]
    return tiny.model if len(same) == 1 else f"{tiny.model}-{same.index(tiny)}"


def network(tiny: Tiny) -> Any:
    """The model in eval mode, with weights that let images differ: at initialisation many are so
    small, zero or one that a wrong use of them could not be seen."""
    transformers = importlib.import_module("transformers")
    config = getattr(transformers, tiny.config)(**tiny.options)
    model = getattr(transformers, tiny.model)(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.add_(noise, alpha=0.3)
            else:
                parameter.copy_(noise * 1.5 * max(1, parameter[0].numel()) ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) * 0.2 - 0.1)
            if name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) * 0.1 + 0.05)
    return model


def store(tiny: Tiny, folder: Path) -> Any:
    """The model, saved in `folder` and loaded by its own class."""
    model = network(tiny)
    model.save_pretrained(folder)
    if tiny.model == "TimmBackbone":  # its from_pretrained takes names of timm's models only
        return model
    return type(model).from_pretrained(folder).eval()
