"""The families of segmenters: for each model_type of a config.json its classes, and which part of the net is what.

# B images  3 RGB  H W image px  C dataset classes  h w logits  D feature channels  y x features
"""

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import (
    Mask2FormerConfig,
    PreTrainedConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    UperNetConfig,
)

from segadapt.models.discriminative import Outputs, convolutional, knet, upernet
from segadapt.models.discriminative.deeplabv3 import DeepLabV3, DeepLabV3Config
from segadapt.models.discriminative.dinov2 import Dinov2Segmenter, Dinov2SegmenterConfig
from segadapt.models.discriminative.foreign import own_names, pools_images
from segadapt.models.discriminative.hrnet import HrnetConfig, HrnetSegmenter, hrnet_names
from segadapt.models.discriminative.keymaps import encoder_names
from segadapt.models.discriminative.mmseg import MmsegSegformer, MmsegSegformerConfig, stage_maps
from segadapt.models.discriminative.ocr import HrnetOcr, HrnetOcrConfig
from segadapt.models.discriminative.resnet import resnet_names
from segadapt.models.discriminative.semantic_map import SemanticMask2Former
from segadapt.models.discriminative.smp_net import SmpConfig, SmpNet, smp_tops
from segadapt.models.discriminative.t2t import T2tConfig, T2tSegmenter, t2t_names, t2t_tops
from segadapt.models.discriminative.timm_net import TimmConfig, TimmSegmenter, timm_tops

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB in 0..1, as in torchvision and in SegFormer's training
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Family:
    """Of a net: its classes, the names of its parts, and how training asks it."""

    config: type[PreTrainedConfig]
    net: Any  # a PreTrainedModel; its forward takes pixel_values and returns an object with `logits`
    heads: tuple[str, ...]  # modules that are no encoder
    is_top: Callable[[Any], re.Pattern[str]]  # of a net: names of norms in the last encoder stage and in the head
    outputs: Callable[[Any, Tensor], Outputs]  # of (net, normalised image), see NetSegmenter.outputs
    encoder: str  # module that a pretrained backbone goes into
    # of an encoder: what brings the weights of a file under its names, see backbone.py; dict: they have them
    encoder_names: Callable[[Any], Callable[[Mapping[str, Tensor]], dict[str, Tensor]]] = lambda _: dict
    # faults, in the words of backbone.py, that a folder or file of a bare encoder has and may have
    bare_faults: str = "(?!)"
    frozen: Callable[[Any], tuple[str, ...]] = lambda _: ()  # of a config: modules that training leaves as they are
    has_auxiliary: Callable[[Any], bool] = lambda _: False  # of a config: train mode gives Outputs.auxiliary_BChw
    has_stages: bool = False  # in train mode it gives Outputs.stages_BChw
    has_queries: bool = False  # it gives Outputs.queries
    auxiliary_head: str | None = None  # a module that nothing but the auxiliary loss reads
    # of a net: a BatchNorm sees one vector an image, of which a single image has no statistics
    pools_images: Callable[[Any], bool] = lambda _: False
    can_record: bool = False  # training makes CUDA graphs of it on its own; the GPU tests train each of these so
    least_px: Callable[[Any], int] = lambda _: 1  # of a config: the shortest side that its convolutions take


def segformer_outputs(net: Any, pixels_B3HW: Tensor) -> Outputs:
    """The features are the fused maps of the head before its dropout; there is no auxiliary head.

    The head's steps are those of its own forward, which does not give the features away.
    """
    head, maps = net.decode_head, stage_maps(net.segformer, pixels_B3HW)
    same_size = []
    for x_BDyx, project in zip(maps, head.linear_projections, strict=True):
        projected_BDyx = project(x_BDyx).transpose(1, 2).unflatten(2, x_BDyx.shape[2:])
        same_size.append(interpolate(projected_BDyx, size=maps[0].shape[2:], mode="bilinear", align_corners=False))
    features_BDhw = head.activation(head.batch_norm(head.linear_fuse(torch.cat(same_size[::-1], dim=1))))
    return Outputs(head.classifier(head.dropout(features_BDhw)), None, features_BDhw)


def mmseg_outputs(net: Any, pixels_B3HW: Tensor) -> Outputs:
    """As of SegFormer, whose encoder it has."""
    features_BDhw = net.decode_head.fused(stage_maps(net.segformer, pixels_B3HW))
    return Outputs(net.decode_head.classified(features_BDhw), None, features_BDhw)


def dinov2_outputs(net: Any, pixels_B3HW: Tensor) -> Outputs:
    """There is no auxiliary head."""
    features_BDhw = net.features(pixels_B3HW)
    return Outputs(net.decode_head.classifier(features_BDhw), None, features_BDhw)


def segformer_tops(net: Any) -> re.Pattern[str]:
    """`stages.3`, in older versions of transformers `block.3`; and the head."""
    last = len(net.config.depths) - 1
    return re.compile(rf"decode_head\.|(.*\.)?(stages|patch_embeddings|block|layer_norm)\.{last}\.")


def segformer_least_px(config: Any) -> int:
    """Each stage's map covers one kernel of its reduction: 29 px of all published sizes, at stride 4 by 8."""
    strides = accumulate(config.strides, operator.mul)
    return max(stride * (ratio - 1) + 1 for stride, ratio in zip(strides, config.sr_ratios, strict=True))


def pyramid_least_px(config: Any) -> int:
    """Of Mask2Former, UPerNet and K-Net: a ConvNeXt halves its map three times and, unlike the others, never pads."""
    own = config.backbone_config
    return 8 * own.patch_size if own.model_type in ("convnext", "convnextv2") else 1


def dinov2_tops(net: Any) -> re.Pattern[str]:
    """The last layer, and what stands behind it."""
    last = net.config.backbone_config.num_hidden_layers - 1
    return re.compile(rf"decode_head\.|backbone\.(encoder\.layer\.{last}|layernorm)\.")


def dinov2_frozen(config: Any) -> tuple[str, ...]:
    """The embeddings at least: nothing reads the mask token among them, so that it would have no gradient."""
    return ("backbone",) if config.frozen else ("backbone.embeddings",)


def pyramid_tops(net: Any) -> re.Pattern[str]:
    """Of Mask2Former, UPerNet and K-Net: all but the encoder's first stages; it is a Swin, ConvNeXt or ResNet."""
    last = len(net.config.backbone_config.depths) - 1
    encoder = r"(model\.pixel_level_module\.encoder|backbone)\."
    stage = rf"(swin\.)?encoder\.(layers|stages)\.{last}|hidden_states_norms\.stage{last + 1}|swin\.layernorm"
    return re.compile(rf"(?!{encoder})|{encoder}({stage})\.")


def unread_norm(config: Any, encoder: str) -> tuple[str, ...]:
    """Of a Swin that gives maps: the norm behind its last layer, which none of them passes."""
    return (f"{encoder}.swin.layernorm",) if config.backbone_config.model_type == "swin" else ()


# of the encoders of transformers that give maps: a norm for each of these, and of a ConvNeXt no last one
MAP_FAULTS = r"hidden_states_norms\..* is missing|(convnext\.)?layernorm\.(weight|bias) is unexpected"

UPERNET = Family(
    UperNetConfig,
    upernet.SemanticUperNet,
    ("decode_head", "auxiliary_head"),
    pyramid_tops,
    upernet.outputs,
    "backbone",
    lambda _: upernet.encoder_names,
    bare_faults=MAP_FAULTS,
    frozen=lambda config: unread_norm(config, "backbone"),
    has_auxiliary=upernet.has_auxiliary,
    pools_images=upernet.pools_images,
    least_px=pyramid_least_px,
    auxiliary_head="auxiliary_head",
    can_record=True,
)

FAMILIES: dict[str, Family] = {
    "segformer": Family(
        SegformerConfig,
        SegformerForSemanticSegmentation,
        ("decode_head",),
        segformer_tops,
        segformer_outputs,
        "segformer",
        lambda _: encoder_names,
        least_px=segformer_least_px,
        can_record=True,
    ),
    "segadapt_segformer_mmseg": Family(
        MmsegSegformerConfig,
        MmsegSegformer,
        ("decode_head",),
        segformer_tops,
        mmseg_outputs,
        "segformer",
        lambda _: encoder_names,
        least_px=segformer_least_px,
        can_record=True,
    ),
    "segadapt_dinov2": Family(
        Dinov2SegmenterConfig,
        Dinov2Segmenter,
        ("decode_head",),
        dinov2_tops,
        dinov2_outputs,
        "backbone",
        frozen=dinov2_frozen,
        can_record=True,
    ),
    "mask2former": Family(
        Mask2FormerConfig,
        SemanticMask2Former,
        ("model.pixel_level_module.decoder", "model.transformer_module", "class_predictor"),
        pyramid_tops,
        lambda net, pixels_B3HW: net.outputs(pixels_B3HW),
        "model.pixel_level_module.encoder",
        frozen=lambda config: unread_norm(config, "model.pixel_level_module.encoder"),
        bare_faults=MAP_FAULTS,
        has_queries=True,
        least_px=pyramid_least_px,
    ),
    "upernet": UPERNET,
    "segadapt_knet": replace(
        UPERNET, config=knet.KnetConfig, net=knet.Knet, heads=knet.HEADS, outputs=knet.outputs, has_stages=True
    ),
    "segadapt_deeplabv3": Family(
        DeepLabV3Config,
        DeepLabV3,
        convolutional.HEADS,
        convolutional.tops,
        convolutional.outputs,
        "encoder",
        lambda _: resnet_names,
        has_auxiliary=lambda _: True,
        auxiliary_head="auxiliary_head",
        pools_images=lambda _: True,
        can_record=True,
    ),
    "segadapt_hrnet": Family(
        HrnetConfig,
        HrnetSegmenter,
        convolutional.HEADS,
        convolutional.tops,
        convolutional.outputs,
        "encoder",
        lambda _: hrnet_names,
        can_record=True,
    ),
    "segadapt_hrnet_ocr": Family(
        HrnetOcrConfig,
        HrnetOcr,
        convolutional.HEADS,
        convolutional.tops,
        convolutional.outputs,
        "encoder",
        lambda _: hrnet_names,
        has_auxiliary=lambda _: True,
        can_record=True,
    ),
    "segadapt_t2t": Family(
        T2tConfig,
        T2tSegmenter,
        convolutional.HEADS,
        t2t_tops,
        convolutional.outputs,
        "encoder",
        lambda _: t2t_names,
        can_record=True,
    ),
    "segadapt_timm": Family(
        TimmConfig,
        TimmSegmenter,
        convolutional.HEADS,
        timm_tops,
        convolutional.outputs,
        "encoder",
        own_names,
        pools_images=pools_images,
    ),
    "segadapt_smp": Family(
        SmpConfig,
        SmpNet,
        ("model.decoder", "model.segmentation_head"),
        smp_tops,
        convolutional.outputs,
        "model.encoder",
        own_names,
        pools_images=pools_images,
    ),
}
