"""RandAugment (Cubuk et al. 2020) on OpenCV and numpy: what is drawn apart from what is done with it.

The operations and their strengths are those of timm's `rand-m9-mstd0.5-inc1` policy: each grows with the magnitude.
Changes of light give Pillow's pixels exactly; geometry is bicubic with OpenCV's kernel, and fills with a grey.

H W image px   3 RGB   uint8
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from segadapt.config_pretraining import RandAugmentSettings

MOST = 10.0  # magnitude
FILL = (124, 116, 104)  # ImageNet's mean colour
LUMA = (19595, 38470, 7471)  # ITU-R 601 in 1/65536, as Pillow rounds it
SMOOTH_33 = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32)  # over 13: Pillow's ImageFilter.SMOOTH

Strength = Callable[[float, np.random.Generator], float]  # of (magnitude 0..10, rng of its sign)
Apply = Callable[[np.ndarray, float], np.ndarray]


@dataclass(frozen=True)
class Operation:
    """One of OPERATIONS, with its strength in its own unit."""

    name: str
    strength: float

    def apply(self, image_HW3: np.ndarray) -> np.ndarray:
        """A new image of the same size."""
        return OPERATIONS[self.name][1](image_HW3, self.strength)


def draw(rng: np.random.Generator, t: RandAugmentSettings) -> list[Operation]:
    """So many of OPERATIONS with replacement, each then left out with probability 1 - t.probability."""
    drawn, names = [], list(OPERATIONS)
    for _ in range(t.operations):
        name = names[rng.integers(len(names))]
        if rng.random() < t.probability:
            magnitude = float(np.clip(rng.normal(t.magnitude, t.magnitude_std), 0, MOST))
            drawn.append(Operation(name, OPERATIONS[name][0](magnitude, rng)))
    return drawn


def apply(image_HW3: np.ndarray, operations: Sequence[Operation]) -> np.ndarray:
    """One after the other; the image itself is not changed."""
    for operation in operations:
        image_HW3 = operation.apply(image_HW3)
    return image_HW3


# --- strengths ---


def _signed(most: float) -> Strength:
    """0 to `most`, to either side by a fair coin."""
    return lambda magnitude, rng: magnitude / MOST * most * (1 if rng.random() < 0.5 else -1)


def _factor(magnitude: float, rng: np.random.Generator) -> float:
    """Of an enhancement: 1 is the image as it is."""
    return max(0.1, 1 + _signed(0.9)(magnitude, rng))


def _none(magnitude: float, rng: np.random.Generator) -> float:
    return 0.0


# --- light ---


def _auto_contrast(image_HW3: np.ndarray, _: float) -> np.ndarray:
    """Each channel's range to 0..255."""
    tables = []
    for channel_HW in cv2.split(image_HW3):
        low, high = int(channel_HW.min()), int(channel_HW.max())
        scale = 255 / (high - low) if high > low else 1.0
        tables.append(np.arange(256) * scale - (low * scale if high > low else 0))
    return _looked_up(image_HW3, tables)


def _equalize(image_HW3: np.ndarray, _: float) -> np.ndarray:
    """Each channel's histogram made flat."""
    tables = []
    for channel_HW in cv2.split(image_HW3):
        counts = np.bincount(channel_HW.ravel(), minlength=256)
        step = int((counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255)
        before = np.cumsum(counts) - counts
        tables.append((before + step // 2) // step if step else np.arange(256))
    return _looked_up(image_HW3, tables)


def _looked_up(image_HW3: np.ndarray, tables: Sequence[np.ndarray]) -> np.ndarray:
    """Each channel through its table of 256 values, clipped and truncated."""
    tables_3 = [table.clip(0, 255).astype(np.uint8) for table in tables]
    return cv2.LUT(image_HW3, np.stack(tables_3, axis=-1)[None])


def _invert(image_HW3: np.ndarray, _: float) -> np.ndarray:
    return 255 - image_HW3


def _posterize(image_HW3: np.ndarray, bits: float) -> np.ndarray:
    """The highest bits of each value are kept."""
    return image_HW3 & np.uint8(256 - 2 ** (8 - int(bits)))


def _solarize(image_HW3: np.ndarray, threshold: float) -> np.ndarray:
    """Values from the threshold on are inverted."""
    return np.where(image_HW3 < threshold, image_HW3, 255 - image_HW3)


def _solarize_add(image_HW3: np.ndarray, added: float) -> np.ndarray:
    """Values below 128 grow."""
    table = np.arange(256)
    return cv2.LUT(image_HW3, np.where(table < 128, np.minimum(table + int(added), 255), table).astype(np.uint8))


def _grey(image_HW3: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 1]."""
    return ((image_HW3.astype(np.int64) @ np.array(LUMA) + 0x8000) >> 16).astype(np.uint8)[:, :, None]


def _blend(other: np.ndarray | np.float32, image_HW3: np.ndarray, factor: float) -> np.ndarray:
    """other + factor (image - other), clipped and truncated."""
    mixed_HW3 = other + np.float32(factor) * (image_HW3.astype(np.float32) - other)
    return mixed_HW3.clip(0, 255).astype(np.uint8)


def _color(image_HW3: np.ndarray, factor: float) -> np.ndarray:
    return _blend(_grey(image_HW3).astype(np.float32), image_HW3, factor)


def _contrast(image_HW3: np.ndarray, factor: float) -> np.ndarray:
    """Against the mean of the grey image."""
    return _blend(np.float32(int(_grey(image_HW3).mean() + 0.5)), image_HW3, factor)


def _brightness(image_HW3: np.ndarray, factor: float) -> np.ndarray:
    return _blend(np.float32(0), image_HW3, factor)


def _sharpness(image_HW3: np.ndarray, factor: float) -> np.ndarray:
    """Against the smoothed image, whose outermost pixels are those of the image."""
    smooth_HW3 = image_HW3.astype(np.float32)
    inside = np.s_[1:-1, 1:-1]
    smooth_HW3[inside] = np.floor(cv2.filter2D(smooth_HW3, -1, SMOOTH_33)[inside] / 13 + 0.5)
    return _blend(smooth_HW3, image_HW3, factor)


# --- geometry ---


def _warped(image_HW3: np.ndarray, rows_23: Sequence[Sequence[float]]) -> np.ndarray:
    """Pixel (x, y) is read at rows_23 (x, y, 1); both are positions of pixel centres from the corner of the image."""
    a = np.array(rows_23, np.float64)
    a[:, 2] += a[:, :2] @ (0.5, 0.5) - 0.5  # OpenCV counts from the centre of the first pixel
    return cv2.warpAffine(
        image_HW3,
        a,
        image_HW3.shape[1::-1],
        flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=FILL,
    )


def _rotate(image_HW3: np.ndarray, degrees: float) -> np.ndarray:
    """Against the clock, about the centre."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = image_HW3.shape[1] / 2, image_HW3.shape[0] / 2
    return _warped(image_HW3, [[c, -s, x - c * x + s * y], [s, c, y - s * x - c * y]])


def _shear_x(image_HW3: np.ndarray, factor: float) -> np.ndarray:
    return _warped(image_HW3, [[1, factor, 0], [0, 1, 0]])


def _shear_y(image_HW3: np.ndarray, factor: float) -> np.ndarray:
    return _warped(image_HW3, [[1, 0, 0], [factor, 1, 0]])


def _translate_x(image_HW3: np.ndarray, share: float) -> np.ndarray:
    return _warped(image_HW3, [[1, 0, share * image_HW3.shape[1]], [0, 1, 0]])


def _translate_y(image_HW3: np.ndarray, share: float) -> np.ndarray:
    return _warped(image_HW3, [[1, 0, 0], [0, 1, share * image_HW3.shape[0]]])


OPERATIONS: dict[str, tuple[Strength, Apply]] = {
    "auto_contrast": (_none, _auto_contrast),
    "equalize": (_none, _equalize),
    "invert": (_none, _invert),
    "rotate": (_signed(30), _rotate),  # degrees
    "posterize": (lambda magnitude, _: 4 - int(magnitude / MOST * 4), _posterize),  # bits
    "solarize": (lambda magnitude, _: 256 - int(magnitude / MOST * 256), _solarize),  # of 0..256
    "solarize_add": (lambda magnitude, _: int(magnitude / MOST * 110), _solarize_add),  # of 0..255
    "color": (_factor, _color),
    "contrast": (_factor, _contrast),
    "brightness": (_factor, _brightness),
    "sharpness": (_factor, _sharpness),
    "shear_x": (_signed(0.3), _shear_x),
    "shear_y": (_signed(0.3), _shear_y),
    "translate_x": (_signed(0.45), _translate_x),  # share of the side
    "translate_y": (_signed(0.45), _translate_y),
}
