"""Pictures of a step: what it saw and predicted, small enough to be kept. Pictures of samples under their labels.

C classes   3 RGB   H W image px   h w logits, of any stride
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate

from segadapt.datasets.labels import IGNORE
from segadapt.metrics import predict_at_label_size
from segadapt.record import write_bytes
from segadapt.wandb_mirror import Picture

PICTURE_PX = 512  # long side of a picture
OPACITY = 0.5  # of the label over the image
TEXT_PX = 14


def picture_of(
    image_3HW: Tensor, logits_Chw: Tensor, label_HW: Tensor | None, *, classes: Sequence[str], caption: str
) -> Picture:
    """Image, prediction and label (None: unlabelled) with a long side of PICTURE_PX at most.

    The prediction is the argmax at that size, so it is close to the one that is scored, and cheap.
    """
    height, width = image_3HW.shape[1:]
    factor = min(1, PICTURE_PX / max(height, width))
    size = max(1, round(factor * height)), max(1, round(factor * width))
    image = interpolate(image_3HW[None], size=size, mode="bilinear", antialias=True)[0]
    masks = {"prediction": predict_at_label_size(logits_Chw, size).cpu().numpy()}
    if label_HW is not None:
        masks["label"] = interpolate(label_HW[None, None], size=size, mode="nearest-exact")[0, 0].cpu().numpy()
    pixels_HW3 = (255 * image).round().byte().permute(1, 2, 0).cpu().numpy()
    return Picture(pixels_HW3, masks, classes, caption)


def overlay(image_HW3: np.ndarray, label_HW: np.ndarray, palette_C3: np.ndarray) -> np.ndarray:
    """The classes' colours over an image, uint8 RGB both; pixels of IGNORE stay as they are."""
    colours_2563 = np.zeros((256, 3), np.float32)
    colours_2563[: len(palette_C3)] = palette_C3
    opacity_HW1 = np.where(label_HW == IGNORE, 0, OPACITY)[..., None]
    return (image_HW3 * (1 - opacity_HW1) + colours_2563[label_HW] * opacity_HW1).round().astype(np.uint8)


def write_panels(
    path: Path,
    panels: Sequence[np.ndarray],
    label_HW: np.ndarray | None,
    *,
    classes: Sequence[str],
    palette_C3: np.ndarray,
) -> None:
    """Panels of one height side by side, uint8 RGB, above the names of the label's classes, as a PNG file."""
    picture = Image.fromarray(np.concatenate(panels, axis=1))
    if shown := [] if label_HW is None else [int(c) for c in np.unique(label_HW) if c != IGNORE]:
        picture = _with_legend(picture, [(classes[c], palette_C3[c]) for c in shown])
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, buffer.getvalue())


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
