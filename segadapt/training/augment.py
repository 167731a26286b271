"""Training crops: geometry shared with the label, then the light. Pure functions of (sample, numpy generator).

H W image px   s crop px
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import cv2
import numpy as np
import torch
from torch import Tensor

from segadapt.config_training import BroadSettings
from segadapt.datasets import Dataset, Task
from segadapt.datasets.labels import IGNORE
from segadapt.seeds import numpy_generator
from segadapt.stream import ahead
from segadapt.training.broad import broad

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


def light_of(*, use_photometric: bool, broad_settings: BroadSettings) -> Light:
    """The change of light that the settings ask for."""
    chain: list[Light] = [photometric] if use_photometric else []
    if broad_settings.probability > 0:
        chain.append(partial(broad, settings=broad_settings))
    return partial(_in_turn, chain) if chain else keep_light


def _in_turn(chain: Sequence[Light], image_HW3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    for change in chain:
        image_HW3 = change(image_HW3, rng)
    return image_HW3


def places_of_classes(dataset: Dataset, *, workers: int) -> dict[int, np.ndarray]:
    """For balanced crops: places in `dataset.keys` of the images that show a class, by class; absent classes miss."""
    keys = dataset.keys(Task(0))
    places: dict[int, list[int]] = {}
    for place, classes in enumerate(ahead(partial(_classes_of, dataset), keys, workers=workers)):
        for index in classes:
            places.setdefault(index, []).append(place)
    return {index: np.array(found) for index, found in sorted(places.items())}


def _classes_of(dataset: Dataset, key: str) -> list[int]:
    label_HW = dataset.load(Task(0), key).label_HW
    assert label_HW is not None, "training needs labels; the verbs check it first"
    return [int(index) for index in np.unique(label_HW) if index != IGNORE]


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
        first: int = 0,
        places: Mapping[int, np.ndarray] | None = None,
    ):
        """first: items before it are passed over, to go on after an interruption. places: see places_of_classes."""
        self.dataset, self.count, self.seed, self.light, self.first = dataset, count, seed, light, first
        self.places = places
        self.geometry = {"short_side_px": short_side_px, "crop_px": crop_px, "scale": scale}
        self.keys = dataset.keys(Task(0))
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.count - self.first

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        index += self.first
        epoch, place = divmod(index, len(self.keys))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = numpy_generator(self.seed, "epoch", epoch).permutation(len(self.keys))
        rng, shows, chosen = numpy_generator(self.seed, "crop", index), None, self._order[place]
        if self.places is not None:
            shows = list(self.places)[rng.integers(len(self.places))]
            chosen = rng.choice(self.places[shows])
        sample = self.dataset.load(Task(0), self.keys[int(chosen)])
        assert sample.label_HW is not None, "training needs labels; the verbs check it first"
        image_ss3, label_ss = crop(sample.image_HW3, sample.label_HW, rng, shows=shows, **self.geometry)
        pixels_3ss = torch.from_numpy(self.light(image_ss3, rng)).permute(2, 0, 1).float() / 255
        return pixels_3ss, torch.from_numpy(label_ss).long()
