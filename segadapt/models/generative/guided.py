"""Windows where the segmenter is unsure, in place of the grid's. Geometry only, on the host.

K windows of one image   H W image px   h w logits, ceil(px / 4)
"""

import math

import cv2
import numpy as np
import torch
from torch import Tensor

MOST_BOXES = 8
LEAST_BOXES = 2  # fewer: the grid's are taken
HIGH = 0.5  # standard deviations above the map's mean
ROUNDS = 5  # of dilation, each 3 x 3 cells


def unsure_boxes(entropy_hw: np.ndarray, *, image_px: tuple[int, int], window_px: int) -> Tensor:
    """Square boxes around the connected regions of high entropy, the highest mean first: int64 [K, 3], K up to 8.

    A rule of the public SD3 port of DUSA, here on the segmenter's grid: cells above mean + 0.5 std, dilated; a box of
    side window_px / 4 .. window_px about the middle of each region, shifted into the image; centres at least
    window_px / 8 apart.

    Args:
        entropy_hw: of each pixel's class probabilities, any unit; NaN is never high.
        image_px: size of the image that the boxes cut, each side at least window_px.
    """
    (height, width), (h, w) = image_px, entropy_hw.shape
    high_hw = (entropy_hw > entropy_hw.mean() + HIGH * entropy_hw.std()).astype(np.uint8)
    high_hw = cv2.dilate(high_hw, np.ones((3, 3), np.uint8), iterations=ROUNDS)
    _, _, regions, _ = cv2.connectedComponentsWithStats(high_hw, connectivity=8)
    found: list[tuple[float, tuple[int, int, int]]] = []
    for left, top, columns, rows, _ in regions[1:].tolist():  # the first is the background
        side = round(max(rows * height / h, columns * width / w))
        side = min(max(side, window_px // 4), window_px)
        y = min(max(round((top + rows / 2) * height / h - side / 2), 0), height - side)
        x = min(max(round((left + columns / 2) * width / w - side / 2), 0), width - side)
        of_y = slice(y * h // height, -(-(y + side) * h // height))
        of_x = slice(x * w // width, -(-(x + side) * w // width))
        found.append((float(entropy_hw[of_y, of_x].mean()), (y, x, side)))
    chosen: list[tuple[int, int, int]] = []
    for _, box in sorted(found, key=lambda item: -item[0]):
        if len(chosen) < MOST_BOXES and all(_apart(box, other) >= window_px / 8 for other in chosen):
            chosen.append(box)
    return torch.tensor(chosen, dtype=torch.int64).view(-1, 3)


def _apart(one: tuple[int, int, int], other: tuple[int, int, int]) -> float:
    """Distance of the centres, px."""
    return math.dist(*((y + side / 2, x + side / 2) for y, x, side in (one, other)))
