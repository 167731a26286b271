"""Input sizes: short side fixed, long side in proportion."""

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


def scale(image_3HW: Tensor, short_side_px: int | None) -> Tensor:
    """Bilinear, align_corners=False, no antialias; an image of that size, and None, is given back as it is."""
    size = size_at(image_3HW.shape[1], image_3HW.shape[2], short_side_px)
    if size == tuple(image_3HW.shape[1:]):
        return image_3HW
    return interpolate(image_3HW[None], size=size, mode="bilinear", align_corners=False, antialias=False)[0]


def resize_short_side(image_HW3: np.ndarray, short_side_px: int) -> Tensor:
    """Scale an image so that its short side is exactly short_side_px; the long side is rounded half up.

    Bilinear, align_corners=False, no antialias; portrait and landscape alike. An image of that size keeps its values.

    Args:
        image_HW3: uint8 RGB.
        short_side_px: >= 1.
    Returns:
        float32 [3, H, W] in 0..1, contiguous.
    """
    image_3HW = torch.from_numpy(np.ascontiguousarray(image_HW3)).permute(2, 0, 1).float() / 255
    return scale(image_3HW, short_side_px).contiguous()
