"""Cross-entropy at full resolution, and the objective that consists of it alone.

B images of a batch   C classes   s crop px   h w logits, of any stride
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from segadapt.models.discriminative import Outputs


@dataclass(frozen=True)
class Terms:
    """What a training step minimises."""

    total: Tensor  # scalar with graph
    values: dict[str, Tensor]  # scalars without
    weights: dict[str, float]  # of this step


def cross_entropy(logits_BCss: Tensor, label_Bss: Tensor, is_counted_Bss: Tensor) -> Tensor:
    """Mean of -log softmax(logits)[label] over the pixels that count; 0 where there are none.

    As F.cross_entropy, which refuses images on CUDA under deterministic algorithms.

    Args:
        label_Bss: int64, 0..C-1 where a pixel counts, anything elsewhere.
        is_counted_Bss: bool.
    """
    index_B1ss = label_Bss.masked_fill(~is_counted_Bss, 0)[:, None]
    own_Bss = logits_BCss.log_softmax(dim=1).gather(1, index_B1ss)[:, 0]
    return -own_Bss.masked_fill(~is_counted_Bss, 0).sum() / is_counted_Bss.sum().clamp(min=1)


def segmentation_loss(logits_BChw: Tensor, label_Bss: Tensor) -> Tensor:
    """Cross-entropy of logits resized to the label, mean over pixels that are not 255; 0 where there are none."""
    logits_BCss = F.interpolate(logits_BChw, size=label_Bss.shape[1:], mode="bilinear", align_corners=False)
    return cross_entropy(logits_BCss, label_Bss, label_Bss != 255)


class Objective(nn.Module):
    """Cross-entropy alone."""

    def forward(self, outputs: Outputs, label_Bss: Tensor, *, step: int) -> Terms:
        """step: number of the optimizer step, from 1, for terms that begin later."""
        loss = segmentation_loss(outputs.logits_BChw, label_Bss)
        return Terms(loss, {"cross_entropy": loss.detach()}, {"cross_entropy": 1.0})

    def amount(self, label_Bss: Tensor) -> float:
        """What the mean over these labels divides by: micro-batches and processes count by their share of it."""
        return float((label_Bss != 255).sum())

    def remember(self) -> None:
        """Cross-entropy has no memory."""
