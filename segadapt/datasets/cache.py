"""Decoded samples kept in memory: for training, where each image is read many times."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from segadapt.datasets import Dataset, Sample, Task
from segadapt.errors import UserError


class Cached:
    """A data set whose clean samples are read once, by `workers` processes, and shared with later workers by fork.

    Memory: 4 bytes a pixel. Raises UserError where a sample cannot be read.
    """

    def __init__(self, dataset: Dataset, *, workers: int):
        self.classes, self.palette_C3 = dataset.classes, dataset.palette_C3
        self._keys: Sequence[str] = dataset.keys(Task(0))
        loader = DataLoader(_Samples(dataset, self._keys), batch_size=None, num_workers=workers, collate_fn=_as_it_is)
        self._samples: dict[str, Sample] = {}
        for sample in loader:
            if isinstance(sample, UserError):
                raise sample
            self._samples[sample.key] = sample

    def keys(self, task: Task) -> list[str]:
        """See Dataset."""
        return list(self._keys)

    def load(self, task: Task, key: str) -> Sample:
        """See Dataset; the clean task alone."""
        assert task.corruption is None, task
        return self._samples[key]


class _Samples(torch.utils.data.Dataset):
    def __init__(self, dataset: Dataset, keys: Sequence[str]):
        self.dataset, self.keys = dataset, keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample | UserError:
        try:
            sample = self.dataset.load(Task(0), self.keys[index])
        except UserError as error:  # raised again above: torch would wrap it in a worker's traceback
            return error
        label_HW = None if sample.label_HW is None else np.ascontiguousarray(sample.label_HW)
        return Sample(sample.key, np.ascontiguousarray(sample.image_HW3), label_HW)


def _as_it_is(sample: Any) -> Any:
    return sample
