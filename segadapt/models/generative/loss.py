"""The objective: the class mixture of velocities against the true velocity. Tensors in, one number a window out.

DUSA (Li et al., NeurIPS 2024), Proposition 1 and Corollary 2: the unconditional prediction is the mixture of the
class-conditional ones under the class posterior. The segmenter's class weights take the posterior's place, per pixel.

K windows   C classes   P (window, class) pairs   z y x latent channels and grid
"""

import math

import torch
from torch import Tensor


def normalise(logits_BChw: Tensor) -> Tensor:
    """LogitNorm: logits / max(||logits||_2, 1e-12), the norm over the C classes of each pixel (DUSA, section 3.4)."""
    return torch.nn.functional.normalize(logits_BChw, dim=1, eps=1e-12)


def class_weights(q_KCyx: Tensor, chosen_KC: Tensor, *, temperature: float) -> Tensor:
    """Softmax over each window's candidate classes, per pixel: [K, C, y, x], 0 for all other classes.

    Never over a pixel's own top-k: at k = 1 that is constantly 1 and the segmenter gets no gradient.
    A window without candidates has finite weights, which no pair reads.
    """
    none = torch.finfo(q_KCyx.dtype).min  # exp gives 0 as for -inf; but a softmax of -inf alone would be NaN
    masked_KCyx = (q_KCyx / temperature).masked_fill(~chosen_KC[:, :, None, None], none)
    return masked_KCyx.softmax(dim=1)


def pixel_entropy(logits_KCyx: Tensor) -> Tensor:
    """Of each pixel's class probabilities, as a share of ln C: [K, y, x] in 0..1."""
    classes = logits_KCyx.shape[1]
    return torch.special.entr(logits_KCyx.softmax(dim=1)).sum(dim=1) / math.log(max(classes, 2))


def window_weights(raw_KCyx: Tensor, *, tau: float) -> Tensor:
    """softmax over the windows of (mean pixel entropy / tau), times their number: [K], mean 1, detached."""
    return len(raw_KCyx) * (pixel_entropy(raw_KCyx.detach()).mean(dim=(1, 2)) / tau).softmax(dim=0)


def mixture_errors(
    weights_KCyx: Tensor,
    velocity_Pzyx: Tensor,
    target_Kzyx: Tensor,
    *,
    pair_window_P: Tensor,
    pair_class_P: Tensor,
) -> Tensor:
    """(sum_k p_k v_k - target)^2, mean over channels: [K, y, x]."""
    pair_weights_Pyx = weights_KCyx[pair_window_P, pair_class_P]
    mixture_Kzyx = torch.zeros_like(target_Kzyx).index_add(0, pair_window_P, pair_weights_Pyx[:, None] * velocity_Pzyx)
    return (mixture_Kzyx - target_Kzyx).square().mean(dim=1)


def window_losses(
    weights_KCyx: Tensor,
    velocity_Pzyx: Tensor,
    target_Kzyx: Tensor,
    keep_Kyx: Tensor,
    *,
    pair_window_P: Tensor,
    pair_class_P: Tensor,
    reduction: str = "valid",
    trust_Kyx: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the mixture velocity in each window: [K].

    r = sum_k p_k v_k - target;  loss = sum over channels and kept pixels of r^2 / (z * pixels), where `valid` counts
    the kept pixels and `all` counts every pixel (zero-filled mean, as in DUSA's code). No pixel kept: 0, never NaN.
    trust_Kyx, in [0, 1], multiplies each pixel's r^2 and leaves the divisor as it is.
    """
    assert reduction in ("valid", "all"), reduction
    squared_Kyx = mixture_errors(
        weights_KCyx, velocity_Pzyx, target_Kzyx, pair_window_P=pair_window_P, pair_class_P=pair_class_P
    )
    if trust_Kyx is not None:
        squared_Kyx = squared_Kyx * trust_Kyx
    kept_K = torch.where(keep_Kyx, squared_Kyx, 0).sum(dim=(1, 2))
    pixels_K = keep_Kyx.sum(dim=(1, 2)) if reduction == "valid" else keep_Kyx[0].numel()
    return kept_K / torch.as_tensor(pixels_K, device=kept_K.device).clamp(min=1)
