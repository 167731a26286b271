"""Any encoder of timm that gives maps, under SegFormer's head as mmsegmentation builds it; needs the extra `timm`.

# B images  3 RGB  H W image px  C dataset classes  h w logits, as large as the first map  D channels
"""

import re
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import PreTrainedConfig, SegformerConfig

from segadapt.errors import UserError, did_you_mean
from segadapt.models.discriminative.convolutional import Maps, check_numbers
from segadapt.models.discriminative.foreign import (
    SETTING,
    ForeignNet,
    check_arguments,
    explain_arguments,
    explain_images,
    package,
)
from segadapt.models.discriminative.mmseg import MmsegHead

LEAST_STRIDE = 4  # of the maps that are taken unless out_indices says which


@strict
class TimmConfig(PreTrainedConfig):
    """ResNet-50.

    Args:
        encoder_name: of timm, such as convnext_tiny, with or without the tag of its weights.
        out_indices: which of the encoder's maps, by timm's count from 0, rising; None: those that timm gives, of stride
            4 and more. The net writes them here, so that a saved one stays as it is.
        options: more arguments of timm.create_model, such as {output_stride: 8}.
        head_size: channels of the head.
        dropout: share of channels dropped before the classifier, in training.
        image_mean, image_std: of RGB in 0..1; None: those of timm's weights of that name.
    """

    model_type = "segadapt_timm"

    encoder_name: str = "resnet50"
    out_indices: list[int] | tuple[int, ...] | None = None
    options: dict[str, Any] | None = None
    head_size: int = 256
    dropout: float | int = 0.1
    image_mean: list[float] | tuple[float, ...] | None = None
    image_std: list[float] | tuple[float, ...] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_arguments(self.encoder_name, self.options)
        super().__post_init__(**kwargs)

    def validate_sizes(self) -> None:
        """Asked by `strict`. ValueError: a value of which no net can be made."""
        check_numbers(self, "head_size")
        if self.out_indices is not None:
            given = list(self.out_indices)
            if not given or given != sorted(set(given)) or given[0] < 0:
                raise ValueError(f"out_indices={given}: expected one number or more, from 0 and rising")


class TimmSegmenter(ForeignNet):
    """Encoder and head; the features are what the classifier sees. Images are padded to the largest stride.

    One that has the size of an encoder of fixed size is taken as it is.
    """

    config: TimmConfig
    config_class = TimmConfig

    def __init__(self, config: TimmConfig):
        super().__init__(config)
        timm = package("timm", "timm")
        check_known(timm, config.encoder_name)
        options = dict(config.options or {})
        if config.out_indices is not None:
            options["out_indices"] = tuple(config.out_indices)
        which = "" if config.out_indices is None else f" with out_indices={list(config.out_indices)}"
        with explain_arguments(f"timm's {config.encoder_name}{which}"):
            self.encoder: Any = self.adopt(
                lambda: timm.create_model(config.encoder_name, pretrained=False, features_only=True, **options),
                timm.layers.BatchNormAct2d,
            )
        info = self.encoder.feature_info
        self._is_taken = [config.out_indices is not None or stride >= LEAST_STRIDE for stride in info.reduction()]
        if not any(self._is_taken):
            raise UserError(f"{SETTING}.encoder_name={config.encoder_name} has no map of stride {LEAST_STRIDE} or "
                            "more. Set out_indices.")  # fmt: skip
        config.out_indices = self._taken(info.out_indices)
        self._multiple_px, known = max(info.reduction()), self.encoder.pretrained_cfg
        own_size = options.get("img_size") or known["input_size"][1:] if known.get("fixed_input_size") else None
        self._own_size = (own_size, own_size) if isinstance(own_size, int) else own_size and tuple(own_size)  # px
        config.image_mean = list(known["mean"]) if config.image_mean is None else config.image_mean
        config.image_std = list(known["std"]) if config.image_std is None else config.image_std
        of_head = SegformerConfig(
            hidden_sizes=self._taken(info.channels()),
            decoder_hidden_size=config.head_size,
            classifier_dropout_prob=config.dropout,
        )
        of_head.num_labels = config.num_labels or 0
        self.head = MmsegHead(of_head)
        self.post_init()

    def _taken(self, values: Any) -> list[Any]:
        return [value for value, is_taken in zip(values, self._is_taken, strict=True) if is_taken]

    def forward(self, pixel_values: Tensor) -> Maps:
        """Normalised images [B, 3, H, W]."""
        is_own_size = pixel_values.shape[2:] == self._own_size  # 224 px of LeViT are no multiple of its stride of 64
        padded_B3HW = pixel_values if is_own_size else self.padded(pixel_values, self._multiple_px)
        with explain_images(self.config.encoder_name, pixel_values):
            maps = self.encoder(padded_B3HW)
        maps = self._taken(maps)
        if str(getattr(self.encoder, "output_fmt", "NCHW")).endswith("NHWC"):
            maps = [map_BhwD.movedim(3, 1) for map_BhwD in maps]
        features_BDhw = self.without_padding(self.head.fused(maps), padded_B3HW, pixel_values)
        return Maps(self.head.classified(features_BDhw), None, features_BDhw)


def check_known(timm: Any, name: str) -> None:
    """UserError: timm has no such architecture."""
    if not timm.is_model(name.split(".")[0]):
        near = did_you_mean(name, timm.list_models())
        raise UserError(f"{SETTING}.encoder_name={name}: timm {timm.__version__} has no such architecture.{near}")


def last_stage(encoder: Any) -> str:
    """Pattern of the last map's modules, by the name that timm gives them."""
    info = encoder.feature_info  # of a whole net a list of dicts
    name = info[-1]["module"] if isinstance(info, list) else info.module_name()[-1]
    return rf"(model\.)*{'[._]'.join(map(re.escape, name.split('.')))}\."


def timm_tops(net: Any) -> re.Pattern[str]:
    """The head, and the last stage where timm names it."""
    return re.compile(rf"head\.|encoder\.{last_stage(net.encoder)}")
