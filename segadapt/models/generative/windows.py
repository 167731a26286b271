"""Sliding windows: geometry only. The SAME boxes cut the image and, through one linear map, the logits.

K windows of one image   C classes   H W image px   h w logits, ceil(px / 4)   y x latent grid, px / 8
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def starts(length_px: int, *, window_px: int, stride_px: int) -> list[int]:
    """Window starts along one side: ceil((length - window) / stride) + 1 of them, the last shifted back to the edge.

    512-px windows with stride 256: 512 -> [0], 683 -> [0, 171], 910 -> [0, 256, 398].

    Raises:
        ValueError: the side is shorter than a window.
    """
    if length_px < window_px:
        raise ValueError(f"side of {length_px} px is shorter than a window of {window_px} px")
    room = length_px - window_px
    return [min(j * stride_px, room) for j in range(-(-room // stride_px) + 1)]


def plan(height_px: int, width_px: int, *, window_px: int, stride_px: int) -> Tensor:
    """Boxes that cover the image: int64 [K, 2] of (top, left); square windows of window_px.

    Where the short side equals window_px (requirement 000) they run along the long side, whichever that is.
    """
    tops = starts(height_px, window_px=window_px, stride_px=stride_px)
    lefts = starts(width_px, window_px=window_px, stride_px=stride_px)
    return torch.cartesian_prod(torch.tensor(tops), torch.tensor(lefts))


def cut(image_CHW: Tensor, boxes_K2: Tensor, *, window_px: int) -> Tensor:
    """Cut all windows: [C, H, W] -> [K, C, window, window]. By slices: no index travels to the device."""
    return torch.stack([image_CHW[:, y : y + window_px, x : x + window_px] for y, x in boxes_K2.tolist()])


def _axis_maps(cells: int, length_px: int, starts_K: Tensor, *, window_px: int, grid: int, like: Tensor) -> Tensor:
    """One axis of resize, cut, resize as matrices: [K, grid, cells]. Bilinear resizing is separable and linear."""
    eye = torch.eye(cells, dtype=like.dtype, device=like.device)[None]
    to_image = F.interpolate(eye, size=length_px, mode="linear", align_corners=False)[0]  # [cells, length]
    windows = torch.stack([to_image[:, start : start + window_px] for start in starts_K.tolist()], dim=1)
    to_grid = F.interpolate(windows, size=grid, mode="linear", align_corners=False)  # [cells, K, grid]
    return to_grid.permute(1, 2, 0)


def logits_on_grid(
    logits_Chw: Tensor, boxes_K2: Tensor, *, image_px: tuple[int, int], window_px: int, grid: int
) -> Tensor:
    """Bring logits to each window's latent grid: [C, h, w] -> [K, C, grid, grid], same dtype, differentiable.

    Equal to: bilinear resize to image_px, cut with the boxes of the image, bilinear resize to the grid (both
    align_corners=False). The three steps are linear in each axis, so they are applied as one matrix a window and
    axis; the [C, H, W] logits at image size (210 MB for 150 classes at 512x683) are never made.
    """
    _, h, w = logits_Chw.shape
    rows_Kyh = _axis_maps(h, image_px[0], boxes_K2[:, 0], window_px=window_px, grid=grid, like=logits_Chw)
    cols_Kxw = _axis_maps(w, image_px[1], boxes_K2[:, 1], window_px=window_px, grid=grid, like=logits_Chw)
    with torch.autocast(logits_Chw.device.type, enabled=False):
        return torch.einsum("kyh,chw,kxw->kcyx", rows_Kyh, logits_Chw, cols_Kxw)
