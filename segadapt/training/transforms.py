"""Random transforms of a training image and its label: what is drawn apart from what is done with it.

With the same drawn values the pixels are those of mmsegmentation 1.2.2's RandomResize, RandomCrop, RandomFlip and
PhotoMetricDistortion. The random streams are our own: all draws of a sample come from the sample's generator. Nothing
is written in place: an image may be the one that the cache holds.

H W image px   3 RGB   images uint8, labels uint8 with 255 = ignore
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from segadapt.config_training import TransformSettings
from segadapt.datasets.labels import IGNORE
from segadapt.training.broad import broad

TRIES = 10  # of a crop with too much of one class; the box after them is taken as it comes
HUES = 180  # OpenCV's hue is in steps of 2 degrees


def transform(
    image_HW3: np.ndarray,
    label_HW: np.ndarray,
    rng: np.random.Generator,
    t: TransformSettings,
    *,
    short_side_px: int,
    shows: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Resize, crop, flip and light, in this order.

    Args:
        short_side_px: of resize=short_side, at factor 1.
        shows: the crop holds a random pixel of this class; None, or a class that the resized label has not: any place.
    Returns:
        image and label of one size, at most crop_px x crop_width_px: smaller where the resized image is.
    """
    image_HW3, label_HW = Resize.draw(rng, label_HW.shape, t, short_side_px=short_side_px).apply(image_HW3, label_HW)
    image_HW3, label_HW = Crop.draw(rng, label_HW, t, shows=shows).apply(image_HW3, label_HW)
    image_HW3, label_HW = Flip.draw(rng, t).apply(image_HW3, label_HW)
    if t.photometric:
        image_HW3 = Photometric.draw(rng, t).apply(image_HW3)
    if t.broad.probability > 0:
        image_HW3 = broad(image_HW3, rng, t.broad)
    return image_HW3, label_HW


@dataclass(frozen=True)
class Resize:
    """The image becomes height x width px: bilinear without antialias, the label by nearest."""

    height: int
    width: int

    @classmethod
    def draw(
        cls, rng: np.random.Generator, size: tuple[int, ...], t: TransformSettings, *, short_side_px: int
    ) -> "Resize":
        """One factor, uniform, of the box that the image must fit into or of its own size; then the aspect.

        The box of `short_side` has the long side longest_px, whatever the factor, or none. A box is truncated to whole
        px, the image's sides are rounded half up.

        Args:
            size: height and width of the image, px.
        """
        ratio = _factor(rng, t)
        if t.resize == "box":
            factor = min(int(t.box_long_px * ratio) / max(size), int(t.box_short_px * ratio) / min(size))
        elif t.resize == "short_side":
            factor = int(short_side_px * ratio) / min(size)
            if t.longest_px is not None:
                factor = min(factor, t.longest_px / max(size))
        else:
            factor = ratio
        stretch = math.sqrt(rng.uniform(t.aspect_low, t.aspect_high))
        height, width = size
        return cls(max(1, int(height * factor / stretch + 0.5)), max(1, int(width * factor * stretch + 0.5)))

    def apply(self, image_HW3: np.ndarray, label_HW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """An image of that size is given back as it is."""
        if label_HW.shape == (self.height, self.width):
            return image_HW3, label_HW
        size = (self.width, self.height)
        return (
            cv2.resize(image_HW3, size, interpolation=cv2.INTER_LINEAR),
            cv2.resize(label_HW, size, interpolation=cv2.INTER_NEAREST),
        )


@dataclass(frozen=True)
class Crop:
    """A box that may reach beyond the lower and the right edge of the image, where the crop ends with it."""

    top: int
    left: int
    height: int
    width: int

    @classmethod
    def draw(
        cls, rng: np.random.Generator, label_HW: np.ndarray, t: TransformSettings, *, shows: int | None = None
    ) -> "Crop":
        """Boxes of any place, or that hold a pixel of class `shows`, until one is varied enough; see TRIES."""
        height, width = t.crop_px, t.crop_width_px or t.crop_px
        at = np.argwhere(label_HW == shows) if shows is not None else np.empty((0, 2), np.int64)
        last_top, last_left = max(0, label_HW.shape[0] - height), max(0, label_HW.shape[1] - width)

        def box() -> Crop:
            if len(at):
                corner = at[rng.integers(len(at))] - rng.integers((height, width))
                top, left = corner.clip(0, (last_top, last_left))
            else:
                top, left = rng.integers(last_top + 1), rng.integers(last_left + 1)
            return cls(int(top), int(left), height, width)

        drawn = box()
        for _ in range(TRIES if t.cat_max_ratio < 1 else 0):
            if drawn.is_varied(label_HW, t.cat_max_ratio):
                break
            drawn = box()
        return drawn

    def is_varied(self, label_HW: np.ndarray, cat_max_ratio: float) -> bool:
        """More than one class, and the most frequent has less than cat_max_ratio of the labelled pixels."""
        inside_hw = label_HW[self.top : self.top + self.height, self.left : self.left + self.width]
        counts = np.bincount(inside_hw.ravel(), minlength=IGNORE)[:IGNORE]
        return bool(np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < cat_max_ratio)

    def apply(self, image_HW3: np.ndarray, label_HW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Views of both."""
        box = np.s_[self.top : self.top + self.height, self.left : self.left + self.width]
        return image_HW3[box], label_HW[box]


@dataclass(frozen=True)
class Flip:
    """Left and right are exchanged, or not."""

    is_flipped: bool

    @classmethod
    def draw(cls, rng: np.random.Generator, t: TransformSettings) -> "Flip":
        """With probability t.flip."""
        return cls(rng.random() < t.flip)

    def apply(self, image_HW3: np.ndarray, label_HW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of both."""
        return (cv2.flip(image_HW3, 1), cv2.flip(label_HW, 1)) if self.is_flipped else (image_HW3, label_HW)


@dataclass(frozen=True)
class Photometric:
    """Changes of light in the order of the fields, None: not this one; contrast is first or last of the last three.

    Saturation and hue each make their own way to HSV and back, which rounds. Every value becomes float32, is clipped to
    0..255 and truncated.
    """

    brightness: float | None  # added
    contrast: float | None  # factor
    saturation: float | None  # factor
    hue: int | None  # added, modulo HUES
    is_contrast_first: bool

    @classmethod
    def draw(cls, rng: np.random.Generator, t: TransformSettings) -> "Photometric":
        """A fair coin for each change whose range is not 0, and one for the place of the contrast."""
        return cls(
            rng.uniform(-t.brightness, t.brightness) if t.brightness and _coin(rng) else None,
            rng.uniform(1 - t.contrast, 1 + t.contrast) if t.contrast and _coin(rng) else None,
            rng.uniform(1 - t.saturation, 1 + t.saturation) if t.saturation and _coin(rng) else None,
            int(rng.integers(-t.hue, t.hue)) if t.hue and _coin(rng) else None,
            _coin(rng),
        )

    def apply(self, image_HW3: np.ndarray) -> np.ndarray:
        """A new image, or where nothing changes the same. Channels are alike here: BGR would give the same pixels."""
        if self.brightness is not None:
            image_HW3 = cv2.LUT(image_HW3, _line(plus=self.brightness))
        if self.contrast is not None and self.is_contrast_first:
            image_HW3 = cv2.LUT(image_HW3, _line(times=self.contrast))
        if self.saturation is not None:
            image_HW3 = _in_hsv(image_HW3, 1, _line(times=self.saturation))
        if self.hue is not None:
            image_HW3 = _in_hsv(image_HW3, 0, ((_VALUES_256 + self.hue) % HUES).astype(np.uint8))
        if self.contrast is not None and not self.is_contrast_first:
            image_HW3 = cv2.LUT(image_HW3, _line(times=self.contrast))
        return image_HW3


def _factor(rng: np.random.Generator, t: TransformSettings) -> float:
    """Uniform between scale_low and scale_high, or over its steps."""
    if not t.scale_step:
        return rng.uniform(t.scale_low, t.scale_high)
    steps = int((t.scale_high - t.scale_low) / t.scale_step + 1e-6)
    return round(t.scale_low + t.scale_step * int(rng.integers(steps + 1)), 9)  # 0.7, not 0.7000000000000001


_VALUES_256 = np.arange(256)


def _coin(rng: np.random.Generator) -> bool:
    return rng.random() < 0.5


def _line(*, times: float = 1, plus: float = 0) -> np.ndarray:
    """What becomes of each of the 256 values: uint8 [256]."""
    return (_VALUES_256.astype(np.float32) * times + plus).clip(0, 255).astype(np.uint8)


def _in_hsv(image_HW3: np.ndarray, channel: int, table_256: np.ndarray) -> np.ndarray:
    """One channel of the HSV image through a table."""
    hsv_HW3 = cv2.cvtColor(image_HW3, cv2.COLOR_RGB2HSV)
    cv2.insertChannel(cv2.LUT(cv2.extractChannel(hsv_HW3, channel), table_256), hsv_HW3, channel)
    return cv2.cvtColor(hsv_HW3, cv2.COLOR_HSV2RGB)
