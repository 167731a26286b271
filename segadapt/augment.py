"""Training crops: geometry shared with the label, then the light. Pure functions of (sample, numpy generator).

H W image px   s crop px
"""

from collections.abc import Callable

import cv2
import numpy as np
import torch
from torch import Tensor

from segadapt.datasets import Dataset, Task
from segadapt.datasets.labels import IGNORE
from segadapt.seeds import numpy_generator

Light = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def crop(
    image_HW3: np.ndarray,
    label_HW: np.ndarray,
    rng: np.random.Generator,
    *,
    short_side_px: int,
    crop_px: int,
    scale: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray]:
    """Random resize, square crop and flip; what lies outside the image is grey, with label 255.

    Args:
        short_side_px: size of the short side at scale 1, as in testing.
        scale: range of the resize factor, uniform.
    Returns:
        image_ss3 uint8 and label_ss uint8.
    """
    factor = short_side_px * rng.uniform(*scale) / min(label_HW.shape)
    size = tuple(max(1, round(side * factor)) for side in label_HW.shape[::-1])
    image_HW3 = cv2.resize(image_HW3, size, interpolation=cv2.INTER_LINEAR)
    label_HW = cv2.resize(label_HW, size, interpolation=cv2.INTER_NEAREST)
    below, right = max(0, crop_px - size[1]), max(0, crop_px - size[0])
    if below or right:
        image_HW3 = np.pad(image_HW3, ((0, below), (0, right), (0, 0)), constant_values=124)
        label_HW = np.pad(label_HW, ((0, below), (0, right)), constant_values=IGNORE)
    top = rng.integers(label_HW.shape[0] - crop_px + 1)
    left = rng.integers(label_HW.shape[1] - crop_px + 1)
    box = np.s_[top : top + crop_px, left : left + crop_px]
    step = 1 if rng.random() < 0.5 else -1
    return np.ascontiguousarray(image_HW3[box][:, ::step]), np.ascontiguousarray(label_HW[box][:, ::step])


def keep_light(image_HW3: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """The image as it is."""
    return image_HW3


def photometric(image_HW3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, saturation and hue, each with probability 1/2 (ranges of mmseg's PhotoMetricDistortion)."""
    pixels = image_HW3.astype(np.float32)
    if rng.random() < 0.5:
        pixels += rng.uniform(-32, 32)
    if rng.random() < 0.5:
        pixels *= rng.uniform(0.5, 1.5)
    hsv = cv2.cvtColor(pixels.clip(0, 255).astype(np.uint8), cv2.COLOR_RGB2HSV).astype(np.float32)
    if rng.random() < 0.5:
        hsv[..., 1] *= rng.uniform(0.5, 1.5)
    if rng.random() < 0.5:
        hsv[..., 0] = (hsv[..., 0] + rng.uniform(-9, 9)) % 180  # OpenCV's hue is in half degrees
    return cv2.cvtColor(hsv.clip(0, 255).astype(np.uint8), cv2.COLOR_HSV2RGB)


def _smooth_field(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A random field in 0..1 of a few cells, float32 [H, W, 1]."""
    cells = rng.random((rng.integers(2, 7), rng.integers(2, 7))).astype(np.float32)
    return cv2.resize(cells, shape[::-1], interpolation=cv2.INTER_CUBIC).clip(0, 1)[..., None]


def broad(image_HW3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Wide generic changes of light, colour, blur, grain and haze, for the teacher's source training alone.

    A stand-in for a teacher that has seen the world; no function of `corruptions.py` is called. Light is a gamma curve
    under a smooth field, colour a random 3x3 mix, blur an oriented Gaussian, haze a blend towards one airlight along a
    smooth field, grain Gaussian noise in cells of 1 to 3 px, stronger in the light. Each with probability 1/2. Grain of
    1 px is close in kind to gaussian and shot noise: say so beside any figure on these corruptions.
    """
    pixels = image_HW3.astype(np.float32) / 255
    height, width = pixels.shape[:2]
    if rng.random() < 0.5:
        pixels = pixels ** np.float32(2 ** rng.uniform(-1.3, 1.3))
        pixels *= 1 + np.float32(rng.uniform(0, 0.8)) * (_smooth_field((height, width), rng) - 0.5)
    if rng.random() < 0.5:
        mix = np.eye(3) + rng.uniform(-0.25, 0.25, (3, 3))
        grey = rng.uniform(0, 0.8)
        mix = (1 - grey) * mix + grey / 3
        pixels = pixels @ mix.T.astype(np.float32)
    if rng.random() < 0.5:
        long, short, angle = rng.uniform(0.5, 5), rng.uniform(0.3, 2), rng.uniform(0, np.pi)
        y, x = np.mgrid[-7:8, -7:8]
        u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        kernel = np.exp(-((u / long) ** 2 + (v / short) ** 2) / 2)
        pixels = cv2.filter2D(pixels, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REFLECT_101)
    if rng.random() < 0.5:
        haze = np.float32(rng.uniform(0.2, 0.9)) * _smooth_field((height, width), rng)
        airlight = rng.uniform(0.3, 1.0) + rng.uniform(-0.08, 0.08, 3)
        pixels = (1 - haze) * pixels + haze * airlight.astype(np.float32)
    if rng.random() < 0.5:
        cell = rng.choice([1, 1, 2, 3])
        channels = rng.choice([1, 3])
        grain = rng.standard_normal((-(-height // cell), -(-width // cell), channels), dtype=np.float32)
        grain = cv2.resize(grain, (width, height), interpolation=cv2.INTER_LINEAR).reshape(height, width, channels)
        strength = np.float32(rng.uniform(0.02, 0.35))
        pixels = pixels + strength * grain * (0.3 + 0.7 * pixels.mean(axis=2, keepdims=True))
    return (pixels * 255 + 0.5).clip(0, 255).astype(np.uint8)


class Crops(torch.utils.data.Dataset):
    """An endless stream of training crops cut to `count`; item i depends on (seed, i) alone, whatever the workers.

    Items: image_3ss float32 in 0..1 and label_ss int64, for torch's default collation.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        count: int,
        seed: int,
        short_side_px: int,
        crop_px: int,
        scale: tuple[float, float],
        light: Light,
    ):
        self.dataset, self.count, self.seed, self.light = dataset, count, seed, light
        self.geometry = {"short_side_px": short_side_px, "crop_px": crop_px, "scale": scale}
        self.keys = dataset.keys(Task(0))
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        epoch, place = divmod(index, len(self.keys))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = numpy_generator(self.seed, "epoch", epoch).permutation(len(self.keys))
        sample = self.dataset.load(Task(0), self.keys[int(self._order[place])])
        assert sample.label_HW is not None, "training needs labels; the verbs check it first"
        rng = numpy_generator(self.seed, "crop", index)
        image_ss3, label_ss = crop(sample.image_HW3, sample.label_HW, rng, **self.geometry)
        pixels_3ss = torch.from_numpy(self.light(image_ss3, rng)).permute(2, 0, 1).float() / 255
        return pixels_3ss, torch.from_numpy(label_ss).long()
