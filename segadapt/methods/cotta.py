"""CoTTA: continual test-time adaptation with an averaging teacher and stochastic restore."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from segadapt.config import setting
from segadapt.errors import UserError
from segadapt.methods.learner import Learner
from segadapt.models.discriminative import Segmenter
from segadapt.models.source import Prediction
from segadapt.seeds import derive


class Cotta(Learner):
    """A student learns labels of its own moving average (Wang et al. 2022); all weights move.

    1. teacher's probabilities: where the source model is sure (its largest probability above `confidence`) those of the
       image as it is, elsewhere the mean over scales and flips (eq. 2-4); they are what is scored
    2. L = mean over pixels of the student's cross-entropy against the teacher's decisions (eq. 1; hard in the authors'
       code for segmentation)
    3. teacher = average * teacher + (1 - average) * student                            (eq. 5)
    4. each number of the student goes back to the source with probability `restore`    (eq. 7-8)

    Per pixel: the choice in 1, as in the authors' code for segmentation; the paper's is per image.

    Published: average 0.999, restore 0.01, confidence 0.69, Adam 7.5e-6 (6e-5 / 8); with flips, scales 0.5 ... 1.75 (on
    ADE20K-C, by DUSA) or 0.5 ... 2.0 (on ACDC).
    """

    scored = "the averaging teacher's, before the update"

    @dataclass
    class Options:
        average: float = setting("share of the old value in the teacher's weights", low=0, high=1)
        restore: float = setting(
            "share of the student's numbers that go back to the source at each step", low=0, high=1
        )
        confidence: float = setting("of the source model, above which the teacher is not averaged", low=0, high=1)
        scales: list[float] = setting("sizes of the image over which the teacher's probabilities are averaged")
        flip: bool = setting("and over both mirror images")

    @staticmethod
    def choose(segmenter: Segmenter, options: Any) -> Mapping[str, nn.Parameter]:
        return segmenter.parameters()

    def __init__(self, segmenter: Segmenter, options: Any, *more: Any, **names: Any):
        if not options.scales or min(options.scales) <= 0:
            raise UserError(f"tta.options.scales={options.scales}: expected sizes above 0. Correct the list.")
        super().__init__(segmenter, options, *more, **names)

    def initial_state(self) -> dict[str, Any]:
        return {"teacher": {name: value.clone() for name, value in self._source.items()}}

    @torch.no_grad()
    def probabilities(self, weights: Mapping[str, Tensor], image_3HW: Tensor) -> Tensor:
        """[1, C, h, w] of the segmenter with other weights."""
        with self.holding(weights):
            (logits_BChw,) = self.again(image_3HW[None])
        assert logits_BChw is not None
        return logits_BChw.softmax(dim=1)

    @torch.no_grad()
    def taught(self, image_3HW: Tensor) -> Tensor:
        """The teacher's probabilities, [1, C, h, w]."""
        o, teacher = self.options, self.state["teacher"]
        is_sure_Bhw = self.probabilities(self._source, image_3HW).amax(dim=1) > o.confidence
        plain_BChw = self.probabilities(teacher, image_3HW)
        total_BChw, count = torch.zeros_like(plain_BChw), 0
        for scale in o.scales:
            size = [max(1, round(side * scale)) for side in image_3HW.shape[1:]]
            scaled_3HW = interpolate(image_3HW[None], size=size, mode="bilinear", align_corners=False)[0]
            for is_flipped in (False, True) if o.flip else (False,):
                p_BChw = self.probabilities(teacher, scaled_3HW.flip(2) if is_flipped else scaled_3HW)
                p_BChw = p_BChw.flip(3) if is_flipped else p_BChw
                total_BChw += interpolate(p_BChw, size=plain_BChw.shape[2:], mode="bilinear", align_corners=False)
                count += 1
        return torch.where(is_sure_Bhw[:, None], plain_BChw, total_BChw / count)

    def step(self, image_3HW: Tensor, *, task: str, key: str) -> Prediction:
        image_3HW = self.fit(image_3HW)
        p_BChw = self.taught(image_3HW)
        loss = cross_entropy(self.logits(image_3HW), p_BChw.argmax(dim=1), reduction="none").mean()
        scored_Chw = p_BChw[0].clamp(min=torch.finfo(p_BChw.dtype).tiny).log()
        return self.learn(loss, scored_Chw, task=task, key=key)

    @torch.no_grad()
    def after_step(self, *, task: str, key: str) -> None:
        o, teacher = self.options, self.state["teacher"]
        generator = torch.Generator(self.device).manual_seed(derive(self.seed, task, key, "restore"))
        for name, parameter in self.moving.items():
            teacher[name].lerp_(parameter, 1 - o.average)
            is_restored = torch.rand(parameter.shape, generator=generator, device=self.device) < o.restore
            parameter.copy_(torch.where(is_restored, self._source[name], parameter))

    def save(self, folder: str | Path) -> None:
        """The averaging teacher, as it is what is scored."""
        with self.holding(self.state["teacher"]):
            super().save(folder)
