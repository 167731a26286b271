"""HRNet (Wang et al. 2020, arXiv 1908.07919, version 2): the encoder and its plain head; names of ImageNet's files.

Module names of the encoder are those of its authors' ImageNet files, hrnetv2_w18, w32 and w48.

# B images  3 RGB  H W image px  C dataset classes  h w finest branch, ceil(px / 4)  D channels  y x any branch
"""

from collections.abc import Mapping, Sequence

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import PreTrainedConfig

from segadapt.models.discriminative.convolutional import ConvolutionalNet, Maps, PlainHead, check_lists, check_numbers
from segadapt.models.discriminative.keymaps import add_counters
from segadapt.models.discriminative.resnet import EXPANSION, Bottleneck

DROPPED = {  # modules of ImageNet's files without a place here: why
    "incre_modules": "widens each branch to classify ImageNet",
    "downsamp_modules": "joins the widened branches to classify ImageNet",
    "final_layer": "classifies ImageNet",
    "classifier": "classifies ImageNet",
}


@strict
class HrnetConfig(PreTrainedConfig):
    """HRNet-W48.

    Args:
        hidden_sizes: channels of the four branches, at strides 4, 8, 16 and 32.
        modules: times that the branches of stages 2, 3 and 4 exchange what they have.
        blocks: of a branch between two exchanges, and of stage 1.
        stem_size: channels at stride 2 and 4.
        dropout: share of channels dropped before the classifier, in training.
    """

    model_type = "segadapt_hrnet"

    hidden_sizes: list[int] | tuple[int, ...] = (48, 96, 192, 384)
    modules: list[int] | tuple[int, ...] = (1, 4, 3)
    blocks: int = 4
    stem_size: int = 64
    dropout: float | int = 0.1

    def validate_sizes(self) -> None:
        """Asked by `strict`. ValueError: a value of which no net can be made."""
        check_lists(self, hidden_sizes=(4,), modules=(3,))
        check_numbers(self, "blocks", "stem_size")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the shortcut; names as in torchvision."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x_BDyx: Tensor) -> Tensor:
        y_BDyx = self.bn1(self.conv1(x_BDyx)).relu_()
        return (self.bn2(self.conv2(y_BDyx)) + x_BDyx).relu_()


def convolution(channels: int, width: int, *, kernel: int = 3, stride: int = 1, relu: bool = True) -> nn.Sequential:
    """With BatchNorm; numbered as in the files."""
    return nn.Sequential(
        nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(width),
        *([nn.ReLU(inplace=True)] if relu else []),
    )


def upsampled(x_BDyx: Tensor, like_BDyx: Tensor) -> Tensor:
    """Bilinear to the size of another map, corners on corners, as its authors' segmentation has it."""
    return interpolate(x_BDyx, size=like_BDyx.shape[2:], mode="bilinear", align_corners=True)


class Exchange(nn.Module):
    """A module of HRNet: blocks on every branch, then every branch is the sum of all, brought to its size."""

    def __init__(self, sizes: Sequence[int], blocks: int):
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(*(BasicBlock(size) for _ in range(blocks))) for size in sizes)
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(self._path(sizes, source, target) for source in range(len(sizes)))
            for target in range(len(sizes))
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        maps = [branch(x_BDyx) for branch, x_BDyx in zip(self.branches, maps, strict=True)]
        fused = []
        for target, paths in enumerate(self.fuse_layers):
            assert isinstance(paths, nn.ModuleList)
            parts = [path(x_BDyx) for path, x_BDyx in zip(paths, maps, strict=True)]
            parts = [part if i <= target else upsampled(part, maps[target]) for i, part in enumerate(parts)]
            fused.append(sum(parts[1:], parts[0]).relu_())
        return fused

    @staticmethod
    def _path(sizes: Sequence[int], source: int, target: int) -> nn.Module:
        """From a branch to another: to a finer one 1x1, to a coarser one a 3x3 of stride 2 for each step."""
        if source == target:
            return nn.Identity()
        if source > target:
            return convolution(sizes[source], sizes[target], kernel=1, relu=False)
        steps = [convolution(sizes[source], sizes[source], stride=2) for _ in range(target - source - 1)]
        return nn.Sequential(*steps, convolution(sizes[source], sizes[target], stride=2, relu=False))


class Hrnet(nn.Module):
    """Images to the joined maps of all branches."""

    def __init__(self, config: HrnetConfig):
        super().__init__()
        sizes, stem = config.hidden_sizes, config.stem_size
        self.conv1 = nn.Conv2d(3, stem, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.conv2 = nn.Conv2d(stem, stem, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(stem)
        wide = EXPANSION * stem
        self.layer1 = nn.Sequential(*(Bottleneck(wide if i else stem, stem) for i in range(config.blocks)))
        self.transition1 = nn.ModuleList(
            [convolution(wide, sizes[0]), nn.Sequential(convolution(wide, sizes[1], stride=2))]
        )
        self.transition2, self.transition3 = (
            nn.ModuleList(
                [*(nn.Identity() for _ in range(n)), nn.Sequential(convolution(sizes[n - 1], sizes[n], stride=2))]
            )
            for n in (2, 3)
        )
        self.stage2, self.stage3, self.stage4 = (
            nn.Sequential(*(Exchange(sizes[:n], config.blocks) for _ in range(count)))
            for n, count in zip((2, 3, 4), config.modules, strict=True)
        )

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        """Normalised images to [B, sum of the branches' channels, h, w]."""
        x_BDyx = self.bn1(self.conv1(pixels_B3HW)).relu_()
        maps = [self.layer1(self.bn2(self.conv2(x_BDyx)).relu_())]
        stages = (
            (self.transition1, self.stage2),
            (self.transition2, self.stage3),
            (self.transition3, self.stage4),
        )
        for transition, stage in stages:
            # a new branch starts from the coarsest one
            maps = stage([change(maps[min(i, len(maps) - 1)]) for i, change in enumerate(transition)])
        return torch.cat([maps[0], *(upsampled(x_BDyx, maps[0]) for x_BDyx in maps[1:])], dim=1)


class HrnetSegmenter(ConvolutionalNet):
    """Encoder and a plain head; the features are the joined branches."""

    config: HrnetConfig
    config_class = HrnetConfig

    def __init__(self, config: HrnetConfig):
        super().__init__(config)
        self.encoder = Hrnet(config)
        channels = sum(config.hidden_sizes)
        self.head = PlainHead(channels, channels, config.num_labels or 0, dropout=config.dropout, bias=False)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> Maps:
        """Normalised images [B, 3, H, W]."""
        features_BDhw = self.encoder(pixel_values)
        return Maps(self.head(features_BDhw), None, features_BDhw)


def hrnet_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ImageNet weights of an HRNet under the names of `Hrnet`, which are the files'; keys of DROPPED are left out."""
    out = {key: value for key, value in state.items() if key.split(".")[0] not in DROPPED}
    add_counters(out)
    return out
