"""The segmenter's input size: short side fixed, long side in proportion."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

# 3 RGB  H W image px


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
    height, width = image_3HW.shape[1:]
    short, long = sorted((height, width))
    if short == short_side_px:
        return image_3HW.contiguous()
    long_side_px = int(short_side_px * long / short + 0.5)
    size = (short_side_px, long_side_px) if height <= width else (long_side_px, short_side_px)
    return interpolate(image_3HW[None], size=size, mode="bilinear", align_corners=False, antialias=False)[
        0
    ].contiguous()
