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
from segadapt.models.discriminative import Outputs
from segadapt.models.discriminative.foreign import (
    RESERVED,
    SETTING,
    ForeignNet,
    check_arguments,
    explain_arguments,
    explain_images,
    package,
)
from segadapt.models.discriminative.mmseg import Scored
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
    has_unread_weights = True  # of some, such as pspnet and efficientnet: no gradient comes for them

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
        self.post_init()

    def forward(self, pixel_values: Tensor) -> Scored:
        """Normalised images [B, 3, H, W]."""
        padded_B3HW = self.padded(pixel_values, self._multiple_px)
        with explain_images(self.config.encoder_name, padded_B3HW):
            logits_BChw = self.model(padded_B3HW)
        return Scored(self.without_padding(logits_BChw, padded_B3HW, pixel_values))


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


def smp_outputs(net: Any, pixels_B3HW: Tensor) -> Outputs:
    """The features are the decoder's map; there is no auxiliary head."""
    seen: list[Tensor] = []
    handle = net.model.segmentation_head.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        logits_BChw = net(pixel_values=pixels_B3HW).logits
    finally:
        handle.remove()
    return Outputs(logits_BChw, None, seen[-1])


def smp_tops(net: Any) -> re.Pattern[str]:
    """Decoder and head, and the last stage of the encoder: of timm, a ResNet or a MiT; of others its name varies."""
    inner = getattr(net.model.encoder, "model", None)
    last = last_stage(inner) if hasattr(inner, "feature_info") else r"(layer4|block4|norm4)\."
    return re.compile(rf"model\.(decoder|segmentation_head|encoder\.{last})")
