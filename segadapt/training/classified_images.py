"""Images with their class, put together to micro-batches: an endless stream for training, each once for validation.

B images of a micro-batch   C classes   H W s px   3 RGB
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from segadapt.config_pretraining import PretrainConfig
from segadapt.datasets.decode import read_image
from segadapt.datasets.image_folder import ImageFolder
from segadapt.seeds import numpy_generator
from segadapt.training.order import Permutations
from segadapt.training.pretrain_transforms import centred, draw_shares, soft_targets, transform


class ClassifiedImage(NamedTuple):
    """One item of a stream."""

    item: int
    image_ss3: np.ndarray  # uint8
    label: int


class MixedBatch(NamedTuple):
    """Images as reading processes hand them over; they are mixed on the device."""

    pixels_B3ss: Tensor  # uint8 RGB
    target_BC: Tensor  # float32, of the mixed images
    own_ss: Tensor  # float32, see draw_shares

    def to(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """image_B3ss float32 RGB in 0..1 and target_BC on a device, without waiting for it."""
        pixels_B3ss, target_BC, own_ss = (values.to(device, non_blocking=True) for values in self)
        image_B3ss = pixels_B3ss.float() / 255
        return own_ss * image_B3ss + (1 - own_ss) * image_B3ss.roll(-1, 0), target_BC


class LabelledBatch(NamedTuple):
    """Of a validation."""

    pixels_B3ss: Tensor  # uint8 RGB
    label_B: Tensor  # int64


class TrainingImages:
    """The first `count` items of an endless stream of permutations; item i depends on (seed, i) alone.

    What a micro-batch draws, how it is mixed, depends on (seed, its first item); its pairs are neighbours in it.
    """

    def __init__(self, settings: PretrainConfig, folder: ImageFolder, *, count: int):
        self.folder, self.count, self.transforms = folder, count, settings.train.transforms
        self.seed, self.max_pixels = settings.experiment.seed, settings.data.max_pixels
        self._permutations = Permutations(len(folder.keys), seed=self.seed)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item: int) -> ClassifiedImage:
        """UserError: a file that cannot be read."""
        key = self.folder.keys[self._permutations.at(item)]
        image_HW3 = read_image(self.folder.path / key, max_pixels=self.max_pixels)
        image_ss3 = transform(image_HW3, numpy_generator(self.seed, "crop", item), self.transforms)
        return ClassifiedImage(item, image_ss3, self.folder.label_of(key))

    def collate(self, images: Sequence[ClassifiedImage]) -> MixedBatch:
        """A micro-batch."""
        t = self.transforms
        own_ss = draw_shares(numpy_generator(self.seed, "mixing", images[0].item), t.image_px, t)
        label_B = np.array([image.label for image in images])
        num_classes = len(self.folder.classes)
        target_BC = soft_targets(label_B, own_ss, num_classes=num_classes, smoothing=t.label_smoothing)
        return MixedBatch(_stacked(images), torch.from_numpy(target_BC), torch.from_numpy(own_ss))


class ValidationImages:
    """Each image of a folder once, its centre alone."""

    def __init__(self, settings: PretrainConfig, folder: ImageFolder):
        self.folder, self.transforms, self.max_pixels = folder, settings.train.transforms, settings.data.max_pixels

    def __len__(self) -> int:
        return len(self.folder.keys)

    def __getitem__(self, item: int) -> ClassifiedImage:
        """See TrainingImages."""
        key = self.folder.keys[item]
        image_HW3 = read_image(self.folder.path / key, max_pixels=self.max_pixels)
        return ClassifiedImage(item, centred(image_HW3, self.transforms), self.folder.label_of(key))

    def collate(self, images: Sequence[ClassifiedImage]) -> LabelledBatch:
        """A batch."""
        return LabelledBatch(_stacked(images), torch.tensor([image.label for image in images]))


def _stacked(images: Sequence[ClassifiedImage]) -> Tensor:
    """uint8 [B, 3, s, s]."""
    return torch.from_numpy(np.stack([image.image_ss3 for image in images])).permute(0, 3, 1, 2).contiguous()
