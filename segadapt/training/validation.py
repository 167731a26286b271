"""The score of a segmenter on held-out images."""

from collections.abc import Sequence

import numpy as np
import torch

from segadapt import metrics, stream
from segadapt.config import RunConfig
from segadapt.datasets import Dataset
from segadapt.models.discriminative.segmenter import NetSegmenter
from segadapt.models.precision import autocast


@torch.no_grad()
def count(
    segmenter: NetSegmenter, dataset: Dataset, entries: Sequence[stream.Entry], *, settings: RunConfig
) -> np.ndarray:
    """Confusion matrix of the segmenter in the run's precision, as `evaluate` has it: int64 [C label, C prediction].

    Args:
        segmenter: in eval mode.
        entries: labelled; none: all counts are 0.
    """
    device = next(segmenter.net.parameters()).device
    matrix, data = metrics.ConfusionMatrix(len(dataset.classes), device), settings.data
    for sample in stream.read(dataset, entries, short_side_px=data.short_side_px, workers=data.workers):
        assert sample.label_HW is not None, "training needs labels; it checks them first"
        with autocast(device, settings.runtime.precision):
            logits_Chw = segmenter.logits(sample.image_3HW[None].to(device))[0]
        matrix.update(metrics.predict_at_label_size(logits_Chw, sample.size_px), sample.label_HW.to(device))
    return matrix.counts()
