"""Predictions for a benchmark's server: grey PNGs of the image's own size, in the ids that the server counts by."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from segadapt.config import EvaluateConfig, RunConfig
from segadapt.datasets.labels import CITYSCAPES, CITYSCAPES_IDS
from segadapt.errors import UserError
from segadapt.record import write_png_grey

FOLDER = "submission"  # in the run folder; below it a folder a task, and in it KEY.png


def _cityscapes(num_classes: int) -> np.ndarray:
    """Train ids to label ids, see labels.CITYSCAPES_IDS."""
    if num_classes != len(CITYSCAPES):
        raise UserError(f"evaluate.submission=cityscapes is for the {len(CITYSCAPES)} classes of Cityscapes; "
                        f"data.classes has {num_classes}. Set data.classes=cityscapes, or submission=ids.")  # fmt: skip
    return np.array(list(CITYSCAPES_IDS.values()), np.uint8)


# evaluate.submission: number of classes -> uint8 [C], the id that each class has in a file.
FILE_IDS: dict[str, Callable[[int], np.ndarray]] = {
    "ids": lambda num_classes: np.arange(num_classes, dtype=np.uint8),
    "ids_plus_one": lambda num_classes: np.arange(1, num_classes + 1, dtype=np.uint8),  # ADE20K: 0 is no class
    "cityscapes": _cityscapes,
}


def file_ids(settings: RunConfig, num_classes: int) -> np.ndarray | None:
    """uint8 [C], the id of each class in a file; None: no submission is asked for. UserError: other classes."""
    if not isinstance(settings, EvaluateConfig) or settings.evaluate.submission == "none":
        return None
    return FILE_IDS[settings.evaluate.submission](num_classes)


def write(path: Path, classes_HW: np.ndarray, file_ids_C: np.ndarray) -> None:
    """One image: uint8 classes [H, W] as an 8-bit grey PNG of the file's ids."""
    write_png_grey(path, file_ids_C[classes_HW])
