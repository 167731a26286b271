"""ROID: universal test-time adaptation through weight ensembling, diversity weighting and prior correction."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from segadapt.config import setting
from segadapt.methods.augmix import augmix
from segadapt.methods.learner import Learner
from segadapt.methods.pixels import entropy
from segadapt.models.source import Prediction
from segadapt.seeds import numpy_generator

CLIP, EPS = 0.99, 1e-5  # of the likelihood ratio, as in the authors' code


class Roid(Learner):
    """Robust online adaptation (Marsden et al. 2024).

    w_div = 1 - cos(p, mean p so far), w_cert = -H, each scaled to 0..1                                 (eq. 3-5)
    w = exp(w_div w_cert / temperature), 0 where w_div is below its mean                                (eq. 6)
    L = mean of w SLR(p) + mean of w SCE(p', p), p' of an augmented view                                (eq. 1-2, 9)
        SLR(p) = -sum_c p_c log(p_c / (1 - p_c)); SCE = symmetric cross-entropy, half and half
    after the step: theta = ensemble theta + (1 - ensemble) theta_source                                (eq. 7)
    scored: logits times the smoothed prior (prior + s) / (1 + s C), s = 1 / (C max prior)              (eq. 10-11)

    Per pixel: all weights and both losses; sums are divided by the number of pixels. The prior is that of the image:
    its mean probabilities. The augmented view changes values alone (AugMix), as pixels must stay where they are.

    Published: ensemble 0.99, momentum 0.9, temperature 1/3, SGD 2.5e-4 momentum 0.9.
    """

    can_record = False  # the view's gradients come from another forward
    scored = "corrected by the image's prior, before the update"

    @dataclass
    class Options:
        ensemble: float = setting("share of the new weights; the rest is the source's", low=0, high=1)
        momentum: float = setting("share of the old value in the mean prediction", low=0, high=1)
        temperature: float = setting("of the weights", low=1e-6)
        prior_correction: bool = setting("multiply logits by the smoothed prior of the image")

    def initial_state(self) -> dict[str, Any]:
        return {"mean_C": None}

    def weights(self, logits_BChw: Tensor) -> Tensor:
        """[B, h, w]; the image's mean prediction enters the running one."""
        logits_BChw = logits_BChw.detach()
        p_BChw, C = logits_BChw.softmax(dim=1), logits_BChw.shape[1]
        mean_C = self.state["mean_C"]
        mean_C = torch.full_like(p_BChw[0, :, 0, 0], 1 / C) if mean_C is None else mean_C
        w_div_Bhw = _scaled(1 - cosine_similarity(p_BChw, mean_C[None, :, None, None], dim=1))
        w_cert_Bhw = _scaled(-entropy(logits_BChw))
        o = self.options
        self.state["mean_C"] = o.momentum * mean_C + (1 - o.momentum) * p_BChw.mean(dim=(0, 2, 3))
        return torch.where(w_div_Bhw < w_div_Bhw.mean(), 0, (w_div_Bhw * w_cert_Bhw / o.temperature).exp())

    def loss(self, logits_BChw: Tensor, image_3HW: Tensor, *, task: str, key: str) -> Tensor:
        weight_Bhw = self.weights(logits_BChw)
        (view_BChw,) = self.again(augmix(image_3HW, numpy_generator(self.seed, task, key, "view"))[None])
        assert view_BChw is not None
        consistency_Bhw = symmetric_cross_entropy(view_BChw, logits_BChw)
        return (weight_Bhw * (likelihood_ratio(logits_BChw) + consistency_Bhw)).mean()

    def step(self, image_3HW: Tensor, *, task: str, key: str) -> Prediction:
        prediction = super().step(image_3HW, task=task, key=key)
        if not self.options.prior_correction:
            return prediction
        return Prediction(**{**vars(prediction), "logits_Chw": corrected(prediction.logits_Chw)})

    @torch.no_grad()
    def after_step(self, *, task: str, key: str) -> None:
        for name, parameter in self.moving.items():
            parameter.lerp_(self._source[name], 1 - self.options.ensemble)


def likelihood_ratio(logits_BChw: Tensor) -> Tensor:
    """SLR at each pixel, [B, h, w]."""
    p_BChw = logits_BChw.softmax(dim=1).clamp(0, CLIP)
    return -(p_BChw * (p_BChw / (1 - p_BChw) + EPS).log()).sum(dim=1)


def symmetric_cross_entropy(logits_BChw: Tensor, other_BChw: Tensor) -> Tensor:
    """Half the cross-entropy each way, [B, h, w]."""
    log_p, log_q = logits_BChw.log_softmax(dim=1), other_BChw.log_softmax(dim=1)
    return -0.5 * (log_q.exp() * log_p).sum(dim=1) - 0.5 * (log_p.exp() * log_q).sum(dim=1)


def corrected(logits_Chw: Tensor) -> Tensor:
    """Logits times the smoothed prior of the image."""
    prior_C = logits_Chw.softmax(dim=0).mean(dim=(1, 2))
    smooth = 1 / (len(prior_C) * prior_C.max())
    return logits_Chw * ((prior_C + smooth) / (1 + smooth * len(prior_C)))[:, None, None]


def _scaled(value: Tensor) -> Tensor:
    """Its range to 0..1; all 0 where it has none."""
    return (value - value.min()) / (value.max() - value.min()).clamp(min=torch.finfo(value.dtype).tiny)
