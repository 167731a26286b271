"""AugMix without what moves pixels: chains of operations on values, mixed with each other and with the image.

H W image px
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def autocontrast(image_3HW: Tensor, _: float) -> Tensor:
    """Each channel stretched to 0..1."""
    low_311, high_311 = image_3HW.amin(dim=(1, 2), keepdim=True), image_3HW.amax(dim=(1, 2), keepdim=True)
    return (image_3HW - low_311) / (high_311 - low_311).clamp(min=1 / 255)


def equalize(image_3HW: Tensor, _: float) -> Tensor:
    """Each channel's values by their rank: the share of its pixels that are darker, in 256 steps."""
    bytes_3N = (image_3HW * 255).round().long().clamp(0, 255).flatten(1)
    share_3V = torch.stack([torch.bincount(row_N, minlength=256) for row_N in bytes_3N]).cumsum(dim=1)
    first_31 = share_3V.gather(1, bytes_3N.amin(dim=1, keepdim=True))  # the darkest value becomes 0
    scale_31 = (share_3V[:, -1:] - first_31).clamp(min=1)
    table_3V = ((share_3V - first_31).clamp(min=0) / scale_31).to(image_3HW)
    return table_3V.gather(1, bytes_3N).view_as(image_3HW)


def posterize(image_3HW: Tensor, strength: float) -> Tensor:
    """Only the highest 8 to 4 bits."""
    step = 2 ** round(4 * strength)
    return (image_3HW * 255).round().div(step, rounding_mode="floor") * step / 255


def solarize(image_3HW: Tensor, strength: float) -> Tensor:
    """Values above a threshold of 1 to 0 are inverted."""
    return torch.where(image_3HW > 1 - strength, 1 - image_3HW, image_3HW)


OPERATIONS: tuple[Callable[[Tensor, float], Tensor], ...] = (autocontrast, equalize, posterize, solarize)


def augmix(
    image_3HW: Tensor, rng: np.random.Generator, *, width: int = 3, depth: int = 3, severity: float = 0.3
) -> Tensor:
    """Hendrycks et al. 2020, algorithm 1: `width` chains of 1..`depth` operations, weights from Dirichlet(1), the sum
    mixed with the image by Beta(1).

    Args:
        image_3HW: RGB in 0..1.
        severity: largest strength of an operation, in 0..1; 0.3 is the paper's 3 of 10.
    Returns:
        As the image: size, dtype, device, 0..1.
    """  # fmt: skip
    weights, share = rng.dirichlet([1.0] * width), rng.beta(1.0, 1.0)
    mixed_3HW = torch.zeros_like(image_3HW)
    for weight in weights:
        chain_3HW = image_3HW
        for _ in range(rng.integers(1, depth + 1)):
            operation = OPERATIONS[rng.integers(len(OPERATIONS))]
            chain_3HW = operation(chain_3HW, float(rng.uniform(0, severity)))
        mixed_3HW += float(weight) * chain_3HW
    return ((1 - share) * image_3HW + share * mixed_3HW).clamp(0, 1)
