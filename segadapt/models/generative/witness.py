"""What the teacher said of one image, kept while a step asks it: its windows put together to maps of the image.

K windows   D noise draws   R = K * D rows (window, draw), draws innermost   C classes   N classes asked about
y x latent grid of a window   Y X of the image, ceil(px / 8)
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

LATENT_PX = 8  # side of a latent pixel
NOT_ASKED = 255


@dataclass(frozen=True)
class Maps:
    """Means over the windows that cover a latent pixel, and over the draws; on the host."""

    classes_N: Tensor  # uint8, ascending
    error_YX: Tensor  # float16, (mixture velocity - target)^2, mean over channels; NaN where no window is
    weight_NYX: Tensor  # float16, class weights, 0..1; they sum to 1, NaN where no window is
    decision_YX: Tensor  # uint8, class of the smallest velocity error of those asked about; NOT_ASKED: none


class Witness:
    """Of one step of Combined; it changes nothing.

    Args:
        draws: noise draws of each window.
    """

    def __init__(self, *, draws: int):
        self._draws = draws
        self._boxes: list[list[int]] = []
        self._size_YX = 0, 0
        self._seen: list[tuple[slice, Tensor, Tensor, Tensor]] = []

    def place(self, boxes_K3: Tensor, image_px: tuple[int, int]) -> None:
        """Where the windows are, see `windows.plan`."""
        self._boxes, self._size_YX = boxes_K3.tolist(), (-(-image_px[0] // LATENT_PX), -(-image_px[1] // LATENT_PX))

    def see(self, of_rows: slice, weights_RCyx: Tensor, error_RCyx: Tensor, squared_Ryx: Tensor) -> None:
        """Some of the rows: class weights, the classes' errors (inf: not asked), and the mixture's."""
        self._seen.append((of_rows, weights_RCyx.detach(), error_RCyx.detach(), squared_Ryx.detach()))

    def maps(self) -> Maps | None:
        """The windows put together; None: nothing was asked, or no answer was finite."""
        if not self._seen:
            return None
        size, classes = self._size_YX, self._seen[0][1].shape[1]
        covered_1YX, square_1YX = torch.zeros(1, *size), torch.zeros(1, *size)
        weight_CYX, error_CYX, asked_CYX = (torch.zeros(classes, *size) for _ in range(3))
        for of_rows, weights_RCyx, error_RCyx, squared_Ryx in self._seen:
            weights_KCyx, error_KCyx = self._over_draws(weights_RCyx), self._over_draws(error_RCyx)
            squared_K1yx = self._over_draws(squared_Ryx)[:, None]
            first = of_rows.start // self._draws
            for box, own_Cyx, each_Cyx, square_1yx in zip(
                self._boxes[first : first + len(weights_KCyx)], weights_KCyx, error_KCyx, squared_K1yx, strict=True
            ):
                is_asked_C = each_Cyx.isfinite().flatten(1).all(dim=1)
                if not is_asked_C.any():
                    continue
                self._add(covered_1YX, box, torch.ones_like(square_1yx))
                self._add(square_1YX, box, square_1yx)
                self._add(weight_CYX, box, own_Cyx)
                self._add(error_CYX, box, torch.where(is_asked_C[:, None, None], each_Cyx, 0))
                self._add(asked_CYX, box, is_asked_C[:, None, None].float().expand_as(each_Cyx))
        if not covered_1YX.any():
            return None
        mean_CYX = torch.where(asked_CYX > 0, error_CYX / asked_CYX, torch.inf)
        decision_YX = torch.where(mean_CYX.isinf().all(dim=0), NOT_ASKED, mean_CYX.argmin(dim=0))
        classes_N = asked_CYX.flatten(1).any(dim=1).nonzero()[:, 0]
        return Maps(
            classes_N.to(torch.uint8),
            (square_1YX / covered_1YX)[0].half(),
            (weight_CYX[classes_N] / covered_1YX).half(),
            decision_YX.to(torch.uint8),
        )

    def _over_draws(self, rows_R: Tensor) -> Tensor:
        return rows_R.float().cpu().unflatten(0, (-1, self._draws)).mean(dim=1)

    def _add(self, total_MYX: Tensor, box: list[int], window_Myx: Tensor) -> None:
        """A window's map, at the size that it has in the image; what stands out over the edge is cut."""
        top, left, side = (round(px / LATENT_PX) for px in box)
        at_MYX = total_MYX[:, top : top + side, left : left + side]
        resized_Myx = interpolate(window_Myx[None], size=(side, side), mode="bilinear", align_corners=False)[0]
        at_MYX += resized_Myx[:, : at_MYX.shape[1], : at_MYX.shape[2]]
