"""MEMO: marginal entropy minimisation with one test image and its augmentations."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from segadapt.config import setting
from segadapt.methods.augmix import augmix
from segadapt.methods.learner import Learner
from segadapt.methods.pixels import entropy
from segadapt.models.discriminative import Segmenter
from segadapt.models.source import Prediction
from segadapt.seeds import numpy_generator


class Memo(Learner):
    """Adapt to each image alone, then predict it (Zhang et al. 2022, eq. 2-3); all weights move, and go back after.

    L = mean over pixels of H( (1/N) sum_n p(x_n) ), over N augmentations of the image; a flip is undone on the
    prediction. Per pixel: the marginal is that of each pixel, so augmentations must not move it: AugMix (Hendrycks et
    al. 2020) with its operations on values alone, and a horizontal flip, where the paper also rotates, shears and
    shifts. The gradient is that of the joint loss, image by image: first all p, then each with dL/dp.

    Published: N 32 to 64 (ImageNet), one step, AdamW 1e-5 with weight decay 0.01 for transformers.
    """

    scored = "after the update"
    can_record = False  # augmentations of an image come before its size was seen twice
    learns = False  # every image begins at the source

    @dataclass
    class Options:
        augmentations: int = setting("augmented copies of an image", low=1)

    @staticmethod
    def choose(segmenter: Segmenter, options: Any) -> Mapping[str, nn.Parameter]:
        return segmenter.parameters()

    def augmented(self, image_3HW: Tensor, index: int, *, task: str, key: str) -> tuple[Tensor, bool]:
        """The n-th augmentation, the same at each call, and whether it is flipped."""
        rng = numpy_generator(self.seed, task, key, "augmentation", index)
        changed_3HW, is_flipped = augmix(image_3HW, rng), bool(rng.random() < 0.5)
        return (changed_3HW.flip(2), True) if is_flipped else (changed_3HW, False)

    def step(self, image_3HW: Tensor, *, task: str, key: str) -> Prediction:
        self.reset()
        image_3HW = self.fit(image_3HW)
        loss = self.marginal_backward(image_3HW, task=task, key=key)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.moving.values() if p.grad is not None])
        is_used = loss.isfinite() & norm.isfinite() & (norm > 0)
        self._updates.take(is_used)
        self._updates.drop()
        with torch.no_grad():
            (logits_BChw,) = self.again(image_3HW[None])
        assert logits_BChw is not None
        numbers = torch.stack([loss, norm, is_used.float(), logits_BChw.isfinite().all().float()])
        value, grad_norm, was_used, is_sound = numbers.tolist()
        return Prediction(logits_BChw[0], bool(is_sound), value, grad_norm, is_updated=bool(was_used))

    def marginal_backward(self, image_3HW: Tensor, *, task: str, key: str) -> Tensor:
        """Gradients of the marginal entropy, one augmentation's graph at a time; returns it."""
        count, names = self.options.augmentations, {"task": task, "key": key}
        total_BChw: Tensor | None = None
        with torch.no_grad():
            for index in range(count):
                p_BChw = self._probabilities(image_3HW, index, again=True, **names)
                total_BChw = p_BChw if total_BChw is None else total_BChw + p_BChw
        assert total_BChw is not None
        marginal_BChw = (total_BChw / count).requires_grad_()
        loss = entropy(marginal_BChw.clamp(min=torch.finfo(marginal_BChw.dtype).tiny).log()).mean()
        (grad_BChw,) = torch.autograd.grad(loss, marginal_BChw)
        for index in range(count):
            (self._probabilities(image_3HW, index, again=False, **names) * grad_BChw / count).sum().backward()
        return loss.detach()

    def _probabilities(self, image_3HW: Tensor, index: int, *, again: bool, task: str, key: str) -> Tensor:
        """[1, C, h, w] of an augmentation, where the image's own pixels are."""
        changed_3HW, is_flipped = self.augmented(image_3HW, index, task=task, key=key)
        (logits_BChw,) = self.again(changed_3HW[None]) if again else (self.logits(changed_3HW),)
        assert logits_BChw is not None
        p_BChw = logits_BChw.softmax(dim=1)
        return p_BChw.flip(3) if is_flipped else p_BChw
