"""The segmenter's training data: an endless stream of transformed crops, put together to batches.

B images of a batch   H W px of a batch   h w crop px   3 RGB
"""

from collections.abc import Sequence
from typing import Any

from segadapt.config_training import TrainConfig
from segadapt.datasets import Dataset, Task
from segadapt.errors import UserError
from segadapt.seeds import numpy_generator
from segadapt.training import sizes
from segadapt.training.order import Order, places_of_classes
from segadapt.training.sizes import Batch, TrainingCrop
from segadapt.training.transforms import transform


class TrainingSamples:
    """The first `count` items of an endless stream; item i depends on (seed, i) alone, whatever the workers.

    What a whole batch draws (size_mode=multi) depends on (seed, i // train.batch_size) of its first item i alone, so
    that parts of one optimizer step have one size.
    """

    def __init__(self, settings: TrainConfig, dataset: Dataset, order: Order, *, count: int):
        self.dataset, self.order, self.count = dataset, order, count
        self.transforms, self.batch_size = settings.train.transforms, settings.train.batch_size
        self.seed, self.short_side_px = settings.experiment.seed, settings.data.short_side_px

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item: int) -> TrainingCrop:
        """UserError: a file that cannot be read."""
        rng = numpy_generator(self.seed, "crop", item)
        key, shows = self.order.choose(item, rng)
        sample = self.dataset.load(Task(0), key)
        assert sample.label_HW is not None, "training needs labels; the verbs check it first"
        image_hw3, label_hw = transform(
            sample.image_HW3, sample.label_HW, rng, self.transforms, short_side_px=self.short_side_px, shows=shows
        )
        return TrainingCrop(item, image_hw3, label_hw)

    def collate(self, crops: Sequence[TrainingCrop]) -> Batch:
        """All of one size."""
        return sizes.collate(crops, self.transforms, seed=self.seed, batch=crops[0].item // self.batch_size)


def build_samples(settings: TrainConfig, dataset: Dataset, *, count: int) -> TrainingSamples:
    """The stream that the settings ask for; balanced=true reads all labels first.

    Args:
        dataset: labelled; `datasets.cache.Cached` where images are to be decoded once.
        count: items in all.
    Raises:
        UserError: balanced, and a sample that cannot be read.
    """
    balanced, seed = settings.train.transforms.balanced, settings.experiment.seed
    places = places_of_classes(dataset, workers=settings.data.workers) if balanced else None
    return TrainingSamples(settings, dataset, Order(dataset, seed=seed, places=places), count=count)


def check_transforms(settings: TrainConfig) -> None:
    """UserError: a range upside down, or sizes of crop and batch that do not go together."""
    t, name = settings.train.transforms, "train.transforms"
    check_range(name, t, "scale_low", "scale_high")
    check_range(name, t, "aspect_low", "aspect_high")
    check_range(name, t, "box_short_px", "box_long_px")
    check_range(f"{name}.broad", t.broad, "grain_min_px", "grain_max_px")
    if t.scale_step > t.scale_high - t.scale_low:
        raise UserError(f"{name}.scale_step={t.scale_step} leaves scale_low={t.scale_low} alone of the factors up to "
                        f"scale_high={t.scale_high}. Set it lower, or 0 for any factor.")  # fmt: skip
    if t.longest_px is not None and t.resize != "short_side":
        raise UserError(f"{name}.longest_px={t.longest_px} with {name}.resize={t.resize}: it would have no effect. Set "
                        "it to null, or resize=short_side.")  # fmt: skip
    sizes.check_sizes(t, batch_size=settings.train.batch_size)


def check_range(section: str, settings: Any, low: str, high: str) -> None:
    """UserError: the first of two settings of a section is above the second."""
    ends = getattr(settings, low), getattr(settings, high)
    if ends[0] > ends[1]:
        raise UserError(f"{section}.{low}={ends[0]} is above {section}.{high}={ends[1]}: expected the lower end of a "
                        "range and its upper end. Swap them.")  # fmt: skip
