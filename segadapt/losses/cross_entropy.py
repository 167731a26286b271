"""Losses of single pixels: cross-entropy, its hardest pixels (OHEM), focal. Logits have the label's size.

B images   C classes   H W label px
"""

import torch
from torch import Tensor

from segadapt.datasets.labels import IGNORE


def true_log_probability(logits_BCHW: Tensor, label_BHW: Tensor) -> Tensor:
    """log softmax(logits)[label] of each pixel, [B, H, W]; 0, with gradient 0, where the label is IGNORE.

    By gather: F.cross_entropy refuses images on CUDA under deterministic algorithms.
    """
    is_ignored_BHW = label_BHW == IGNORE
    index_B1HW = label_BHW.masked_fill(is_ignored_BHW, 0)[:, None]
    return logits_BCHW.log_softmax(dim=1).gather(1, index_B1HW)[:, 0].masked_fill(is_ignored_BHW, 0)


def weight_of_pixels(label_BHW: Tensor, class_weights_C: Tensor | None, *, dtype: torch.dtype) -> Tensor:
    """Each pixel's class weight, 1 without weights; 0 where the label is IGNORE."""
    is_counted_BHW = label_BHW != IGNORE
    if class_weights_C is None:
        return is_counted_BHW.to(dtype)
    return class_weights_C.to(dtype)[label_BHW.masked_fill(~is_counted_BHW, 0)] * is_counted_BHW


def weighted_mean(loss_BHW: Tensor, weight_BHW: Tensor) -> Tensor:
    """sum(weight loss) / sum(weight), as PyTorch's; 0 with a graph where all weights are 0."""
    total = weight_BHW.sum()
    return (weight_BHW * loss_BHW).sum() / torch.where(total > 0, total, 1)


def reduced(loss_BHW: Tensor, label_BHW: Tensor, *, class_weights_C: Tensor | None, reduction: str) -> Tensor:
    """Scalar of the pixels' losses, which are 0 where the label is IGNORE.

    Args:
        reduction: valid: mean over the pixels that are not IGNORE, weighted by class_weights_C (PyTorch,
            transformers); all: sum / number of all pixels (mmseg's default), without weights.
    """
    if reduction == "all":
        assert class_weights_C is None, "the settings refuse it"
        return loss_BHW.mean()
    return weighted_mean(loss_BHW, weight_of_pixels(label_BHW, class_weights_C, dtype=loss_BHW.dtype))


def cross_entropy(
    logits_BCHW: Tensor, label_BHW: Tensor, *, class_weights_C: Tensor | None = None, reduction: str = "valid"
) -> Tensor:
    """-log softmax(logits)[label], see `reduced`; a batch of IGNORE alone gives 0 with a graph.

    Args:
        label_BHW: int64, 0..C-1 or IGNORE.
        class_weights_C: >= 0.
    """
    loss_BHW = -true_log_probability(logits_BCHW, label_BHW)
    return reduced(loss_BHW, label_BHW, class_weights_C=class_weights_C, reduction=reduction)


def ohem(
    logits_BCHW: Tensor, label_BHW: Tensor, *, threshold: float, min_kept: int, class_weights_C: Tensor | None = None
) -> Tensor:
    """Cross-entropy of the hardest pixels: online hard example mining, as openseg's.

    Kept are pixels whose true class has a probability below max(threshold, the min_kept-th smallest, from 0), so at
    least min_kept of the batch, or all where it has no more; (weighted) mean over the kept.

    Args:
        min_kept: pixels of the whole batch, not of an image.
    """
    log_BHW = true_log_probability(logits_BCHW, label_BHW)
    easy_BHW = log_BHW.detach().exp().masked_fill(label_BHW == IGNORE, 2)  # above all probabilities
    bound = easy_BHW.new_full((), 2.0)
    if min_kept < easy_BHW.numel():
        bound = easy_BHW.flatten().kthvalue(min_kept + 1).values.clamp(min=threshold)
    weight_BHW = weight_of_pixels(label_BHW, class_weights_C, dtype=log_BHW.dtype) * (easy_BHW < bound)
    return weighted_mean(-log_BHW, weight_BHW)


def focal(
    logits_BCHW: Tensor,
    label_BHW: Tensor,
    *,
    gamma: float,
    class_weights_C: Tensor | None = None,
    reduction: str = "valid",
) -> Tensor:
    """-(1 - p)^gamma log p, p the true class's softmax probability (Lin et al. 2017, equation 4)."""
    log_BHW = true_log_probability(logits_BCHW, label_BHW)
    # expm1 keeps 1 - p of a sure pixel; the bound keeps the gradient of a power below 1 finite at p = 1
    loss_BHW = -(-torch.expm1(log_BHW)).clamp(min=torch.finfo(log_BHW.dtype).tiny).pow(gamma) * log_BHW
    return reduced(loss_BHW, label_BHW, class_weights_C=class_weights_C, reduction=reduction)
