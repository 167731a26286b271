"""The order of the test images, and reading them ahead: a seeded, recorded list of (task, key) entries.

3 RGB   H W image px after the shared resize   H0 W0 image px on disk
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from segadapt.datasets import Dataset, Task
from segadapt.datasets.resize import resize_short_side
from segadapt.errors import UserError
from segadapt.seeds import numpy_generator


@dataclass(frozen=True)
class Entry:
    """One place of the stream."""

    task: Task
    key: str


@dataclass(frozen=True)
class Prepared:
    """A sample after the only processing that both models share: the short side. Labels are never resized."""

    entry: Entry
    image_3HW: Tensor  # float32, 0..1
    label_HW: Tensor | None  # uint8, at the size on disk
    size_px: tuple[int, int]  # H0, W0
    digest: str  # of the pixels as read, corrupted, and of the label


def order(dataset: Dataset, task: Task, *, seed: int, shuffle: bool, limit: int | None) -> list[Entry]:
    """The keys of one task in stream order; it depends on (seed, task, keys) alone, not on the file system."""
    keys = dataset.keys(task)
    if shuffle:
        keys = [keys[index] for index in numpy_generator(seed, "order", task.name).permutation(len(keys))]
    return [Entry(task, key) for key in keys[:limit]]


def order_hash(entries: Sequence[Entry]) -> str:
    """SHA-256 over the (task, key) pairs of a stream, in order."""
    return hashlib.sha256("\n".join(f"{entry.task.name}\t{entry.key}" for entry in entries).encode()).hexdigest()


class _Reader(torch.utils.data.Dataset):
    """The entries of a stream as a map-style data set, for torch's worker processes."""

    def __init__(self, dataset: Dataset, entries: Sequence[Entry], short_side_px: int):
        self.dataset, self.entries, self.short_side_px = dataset, entries, short_side_px

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Prepared | UserError:
        entry = self.entries[index]
        try:
            sample = self.dataset.load(entry.task, entry.key)
        except UserError as error:  # raised again by `read`: torch would wrap it in a worker's traceback
            return error
        digest = hashlib.blake2b(np.ascontiguousarray(sample.image_HW3).data, digest_size=8)
        if sample.label_HW is not None:
            digest.update(np.ascontiguousarray(sample.label_HW).data)
        return Prepared(
            entry,
            resize_short_side(sample.image_HW3, self.short_side_px),
            None if sample.label_HW is None else torch.from_numpy(np.ascontiguousarray(sample.label_HW)),
            (sample.image_HW3.shape[0], sample.image_HW3.shape[1]),
            digest.hexdigest(),
        )


def _as_it_is(prepared: Any) -> Any:
    return prepared


def one_thread_each(_: int) -> None:
    """Worker start: OpenCV would otherwise start a thread pool in every process."""
    cv2.setNumThreads(0)


def read(dataset: Dataset, entries: Sequence[Entry], *, short_side_px: int, workers: int) -> Iterator[Prepared]:
    """Yield the samples in order, `workers` processes reading ahead; the values do not depend on their number."""
    loader = DataLoader(
        _Reader(dataset, entries, short_side_px),
        batch_size=None,
        num_workers=min(workers, len(entries)),
        worker_init_fn=one_thread_each,
        collate_fn=_as_it_is,
    )
    for prepared in loader:
        if isinstance(prepared, UserError):
            raise prepared
        yield prepared
