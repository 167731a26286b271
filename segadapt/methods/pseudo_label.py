"""Pseudo-labels: the segmenter's own decisions as labels."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cross_entropy

from segadapt.config import setting
from segadapt.methods.learner import Learner
from segadapt.methods.pixels import mean_where


class PseudoLabel(Learner):
    """Cross-entropy against the most probable class (Lee 2013, eq. 15-16), at test time in the norms' parameters.

    L = mean of -log p(argmax p) over the pixels whose probability reaches the threshold. Per pixel.

    Published: every sample counts (threshold 0); the rate follows Tent's, as for segmentation none was.
    """

    @dataclass
    class Options:
        threshold: float = setting("pixels count whose most probable class reaches this probability", low=0, high=1)

    def loss(self, logits_BChw: Tensor, image_3HW: Tensor, *, task: str, key: str) -> Tensor:
        confidence_Bhw, label_Bhw = logits_BChw.detach().softmax(dim=1).max(dim=1)
        each_Bhw = cross_entropy(logits_BChw, label_Bhw, reduction="none")
        return mean_where(each_Bhw, confidence_Bhw >= self.options.threshold)
