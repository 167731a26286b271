"""DUSA-U: the teacher learns from the empty prompt alone."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from segadapt.models.combined import Combined, Taught
from segadapt.models.generative.candidates import Candidates
from segadapt.models.generative.sd3 import NoisyLatent


class DusaU(Combined):
    """The generative method with a cheaper update of the teacher (DUSA-U, Li et al. 2024, appendix).

    The segmenter's gradient is that of the generative method, from class velocities without graph. The teacher's is
    that of mean (v(x_t, empty prompt) - (noise - x_0))^2 over each window: one pair a window with a backward, in place
    of one a candidate. Per image, all pixels of its windows, which count alike whatever the options of the loss.

    Published: as the generative method.
    """

    learns_from_classes = False

    def _backward_chunks(
        self,
        leaf_RCyx: Tensor,
        noisy: NoisyLatent,
        candidates: Candidates,
        *,
        weight_R: Tensor | None = None,
        when_complete: Callable[[], None] = lambda: None,
    ) -> Taught:
        taught = super()._backward_chunks(leaf_RCyx, noisy, candidates, weight_R=weight_R, when_complete=when_complete)
        if self.trains_generative and any(candidates.counts):  # an image that asks nothing gives no step
            rows = torch.arange(len(leaf_RCyx), device=leaf_RCyx.device)
            for row_P in rows.split(self.pairs_at_once):
                null_P = torch.full_like(row_P, self.generative.null_class)
                loss = mse_loss(self.generative.velocity(noisy, row_P, null_P), noisy.target_Kzyx[row_P])
                (loss * len(row_P) / len(rows)).backward()
        return taught
