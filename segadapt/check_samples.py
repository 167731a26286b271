"""Pictures of a few samples: the image, its label over it, and the windows that will be cut.

3 RGB   H W image px after the shared resize   C classes
"""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from segadapt.config_verbs import CheckConfig
from segadapt.datasets import Dataset
from segadapt.datasets.resize import resize_short_side, size_at
from segadapt.models.generative import windows
from segadapt.parse import wants_teacher
from segadapt.pictures import overlay, write_panels
from segadapt.stream import Entry
from segadapt.task_loop import slug_of

LINE_PX = 2
# Okabe and Ito's colours, told apart by colour-blind eyes too; of the windows' outlines, in turn.
OUTLINES = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))


def write_sample(folder: Path, settings: CheckConfig, dataset: Dataset, entry: Entry) -> Path:
    """Draw one sample as both models get it; returns the PNG: {folder}/{task}/{key}.png.

    Left the image with the outlines of the teacher's windows, right the same under its label with a legend; ignored
    pixels are plain. A method without teacher has no windows. Of windows=entropy these are the grid's, which an image
    gets where the segmenter is sure.
    """
    sample, g = dataset.load(entry.task, entry.key), settings.model.generative
    image_3HW = resize_short_side(sample.image_HW3, settings.data.short_side_px)
    image_HW3 = np.ascontiguousarray((image_3HW * 255).round().byte().permute(1, 2, 0).numpy())
    height, width = image_HW3.shape[:2]
    boxes = []
    if wants_teacher(settings.tta):
        seen_px = size_at(height, width, g.short_side_px)
        plan_K3 = windows.plan(*seen_px, window_px=g.window_px, stride_px=g.stride_px)
        boxes = [[value * height / seen_px[0] for value in box] for box in plan_K3.tolist()]
    panels = [outlined(image_HW3, boxes)]
    label_HW = None
    if sample.label_HW is not None:
        label_HW = cv2.resize(sample.label_HW, (width, height), interpolation=cv2.INTER_NEAREST)
        panels.append(outlined(overlay(image_HW3, label_HW, dataset.palette_C3), boxes))
    path = folder / slug_of(entry.task) / f"{entry.key}.png"
    write_panels(path, panels, label_HW, classes=dataset.classes, palette_C3=dataset.palette_C3)
    return path


def outlined(image_HW3: np.ndarray, boxes: Sequence[Sequence[float]]) -> np.ndarray:
    """A copy with the outline of every box (top, left, side; px); each a little further in: none hides another."""
    image_HW3 = image_HW3.copy()
    for index, (top, left, side) in enumerate(boxes):
        inset = LINE_PX // 2 + LINE_PX * index % max(LINE_PX, int(side / 4))
        first = round(left) + inset, round(top) + inset
        last = round(left + side) - 1 - inset, round(top + side) - 1 - inset
        cv2.rectangle(image_HW3, first, last, OUTLINES[index % len(OUTLINES)], LINE_PX)
    return image_HW3
