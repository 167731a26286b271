"""What several methods compute at each pixel.

B images (1)   C classes   h w logits
"""

import math

import torch
from torch import Tensor


def entropy(logits_BChw: Tensor) -> Tensor:
    """Of the softmax over classes, nats: [B, h, w] in 0..ln C, differentiable; exact also where a probability is 0."""
    log_p_BChw = logits_BChw.log_softmax(dim=1)
    return -(log_p_BChw.exp() * log_p_BChw).sum(dim=1)


def most_entropy(classes: int) -> float:
    """ln C, the entropy of a uniform choice."""
    return math.log(classes)


def mean_where(value_Bhw: Tensor, kept_Bhw: Tensor) -> Tensor:
    """Mean over the pixels that are kept; 0 with a gradient of 0 where there are none. No index travels to the host."""
    return torch.where(kept_Bhw, value_Bhw, 0).sum() / kept_Bhw.sum().clamp(min=1)
