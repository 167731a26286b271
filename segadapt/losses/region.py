"""Losses of whole regions: Lovasz-Softmax, Dice, region mutual information (RMI). Logits have the label's size.

B images   C classes   H W label px   P all pixels of the batch   N 9-vectors of an image
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from segadapt.datasets.labels import IGNORE

POOL, SIDE = 3, 3  # of RMI: cells that are pooled, and neighbourhoods that become vectors, both square
LEAST_PROBABILITY, DIAGONAL = 1e-6, 1e-3  # of RMI, as openseg's


def _per_class(logits_BCHW: Tensor, label_BHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities [C, P] and label [C, P] of 0 and 1, both 0 where the label is IGNORE; is_present [C]."""
    num_classes = logits_BCHW.shape[1]
    label_P = label_BHW.flatten()
    p_CP = logits_BCHW.softmax(dim=1).transpose(0, 1).flatten(1) * (label_P != IGNORE)
    is_class_CP = label_P == torch.arange(num_classes, device=label_P.device)[:, None]
    return p_CP, is_class_CP, is_class_CP.any(dim=1)


def _mean_of_present(loss_C: Tensor, is_present_C: Tensor) -> Tensor:
    """Mean over the classes in the labels; 0 with a graph where there is none."""
    return loss_C.masked_fill(~is_present_C, 0).sum() / is_present_C.sum().clamp(min=1)


def lovasz_softmax(logits_BCHW: Tensor, label_BHW: Tensor) -> Tensor:
    """The Lovasz extension of the Jaccard loss (Berman et al. 2018, section 3.2, algorithm 1).

    Over the valid pixels of the batch as one; mean over the classes that are in its labels.
    """
    p_CP, is_class_CP, is_present_C = _per_class(logits_BCHW, label_BHW)
    error_CP = (is_class_CP.to(p_CP.dtype) - p_CP).abs()  # 0 at IGNORE: sorted last, where it adds nothing
    present = is_present_C.nonzero()[:, 0].tolist()  # waits for the device, and spares the sorts of absent classes
    weight_CP = torch.zeros_like(error_CP)
    for c in present:  # one by one: their sorts take 50 bytes a pixel
        weight_CP[c] = _jaccard_gradient(error_CP[c].detach(), is_class_CP[c])
    return (error_CP * weight_CP).sum() / max(len(present), 1)


def _jaccard_gradient(error_P: Tensor, is_class_P: Tensor) -> Tensor:
    """What each pixel's error is multiplied by: how much the Jaccard loss grows as it joins those of larger errors.

    Of a pixel of the class 1 / union, of another intersection / ((union - 1) union): as the difference of two losses,
    which are of order 1, most digits of it would be lost over a million pixels.
    """
    # bits of numbers >= 0 sort as they do; a CPU sorts whole numbers eight times faster
    bits_P = error_P.view(torch.int32 if error_P.dtype == torch.float32 else torch.int64)
    order_P = (-bits_P).argsort(stable=True)
    sorted_P = is_class_P[order_P]
    found_P = sorted_P.cumsum(dim=0)  # whole numbers: cumsum of floats has no deterministic CUDA form
    left_P = found_P[-1] - found_P
    union_P = left_P + torch.arange(1, len(order_P) + 1, device=order_P.device)
    growth_P = torch.where(sorted_P, 1, left_P.to(error_P.dtype) / (union_P - 1)) / union_P
    return torch.empty_like(error_P).index_copy_(0, order_P, growth_P)


def dice(logits_BCHW: Tensor, label_BHW: Tensor, *, smooth: float) -> Tensor:
    """1 - (2 sum p y + smooth) / (sum p^2 + sum y + smooth) (Milletari et al. 2016), p of the softmax.

    Over the valid pixels of the batch as one; mean over the classes that are in its labels.
    """
    p_CP, is_class_CP, is_present_C = _per_class(logits_BCHW, label_BHW)
    common_C = (p_CP * is_class_CP).sum(dim=1)
    sizes_C = p_CP.square().sum(dim=1) + is_class_CP.sum(dim=1)
    return _mean_of_present(1 - (2 * common_C + smooth) / (sizes_C + smooth), is_present_C)


def rmi(logits_BCHW: Tensor, label_BHW: Tensor, *, share: float) -> Tensor:
    """(1 - share) binary cross-entropy + share region mutual information, both of sigmoid probabilities.

    The former is summed over classes, mean over valid pixels. The latter (Zhao et al. 2019) is, over the
    9-vectors y of the label and p of the probabilities in 3x3 cells of the map max-pooled by 3, ignored pixels 0 in
    both: log det(S_yy - S_yp (S_pp + 0.001 I)^-1 S_py + 0.001 I) / 18, S sums of products of centred vectors in
    float64; mean over images, sum over classes.
    """
    is_counted_B1HW = (label_BHW != IGNORE)[:, None]
    classes_C11 = torch.arange(logits_BCHW.shape[1], device=label_BHW.device)[:, None, None]
    y_BCHW = (label_BHW[:, None] == classes_C11).to(logits_BCHW.dtype)
    each_BCHW = F.binary_cross_entropy_with_logits(logits_BCHW, y_BCHW, reduction="none")
    binary = (each_BCHW * is_counted_B1HW).sum() / is_counted_B1HW.sum().clamp(min=1)
    p_BCHW = logits_BCHW.sigmoid() * is_counted_B1HW + LEAST_PROBABILITY
    y_BC9N, p_BC9N = _vectors(y_BCHW), _vectors(p_BCHW)
    diagonal_99 = DIAGONAL * torch.eye(SIDE**2, dtype=torch.float64, device=label_BHW.device)
    y_p_BC99 = y_BC9N @ p_BC9N.mT
    lower_BC99 = _cholesky(p_BC9N @ p_BC9N.mT + diagonal_99)
    explained_BC99 = y_p_BC99 @ torch.cholesky_solve(y_p_BC99.mT, lower_BC99)
    rest_BC99 = y_BC9N @ y_BC9N.mT - explained_BC99 + diagonal_99
    log_det_BC = 2 * _cholesky(rest_BC99).diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
    mutual = (log_det_BC / (2 * SIDE**2)).mean(dim=0).sum()
    return (1 - share) * binary + share * mutual.to(binary.dtype)


def _cholesky(matrix_BC99: Tensor) -> Tensor:
    """Lower factor; of NaN it is NaN, so that the training loop can say so, and no GPU is waited for."""
    return torch.linalg.cholesky_ex(matrix_BC99).L


def _vectors(map_BCHW: Tensor) -> Tensor:
    """The centred 9-vectors of a map with values in 0..1: max-pooled, each 3x3 neighbourhood one: float64 [B, C, 9, N].

    Cells are those of max_pool2d(3, stride=3, padding=1), whose own backward has no deterministic CUDA form.
    """
    below, right = ((-1, 1, 0)[side % POOL] for side in map_BCHW.shape[2:])  # -1: that row is in no cell
    padded_BCHW = F.pad(map_BCHW, (1, right, 1, below))
    pooled_BCyx = padded_BCHW.unflatten(3, (-1, POOL)).unflatten(2, (-1, POOL)).amax(dim=(3, 5)).double()
    height, width = (side - SIDE + 1 for side in pooled_BCyx.shape[2:])
    corners = [(y, x) for y in range(SIDE) for x in range(SIDE)]
    vector_BC9N = torch.stack([pooled_BCyx[..., y : y + height, x : x + width].flatten(2) for y, x in corners], dim=2)
    return vector_BC9N - vector_BC9N.mean(dim=3, keepdim=True)
