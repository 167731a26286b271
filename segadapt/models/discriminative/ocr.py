"""HRNet with object-contextual representations (OCR, Yuan et al. 2020, arXiv 1909.11065).

# B images  3 RGB  H W image px  C dataset classes  h w logits, ceil(px / 4)  D channels  N = h w pixels  K keys
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from segadapt.models.discriminative.convolutional import (
    Classifier,
    ConvNorm,
    ConvolutionalNet,
    Maps,
    PlainHead,
    check_numbers,
)
from segadapt.models.discriminative.hrnet import Hrnet, HrnetConfig


@strict
class HrnetOcrConfig(HrnetConfig):
    """HRNet-W48 with OCR; see HrnetConfig. "OCR-B" has ocr_size 256, key_size 128, auxiliary_size 256.

    Args:
        ocr_size: channels of pixels and regions.
        key_size: channels of query, key and value.
        auxiliary_size: channels of the head that draws the soft regions.
    """

    model_type = "segadapt_hrnet_ocr"

    ocr_size: int = 512
    key_size: int = 256
    auxiliary_size: int = 720
    dropout: float | int = 0.05

    def validate_sizes(self) -> None:
        """As HrnetConfig."""
        super().validate_sizes()
        check_numbers(self, "ocr_size", "key_size", "auxiliary_size")


def region_vectors(pixels_BDhw: Tensor, regions_BChw: Tensor) -> Tensor:
    """Mean feature of each class's soft region (eq. 2 of the paper): weights are a softmax over the pixels.

    Returns:
        regions_BDC1.
    """
    weights_BCN = regions_BChw.flatten(2).softmax(dim=2)
    return torch.einsum("bcn,bdn->bdc", weights_BCN, pixels_BDhw.flatten(2))[..., None]


class OcrHead(nn.Module):
    """Features and soft regions to logits: each pixel attends to the regions (eqs. 3 to 5 of the paper)."""

    def __init__(self, channels: int, config: HrnetOcrConfig):
        super().__init__()
        size, keys = config.ocr_size, config.key_size
        self.pixels = ConvNorm(channels, size, 3)
        self.query = nn.Sequential(ConvNorm(size, keys, 1), ConvNorm(keys, keys, 1))
        self.key = nn.Sequential(ConvNorm(size, keys, 1), ConvNorm(keys, keys, 1))
        self.value = ConvNorm(size, keys, 1)
        self.context = ConvNorm(keys, size, 1)
        self.fuse = ConvNorm(2 * size, size, 1)
        self.dropout = nn.Dropout2d(config.dropout)
        self.classifier = Classifier(size, config.num_labels or 0)

    def forward(self, features_BDhw: Tensor, regions_BChw: Tensor) -> Tensor:
        pixels_BDhw = self.pixels(features_BDhw)
        regions_BDC1 = region_vectors(pixels_BDhw, regions_BChw)
        query_BNK, key_BCK, value_BCK = (
            project(of).flatten(2).transpose(1, 2)
            for project, of in ((self.query, pixels_BDhw), (self.key, regions_BDC1), (self.value, regions_BDC1))
        )
        found_BKN = scaled_dot_product_attention(query_BNK, key_BCK, value_BCK).transpose(1, 2)
        context_BDhw = self.context(found_BKN.unflatten(2, pixels_BDhw.shape[2:]))
        return self.classifier(self.dropout(self.fuse(torch.cat([context_BDhw, pixels_BDhw], dim=1))))


class HrnetOcr(ConvolutionalNet):
    """Encoder, the auxiliary head, whose logits are the soft regions, and OCR; the features are the joined branches."""

    config: HrnetOcrConfig
    config_class = HrnetOcrConfig

    def __init__(self, config: HrnetOcrConfig):
        super().__init__(config)
        channels = sum(config.hidden_sizes)
        self.encoder = Hrnet(config)
        self.auxiliary_head = PlainHead(channels, config.auxiliary_size, config.num_labels or 0, dropout=0.0)
        self.head = OcrHead(channels, config)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> Maps:
        """Normalised images [B, 3, H, W]."""
        features_BDhw = self.encoder(pixel_values)
        regions_BChw = self.auxiliary_head(features_BDhw)
        return Maps(self.head(features_BDhw, regions_BChw), regions_BChw, features_BDhw)
