"""The families of segmenters: for each model_type of a config.json its classes, and which part of the net is what.

# B images  3 RGB  H W image px  C dataset classes  h w logits  D feature channels  y x features
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, SegformerConfig, SegformerForSemanticSegmentation

from segadapt.models.discriminative import Outputs, convolutional
from segadapt.models.discriminative.deeplabv3 import DeepLabV3, DeepLabV3Config
from segadapt.models.discriminative.hrnet import HrnetConfig, HrnetSegmenter
from segadapt.models.discriminative.mmseg import MmsegSegformer, MmsegSegformerConfig
from segadapt.models.discriminative.ocr import HrnetOcr, HrnetOcrConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB in 0..1, as in torchvision and in SegFormer's training
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Family:
    """Of a net: its classes, the names of its parts, and how training asks it."""

    config: type[PreTrainedConfig]
    net: Any  # a PreTrainedModel; its forward takes pixel_values and returns an object with `logits`
    heads: tuple[str, ...]  # modules that are no encoder
    is_top: Callable[[Any], re.Pattern[str]]  # of a config: names of norms in the last encoder stage and in the head
    outputs: Callable[[Any, Tensor], Outputs]  # of (net, normalised image), see NetSegmenter.outputs
    frozen: tuple[str, ...] = ()  # modules that training leaves as they are


def segformer_outputs(net: Any, pixels_B3HW: Tensor) -> Outputs:
    """The features are the fused maps of the head before its dropout; there is no auxiliary head."""
    seen: list[Tensor] = []
    fused = net.decode_head.fusion_conv if isinstance(net, MmsegSegformer) else net.decode_head.activation
    handle = fused.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        logits_BChw = net(pixel_values=pixels_B3HW).logits
    finally:
        handle.remove()
    return Outputs(logits_BChw, None, seen[-1])


def segformer_tops(config: Any) -> re.Pattern[str]:
    """`stages.3`, in older versions of transformers `block.3`; and the head."""
    last = len(config.depths) - 1
    return re.compile(rf"decode_head\.|(.*\.)?(stages|patch_embeddings|block|layer_norm)\.{last}\.")


FAMILIES: dict[str, Family] = {
    "segformer": Family(
        SegformerConfig, SegformerForSemanticSegmentation, ("decode_head",), segformer_tops, segformer_outputs
    ),
    "segadapt_segformer_mmseg": Family(
        MmsegSegformerConfig, MmsegSegformer, ("decode_head",), segformer_tops, segformer_outputs
    ),
    "segadapt_deeplabv3": Family(
        DeepLabV3Config, DeepLabV3, convolutional.HEADS, convolutional.tops, convolutional.outputs
    ),
    "segadapt_hrnet": Family(
        HrnetConfig, HrnetSegmenter, convolutional.HEADS, convolutional.tops, convolutional.outputs
    ),
    "segadapt_hrnet_ocr": Family(
        HrnetOcrConfig, HrnetOcr, convolutional.HEADS, convolutional.tops, convolutional.outputs
    ),
}
