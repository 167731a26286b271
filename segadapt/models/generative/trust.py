"""Where the teacher is not believed: pixels on which its noise draws disagree, images on which it has nothing to add.

K windows   D noise draws   R = K * D rows (window, draw), draws innermost   C classes   P (row, class) pairs
z y x latent channels and grid
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from segadapt.config import TrustSettings


@dataclass(frozen=True)
class Verdict:
    """What counts of some windows, and sums over their latent pixels."""

    keep_Ryx: Tensor  # bool: the pixel counts
    weight_Ryx: Tensor | None  # factor of the squared residual; None: 1
    sums_4: Tensor  # float64: agreement of the draws; pixels asked where teacher = segmenter; asked; that count


@torch.no_grad()
def asked_errors(
    velocity_Pzyx: Tensor, target_Rzyx: Tensor, *, pair_row_P: Tensor, pair_class_P: Tensor, num_classes: int
) -> Tensor:
    """Mean over channels of (v_k - target)^2 at each pixel: [R, C, y, x], inf for classes that were not asked."""
    error_Pyx = (velocity_Pzyx - target_Rzyx[pair_row_P]).square().mean(dim=1)
    R, _, *grid = target_Rzyx.shape
    error_RCyx = error_Pyx.new_full((R, num_classes, *grid), torch.inf)
    error_RCyx[pair_row_P, pair_class_P] = error_Pyx
    return error_RCyx


def agreement(error_RCyx: Tensor, draws: int) -> Tensor:
    """Share of a window's draws that decide for the class most of them decide for: [K, y, x] float64 in [1 / D, 1]."""
    decided_KDyx = error_RCyx.argmin(dim=1).unflatten(0, (-1, draws))
    votes_KDyx = (decided_KDyx[:, :, None] == decided_KDyx[:, None]).sum(dim=2)
    return votes_KDyx.amax(dim=1).double() / draws


def decision(error_RCyx: Tensor, draws: int) -> Tensor:
    """The class of the smallest error averaged over the draws: int64 [K, y, x]."""
    return error_RCyx.unflatten(0, (-1, draws)).mean(dim=1).argmin(dim=1)


@torch.no_grad()
def judge(
    error_RCyx: Tensor,
    q_RCyx: Tensor,
    keep_Ryx: Tensor,
    *,
    draws: int,
    trust: TrustSettings,
    asked_Ryx: Tensor | None = None,
) -> Verdict:
    """Compare the draws of each window with each other, and the teacher with the segmenter's own top class.

    Args:
        error_RCyx: of whole windows, as asked_errors gives them.
        q_RCyx: the segmenter's logits, the same in all rows of a window.
        keep_Ryx: pixels that count.
        asked_Ryx: pixels whose top class is a candidate; None: those that count.
    """
    has_candidates_K = (error_RCyx[::draws] < torch.inf).flatten(1).any(dim=1)
    agreement_Kyx = (
        agreement(error_RCyx, draws) * has_candidates_K[:, None, None]
    )  # a window that asks nothing has none
    asked_Kyx = (keep_Ryx if asked_Ryx is None else asked_Ryx)[::draws]
    is_alike_Kyx = (decision(error_RCyx, draws) == q_RCyx[::draws].argmax(dim=1)) & asked_Kyx
    weight_Ryx = None
    if trust.mode == "skip":
        keep_Ryx = keep_Ryx & (agreement_Kyx >= trust.threshold).repeat_interleave(draws, dim=0)
    elif trust.mode == "weight":
        weight_Ryx = agreement_Kyx.repeat_interleave(draws, dim=0).to(q_RCyx.dtype)
    sums_4 = torch.stack([each.sum(dtype=torch.float64) for each in (
        agreement_Kyx, is_alike_Kyx, asked_Kyx, keep_Ryx[::draws])])  # fmt: skip
    return Verdict(keep_Ryx, weight_Ryx, sums_4)
