"""ResNet with bottleneck blocks as encoder (He et al. 2016), strides replaced by dilation; names of ImageNet's files.

# B images  3 RGB  H W image px  D channels  y x features
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from segadapt.models.discriminative.convolutional import ConvNorm
from segadapt.models.discriminative.keymaps import add_counters

EXPANSION = 4  # channels of a block's map, in those of its 3x3 convolution
DROPPED = {"fc": "classifies ImageNet"}  # modules of ImageNet's files without a place here: why
# names of the stem's modules: mmsegmentation's `resnet50_v1c` counts ReLUs, torchvision and openseg number each kind
STEM = {f"stem.{3 * index}": f"stem.{index}.conv" for index in range(3)}
STEM |= {f"stem.{3 * index + 1}": f"stem.{index}.bn" for index in range(3)}
STEM |= {f"{kind}{index + 1}": f"stem.{index}.{kind}" for kind in ("conv", "bn") for index in range(3)}


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride, 1x1, and the shortcut; names as in torchvision."""

    def __init__(self, channels: int, width: int, *, stride: int = 1, dilation: int = 1):
        super().__init__()
        out_channels = EXPANSION * width
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = (
            nn.Identity()
            if stride == 1 and channels == out_channels
            else nn.Sequential(nn.Conv2d(channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))
        )

    def forward(self, x_BDyx: Tensor) -> Tensor:
        y_BDyx = self.bn1(self.conv1(x_BDyx)).relu_()
        y_BDyx = self.bn2(self.conv2(y_BDyx)).relu_()
        return (self.bn3(self.conv3(y_BDyx)) + self.downsample(x_BDyx)).relu_()


class ResNet(nn.Module):
    """Images to the maps of its last two stages.

    Args:
        depths: blocks of the four stages: (3, 4, 6, 3) ResNet-50, (3, 4, 23, 3) ResNet-101.
        widths: channels of the four stages' 3x3 convolutions; their maps have EXPANSION times as many.
        stem_sizes: channels of the stem: one of a 7x7 convolution, or three of 3x3 convolutions ("deep stem", v1c).
        output_stride: px of the image to a pixel of the last map, 8, 16 or 32; what is missing to 32 is dilation. A
            dilated map is the strided one with the pixels between filled in (holes, "a trous"): so the first block of
            such a stage has the dilation of the stage before, as in torchvision and mmsegmentation.
    """

    def __init__(self, depths: Sequence[int], widths: Sequence[int], stem_sizes: Sequence[int], output_stride: int):
        super().__init__()
        kernel = 7 if len(stem_sizes) == 1 else 3
        sizes = (3, *stem_sizes)
        self.stem = nn.Sequential(
            *(
                ConvNorm(sizes[index], sizes[index + 1], kernel, stride=2 if index == 0 else 1)
                for index in range(len(stem_sizes))
            )
        )
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels, stride, dilation = stem_sizes[-1], 4, 1
        stages = []
        for depth, width, step in zip(depths, widths, (1, 2, 2, 2), strict=True):
            before = dilation
            if stride * step > output_stride:
                dilation, step = dilation * step, 1
            stride *= step
            first = Bottleneck(channels, width, stride=step, dilation=before)
            channels = EXPANSION * width
            others = (Bottleneck(channels, width, dilation=dilation) for _ in range(depth - 1))
            stages.append(nn.Sequential(first, *others))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages

    def forward(self, pixels_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images to the maps of stages 3 and 4; at an output stride of 8 or 16 of one size."""
        third_BDyx = self.layer3(self.layer2(self.layer1(self.maxpool(self.stem(pixels_B3HW)))))
        return third_BDyx, self.layer4(third_BDyx)


def resnet_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ImageNet weights of a ResNet under the names of `ResNet`; a key that is not known keeps its own.

    Known are the names of torchvision (7x7 stem), of mmsegmentation's v1c files, and of openseg's (both three 3x3).
    Keys of DROPPED are left out.
    """
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        if module not in DROPPED:
            out[f"{STEM[module]}.{kind}" if module in STEM else key] = value
    add_counters(out)
    return out
