"""Which image a training item shows: endless permutations of all images, or every class as often."""

from collections.abc import Mapping
from functools import partial

import numpy as np

from segadapt.datasets import Dataset, Task
from segadapt.datasets.labels import IGNORE
from segadapt.seeds import numpy_generator
from segadapt.stream import ahead


class Order:
    """Item i to a key: one permutation of the images an epoch, from (seed, epoch); or any class, and an image with it.

    Args:
        places: see places_of_classes; None: not balanced.
    """

    def __init__(self, dataset: Dataset, *, seed: int, places: Mapping[int, np.ndarray] | None):
        self.keys, self.seed, self.places = dataset.keys(Task(0)), seed, places
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def choose(self, index: int, rng: np.random.Generator) -> tuple[str, int | None]:
        """Key of item `index`, and the class that its crop has to show; None: any place. rng: the item's own."""
        if self.places is not None:
            shows = list(self.places)[rng.integers(len(self.places))]
            return self.keys[int(rng.choice(self.places[shows]))], shows
        epoch, place = divmod(index, len(self.keys))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = numpy_generator(self.seed, "epoch", epoch).permutation(len(self.keys))
        return self.keys[int(self._order[place])], None


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
