"""ToyTown: a small world of street scenes, drawn on the fly from numbers, so that everything runs without data.

A scene depends on (split, index, seed) alone, its look also on the weather; see toytown_scene.py for how it is drawn.
The world is frozen: a changed pixel makes every score on it incomparable, and tests/test_toytown.py pins hashes.
"""

from dataclasses import dataclass

import numpy as np

from segadapt.datasets import Sample, Source, Task
from segadapt.datasets.toytown_light import WEATHERS, light_up
from segadapt.datasets.toytown_scene import Dice
from segadapt.datasets.toytown_street import sketch_street
from segadapt.errors import UserError, did_you_mean
from segadapt.seeds import numpy_generator

SPLITS = ("training", "validation", "test")
ALL_WEATHERS = "all"  # one of WEATHERS for each image, drawn evenly

CLASSES_AND_COLOURS = {
    "sky": (70, 130, 180),
    "building": (110, 90, 90),
    "road": (128, 64, 128),
    "pavement": (244, 35, 232),
    "tree": (40, 110, 35),
    "grass": (152, 251, 152),
    "water": (0, 170, 230),
    "car": (0, 0, 142),
    "person": (220, 20, 60),
    "pole": (153, 153, 153),
    "sign": (220, 220, 0),
    "fence": (190, 120, 60),
}
CLASSES = tuple(CLASSES_AND_COLOURS)
PALETTE_C3 = np.array(list(CLASSES_AND_COLOURS.values()), np.uint8)


@dataclass(frozen=True)
class Scene:
    """One drawn picture with its exact label."""

    image_HW3: np.ndarray  # uint8 RGB, 240x320 or, one in five, 320x240
    label_HW: np.ndarray  # uint8, index into CLASSES; no pixel is ignored
    weather: str  # key of WEATHERS


def render(split: str, index: int, *, seed: int = 0, weather: str = "clear") -> Scene:
    """Draw scene `index` of a split; the same arguments give the same bytes, and `weather` never moves a label.

    Args:
        split: one of SPLITS.
        index: 0 or more.
        seed: of the world; another seed is another town.
        weather: key of WEATHERS, or 'all' to draw one of them for this image.
    Raises:
        UserError: unknown split or weather.
    """
    check_names(split, weather=weather)
    if weather == ALL_WEATHERS:
        kinds = tuple(WEATHERS)
        weather = kinds[int(numpy_generator(seed, "toytown", split, index, "kind").integers(len(kinds)))]
    sketch = sketch_street(Dice(numpy_generator(seed, "toytown", split, index, "street")))
    sky = Dice(numpy_generator(seed, "toytown", split, index, "weather", weather))
    thing_N = np.array([surface.thing for surface in sketch.surfaces], np.uint8)
    image_HW3 = light_up(sketch, WEATHERS[weather], dice=sky)
    return Scene(image_HW3, np.take(thing_N, sketch.surface_HW), weather)


def check_names(split: str, *, weather: str) -> None:
    """Raise UserError for a split or weather that ToyTown does not have."""
    if split not in SPLITS:
        raise UserError(f"data.split={split} is not a split of ToyTown.{did_you_mean(split, SPLITS)}")
    if weather not in (*WEATHERS, ALL_WEATHERS):
        hint = did_you_mean(weather, (*WEATHERS, ALL_WEATHERS))
        raise UserError(f"data.weather={weather} is not a weather of ToyTown.{hint}")


class ToyTown:
    """`count` scenes of one split as a Dataset; a task's corruption is applied to the drawn image.

    Raises:
        UserError: unknown split or weather, or a count below 1.
    """

    classes = CLASSES
    palette_C3 = PALETTE_C3

    def __init__(
        self, *, split: str, count: int, world_seed: int = 0, weather: str = "clear", tasks_seed: int = 0
    ) -> None:
        check_names(split, weather=weather)
        if count < 1:
            raise UserError(f"data.count={count} leaves ToyTown without images; expected 1 or more. Raise data.count.")
        self.split, self.count, self.weather = split, count, weather
        self.world_seed, self.tasks_seed = world_seed, tasks_seed

    def keys(self, task: Task) -> list[str]:
        """'00000', '00001', ...: the same scenes for every task."""
        return [f"{index:05d}" for index in range(self.count)]

    def load(self, task: Task, key: str) -> Sample:
        """Draw the scene of a key; uint8 RGB and exact label, corrupted as the task says."""
        scene = render(self.split, int(key), seed=self.world_seed, weather=self.weather)
        image_HW3 = scene.image_HW3
        if task.corruption:
            from segadapt.corruptions import corrupt  # only streams with corruptions pay for their import

            image_HW3 = corrupt(image_HW3, task.corruption, severity=task.severity, seed=self.tasks_seed, key=key)
        return Sample(key, image_HW3, scene.label_HW)

    def source(self, task: Task, key: str) -> Source:
        """The key: every task shows the same scene."""
        return Source(key, key)

    def verify(self, task: Task, key: str, *, label: bool) -> None:
        """Nothing is read, so nothing can be broken."""
