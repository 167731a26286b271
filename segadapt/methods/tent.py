"""Tent: fully test-time adaptation by entropy minimisation."""

from torch import Tensor

from segadapt.methods.learner import Learner
from segadapt.methods.pixels import entropy


class Tent(Learner):
    """Minimise the mean entropy of the predictions (Wang et al. 2021, eq. 1) in the affine parameters of all norms.

    L = mean over pixels of H(softmax(logits)). Per pixel: each pixel of the quarter grid is a sample of the paper's
    batch. LayerNorm is included; without it one layer of SegFormer would adapt. BatchNorm keeps its source statistics,
    where the paper takes the batch's: at one image those cost SegFormer 5 points (see Bn).

    Published: Adam, rate 7.5e-6 for segmentation (in Wang et al. 2022, CoTTA), one step an image.
    """

    def loss(self, logits_BChw: Tensor, image_3HW: Tensor, *, task: str, key: str) -> Tensor:
        return entropy(logits_BChw).mean()
