"""Input sizes: short side fixed, long side in proportion; or the largest that fits in a box."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

# 3 RGB  H W image px


def size_at(height: int, width: int, short_side_px: int | None) -> tuple[int, int]:
    """(H, W) with this short side, the long side rounded half up; None: as it is."""
    short, long = sorted((height, width))
    if short_side_px in (None, short):
        return height, width
    long_side_px = int(short_side_px * long / short + 0.5)
    return (short_side_px, long_side_px) if height <= width else (long_side_px, short_side_px)


def size_in_box(height: int, width: int, *, long_px: int, short_px: int) -> tuple[int, int]:
    """(H, W) of the largest image of these proportions with sides of at most long_px and short_px, rounded half up.

    As mmcv.imrescale with a tuple: 375 x 500 in the box 2048 x 512 becomes 512 x 683.
    """
    factor = min(long_px / max(height, width), short_px / min(height, width))
    return int(height * factor + 0.5), int(width * factor + 0.5)


def scale(image_3HW: Tensor, short_side_px: int | None) -> Tensor:
    """Bilinear, align_corners=False, no antialias; an image of that size, and None, is given back as it is."""
    size = size_at(image_3HW.shape[1], image_3HW.shape[2], short_side_px)
    if size == tuple(image_3HW.shape[1:]):
        return image_3HW
    return interpolate(image_3HW[None], size=size, mode="bilinear", align_corners=False, antialias=False)[0]


def resize_short_side(image_HW3: np.ndarray, short_side_px: int | None) -> Tensor:
    """Scale an image so that its short side is exactly short_side_px; the long side is rounded half up; None: not.

    Bilinear, align_corners=False, no antialias; portrait and landscape alike. An image of that size keeps its values.

    Args:
        image_HW3: uint8 RGB.
        short_side_px: >= 1; None: the image keeps its size.
    Returns:
        float32 [3, H, W] in 0..1, contiguous.
    """
    image_3HW = torch.from_numpy(np.ascontiguousarray(image_HW3)).permute(2, 0, 1).float() / 255
    return scale(image_3HW, short_side_px).contiguous()
