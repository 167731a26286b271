"""Windows that a teacher trains on: geometry shared with the label, then the light; the segmenter has transforms.py.

H W image px   s crop px
"""

from collections.abc import Callable, Mapping
from functools import partial

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from segadapt.config_training import BroadSettings
from segadapt.datasets import Dataset, Task
from segadapt.datasets.labels import IGNORE
from segadapt.seeds import numpy_generator
from segadapt.training.broad import broad
from segadapt.training.order import Order

Light = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def crop(
    image_HW3: np.ndarray,
    label_HW: np.ndarray,
    rng: np.random.Generator,
    *,
    short_side_px: int,
    crop_px: int,
    scale: tuple[float, float],
    shows: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Random resize, square crop and flip; what lies outside the image is grey, with label 255.

    Args:
        shows: the crop holds a random pixel of this class; None, or a class the image has not: any place.
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
    top, left = (rng.integers(side - crop_px + 1) for side in label_HW.shape)
    if shows is not None and len(at := np.argwhere(label_HW == shows)):
        corner = at[rng.integers(len(at))] - rng.integers(crop_px, size=2)
        top, left = corner.clip(0, np.subtract(label_HW.shape, crop_px))
    box = np.s_[top : top + crop_px, left : left + crop_px]
    step = 1 if rng.random() < 0.5 else -1
    return np.ascontiguousarray(image_HW3[box][:, ::step]), np.ascontiguousarray(label_HW[box][:, ::step])


def keep_light(image_HW3: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """The image as it is."""
    return image_HW3


def light_of(settings: BroadSettings) -> Light:
    """The change of light that the settings ask for."""
    return partial(broad, settings=settings) if settings.probability > 0 else keep_light


class Crops:
    """An endless stream of training crops cut to `count`; item i depends on (seed, i) alone, whatever the workers.

    Items: image_3ss float32 in 0..1 and label_ss int64.
    """

    collate = staticmethod(default_collate)

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
        first: int = 0,
        places: Mapping[int, np.ndarray] | None = None,
    ):
        """first: items before it are passed over, to go on after an interruption. places: see places_of_classes."""
        self.dataset, self.count, self.seed, self.light, self.first = dataset, count, seed, light, first
        self.order = Order(dataset, seed=seed, places=places)
        self.geometry = {"short_side_px": short_side_px, "crop_px": crop_px, "scale": scale}

    def __len__(self) -> int:
        return self.count - self.first

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        index += self.first
        rng = numpy_generator(self.seed, "crop", index)
        key, shows = self.order.choose(index, rng)
        sample = self.dataset.load(Task(0), key)
        assert sample.label_HW is not None, "training needs labels; the verbs check it first"
        image_ss3, label_ss = crop(sample.image_HW3, sample.label_HW, rng, shows=shows, **self.geometry)
        pixels_3ss = torch.from_numpy(self.light(image_ss3, rng)).permute(2, 0, 1).float() / 255
        return pixels_3ss, torch.from_numpy(label_ss).long()
