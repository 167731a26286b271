"""Any net of segmentation_models_pytorch (smp); needs the extra `smp`.

# B images  3 RGB  H W image px  C dataset classes  h w logits, mostly px  D channels  y x decoder's map
"""

import inspect
import math
import re
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import PreTrainedConfig

from segadapt.errors import UserError, did_you_mean
from segadapt.models.discriminative.convolutional import Maps
from segadapt.models.discriminative.foreign import (
    RESERVED,
    SETTING,
    ForeignNet,
    check_arguments,
    explain_arguments,
    explain_images,
    package,
)
from segadapt.models.discriminative.timm_net import check_known, last_stage

MULTIPLE_PX = 32  # smp's DPT asks for twice the stride that it checks
OF_TIMM = "tu-"  # in front of the names of timm's encoders


@strict
class SmpConfig(PreTrainedConfig):
    """U-Net on ResNet-34.

    Args:
        arch: of smp, such as unet, fpn, deeplabv3plus.
        encoder_name: of smp, such as resnet34, or with `tu-` of timm.
        options: more arguments of smp.create_model, such as {decoder_channels: [128, 64, 32, 16, 8]}.
        image_mean, image_std: of RGB in 0..1; None: ImageNet's.
    """

    model_type = "segadapt_smp"

    arch: str = "unet"
    encoder_name: str = "resnet34"
    options: dict[str, Any] | None = None
    image_mean: list[float] | tuple[float, ...] | None = None
    image_std: list[float] | tuple[float, ...] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_arguments(self.encoder_name, self.options)
        super().__post_init__(**kwargs)


class SmpNet(ForeignNet):
    """smp's own net; images are padded to the multiple that it asks for, but for nets that ask for none."""

    config: SmpConfig
    config_class = SmpConfig

    def __init__(self, config: SmpConfig):
        super().__init__(config)
        smp, timm = package("segmentation_models_pytorch", "smp"), package("timm", "smp")
        options = config.options or {}
        _check(smp, timm, config.arch, config.encoder_name, options)
        with explain_arguments(f"smp's {config.arch} on {config.encoder_name}"):
            self.model: Any = self.adopt(
                lambda: smp.create_model(
                    config.arch, config.encoder_name, encoder_weights=None, classes=config.num_labels or 0, **options
                ),
                timm.layers.BatchNormAct2d,
            )
        is_free = not self.model.requires_divisible_input_shape
        self._multiple_px = 1 if is_free else math.lcm(MULTIPLE_PX, self.model.encoder.output_stride)
        # no gradient comes for some, see `spread`
        self.has_unread_weights = _has_unread_weights(config.arch.lower(), config.encoder_name, options)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> Maps:
        """Normalised images [B, 3, H, W]; the features are the decoder's map.

        The steps are those of the model's own forward, which does not give the features away.
        """
        padded_B3HW, model = self.padded(pixel_values, self._multiple_px), self.model
        with explain_images(self.config.encoder_name, pixel_values):
            maps = model.encoder(padded_B3HW)
            # DPT's encoder gives its tokens beside the maps
            features_BDyx = model.decoder(*maps) if self.config.arch.lower() == "dpt" else model.decoder(maps)
            logits_BChw = model.segmentation_head(features_BDyx)
        logits_BChw, features_BDyx = (
            self.without_padding(values, padded_B3HW, pixel_values) for values in (logits_BChw, features_BDyx)
        )
        return Maps(logits_BChw, None, features_BDyx)


def _check(smp: Any, timm: Any, arch: str, encoder_name: str, options: dict[str, Any]) -> None:
    """UserError: no such net or encoder, or an option that would have no effect."""
    kinds = smp.MODEL_ARCHITECTURES_MAPPING
    if arch.lower() not in kinds:
        raise UserError(f"{SETTING}.arch={arch} is no net of smp {smp.__version__}.{did_you_mean(arch.lower(), kinds)}")
    if encoder_name.startswith(OF_TIMM):
        return check_known(timm, encoder_name.removeprefix(OF_TIMM))  # which takes any option that timm takes
    encoders = smp.encoders.get_encoder_names()
    if encoder_name not in encoders:
        raise UserError(f"{SETTING}.encoder_name={encoder_name} is no encoder of smp {smp.__version__}."
                        f"{did_you_mean(encoder_name, encoders)} One of timm has {OF_TIMM} in front.")  # fmt: skip
    known = inspect.signature(kinds[arch.lower()]).parameters.keys() - {*RESERVED, "kwargs"}
    for key in options.keys() - known:
        raise UserError(f"{SETTING}.options.{key} is not an option of smp's {arch}.{did_you_mean(key, known)}")
    return None


def _has_unread_weights(arch: str, encoder_name: str, options: dict[str, Any]) -> bool:
    """Layers behind the last map that is read: of a shallower encoder, of DPT's ViT, of smp's own EfficientNets."""
    is_efficientnet = "efficientnet" in encoder_name and not encoder_name.startswith(OF_TIMM)
    return arch in ("pspnet", "dpt") or "encoder_depth" in options or is_efficientnet


def smp_tops(net: Any) -> re.Pattern[str]:
    """Decoder and head, and the last stage of the encoder: of timm, a ResNet or a MiT; of others its name varies."""
    inner = getattr(net.model.encoder, "model", None)
    last = last_stage(inner) if hasattr(inner, "feature_info") else r"(layer4|block4|norm4)\."
    return re.compile(rf"model\.(decoder|segmentation_head|encoder\.{last})")
