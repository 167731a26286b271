"""Which image a training item shows: endless permutations of all images, or every class as often."""

from collections.abc import Mapping
from functools import partial

import numpy as np

from segadapt.datasets import Dataset, Task
from segadapt.datasets.labels import IGNORE
from segadapt.seeds import numpy_generator
from segadapt.stream import ahead


class Permutations:
    """Endless: one permutation of 0 .. count - 1 an epoch, from (seed, epoch) alone. The last one is kept."""

    def __init__(self, count: int, *, seed: int):
        self._count, self._seed = count, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def at(self, index: int) -> int:
        """Item `index`, from 0."""
        epoch, place = divmod(index, self._count)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, numpy_generator(self._seed, "epoch", epoch).permutation(self._count)
        return int(self._order[place])


class Order:
    """Item i to a key: of endless permutations of the images; or any class, and an image with it.

    Args:
        places: see places_of_classes; None: not balanced.
    """

    def __init__(self, dataset: Dataset, *, seed: int, places: Mapping[int, np.ndarray] | None):
        self.keys, self.places = dataset.keys(Task(0)), places
        self._permutations = Permutations(len(self.keys), seed=seed)

    def choose(self, index: int, rng: np.random.Generator) -> tuple[str, int | None]:
        """Key of item `index`, and the class that its crop has to show; None: any place. rng: the item's own."""
        if self.places is not None:
            shows = list(self.places)[rng.integers(len(self.places))]
            return self.keys[int(rng.choice(self.places[shows]))], shows
        return self.keys[self._permutations.at(index)], None


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
