"""K-Net for semantic segmentation (Zhang et al. 2021, arXiv 2106.14855): UPerNet, whose class kernels stages refine.

# B images  3 RGB  H W image px  C dataset classes, a kernel each  h w logits, about px / 4  D channels of features and
# of a kernel  P pieces that a kernel is updated in  E channels of a piece, D / P
"""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import UperNetConfig, initialization

from segadapt.models.discriminative import Outputs
from segadapt.models.discriminative.convolutional import check_numbers
from segadapt.models.discriminative.mmseg import Scored
from segadapt.models.discriminative.upernet import SemanticUperNet, auxiliary, fused

HEADS = ("decode_head", "auxiliary_head", "stages")


@strict
class KnetConfig(UperNetConfig):
    """As UperNetConfig, and three stages as mmsegmentation's recipes have them.

    Args:
        stages: updates of the kernels, each with logits of its own.
        update_size: channels that the updator takes at a time; hidden_size is a multiple.
        update_heads: of the attention among kernels.
        feedforward_size: channels inside the feed-forward layer behind it.
        dropout: share of channels dropped before UPerNet's own classifier, in training.
    """

    model_type = "segadapt_knet"

    stages: int = 3
    update_size: int = 256
    update_heads: int = 8
    feedforward_size: int = 2048
    dropout: float | int = 0.1

    def validate_sizes(self) -> None:
        """Asked by `strict`. ValueError: a value of which no net can be made."""
        check_numbers(self, "hidden_size", "stages", "update_size", "update_heads", "feedforward_size")
        for name in ("update_size", "update_heads"):
            if self.hidden_size % getattr(self, name):
                raise ValueError(f"hidden_size={self.hidden_size}: expected a multiple of {name}={getattr(self, name)}")


class Update(nn.Module):
    """Adaptive kernel update, section 3.2 of the paper: what a class's pixels say, and its kernel, each behind a gate.

    The gates come of the product of both. Behind the sum a linear layer, LayerNorm and ReLU, which only its authors'
    code has.
    """

    def __init__(self, size: int):
        super().__init__()
        self.of_pixels = nn.Linear(size, 2 * size)  # one half for the gates, one to pass
        self.of_kernel = nn.Linear(size, 2 * size)
        self.pixel_gate = nn.Sequential(nn.Linear(size, size), nn.LayerNorm(size), nn.Sigmoid())
        self.kernel_gate = nn.Sequential(nn.Linear(size, size), nn.LayerNorm(size), nn.Sigmoid())
        self.pixel_norm = nn.LayerNorm(size)
        self.kernel_norm = nn.LayerNorm(size)
        self.out = nn.Sequential(nn.Linear(size, size), nn.LayerNorm(size), nn.ReLU())

    def forward(self, pixels_BCPE: Tensor, kernel_BCPE: Tensor) -> Tensor:
        pixel_in, pixel_out = self.of_pixels(pixels_BCPE).chunk(2, dim=-1)
        kernel_in, kernel_out = self.of_kernel(kernel_BCPE).chunk(2, dim=-1)
        both = pixel_in * kernel_in
        passed = self.pixel_gate(both) * self.pixel_norm(pixel_out)
        kept = self.kernel_gate(both) * self.kernel_norm(kernel_out)
        return self.out(passed + kept)


class Stage(nn.Module):
    """Kernels and the logits that they gave, to better ones (figure 2 of the paper)."""

    def __init__(self, config: KnetConfig):
        super().__init__()
        size, self._heads, self._piece = config.hidden_size, config.update_heads, config.update_size
        self.transform = nn.Conv2d(size, size, kernel_size=1)
        self.update = Update(config.update_size)
        self.query_key_value = nn.Linear(size, 3 * size)
        self.attended = nn.Linear(size, size)
        self.attention_norm = nn.LayerNorm(size)
        wide = config.feedforward_size
        self.feedforward = nn.Sequential(nn.Linear(size, wide), nn.ReLU(), nn.Linear(wide, size))
        self.feedforward_norm = nn.LayerNorm(size)
        self.classifying = nn.Sequential(
            nn.Linear(size, size, bias=False), nn.LayerNorm(size), nn.ReLU(), nn.Linear(size, size)
        )

    def forward(self, features_BDhw: Tensor, kernels_BCD: Tensor, logits_BChw: Tensor) -> tuple[Tensor, Tensor]:
        """Gives the logits of this stage and the kernels for the next."""
        x_BDhw = self.transform(features_BDhw)
        # under autocast a softmax is float32, whatever its logits are
        pixels_BCD = torch.einsum("bchw,bdhw->bcd", logits_BChw.softmax(dim=1), x_BDhw)
        pieces = (-1, self._piece)
        kernels_BCD = self.update(pixels_BCD.unflatten(2, pieces), kernels_BCD.unflatten(2, pieces)).flatten(2)
        kernels_BCD = self.attention_norm(kernels_BCD + self._attention(kernels_BCD))
        kernels_BCD = self.feedforward_norm(kernels_BCD + self.feedforward(kernels_BCD))
        return torch.einsum("bcd,bdhw->bchw", self.classifying(kernels_BCD), x_BDhw), kernels_BCD

    def _attention(self, kernels_BCD: Tensor) -> Tensor:
        """What each kernel takes of all."""
        query, key, value = (
            part.unflatten(2, (self._heads, -1)).transpose(1, 2)
            for part in self.query_key_value(kernels_BCD).chunk(3, dim=2)
        )
        return self.attended(scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Knet(SemanticUperNet):
    """Kernels begin as the weights of UPerNet's classifier, logits as what it says; those of the last stage score."""

    config: KnetConfig
    config_class = KnetConfig

    def __init__(self, config: KnetConfig):
        super().__init__(config)
        self.dropout = nn.Dropout2d(config.dropout)
        self.stages = nn.ModuleList(Stage(config) for _ in range(config.stages))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Asked by transformers for each module that has parameters of its own, and for no other.

        The stages begin as their authors have it, the rest as UPerNet of transformers, whose constructor asks as well.
        """
        super()._init_weights(module)
        stages = self._modules.get("stages")
        if stages is not None and module in set(stages.modules()):
            for parameter in module.parameters(recurse=False):
                if parameter.ndim > 1:
                    initialization.xavier_uniform_(parameter)

    def refined(self, features_BDhw: Tensor) -> list[Tensor]:
        """Logits [B, C, h, w] of UPerNet's classifier and of each stage behind it."""
        classifier = self.decode_head.classifier
        logits = [classifier(self.dropout(features_BDhw))]
        kernels_BCD = classifier.weight.flatten(1).expand(len(features_BDhw), -1, -1)
        for stage in self.stages:
            logits_BChw, kernels_BCD = stage(features_BDhw, kernels_BCD, logits[-1])
            logits.append(logits_BChw)
        return logits

    def forward(self, pixel_values: Tensor) -> Scored:
        """Normalised images [B, 3, H, W]."""
        return Scored(self.refined(fused(self.decode_head, self.backbone(pixel_values).feature_maps))[-1])


def outputs(net: Any, pixels_B3HW: Tensor) -> Outputs:
    """For training, see NetSegmenter.outputs. The features are what the kernels meet first: UPerNet's."""
    maps = net.backbone(pixels_B3HW).feature_maps
    features_BDhw = fused(net.decode_head, maps)
    *earlier, last_BChw = net.refined(features_BDhw)
    stages_BChw = tuple(earlier) if net.training else ()
    return Outputs(last_BChw, auxiliary(net, maps), features_BDhw, stages_BChw=stages_BChw)
