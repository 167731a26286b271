"""Pictures of a few samples: the image, its label over it, and the windows that will be cut.

3 RGB   H W image px after the shared resize   C classes
"""

import io
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from segadapt.config import CheckConfig
from segadapt.datasets import Dataset
from segadapt.datasets.labels import IGNORE
from segadapt.datasets.resize import resize_short_side, size_at
from segadapt.models.generative import windows
from segadapt.parse import wants_teacher
from segadapt.record import write_bytes
from segadapt.stream import Entry
from segadapt.task_loop import slug_of

OPACITY = 0.5  # of the label over the image
LINE_PX = 2
TEXT_PX = 14
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
    classes: list[int] = []
    if sample.label_HW is not None:
        label_HW = cv2.resize(sample.label_HW, (width, height), interpolation=cv2.INTER_NEAREST)
        panels.append(outlined(overlay(image_HW3, label_HW, dataset.palette_C3), boxes))
        classes = [int(c) for c in np.unique(label_HW) if c != IGNORE]
    picture = Image.fromarray(np.concatenate(panels, axis=1))
    if classes:
        picture = _with_legend(picture, [(dataset.classes[c], dataset.palette_C3[c]) for c in classes])
    path = folder / slug_of(entry.task) / f"{entry.key}.png"
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, buffer.getvalue())
    return path


def overlay(image_HW3: np.ndarray, label_HW: np.ndarray, palette_C3: np.ndarray) -> np.ndarray:
    """The classes' colours over an image, uint8 RGB both; pixels of IGNORE stay as they are."""
    colours_2563 = np.zeros((256, 3), np.float32)
    colours_2563[: len(palette_C3)] = palette_C3
    opacity_HW1 = np.where(label_HW == IGNORE, 0, OPACITY)[..., None]
    return (image_HW3 * (1 - opacity_HW1) + colours_2563[label_HW] * opacity_HW1).round().astype(np.uint8)


def outlined(image_HW3: np.ndarray, boxes: Sequence[Sequence[float]]) -> np.ndarray:
    """A copy with the outline of every box (top, left, side; px); each a little further in: none hides another."""
    image_HW3 = image_HW3.copy()
    for index, (top, left, side) in enumerate(boxes):
        inset = LINE_PX // 2 + LINE_PX * index % max(LINE_PX, int(side / 4))
        first = round(left) + inset, round(top) + inset
        last = round(left + side) - 1 - inset, round(top + side) - 1 - inset
        cv2.rectangle(image_HW3, first, last, OUTLINES[index % len(OUTLINES)], LINE_PX)
    return image_HW3


def _with_legend(picture: Image.Image, classes: Sequence[tuple[str, np.ndarray]]) -> Image.Image:
    """The picture above the names of its classes, each behind a square of its colour."""
    font, gap = ImageFont.load_default(TEXT_PX), TEXT_PX // 2
    places, x, y = [], gap, gap
    for name, colour in classes:
        length = round(font.getlength(name)) + TEXT_PX + 3 * gap
        if x > gap and x + length > picture.width:
            x, y = gap, y + TEXT_PX + gap
        places.append((x, y, name, tuple(colour.tolist())))
        x += length
    whole = Image.new("RGB", (picture.width, picture.height + y + TEXT_PX + gap), "white")
    whole.paste(picture)
    draw = ImageDraw.Draw(whole)
    for x, y, name, colour in places:
        top = picture.height + y
        draw.rectangle([x, top, x + TEXT_PX - 1, top + TEXT_PX - 1], fill=colour, outline="black")
        draw.text((x + TEXT_PX + gap, top), name, fill="black", font=font)
    return whole
