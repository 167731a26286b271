"""DeepLabV3 (Chen et al. 2017, arXiv 1706.05587) on a dilated ResNet, with an auxiliary head on its third stage.

# B images  3 RGB  H W image px  C dataset classes  h w logits, px / output stride  D channels
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedConfig

from segadapt.errors import UserError
from segadapt.models.discriminative.convolutional import (
    Classifier,
    ConvNorm,
    ConvolutionalNet,
    Maps,
    PlainHead,
    check_lists,
    check_numbers,
)
from segadapt.models.discriminative.resnet import EXPANSION, ResNet


@strict
class DeepLabV3Config(PreTrainedConfig):
    """ResNet-50 with a deep stem; see ResNet for the first four.

    Args:
        head_size: channels of each branch of the pyramid.
        rates: dilations of its 3x3 convolutions, in feature px; the paper has (6, 12, 18) at an output stride of 16.
        auxiliary_size: channels of the auxiliary head.
        dropout: share of channels dropped before the classifier, in training.
    """

    model_type = "segadapt_deeplabv3"

    depths: list[int] | tuple[int, ...] = (3, 4, 6, 3)
    widths: list[int] | tuple[int, ...] = (64, 128, 256, 512)
    stem_sizes: list[int] | tuple[int, ...] = (64, 64, 128)
    output_stride: int = 8
    head_size: int = 512
    rates: list[int] | tuple[int, ...] = (12, 24, 36)
    auxiliary_size: int = 256
    dropout: float | int = 0.1

    def validate_sizes(self) -> None:
        """Asked by `strict`. ValueError: a value of which no net can be made."""
        if self.output_stride not in (8, 16):
            raise ValueError(f"output_stride={self.output_stride}: expected 8 or 16")
        check_lists(self, depths=(4,), widths=(4,), stem_sizes=(1, 3))
        check_numbers(self, "head_size", "auxiliary_size")
        if not self.rates or min(self.rates) < 1:
            raise ValueError(f"rates={list(self.rates)}: expected one number or more, each 1 or more")


class PyramidHead(nn.Module):
    """Atrous spatial pyramid pooling, and its refinement, which has no ReLU."""

    def __init__(self, config: DeepLabV3Config):
        super().__init__()
        channels, size = EXPANSION * config.widths[-1], config.head_size
        self.branches = nn.ModuleList(
            [ConvNorm(channels, size, 1), *(ConvNorm(channels, size, 3, dilation=rate) for rate in config.rates)]
        )
        self.pool = ConvNorm(channels, size, 1)
        self.project = ConvNorm(size * (2 + len(config.rates)), size, 3)
        self.refine = ConvNorm(size, size, 3, relu=False)
        self.dropout = nn.Dropout2d(config.dropout)
        self.classifier = Classifier(size, config.num_labels or 0)

    def forward(self, x_BDhw: Tensor) -> Tensor:
        pooled_BDhw = self.pool(x_BDhw.mean(dim=(2, 3), keepdim=True)).expand(-1, -1, *x_BDhw.shape[2:])
        branches = [branch(x_BDhw) for branch in self.branches]
        return self.classifier(self.dropout(self.refine(self.project(torch.cat([*branches, pooled_BDhw], dim=1)))))


class DeepLabV3(ConvolutionalNet):
    """Encoder and heads; the features are the encoder's last map."""

    config: DeepLabV3Config
    config_class = DeepLabV3Config

    def __init__(self, config: DeepLabV3Config):
        super().__init__(config)
        self.encoder = ResNet(config.depths, config.widths, config.stem_sizes, config.output_stride)
        self.head = PyramidHead(config)
        self.auxiliary_head = PlainHead(
            EXPANSION * config.widths[-2], config.auxiliary_size, config.num_labels or 0, dropout=0.0
        )
        self.post_init()

    def forward(self, pixel_values: Tensor) -> Maps:
        """Normalised images [B, 3, H, W]."""
        third_BDhw, last_BDhw = self.encoder(pixel_values)
        auxiliary_BChw = self.auxiliary_head(third_BDhw) if self.training else None
        return Maps(self.head(last_BDhw), auxiliary_BChw, last_BDhw)
