"""What pretraining trains and how it is judged: an encoder under a linear classifier, soft targets, top-k accuracy.

B images   3 RGB   H W image px   C classes
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import SegformerForImageClassification

from segadapt.config_pretraining import PretrainConfig
from segadapt.datasets.image_folder import ImageFolder
from segadapt.losses.objective import Terms
from segadapt.models.discriminative.make import config_of, explain_config
from segadapt.models.discriminative.segmenter import NetSegmenter
from segadapt.models.precision import autocast
from segadapt.stream import batches
from segadapt.training.classified_images import ValidationImages
from segadapt.training.parallel import World

FAMILY = "segformer"
MOST = 5  # classes of top-5 accuracy


class Classifier(NetSegmenter):
    """The encoder of a SegFormer, its last map's mean, and one linear layer; all else as of a segmenter."""

    def outputs(self, image_B3HW: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """logits_BC: float32, of RGB in 0..1."""
        return self.net(pixel_values=self.normalised(image_B3HW)).logits.float()

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """Those of the linear layer."""
        return {name: p for name, p in self.parameters().items() if name.startswith("classifier.")}


def make_classifier(
    config: Mapping[str, Any],
    classes: tuple[str, ...],
    *,
    seed: int,
    device: torch.device,
    gradient_checkpointing: bool = False,
) -> Classifier:
    """With random weights, which depend on the seed alone. UserError: see make.config_of.

    Args:
        config: keyword arguments of SegformerConfig.
    """
    made = config_of(FAMILY, config, len(classes), classes=classes)
    with torch.random.fork_rng(devices=[]), explain_config("no net can be made of it"):
        torch.manual_seed(seed)
        net: Any = SegformerForImageClassification(made)  # pyright: ignore[reportArgumentType]
    return Classifier(net.to(device), gradient_checkpointing=gradient_checkpointing)


class SoftCrossEntropy(nn.Module):
    """Cross-entropy against probabilities, the mean over images: the objective of the loop."""

    def forward(self, logits_BC: Tensor, target_BC: Tensor, *, step: int, shares_T: Tensor | None = None) -> Terms:
        """float32; the targets sum to 1. Nothing of it depends on the step; for the shares see Objective.forward."""
        value = -(target_BC * logits_BC.log_softmax(1)).sum(1).mean()
        total = value if shares_T is None else value * shares_T.sum()
        return Terms(total, {"cross_entropy": value.detach()}, {"cross_entropy": 1.0})

    def amounts(self, target_BC: Tensor) -> Tensor:
        """What the mean of its one term divides by: float64 [1], on the device."""
        return torch.full((1,), len(target_BC), dtype=torch.float64, device=target_BC.device)

    def refuse_idle(self, iters: int) -> None:
        """It always has an effect."""

    def remember(self) -> None:
        """It has no memory."""


def ranks(logits_BC: Tensor, label_B: Tensor) -> Tensor:
    """Classes that are placed before the right one: int64 [B], 0: top-1. Of equal logits the lower id comes first.

    C where a logit is not finite: such a prediction is never right.
    """
    own_B1 = logits_BC.gather(1, label_B[:, None])
    is_lower_BC = torch.arange(logits_BC.shape[1], device=label_B.device) < label_B[:, None]
    before_B = ((logits_BC > own_B1) | ((logits_BC == own_B1) & is_lower_BC)).sum(1)
    return torch.where(logits_BC.isfinite().all(1), before_B, logits_BC.shape[1])


class Accuracy:
    """Scores of a validation: top-1, and top-5 of more than 5 classes, of fewer it would always be 1."""

    chosen_by = "top1"

    def __init__(self, settings: PretrainConfig, folder: ImageFolder, world: World):
        self._settings, self._world, t = settings, world, settings.train
        self._images, self._ks = ValidationImages(settings, folder), (1, MOST) if len(folder.classes) > MOST else (1,)
        part = max(1, t.batch_size // (world.size * t.accumulate))
        own = range(world.rank, len(self._images), world.size)
        self._stretches = [own[start : start + part] for start in range(0, len(own), part)]

    @torch.no_grad()
    def __call__(self, segmenter: Classifier) -> dict[str, float]:
        """Fractions of all images over all processes, float64; in eval mode, in the settings' precision."""
        device, runtime = segmenter.net.device, self._settings.runtime
        counts = np.zeros(len(self._ks) + 1, np.int64)
        for batch in batches(self._images, self._stretches, workers=self._settings.data.workers):
            pixels_B3ss, label_B = (values.to(device) for values in batch)
            with autocast(device, runtime.precision):
                logits_BC = segmenter.outputs(pixels_B3ss.float() / 255)
            rank_B = ranks(logits_BC, label_B).cpu().numpy()
            counts += [*(np.count_nonzero(rank_B < k) for k in self._ks), len(rank_B)]
        *right, images = self._world.sum(counts)
        return {f"top{k}": float(number / images) for k, number in zip(self._ks, right, strict=True)}
