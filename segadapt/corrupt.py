"""Write a corrupted copy of a data set: one image file per (task, key), a manifest of hashes, restartable at any point.

{output}/settings.json                       what must not change between restarts
{output}/{corruption}/{severity}/{key}.png   written whole or not at all
{output}/manifest.json                       SHA-256 of every image; written last, the same for any worker count
"""

import hashlib
import io
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import closing
from dataclasses import asdict, dataclass
from multiprocessing.synchronize import Event
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from segadapt import __version__
from segadapt.config import DataSettings
from segadapt.config_data import CorruptConfig
from segadapt.corruptions import check_corruption, corrupt
from segadapt.datasets import Dataset, Task
from segadapt.datasets.build import build_dataset, build_tasks
from segadapt.errors import UserError, did_you_mean
from segadapt.signals import Asked, Stopped, noted_signals
from segadapt.untrusted import check_inside, read_json
from segadapt.written_set import WRITE_ANEW, as_json, check_key, claim, progress_bar, write_whole

FORMATS = {"png": "PNG", "jpg": "JPEG"}  # file suffix -> Pillow's name
CLEAN = Task(0)
LOOK_S = 0.2  # from one look for a signal to the next

_is_over: Event | None = None  # of a writing process


@dataclass(frozen=True)
class Settings:
    """Everything that decides the bytes of an image, besides its task and key."""

    dataset: str
    classes: str
    seed: int
    image_format: str  # a name of FORMATS
    quality: int | None  # of JPEG, 1..95; None for PNG
    version: str  # of segadapt


@dataclass(frozen=True)
class _Work:
    """What every worker process needs besides the key."""

    dataset: Dataset
    tasks: tuple[Task, ...]
    output: Path
    settings: Settings


def write_set(
    dataset: Dataset,
    tasks: Sequence[Task],
    output: str | Path,
    *,
    seed: int,
    image_format: str = "png",
    quality: int = 75,
    workers: int,
    limit: int | None = None,
    origin: Mapping[str, str | int | None] | None = None,
    progress: bool = True,
) -> Path:
    """Corrupt every clean image for every task; PNG files hold exactly what `corrupt` gives for (seed, task, key).

    Files that an earlier call has finished stay untouched, so the same call continues after an interruption, and a call
    with other tasks or a larger limit adds to the set.

    Args:
        dataset: the clean set; picklable if workers > 1.
        tasks: corrupted tasks; their order does not matter.
        output: folder, made if missing.
        quality: of JPEG, 1..95; 75, Pillow's default, imitates the published ADE20K-C. Without effect on PNG.
        workers: processes, spawned (so scripts need a __main__ guard); 1 works in this process.
        limit: take the first of the sorted keys only; None for all.
        origin: by name, what else decides the clean pixels (see `origin_of`); stored and compared with the settings.
        progress: show a bar.
    Returns:
        Path of the manifest.
    Raises:
        UserError: bad argument; a key that would leave the output folder; a set that was started with other settings.
        Stopped: SIGINT or SIGTERM came; what is written is whole, and the same call goes on.
    """
    output = Path(output)
    _check_arguments(tasks, image_format=image_format, quality=quality, workers=workers, limit=limit)
    all_keys = dataset.keys(CLEAN)
    for key in all_keys:
        check_key(key)
    keys = all_keys[:limit]
    settings = Settings(
        dataset=_identity(dataset, all_keys),
        classes=f"{len(dataset.classes)} names, {_hash(dataset.classes)}",
        seed=seed,
        image_format=image_format,
        quality=quality if image_format == "jpg" else None,
        version=__version__,
    )
    identity = {**(origin or {}), **asdict(settings)}
    claim(output, identity)

    sha256_of = _earlier_images(output)
    work = _Work(dataset, tuple(tasks), output, settings)
    with (
        progress_bar(shown=progress) as bar,
        noted_signals() as asked,
        closing(_run(work, keys, asked, workers=workers)) as written,
    ):
        for hashes in bar.track(written, total=len(keys), description="corrupting images"):
            sha256_of |= hashes
    manifest = {"settings": identity, "count": len(sha256_of), "sha256": dict(sorted(sha256_of.items()))}
    path = output / "manifest.json"
    write_whole(path, as_json(manifest))
    return path


def image_path(task: Task, key: str, image_format: str) -> str:
    """Path of a corrupted image inside its set, with forward slashes."""
    return f"{task.corruption}/{task.severity}/{key}.{image_format}"


def _run(work: _Work, keys: list[str], asked: Asked, *, workers: int) -> Generator[dict[str, str]]:
    """Yield the hashes of one key after the other, in order. Stopped: a signal came."""
    if workers == 1:
        for key in keys:
            _stop_if(asked)
            yield _write_key(work, key)
        return
    context = multiprocessing.get_context("spawn")  # fork would copy the threads of torch and OpenCV in mid-air
    size = min(16, 1 + len(keys) // (4 * workers))  # keys sent at a time, along with one copy of the data set
    is_over = context.Event()
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(is_over,))
    try:
        own = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: Ctrl-C is this process's to answer
        try:
            firsts = range(0, len(keys), size)
            futures = [pool.submit(_write_keys, work, keys[first : first + size]) for first in firsts]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, own)
        for future in futures:
            while not wait([future], timeout=LOOK_S).done:
                _stop_if(asked)
            _stop_if(asked)
            yield from future.result()
    finally:
        is_over.set()
        pool.shutdown(cancel_futures=True)


def _stop_if(asked: Asked) -> None:
    if asked.signum is not None:
        raise Stopped(asked.signum, f"{asked.signum.name}; the same command goes on with the images that are missing")


def _begin(is_over: Event) -> None:
    """Of a writing process: it ends with the first one."""
    global _is_over
    _is_over = is_over
    cv2.setNumThreads(1)  # the processes share the cores already, and the images do not depend on it
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _write_keys(work: _Work, keys: list[str]) -> list[dict[str, str]]:
    """See _write_key; in a writing process. Broken off, before the next key, where nobody waits for it."""
    assert _is_over is not None
    found = []
    for key in keys:
        if _is_over.is_set():
            break
        found.append(_write_key(work, key))
    return found


def _write_key(work: _Work, key: str) -> dict[str, str]:
    """Write what is missing of one key, all tasks; return path in the set -> SHA-256."""
    image_HW3 = None
    sha256_of = {}
    for task in work.tasks:
        name = image_path(task, key, work.settings.image_format)
        path = work.output / name
        if path.is_file():
            content = path.read_bytes()
        else:
            if image_HW3 is None:
                image_HW3 = work.dataset.load(CLEAN, key).image_HW3
            assert task.corruption is not None
            corrupted = corrupt(image_HW3, task.corruption, severity=task.severity, seed=work.settings.seed, key=key)
            content = _encode(corrupted, work.settings)
            write_whole(path, content)
        sha256_of[name] = hashlib.sha256(content).hexdigest()
    return sha256_of


def _encode(image_HW3: np.ndarray, settings: Settings) -> bytes:
    options = {} if settings.quality is None else {"quality": settings.quality}
    file = io.BytesIO()
    Image.fromarray(image_HW3).save(file, FORMATS[settings.image_format], **options)
    return file.getvalue()


def _earlier_images(output: Path) -> dict[str, str]:
    """The manifest of an earlier call, less files that are gone; empty where there is none."""
    path = output / "manifest.json"
    if not path.is_file():
        return {}
    earlier = read_json(path, cure=WRITE_ANEW).get("sha256")
    if not isinstance(earlier, dict):
        raise UserError(f"{path}: no object `sha256`; expected a hash for every image. {WRITE_ANEW}")
    for name in earlier:
        check_inside(output / name, output, cure=f"It is named in {path}. {WRITE_ANEW}")
    return {name: sha256 for name, sha256 in earlier.items() if (output / name).is_file()}


def _identity(dataset: Dataset, keys: list[str]) -> str:
    """Kind, size and a hash of the keys; not the folder, so that a set may be moved."""
    return f"{type(dataset).__name__}, {len(keys)} images, {_hash(keys)}"


def _hash(names: Sequence[str]) -> str:
    return hashlib.sha256("\x1f".join(names).encode()).hexdigest()[:16]


def _check_arguments(
    tasks: Sequence[Task], *, image_format: str, quality: int, workers: int, limit: int | None
) -> None:
    for task in tasks:
        if task.corruption is None:
            raise UserError(
                f"task {task.index} is clean; expected a corruption. Leave it out: clean images are not copied."
            )
        check_corruption(task.corruption, task.severity)
    if image_format not in FORMATS:
        raise UserError(f"image_format={image_format!r}; expected png or jpg.{did_you_mean(image_format, FORMATS)}")
    if not 1 <= quality <= 95:
        raise UserError(f"quality={quality}; expected 1..95. Set it to 75, or leave it out.")
    if workers < 1:
        raise UserError(f"workers={workers}; expected 1 or more processes. Use workers=1 to work in this process.")
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit}; expected 1 or more images. Leave it out to take all.")


def origin_of(data: DataSettings) -> dict[str, str | int | None]:
    """The settings that decide which clean pixels a key has; None for one that this kind does not read.

    Without data_root: a set may be continued from a copy of the data elsewhere.
    """
    is_drawn = data.kind == "toytown"
    return {
        "kind": data.kind,
        "name": data.name,
        "split": data.split,
        "world_seed": data.world_seed if is_drawn else None,
        "weather": data.weather if is_drawn else None,
        "image_path": None if is_drawn else data.image_path,
    }


def run(settings: CorruptConfig) -> None:
    """The verb: every corruption of data.corruptions over the clean set of data; data.limit: its first sorted keys.

    Raises:
        UserError: no corruption named, or as `write_set` does.
    """
    data, written = settings.data, settings.corrupt
    tasks = build_tasks(data)
    if not data.corruptions:
        raise UserError("data.corruptions=[]: nothing to write. Name at least one corruption.")
    output = Path(written.output).expanduser()
    manifest = write_set(
        build_dataset(data),
        tasks,
        output,
        seed=data.corruption_seed,
        image_format=written.image_format,
        quality=written.quality,
        workers=max(1, data.workers),
        limit=data.limit,
        origin=origin_of(data),
    )
    print(f"wrote {manifest}")
