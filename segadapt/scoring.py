"""Pixel counts of a segmenter on labelled images, as `evaluate` counts them; for validations."""

from collections.abc import Sequence

import numpy as np
import torch

from segadapt import metrics, stream
from segadapt.config import EvaluateConfig
from segadapt.datasets import Dataset
from segadapt.datasets.resize import scale
from segadapt.inference import as_evaluated
from segadapt.models.discriminative import Segmenter
from segadapt.models.precision import autocast
from segadapt.rules import loaded_px


@torch.no_grad()
def count(
    segmenter: Segmenter, dataset: Dataset, entries: Sequence[stream.Entry], *, settings: EvaluateConfig
) -> np.ndarray:
    """Confusion matrix, int64 [C label, C prediction], under the settings' rule and precision.

    Counts of parts of the entries add up to those of all.

    Args:
        segmenter: in eval mode; nothing of it is changed.
        entries: labelled.
    """
    asked, device = as_evaluated(segmenter, settings), next(segmenter.net.parameters()).device
    matrix = metrics.ConfusionMatrix(len(dataset.classes), device)
    for sample in stream.read(dataset, entries, short_side_px=loaded_px(settings), workers=settings.data.workers):
        assert sample.label_HW is not None
        image_3HW = scale(sample.image_3HW.to(device), asked.short_side_px)
        with autocast(device, settings.runtime.precision):
            (logits_Chw,) = asked.logits(image_3HW[None])
        matrix.update(metrics.predict_at_label_size(logits_Chw, sample.size_px), sample.label_HW.to(device))
    return matrix.counts()
