"""What a data set is: keys for a task, and one sample for a key. The registry of kinds is in build.py."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Task:
    """One stretch of a stream under one condition; corruption None is the clean set."""

    index: int
    corruption: str | None = None
    severity: int = 0  # 1..5; 0 for the clean set, and for conditions on disk that have none
    visit: int = 1  # how often the stream has come to this condition

    @property
    def condition(self) -> str:
        """'gaussian_noise/5', 'night' or 'clean'; the images' order is derived from it, the same at every visit."""
        return (f"{self.corruption}/{self.severity}" if self.severity else self.corruption) or "clean"

    @property
    def name(self) -> str:
        """The condition, and 'fog/5@2' where it comes again; all draws are derived from it."""
        return self.condition if self.visit == 1 else f"{self.condition}@{self.visit}"


@dataclass(frozen=True)
class Sample:
    """One image with its label, both at the original size."""

    key: str
    image_HW3: np.ndarray  # uint8 RGB
    label_HW: np.ndarray | None  # uint8, 0..C-1, 255 = ignore; None: unlabelled


@dataclass(frozen=True)
class Source:
    """What a sample is made from; entries of one stream with equal sources share their files."""

    image: str  # path, or the key of a drawn image
    label: str | None  # None: unlabelled
    is_file: bool = False  # both are paths


class Dataset(Protocol):
    """A set of images; every method is deterministic, and `load` may be called in any process."""

    classes: tuple[str, ...]
    palette_C3: np.ndarray  # uint8 RGB, one colour a class

    def keys(self, task: Task) -> list[str]:
        """Unique sample names of a task, sorted. UserError: no image, or a label without image and vice versa."""
        ...

    def load(self, task: Task, key: str) -> Sample:
        """Read (or draw) one sample, corrupted as the task says. UserError names an unreadable file or bad label."""
        ...

    def source(self, task: Task, key: str) -> Source:
        """Say what `load` would read, without opening it."""
        ...

    def verify(self, task: Task, key: str, *, label: bool) -> None:
        """Raise the UserError that `load` would raise, far cheaper: no image is decoded if its file looks whole.

        Args:
            label: decode the label and look at every id; if False, only its size is compared.
        """
        ...
