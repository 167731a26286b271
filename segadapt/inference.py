"""How `evaluate` asks a segmenter: size of its input, whole or in windows, scales, mirrored, the logits' way back.

B images   3 RGB   H W image px on disk   y x px of the network's input   C classes   h w logits, of any stride
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from segadapt.config import EvaluateConfig, EvaluateSettings, RunConfig
from segadapt.datasets.resize import size_at, size_in_box
from segadapt.models.discriminative import Segmenter
from segadapt.models.discriminative.families import IMAGENET_MEAN
from segadapt.rules import is_plain

ALIGNED_PX = 32


def as_evaluated(segmenter: Segmenter, settings: RunConfig) -> Segmenter:
    """The segmenter under the rule of the settings; itself under the rule of `adapt`."""
    if not isinstance(settings, EvaluateConfig) or is_plain(settings.evaluate):
        return segmenter
    return Inference(segmenter, settings.evaluate, short_side_px=settings.data.short_side_px)


class Inference:
    """A segmenter under a rule: it is given images as on disk, and its logits have their size.

    Args:
        segmenter: in eval mode on its device.
        rule: without contradictions, see rules.py.
        short_side_px: data.short_side_px; `original` does not follow it.
    """

    short_side_px: int | None = None

    def __init__(self, segmenter: Segmenter, rule: EvaluateSettings, *, short_side_px: int):
        self.segmenter, self.rule, self._short_px = segmenter, rule, short_side_px
        # on the device from the start: what is recorded must not copy from the host
        device = next(segmenter.net.parameters()).device
        self._padding_311 = torch.tensor(IMAGENET_MEAN, device=device)[:, None, None]

    def logits(self, image_B3HW: Tensor) -> Tensor:
        """Logits [B, C, H, W]; of several views the logarithm of their mean softmax, or their mean."""
        flips = (False, True) if self.rule.flip else (False,)
        views = [(factor, is_flipped) for factor in self.rule.scales for is_flipped in flips]
        if len(views) == 1:
            return self._view(image_B3HW, *views[0])
        total_BCHW = None
        for view in views:
            logits_BCHW = self._view(image_B3HW, *view)
            if self.rule.average == "logits":
                total_BCHW = logits_BCHW if total_BCHW is None else total_BCHW + logits_BCHW
            else:  # in logarithms: the least probabilities would be 0
                logits_BCHW = logits_BCHW.log_softmax(dim=1)
                total_BCHW = logits_BCHW if total_BCHW is None else torch.logaddexp(total_BCHW, logits_BCHW)
        assert total_BCHW is not None
        return total_BCHW / len(views) if self.rule.average == "logits" else total_BCHW - math.log(len(views))

    def _view(self, image_B3HW: Tensor, factor: float, is_flipped: bool) -> Tensor:
        """Logits [B, C, H, W] of one scale, mirrored or not."""
        input_B3yx = self._input(image_B3HW, factor)
        padded_B3yx, top, left = self._padded(input_B3yx.flip(3) if is_flipped else input_B3yx)
        logits_BChw = self._slide(padded_B3yx) if self.rule.window_px else self.segmenter.logits(padded_B3yx)
        if self.rule.logit_resize == "two_step":
            height, width = input_B3yx.shape[2:]
            logits_BCyx = resized(logits_BChw, padded_B3yx.shape[2:])
            logits_BChw = logits_BCyx[:, :, top : top + height, left : left + width]
        return resized(logits_BChw.flip(3) if is_flipped else logits_BChw, image_B3HW.shape[2:])

    def _input(self, image_B3HW: Tensor, factor: float) -> Tensor:
        """The image at the size of the rule."""
        rule, (height, width) = self.rule, image_B3HW.shape[2:]
        if rule.input_resize == "original":
            return resized(image_B3HW, (int(height * factor + 0.5), int(width * factor + 0.5)))
        if rule.input_resize == "short_side":
            return resized(image_B3HW, size_at(height, width, int(self._short_px * factor + 0.5)))
        assert rule.long_side_px is not None
        box = {"long_px": int(rule.long_side_px * factor), "short_px": int(self._short_px * factor)}
        input_B3yx = resized(image_B3HW, size_in_box(height, width, **box))
        if rule.input_resize == "box":
            return input_B3yx
        return resized(input_B3yx, [side_px + -side_px % ALIGNED_PX for side_px in input_B3yx.shape[2:]])

    def _padded(self, input_B3yx: Tensor) -> tuple[Tensor, int, int]:
        """With a border of ImageNet's mean colour, 0 once normalised; and the px above and left of the input."""
        height, width = input_B3yx.shape[2:]
        below, right = -height % self.rule.size_divisor, -width % self.rule.size_divisor
        if not below and not right:
            return input_B3yx, 0, 0
        top, left = (below // 2, right // 2) if self.rule.padding == "centre" else (0, 0)
        border_B3yx = self._padding_311.expand(len(input_B3yx), 3, height + below, width + right)
        padded_B3yx = border_B3yx.to(input_B3yx.dtype).clone()
        padded_B3yx[:, :, top : top + height, left : left + width] = input_B3yx
        return padded_B3yx, top, left

    def _slide(self, input_B3yx: Tensor) -> Tensor:
        """Logits [B, C, y, x]: of each pixel the mean over the windows that hold it; each resized to its window."""
        side_px, stride_px = self.rule.window_px, self.rule.stride_px
        assert side_px is not None
        assert stride_px is not None
        height, width = input_B3yx.shape[2:]
        sum_BCyx, hits_yx = None, input_B3yx.new_zeros((height, width))
        for top in window_starts(height, window_px=side_px, stride_px=stride_px):
            for left in window_starts(width, window_px=side_px, stride_px=stride_px):
                box = slice(top, top + side_px), slice(left, left + side_px)
                window_B3yx = input_B3yx[:, :, *box]
                logits_BCyx = resized(self.segmenter.logits(window_B3yx), window_B3yx.shape[2:])
                if sum_BCyx is None:
                    sum_BCyx = logits_BCyx.new_zeros((*logits_BCyx.shape[:2], height, width))
                sum_BCyx[:, :, *box] += logits_BCyx
                hits_yx[box] += 1
        assert sum_BCyx is not None
        return sum_BCyx / hits_yx

    @property
    def net(self) -> nn.Module:
        """See Segmenter, also for what follows."""
        return self.segmenter.net

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.segmenter.parameters()

    def norm_parameters(self) -> dict[str, nn.Parameter]:
        return self.segmenter.norm_parameters()

    def top_norm_parameters(self) -> dict[str, nn.Parameter]:
        return self.segmenter.top_norm_parameters()

    def save(self, folder: str | Path) -> None:
        self.segmenter.save(folder)


def window_starts(length_px: int, *, window_px: int, stride_px: int) -> list[int]:
    """First px of each window along a side; the last one is shifted back inside, a side below window_px has one."""
    count = max(length_px - window_px + stride_px - 1, 0) // stride_px + 1
    return [max(0, min(index * stride_px, length_px - window_px)) for index in range(count)]


def resized(values: Tensor, size: Sequence[int]) -> Tensor:
    """[B, ., y, x] at another size: bilinear, align_corners=False, no antialias; of that size as they are."""
    if tuple(values.shape[2:]) == tuple(size):
        return values
    return interpolate(values, size=tuple(size), mode="bilinear", align_corners=False, antialias=False)
