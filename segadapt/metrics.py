"""One confusion matrix per task; every score is derived from it. What is absent stays NaN."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchmetrics.classification import MulticlassConfusionMatrix

# C dataset classes  H W label px  h w logits, ceil(image px / 4)


def predict_at_label_size(logits_Chw: Tensor, size: tuple[int, int]) -> Tensor:
    """Upsample logits straight to the label's own size (bilinear, align_corners=False), then argmax.

    Args:
        logits_Chw: float32, raw or normalised, at any size; at most 255 classes.
        size: (height, width) of the label in px.
    Returns:
        uint8 [H, W], 0..C-1, on the device of the logits.
    """
    logits_CHW = interpolate(logits_Chw[None], size=size, mode="bilinear", align_corners=False)[0]
    return logits_CHW.argmax(dim=0).to(torch.uint8)


class ConfusionMatrix:
    """Counts n[label, prediction] over all pixels whose label is not 255."""

    def __init__(self, num_classes: int, device: torch.device | str):
        self._metric = MulticlassConfusionMatrix(num_classes, ignore_index=255, validate_args=False).to(device)

    def update(self, prediction_HW: Tensor, label_HW: Tensor) -> None:
        """Add pixels: two integer tensors of one shape (any), 0..C-1 and 0..C-1 or 255; both on the metric's device."""
        if prediction_HW.shape != label_HW.shape:
            raise ValueError(
                f"prediction {tuple(prediction_HW.shape)} and label {tuple(label_HW.shape)} differ in shape."
            )
        with _native_bincount():
            self._metric.update(prediction_HW, label_HW)

    def counts(self) -> np.ndarray:
        """Return int64 [C label, C prediction], a copy on the CPU."""
        counts_CC = cast(Tensor, self._metric.confmat)
        assert counts_CC.dtype == torch.int64, counts_CC.dtype  # float32 would stop counting at 2**24 pixels
        return counts_CC.cpu().numpy().copy()

    def restore(self, counts_CC: Tensor) -> None:
        """Go on from counts, int64 [C label, C prediction] on any device."""
        self._metric.confmat = counts_CC.to(self._metric.device, copy=True)

    def reset(self) -> None:
        """Forget all pixels."""
        self._metric.reset()


@contextmanager
def _native_bincount() -> Iterator[None]:
    """Lift the deterministic mode for counting, which is exact in any order.

    Under it torchmetrics 1.9 replaces bincount by a [pixels, C * C] int64 table: 63 GB for 512 x 683 px, 150 classes.
    """
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


@dataclass(frozen=True)
class Scores:
    """Scores of one confusion matrix as fractions in [0, 1], float64; NaN: nothing to average.

    The m-scores are means over the classes whose value is defined (not NaN).
    """

    miou: float
    macc: float
    aacc: float  # share of correct pixels
    mf1: float
    mprecision: float
    mrecall: float
    mfscore: float  # mmsegmentation's; see f1_C, which has values where it has none
    iou_C: np.ndarray  # NaN: neither present nor predicted; 0: predicted, never present
    acc_C: np.ndarray  # recall; NaN: not present
    f1_C: np.ndarray  # Dice; NaN as iou_C
    precision_C: np.ndarray  # NaN: not predicted


def scores(counts_CC: np.ndarray) -> Scores:
    """Derive all scores from counts [C label, C prediction], as mmseg's IoUMetric defines them, in float64.

    IoU = n_cc / (row + col - n_cc), acc = recall = n_cc / row, precision = n_cc / col,
    F1 = Dice = 2 n_cc / (row + col). mFscore is the mean of the same over the classes where 2 P R / (P + R), of
    precision and recall, is defined: those with a correct pixel.
    """
    hit_C = np.diagonal(counts_CC)
    label_C, predicted_C = counts_CC.sum(axis=1), counts_CC.sum(axis=0)
    iou_C = _ratio(hit_C, label_C + predicted_C - hit_C)
    acc_C = _ratio(hit_C, label_C)
    f1_C, precision_C = _ratio(2 * hit_C, label_C + predicted_C), _ratio(hit_C, predicted_C)
    macc = _mean_of_defined(acc_C)
    return Scores(
        miou=_mean_of_defined(iou_C),
        macc=macc,
        aacc=float(_ratio(hit_C.sum(keepdims=True), counts_CC.sum(keepdims=True).ravel())[0]),
        mf1=_mean_of_defined(f1_C),
        mprecision=_mean_of_defined(precision_C),
        mrecall=macc,
        mfscore=_mean_of_defined(f1_C[hit_C > 0]),
        iou_C=iou_C,
        acc_C=acc_C,
        f1_C=f1_C,
        precision_C=precision_C,
    )


def _ratio(part_C: np.ndarray, whole_C: np.ndarray) -> np.ndarray:
    """part / whole in float64; NaN where whole is 0."""
    return np.divide(part_C, whole_C, out=np.full(whole_C.shape, np.nan), where=whole_C > 0)


def _mean_of_defined(values_C: np.ndarray) -> float:
    """Mean of what is not NaN; NaN, without numpy's warning, if nothing is left."""
    defined = values_C[~np.isnan(values_C)]
    return float(defined.mean()) if defined.size else float("nan")
