"""The test images: their order (a seeded, recorded list of (task, key) entries), their check, reading them ahead.

3 RGB   H W image px after the shared resize   H0 W0 image px on disk
"""

import atexit
import hashlib
import os
import signal
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from segadapt.datasets import Dataset, Source, Task
from segadapt.datasets.resize import resize_short_side
from segadapt.errors import UserError
from segadapt.seeds import numpy_generator
from segadapt.signals import STOPPING

Item = TypeVar("Item")
Result = TypeVar("Result")


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
        keys = [keys[index] for index in numpy_generator(seed, "order", task.condition).permutation(len(keys))]
    return [Entry(task, key) for key in keys[:limit]]


def mixed(entries: Sequence[Entry], *, seed: int, visit: int) -> list[Entry]:
    """The entries of all tasks of a round in one shuffled order."""
    return [entries[index] for index in numpy_generator(seed, "mixed", visit).permutation(len(entries))]


def order_hash(entries: Sequence[Entry]) -> str:
    """SHA-256 over the (task, key) pairs of a stream, in order."""
    return hashlib.sha256("\n".join(f"{entry.task.name}\t{entry.key}" for entry in entries).encode()).hexdigest()


def manifest_hash(dataset: Dataset, entries: Sequence[Entry]) -> str:
    """SHA-256 over key and bytes of image and label of each file of a stream, in order; the bytes are not read."""
    sizes: dict[Source, str] = {}
    lines = []
    for entry in entries:
        source = dataset.source(entry.task, entry.key)
        if source not in sizes:
            paths = [path for path in (source.image, source.label) if source.is_file and path is not None]
            sizes[source] = "\t".join(str(os.stat(path).st_size) for path in paths)
        lines.append(f"{entry.task.name}\t{entry.key}\t{sizes[source]}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read(dataset: Dataset, entries: Sequence[Entry], *, short_side_px: int | None, workers: int) -> Iterator[Prepared]:
    """Yield the samples in order, `workers` processes reading ahead; the values do not depend on their number.

    short_side_px: None: images keep their size.
    """
    return ahead(partial(_prepare, dataset, short_side_px), entries, workers=workers)


def verify(dataset: Dataset, entries: Sequence[Entry], *, workers: int) -> None:
    """Look at every file of a stream before its first step: each pair of image and label once, each label's ids once.

    A file that is cut, empty, of a wrong kind or size is found; bytes changed inside an image that keeps its end are
    not, since images are not decoded. Tasks made on the fly share their files, and cost what one of them costs.

    Raises:
        UserError: the first in stream order, as `read` would raise it in the middle of the run.
    """
    checks: dict[Source, tuple[Entry, bool]] = {}
    labels: set[str | None] = set()
    for entry in entries:
        source = dataset.source(entry.task, entry.key)
        if source not in checks:
            checks[source] = entry, source.label not in labels
            labels.add(source.label)
    for _ in ahead(partial(_verify, dataset), list(checks.values()), workers=workers):
        pass


def ahead(function: Callable[[Item], Result], items: Sequence[Item], *, workers: int) -> Iterator[Result]:
    """Yield function(item) in order, `workers` processes ahead. A UserError arrives as it was raised, at its place."""
    yield from raising(
        Loader(_Results(function, items), batch_size=None, workers=min(workers, len(items)), collate_fn=_as_it_is)
    )


class Samples(Protocol):
    """A map-style data set of items that `collate` puts together to a batch. Items may raise UserErrors."""

    def __len__(self) -> int: ...

    def __getitem__(self, item: int, /) -> Any: ...

    def collate(self, _: Any, /) -> Any:
        """A batch of what `__getitem__` gave."""
        ...


def batches(samples: Samples, stretches: Sequence[range], *, workers: int, is_pinned: bool = False) -> Iterator[Any]:
    """The stretches of items as batches, in order, read by `workers` processes. UserError: an item's first one."""
    return raising(
        Loader(
            _Results(samples.__getitem__, range(len(samples))),
            batch_sampler=stretches,
            workers=workers,
            collate_fn=partial(_first_error_or, samples.collate),
            pin_memory=is_pinned,
        )
    )


_reading: weakref.WeakSet[Any] = weakref.WeakSet()  # iterators of loaders that have processes


class Loader(DataLoader):
    """torch's, with as many processes as data.workers says, each of one thread.

    Torch would warn where they are more than the cores. They are the user's to choose: on a network's disk they mostly
    wait, and a recipe should run as it is on a small machine.
    """

    def __init__(self, dataset: torch.utils.data.Dataset, *arguments: Any, workers: int, **more: Any):
        super().__init__(dataset, *arguments, num_workers=workers, worker_init_fn=one_thread_each, **more)

    def __iter__(self) -> Any:
        iterator = super().__iter__()
        if self.num_workers:
            _reading.add(iterator)
        return iterator

    def check_worker_number_rationality(self) -> None:
        """No warning."""


@atexit.register
def _end_workers() -> None:
    """An error's traceback may hold an iterator to the end; multiprocessing, whose turn is later, would send its
    processes SIGTERM, which they ignore, and wait for them for ever."""
    for iterator in list(_reading):
        iterator._shutdown_workers()


def raising(results: Iterable[Result | UserError]) -> Iterator[Result]:
    """What worker processes give, each UserError raised as it was at its place: torch would wrap it in a traceback."""
    for result in results:
        if isinstance(result, UserError):
            raise result
        yield result


def one_thread_each(_: int) -> None:
    """Worker start: OpenCV would otherwise start a thread pool in every process.

    A signal to the whole group (Ctrl-C, timeout, Slurm) is the main process's to answer; workers end with it, as torch
    has them look for their parent.
    """
    cv2.setNumThreads(0)
    for signum in STOPPING:
        signal.signal(signum, signal.SIG_IGN)


class _Results(torch.utils.data.Dataset):
    """function(item) as a map-style data set, for torch's worker processes."""

    def __init__(self, function: Callable[[Any], Any], items: Sequence[Any]):
        self.function, self.items = function, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.function(self.items[index])
        except UserError as error:  # to be raised again, see `raising`
            return error


def _first_error_or(collate: Callable[[Sequence[Any]], Any], results: Sequence[Any]) -> Any:
    error = next((result for result in results if isinstance(result, UserError)), None)
    return collate(results) if error is None else error


def _as_it_is(result: Any) -> Any:
    return result


def _prepare(dataset: Dataset, short_side_px: int | None, entry: Entry) -> Prepared:
    sample = dataset.load(entry.task, entry.key)
    digest = hashlib.blake2b(np.ascontiguousarray(sample.image_HW3).data, digest_size=8)
    if sample.label_HW is not None:
        digest.update(np.ascontiguousarray(sample.label_HW).data)
    return Prepared(
        entry,
        resize_short_side(sample.image_HW3, short_side_px),
        None if sample.label_HW is None else torch.from_numpy(np.ascontiguousarray(sample.label_HW)),
        (sample.image_HW3.shape[0], sample.image_HW3.shape[1]),
        digest.hexdigest(),
    )


def _verify(dataset: Dataset, check: tuple[Entry, bool]) -> None:
    entry, label = check
    dataset.verify(entry.task, entry.key, label=label)
