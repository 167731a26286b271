"""Crops of different sizes to a batch of one: the target size, how a crop is brought to it, where it lies in it.

The size modes of openseg (openseg-group/openseg.pytorch, lib/datasets/tools/collate.py), except that a crop is scaled
as a training image is, on uint8; mmsegmentation's padding is fixed, only_pad, right_down.

B images of a batch   H W px of a batch   h w crop px   3 RGB
"""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from segadapt.config_training import TransformSettings
from segadapt.datasets.labels import IGNORE
from segadapt.errors import UserError
from segadapt.models.discriminative.families import IMAGENET_MEAN
from segadapt.seeds import numpy_generator

Size = tuple[int, int]  # height, width, px


class TrainingCrop(NamedTuple):
    """One item of the stream, before its batch decides on its size."""

    item: int
    image_hw3: np.ndarray  # uint8
    label_hw: np.ndarray  # uint8, 255 = ignore


def targets_of(t: TransformSettings) -> list[Size]:
    """The sizes of size_mode fixed and multi."""
    sizes = [(height, width) for height, width in t.sizes_px] or [(t.crop_px, t.crop_width_px or t.crop_px)]
    return [(_rounded_up(height, t.stride_px), _rounded_up(width, t.stride_px)) for height, width in sizes]


def _rounded_up(side_px: int, stride_px: int) -> int:
    return -(-side_px // stride_px) * stride_px


def check_sizes(t: TransformSettings, *, batch_size: int) -> None:
    """UserError: sizes that the mode does not read or that are too few, or that a crop would not fit into."""
    name = "train.transforms"
    for size in t.sizes_px:
        if len(size) != 2 or min(size) < 16:
            raise UserError(f"{name}.sizes_px holds {size}; expected [height, width], each at least 16 px, such as "
                            "[[512,1024]].")  # fmt: skip
    count = len(t.sizes_px)
    if not {"fixed": count <= 1, "multi": count > 1}.get(t.size_mode, count == 0):
        wanted = {"fixed": "one size, or none for the crop's", "multi": "two sizes or more"}.get(t.size_mode, "none")
        raise UserError(f"{name}.sizes_px={t.sizes_px} with size_mode={t.size_mode}: expected {wanted}. Set "
                        f"{name}.sizes_px to that, or another size_mode.")  # fmt: skip
    if t.size_mode == "diverse" and batch_size != 1:
        raise UserError(f"{name}.size_mode=diverse with train.batch_size={batch_size}: images of their own sizes make "
                        "no batch. Set train.batch_size=1, or size_mode=max.")  # fmt: skip
    if t.align == "only_pad":
        height, width = t.crop_px, t.crop_width_px or t.crop_px
        for target in targets_of(t):
            if target[0] < height or target[1] < width:
                raise UserError(f"{name}.sizes_px: {target[0]} x {target[1]} px is smaller than the crop of {height} x "
                                f"{width} px, which align=only_pad cannot shrink. Lower crop_px and crop_width_px, or "
                                "set align=scale_and_pad or only_scale.")  # fmt: skip


def target_size(sizes: Sequence[Size], t: TransformSettings, *, seed: int, batch: int) -> Size:
    """Size of batch number `batch` of crops of these sizes, each side a multiple of stride_px (rounded up).

    multi: drawn from (seed, batch). max, and diverse with its one crop: the largest height and the largest width.
    """
    if t.size_mode in ("max", "diverse"):
        height, width = (max(sides) for sides in zip(*sizes, strict=True))
        return _rounded_up(height, t.stride_px), _rounded_up(width, t.stride_px)
    choices = targets_of(t)
    return choices[numpy_generator(seed, "size", batch).integers(len(choices))]


def aligned(image_hw3: np.ndarray, label_hw: np.ndarray, target: Size, align: str) -> tuple[np.ndarray, np.ndarray]:
    """only_pad: as it is; only_scale: to the target, whatever the aspect; scale_and_pad: as large as fits into it."""
    height, width = label_hw.shape
    size = target
    if align == "scale_and_pad":
        factor = min(target[0] / height, target[1] / width)
        size = max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))
    if align == "only_pad" or size == (height, width):
        return image_hw3, label_hw
    return (
        cv2.resize(image_hw3, size[::-1], interpolation=cv2.INTER_LINEAR),
        cv2.resize(label_hw, size[::-1], interpolation=cv2.INTER_NEAREST),
    )


def corner(slack: Size, pad: str, rng: np.random.Generator) -> Size:
    """Top and left of a crop in a target that is larger by `slack`; names say where the padding is.

    border: all of it left and up, or right and down, by a fair coin.
    """
    if pad == "border":
        pad = "left_up" if rng.random() < 0.5 else "right_down"
    if pad == "random":
        return int(rng.integers(slack[0] + 1)), int(rng.integers(slack[1] + 1))
    if pad == "centre":
        return slack[0] // 2, slack[1] // 2
    return slack if pad == "left_up" else (0, 0)


class Batch(NamedTuple):
    """Crops of one size as reading processes hand them over, in a fifth of the bytes of what the net takes."""

    pixels_B3HW: Tensor  # uint8 RGB
    label_BHW: Tensor  # uint8
    inside_B4: Tensor  # int64 rows top..bottom-1 and columns left..right-1 of the crop: all else is padding

    def to(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """image_B3HW float32 RGB in 0..1 and label_BHW int64 on a device, without waiting for it.

        Padding has the mean colour of ImageNet, 0 once normalised, and label 255.
        """
        pixels_B3HW, label_BHW, inside_B4 = (values.to(device, non_blocking=True) for values in self)
        row_H, column_W = (torch.arange(side, device=device) for side in label_BHW.shape[1:])
        top_B1, bottom_B1, left_B1, right_B1 = inside_B4.T[..., None]
        is_row_BH, is_column_BW = (row_H >= top_B1) & (row_H < bottom_B1), (column_W >= left_B1) & (column_W < right_B1)
        is_inside_B1HW = (is_row_BH[:, :, None] & is_column_BW[:, None])[:, None]
        mean_311 = torch.stack([torch.full((1, 1), value, device=device) for value in IMAGENET_MEAN])
        return torch.where(is_inside_B1HW, pixels_B3HW.float() / 255, mean_311), label_BHW.long()


def collate(crops: Sequence[TrainingCrop], t: TransformSettings, *, seed: int, batch: int) -> Batch:
    """Batch number `batch`, of one size."""
    height, width = target_size([crop.label_hw.shape for crop in crops], t, seed=seed, batch=batch)
    pixels_B3HW = torch.zeros(len(crops), 3, height, width, dtype=torch.uint8)
    label_BHW = torch.full((len(crops), height, width), IGNORE, dtype=torch.uint8)
    inside = []
    for place, (item, image_hw3, label_hw) in enumerate(crops):
        image_hw3, label_hw = aligned(image_hw3, label_hw, (height, width), t.align)
        slack = height - label_hw.shape[0], width - label_hw.shape[1]
        top, left = corner(slack, t.pad, numpy_generator(seed, "pad", item))
        bottom, right = top + label_hw.shape[0], left + label_hw.shape[1]
        label_BHW[place].numpy()[top:bottom, left:right] = label_hw
        pixels_3hw = pixels_B3HW[place].numpy()[:, top:bottom, left:right]
        for plane_hw, channel_hw in zip(pixels_3hw, cv2.split(image_hw3), strict=True):  # faster than transposed
            plane_hw[:] = channel_hw
        inside.append([top, bottom, left, right])
    return Batch(pixels_B3HW, label_BHW, torch.tensor(inside))
