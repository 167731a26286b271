"""Random changes of images that are to be classified: what is drawn apart from what is done with it.

The recipe of DeiT (Touvron et al. 2021), by which MiT is pretrained: random crop, flip, RandAugment (rand_augment.py),
erasing, then Mixup or CutMix over a micro-batch. Resizes are OpenCV's, bicubic, without antialias.

B images of a micro-batch   C classes   H W image px   s side of the net's input, px   3 RGB
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from segadapt.config_pretraining import PretrainTransformsSettings
from segadapt.models.discriminative.families import IMAGENET_MEAN, IMAGENET_STD
from segadapt.training import rand_augment

TRIES = 10  # of a box that has to fit into the image
ERASED_AREA = (0.02, 1 / 3)  # shares of the image, Zhong et al. 2020
ERASED_ASPECT = (0.3, 1 / 0.3)


def transform(image_HW3: np.ndarray, rng: np.random.Generator, t: PretrainTransformsSettings) -> np.ndarray:
    """Crop, flip, RandAugment and erasing, in this order: uint8 [s, s, 3]."""
    image_ss3 = Crop.draw(rng, image_HW3.shape[:2], t).apply(image_HW3, t.image_px)
    image_ss3 = rand_augment.apply(image_ss3, rand_augment.draw(rng, t.randaugment))
    erase = Erase.draw(rng, t.image_px, t)
    return image_ss3 if erase is None else erase.apply(image_ss3)


def centred(image_HW3: np.ndarray, t: PretrainTransformsSettings) -> np.ndarray:
    """For validation: short side to t.validation_short_side_px, then the centre: uint8 [s, s, 3]."""
    factor = t.validation_short_side_px / min(image_HW3.shape[:2])
    height, width = (max(t.validation_short_side_px, round(side * factor)) for side in image_HW3.shape[:2])
    resized_HW3 = cv2.resize(image_HW3, (width, height), interpolation=cv2.INTER_CUBIC)
    top, left = (height - t.image_px) // 2, (width - t.image_px) // 2
    return np.ascontiguousarray(resized_HW3[top : top + t.image_px, left : left + t.image_px])


@dataclass(frozen=True)
class Crop:
    """A box of the image becomes a square, mirrored or not."""

    top: int
    left: int
    height: int
    width: int
    is_flipped: bool

    @classmethod
    def draw(cls, rng: np.random.Generator, size: tuple[int, ...], t: PretrainTransformsSettings) -> "Crop":
        """A share of the area and an aspect until the box fits; after TRIES the largest centred box of an aspect so.

        Args:
            size: height and width of the image, px.
        """
        height, width = size
        for _ in range(TRIES):
            area = height * width * rng.uniform(t.area_low, t.area_high)
            aspect = _log_uniform(rng, t.aspect_low, t.aspect_high)
            h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if 0 < h <= height and 0 < w <= width:
                top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
                return cls(top, left, h, w, rng.random() < t.flip)
        aspect = min(max(width / height, t.aspect_low), t.aspect_high)
        h, w = min(height, max(1, round(width / aspect))), min(width, max(1, round(height * aspect)))
        return cls((height - h) // 2, (width - w) // 2, h, w, rng.random() < t.flip)

    def apply(self, image_HW3: np.ndarray, side_px: int) -> np.ndarray:
        """A new image."""
        box_hw3 = image_HW3[self.top : self.top + self.height, self.left : self.left + self.width]
        image_ss3 = cv2.resize(box_hw3, (side_px, side_px), interpolation=cv2.INTER_CUBIC)
        return cv2.flip(image_ss3, 1) if self.is_flipped else image_ss3


@dataclass(frozen=True)
class Erase:
    """A box becomes noise (Zhong et al. 2020, random erasing)."""

    top: int
    left: int
    noise_hw3: np.ndarray  # uint8

    @classmethod
    def draw(cls, rng: np.random.Generator, side_px: int, t: PretrainTransformsSettings) -> "Erase | None":
        """With probability t.erasing, normal noise as large as ImageNet's, clipped; None: not, or no box fitted."""
        if rng.random() >= t.erasing:
            return None
        for _ in range(TRIES):
            area, aspect = side_px**2 * rng.uniform(*ERASED_AREA), _log_uniform(rng, *ERASED_ASPECT)
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < h < side_px and 0 < w < side_px:
                noise_hw3 = rng.standard_normal((h, w, 3)) * IMAGENET_STD + IMAGENET_MEAN
                top, left = int(rng.integers(side_px - h + 1)), int(rng.integers(side_px - w + 1))
                return cls(top, left, (noise_hw3 * 255).clip(0, 255).astype(np.uint8))
        return None

    def apply(self, image_ss3: np.ndarray) -> np.ndarray:
        """A new image."""
        h, w, _ = self.noise_hw3.shape
        erased_ss3 = image_ss3.copy()
        erased_ss3[self.top : self.top + h, self.left : self.left + w] = self.noise_hw3
        return erased_ss3


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


# --- of a micro-batch ---


def draw_shares(rng: np.random.Generator, side_px: int, t: PretrainTransformsSettings) -> np.ndarray:
    """Of each pixel the image's own share, the rest is its partner's: float32 [s, s] in 0..1; all 1: not mixed.

    Mixup (Zhang et al. 2018): the same share everywhere. CutMix (Yun et al. 2019): 0 inside a box whose area, but for
    what lies outside the image, is 1 - a Beta variate.
    """
    own_ss = np.ones((side_px, side_px), np.float32)
    if rng.random() >= t.mixing:
        return own_ss
    if rng.random() >= t.cutmix_share:
        return own_ss * np.float32(rng.beta(t.mixup_alpha, t.mixup_alpha))
    half = int(side_px * math.sqrt(1 - rng.beta(t.cutmix_alpha, t.cutmix_alpha))) // 2
    y, x = (int(centre) for centre in rng.integers(side_px, size=2))
    own_ss[max(0, y - half) : y + half, max(0, x - half) : x + half] = 0
    return own_ss


def soft_targets(label_B: np.ndarray, own_ss: np.ndarray, *, num_classes: int, smoothing: float) -> np.ndarray:
    """Probabilities that sum to 1: float32 [B, C]. Each image's partner is the next one, the last one's the first.

    Args:
        own_ss: see draw_shares; a target's own share is its mean.
        smoothing: share that is spread over all classes.
    """
    target_BC = np.full((len(label_B), num_classes), smoothing / num_classes)
    target_BC[np.arange(len(label_B)), label_B] += 1 - smoothing
    own = own_ss.mean(dtype=np.float64)
    return (own * target_BC + (1 - own) * np.roll(target_BC, -1, axis=0)).astype(np.float32)
