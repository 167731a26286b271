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
    """Boxes that cover the image: int64 [K, 3] of (top, left, side), px; square windows of window_px.

    Where the short side equals window_px (requirement 000) they run along the long side, whichever that is.
    """
    tops = starts(height_px, window_px=window_px, stride_px=stride_px)
    lefts = starts(width_px, window_px=window_px, stride_px=stride_px)
    return F.pad(torch.cartesian_prod(torch.tensor(tops), torch.tensor(lefts)), (0, 1), value=window_px)


def cut(image_CHW: Tensor, boxes_K3: Tensor, *, window_px: int, mode: str = "bilinear") -> Tensor:
    """Cut all windows: [C, H, W] -> [K, C, window, window]. By slices: no index travels to the device.

    A box of another side is resized to window_px (bilinear: align_corners=False, no antialias).
    """
    size, corners = (window_px, window_px), False if mode == "bilinear" else None
    crops = [image_CHW[:, y : y + side, x : x + side] for y, x, side in boxes_K3.tolist()]
    return torch.stack(
        [
            crop
            if crop.shape[1:] == size
            else F.interpolate(crop[None], size=size, mode=mode, align_corners=corners)[0]
            for crop in crops
        ]
    )


def _axis_maps(cells: int, length_px: int, spans: list[tuple[int, int]], *, grid: int, like: Tensor) -> Tensor:
    """One axis of resize, cut, resize as matrices: [K, grid, cells]. Bilinear resizing is separable and linear.

    Args:
        spans: (start, side) of each window, px.
    """
    eye = torch.eye(cells, dtype=like.dtype, device=like.device)[None]
    to_image = F.interpolate(eye, size=length_px, mode="linear", align_corners=False)[0]  # [cells, length]
    windows = [to_image[:, None, start : start + side] for start, side in spans]
    if len({side for _, side in spans}) == 1:  # one resize for all
        windows = [torch.cat(windows, dim=1)]
    to_grid = [F.interpolate(some, size=grid, mode="linear", align_corners=False) for some in windows]
    return torch.cat(to_grid, dim=1).permute(1, 2, 0)  # from [cells, K, grid]


def logits_on_grid(logits_Chw: Tensor, boxes_K3: Tensor, *, image_px: tuple[int, int], grid: int) -> Tensor:
    """Bring logits to each window's latent grid: [C, h, w] -> [K, C, grid, grid], same dtype, differentiable.

    Equal to: bilinear resize to image_px, cut with the boxes of the image, bilinear resize to the grid (both
    align_corners=False). The three steps are linear in each axis, so they are applied as one matrix a window and
    axis; the [C, H, W] logits at image size (210 MB for 150 classes at 512x683) are never made.
    """
    _, h, w = logits_Chw.shape
    tops, lefts, sides = boxes_K3.T.tolist()
    rows_Kyh = _axis_maps(h, image_px[0], list(zip(tops, sides, strict=True)), grid=grid, like=logits_Chw)
    cols_Kxw = _axis_maps(w, image_px[1], list(zip(lefts, sides, strict=True)), grid=grid, like=logits_Chw)
    with torch.autocast(logits_Chw.device.type, enabled=False):
        return torch.einsum("kyh,chw,kxw->kcyx", rows_Kyh, logits_Chw, cols_Kxw)
