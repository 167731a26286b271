"""SegFormer as mmsegmentation builds it: the encoder of transformers, and a head that transformers does not have.

B images   3 RGB   H W image px   C dataset classes   h w logits, ceil(px / 4)   D head channels
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import SegformerConfig, SegformerModel
from transformers.models.segformer.modeling_segformer import SegformerPreTrainedModel

from segadapt.models.discriminative.convolutional import Classifier

LAYER_NORM_EPS = 1e-6  # of every LayerNorm in mmsegmentation's encoder; transformers has 1e-5 and reads no setting


class MmsegSegformerConfig(SegformerConfig):
    """As SegformerConfig; `layer_norm_eps`, which SegFormer of transformers ignores, is used."""

    model_type = "segadapt_segformer_mmseg"


class ConvModule(nn.Module):
    """1x1 convolution, BatchNorm, ReLU; names as in mmcv."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, kernel_size=1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x_BDhw: Tensor) -> Tensor:
        return self.bn(self.conv(x_BDhw)).relu()


class MmsegHead(nn.Module):
    """SegformerHead of mmsegmentation: a convolution, BatchNorm and ReLU a stage, where NVIDIA's has one linear layer.

    The maps are joined in the order of the stages; NVIDIA joins them in reverse.
    """

    def __init__(self, config: SegformerConfig):
        super().__init__()
        width = config.decoder_hidden_size
        self.convs = nn.ModuleList(ConvModule(channels, width) for channels in config.hidden_sizes)
        self.fusion_conv = ConvModule(width * len(config.hidden_sizes), width)
        self.dropout = nn.Dropout2d(config.classifier_dropout_prob)  # whole channels; transformers' head drops numbers
        self.conv_seg = Classifier(width, config.num_labels or 0)

    def fused(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps of the stages, [B, channels, px / 4 ... px / 32], to what the classifier sees, [B, D, h, w]."""
        size = maps[0].shape[2:]
        same_size = [
            interpolate(conv(x_BDyx), size=size, mode="bilinear", align_corners=False)
            for conv, x_BDyx in zip(self.convs, maps, strict=True)
        ]
        return self.fusion_conv(torch.cat(same_size, dim=1))

    def classified(self, fused_BDhw: Tensor) -> Tensor:
        """Logits [B, C, h, w]."""
        return self.conv_seg(self.dropout(fused_BDhw))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps of the stages to logits."""
        return self.classified(self.fused(maps))


def stage_maps(encoder: SegformerModel, pixels_B3HW: Tensor) -> list[Tensor]:
    """[B, channels, px / 4 ... px / 32], as the encoder's forward gives them under output_hidden_states.

    That notes them with hooks, at which torch.compile would break its graph.
    """
    maps, x_BDyx = [], pixels_B3HW
    for stage in encoder.stages:
        x_BDyx = stage(x_BDyx)
        maps.append(x_BDyx)
    return maps


@dataclass(frozen=True)
class Scored:
    """What the net returns; transformers' class names it the same."""

    logits: Tensor  # [B, C, h, w]


class MmsegSegformer(SegformerPreTrainedModel):
    """Encoder and head. Saved and read as transformers' own: config.json with our model type, and model.safetensors."""

    config: MmsegSegformerConfig
    config_class = MmsegSegformerConfig

    def __init__(self, config: MmsegSegformerConfig):
        super().__init__(config)
        self.segformer = SegformerModel(config)
        for module in self.segformer.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = config.layer_norm_eps
        self.decode_head = MmsegHead(config)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> Scored:
        """Normalised images [B, 3, H, W]."""
        return Scored(self.decode_head(stage_maps(self.segformer, pixel_values)))
