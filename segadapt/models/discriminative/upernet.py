"""UPerNet of transformers (Xiao et al. 2018, arXiv 1807.10221), to train, to score and to adapt.

# B images  3 RGB  H W image px  C dataset classes  h w finest map, about px / 4  D head channels  y x any map  n bins
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import UperNetForSemanticSegmentation

from segadapt.models.discriminative import Outputs
from segadapt.models.discriminative.mmseg import Scored


def fused(head: Any, maps: Sequence[Tensor]) -> Tensor:
    """Maps of the stages, [B, channels, y, x], to what the classifier sees, [B, D, h, w].

    The steps are those of UperNetHead's own forward, which does not give the features away.
    """
    laterals = [conv(x_BDyx) for conv, x_BDyx in zip(head.lateral_convs, maps[:-1], strict=True)]
    coarse_BDyx = _pyramid(head, maps[-1])
    summed = [coarse_BDyx]
    for x_BDyx in laterals[::-1]:
        coarse_BDyx = x_BDyx + _at_size_of(x_BDyx, coarse_BDyx)
        summed.insert(0, coarse_BDyx)
    refined = [conv(x_BDyx) for conv, x_BDyx in zip(head.fpn_convs, summed[:-1], strict=True)]
    same_size = [_at_size_of(refined[0], x_BDyx) for x_BDyx in (*refined, summed[-1])]
    return head.fpn_bottleneck(torch.cat(same_size, dim=1))


def _pyramid(head: Any, x_BDyx: Tensor) -> Tensor:
    """Pyramid pooling of the coarsest map (Zhao et al. 2017, section 3.2), as UperNetHead.psp_forward."""
    branches = (block.children() for block in head.psp_modules.children())
    means = [conv(average_pool(x_BDyx, pool.output_size)) for pool, conv in branches]
    return head.bottleneck(torch.cat([x_BDyx, *(_at_size_of(x_BDyx, mean_BDnn) for mean_BDnn in means)], dim=1))


def average_pool(x_BDyx: Tensor, n: int) -> Tensor:
    """`adaptive_avg_pool2d` to [B, D, n, n], by matrix products: on a GPU the gradient of torch's varies between runs.

    Sums are float32, or float64 of such a map, whatever autocast says.
    """
    with torch.autocast(x_BDyx.device.type, enabled=False):
        in_bin_ny, in_bin_nx = (_bins(n, size, x_BDyx) for size in x_BDyx.shape[2:])
        sum_BDnn = in_bin_ny @ x_BDyx.to(in_bin_ny.dtype) @ in_bin_nx.T
        return (sum_BDnn / (in_bin_ny.sum(1)[:, None] * in_bin_nx.sum(1))).to(x_BDyx.dtype)


def _bins(n: int, size: int, like: Tensor) -> Tensor:
    """[n, size]: 1 where a bin has a place of the side; neighbours share one where size is no multiple of n."""
    bin_n1 = torch.arange(n, device=like.device)[:, None]
    place_y = torch.arange(size, device=like.device)
    is_in_ny = (place_y >= bin_n1 * size // n) & (place_y < -(-(bin_n1 + 1) * size // n))
    return is_in_ny.to(torch.promote_types(like.dtype, torch.float32))


def _at_size_of(other_BDyx: Tensor, x_BDyx: Tensor) -> Tensor:
    return interpolate(x_BDyx, size=other_BDyx.shape[2:], mode="bilinear", align_corners=False)


class SemanticUperNet(UperNetForSemanticSegmentation):
    """UperNetForSemanticSegmentation whose logits stay on the head's grid, which is 16 times smaller."""

    def forward(self, pixel_values: Tensor) -> Scored:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Normalised images [B, 3, H, W]."""
        return Scored(self.decode_head.classifier(fused(self.decode_head, self.backbone(pixel_values).feature_maps)))


def outputs(net: Any, pixels_B3HW: Tensor) -> Outputs:
    """For training, see NetSegmenter.outputs. The features are what the classifier sees."""
    maps = net.backbone(pixels_B3HW).feature_maps
    features_BDhw = fused(net.decode_head, maps)
    return Outputs(net.decode_head.classifier(features_BDhw), auxiliary(net, maps), features_BDhw)


def auxiliary(net: Any, maps: Sequence[Tensor]) -> Tensor | None:
    """Logits of the auxiliary head, [B, C, y, x], in train mode; None where there is none."""
    return net.auxiliary_head(maps) if has_auxiliary(net.config) and net.training else None


def pools_images(net: Any) -> bool:
    """Whether a map is pooled to one pixel, with a BatchNorm behind it."""
    return 1 in net.config.pool_scales


def has_auxiliary(config: Any) -> bool:
    """Whether the net of a config has an auxiliary head."""
    return config.use_auxiliary_head


def encoder_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a bare encoder, or of a whole UPerNet of transformers, under the encoder's names."""
    return {key.removeprefix("backbone."): value for key, value in state.items()}
