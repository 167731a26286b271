"""What our convolutional nets share: convolution and norm, classifier, a plain head, how weights start, what comes out.

# B images  3 RGB  H W image px  C dataset classes  h w logits  D feature channels  y x features
"""

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, initialization

from segadapt.models.discriminative import Outputs

HEADS = ("head", "auxiliary_head")  # everything but `encoder`


@dataclass(frozen=True)
class Maps:
    """What a net returns."""

    logits: Tensor  # [B, C, h, w], raw
    auxiliary: Tensor | None  # raw, of the auxiliary head; None in eval mode unless the logits need it
    features: Tensor  # [B, D, y, x], what the encoder hands to the head


def outputs(net: Any, pixels_B3HW: Tensor) -> Outputs:
    """For training, see NetSegmenter.outputs."""
    found = net(pixel_values=pixels_B3HW)
    return Outputs(found.logits, found.auxiliary, found.features)


def tops(net: Any) -> re.Pattern[str]:
    """The last stage has this name in all our encoders, whatever their sizes."""
    return re.compile(r"encoder\.(layer4|stage4)\.|head\.|auxiliary_head\.")


def check_lists(config: PreTrainedConfig, **lengths: tuple[int, ...]) -> None:
    """ValueError: a list of a config that has another length than these, or a number below 1."""
    for name, allowed in lengths.items():
        given = list(getattr(config, name))
        if len(given) not in allowed or min(given) < 1:
            expected = " or ".join(map(str, allowed))
            raise ValueError(f"{name}={given}: expected {expected} numbers of 1 or more")


def check_numbers(config: PreTrainedConfig, *sizes: str) -> None:
    """ValueError: a size or count below 1, or a dropout outside of [0, 1)."""
    for name in sizes:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)}: expected 1 or more")
    dropout = config.dropout
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: expected at least 0 and less than 1")


class ConvNorm(nn.Module):
    """Convolution that keeps the size at stride 1, BatchNorm and, unless told otherwise, ReLU."""

    def __init__(
        self, channels: int, out_channels: int, kernel: int, *, stride: int = 1, dilation: int = 1, relu: bool = True
    ):
        super().__init__()
        self.conv = nn.Conv2d(
            channels, out_channels, kernel, stride, padding=dilation * (kernel // 2), dilation=dilation, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True) if relu else nn.Identity()

    def forward(self, x_BDyx: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x_BDyx)))


class Classifier(nn.Conv2d):
    """1x1 convolution to a score a class; a type of its own as its weights start in their own way."""

    def __init__(self, channels: int, num_classes: int, *, bias: bool = True):
        super().__init__(channels, num_classes, kernel_size=1, bias=bias)


class PlainHead(nn.Module):
    """3x3 convolution with norm and ReLU, whole channels dropped, classifier."""

    def __init__(self, channels: int, width: int, num_classes: int, *, dropout: float, bias: bool = True):
        super().__init__()
        self.conv = ConvNorm(channels, width, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = Classifier(width, num_classes, bias=bias)

    def forward(self, x_BDyx: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.conv(x_BDyx)))


class ConvolutionalNet(PreTrainedModel):
    """A net of transformers' kind with `encoder`, `head` and maybe `auxiliary_head`.

    Convolutions start as in He et al. 2015 (fan out, ReLU), BatchNorm at 1 and 0, classifiers from N(0, 0.01) as in
    mmsegmentation.
    """

    main_input_name = "pixel_values"

    def _init_weights(self, module: nn.Module) -> None:
        # by transformers' own functions, which leave what was loaded as it is
        if isinstance(module, Classifier):
            initialization.normal_(module.weight, std=0.01)
            if module.bias is not None:
                initialization.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            initialization.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        else:
            super()._init_weights(module)
