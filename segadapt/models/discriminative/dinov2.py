"""DINOv2 (Oquab et al. 2024) with the linear heads of its paper: BatchNorm and a 1x1 convolution on patch tokens.

# B images  3 RGB  H W image px  C dataset classes  h w patches, ceil(px / patch)  D head channels  T tokens
"""

from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from segadapt.errors import UserError, did_you_mean
from segadapt.models.discriminative.mmseg import Scored

# model_type of backbone_config: its classes in transformers
BACKBONES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "dinov2": (Dinov2Config, Dinov2Model),
    "dinov2_with_registers": (Dinov2WithRegistersConfig, Dinov2WithRegistersModel),
}


@strict
class Dinov2SegmenterConfig(PreTrainedConfig):
    """A backbone and a linear head.

    Args:
        backbone_config: of BACKBONES, with its `model_type`.
        layers: last layers whose tokens the head sees, side by side: 1 the "linear" head of the paper, 4 its "ms" head.
        frozen: training leaves the backbone as it is; false: all of it moves but its embeddings.
    """

    model_type = "segadapt_dinov2"
    has_no_defaults_at_init: ClassVar[bool] = True  # transformers 5.17 makes one without arguments when it saves

    backbone_config: dict[str, Any] | PreTrainedConfig | None = None
    layers: int = 1
    frozen: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        given = self.backbone_config or {}
        if isinstance(given, dict):
            kind = given.get("model_type")
            if kind not in BACKBONES:
                raise UserError(
                    f"model.discriminative.config.backbone_config.model_type={kind} is no backbone of segadapt_dinov2."
                    f"{did_you_mean(str(kind), BACKBONES)}"
                )
            given = self.backbone_config = BACKBONES[kind][0](**given)
        depth = given.num_hidden_layers  # pyright: ignore[reportAttributeAccessIssue]
        if not 1 <= self.layers <= depth:
            raise UserError(f"model.discriminative.config.layers={self.layers}: the backbone has {depth} layers; "
                            "expected 1 for the linear head, 4 for the ms head. Correct it.")  # fmt: skip
        super().__post_init__(**kwargs)


class LinearHead(nn.Module):
    """BatchNorm and a 1x1 convolution, without dropout; begins as mmsegmentation's heads do."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Conv2d(channels, num_classes, kernel_size=1)


class Dinov2Segmenter(PreTrainedModel):
    """Backbone and head. Images are padded around the centre to whole patches, with their mean colour."""

    config: Dinov2SegmenterConfig
    config_class = Dinov2SegmenterConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True

    def __init__(self, config: Dinov2SegmenterConfig):
        super().__init__(config)
        inner: Any = config.backbone_config
        self.backbone: Any = BACKBONES[inner.model_type][1](inner)
        self.decode_head = LinearHead(inner.hidden_size * config.layers, config.num_labels or 0)
        self.post_init()
        nn.init.normal_(self.decode_head.classifier.weight, std=0.01)
        nn.init.zeros_(self.decode_head.classifier.bias)  # pyright: ignore[reportArgumentType]

    def features(self, pixels_B3HW: Tensor) -> Tensor:
        """What the classifier sees, [B, D, h, w], of normalised images; rows and columns cover the image evenly."""
        inner: Any = self.config.backbone_config
        patch = inner.patch_size
        (top, bottom), (left, right) = (_padding(size, patch) for size in pixels_B3HW.shape[2:])
        padded_B3HW = pad(pixels_B3HW, (left, right, top, bottom))
        found = self.backbone(pixel_values=padded_B3HW, output_hidden_states=True)
        first_patch = 1 + getattr(inner, "num_register_tokens", 0)
        # the last of them is taken from its own place: versions of transformers differ in whether it is normed here
        layers = [self.backbone.layernorm(layer) for layer in found.hidden_states[-self.config.layers : -1]]
        tokens_BTD = torch.cat([*layers, found.last_hidden_state], dim=2)[:, first_patch:]
        rows, columns = (size // patch for size in padded_B3HW.shape[2:])
        maps_BDhw = tokens_BTD.transpose(1, 2).unflatten(2, (rows, columns))
        H, W = pixels_B3HW.shape[2:]
        down_hh = covering(rows, H, before=top, patch=patch, like=maps_BDhw)
        across_ww = covering(columns, W, before=left, patch=patch, like=maps_BDhw)
        return self.decode_head.norm(down_hh @ maps_BDhw @ across_ww.T)

    def forward(self, pixel_values: Tensor) -> Scored:
        """Normalised images [B, 3, H, W]."""
        return Scored(self.decode_head.classifier(self.features(pixel_values)))


def _padding(size: int, patch: int) -> tuple[int, int]:
    """Pixels before and behind, so that a side is whole patches; none where it is already."""
    missing = -size % patch
    return missing // 2, missing - missing // 2


def covering(patches: int, size: int, *, before: int, patch: float, like: Tensor) -> Tensor:
    """Matrix [patches, patches] from a padded side's values to as many that cover the image alone.

    Linear between the centres of patches, as `interpolate` with align_corners=False, and on GPUs deterministic too. The
    identity where nothing is padded.

    Args:
        size: of the image, px.
        before: padding in front of it, px.
        patch: px of the padded side to a value.
    """
    index_h = torch.arange(patches, device=like.device, dtype=torch.float64)
    wanted_h = ((index_h + 0.5) * (size / patches) + before) / patch - 0.5
    wanted_h = wanted_h.clamp(0, patches - 1)
    return (1 - (wanted_h[:, None] - index_h[None]).abs()).clamp(min=0).to(like.dtype)
