"""Checkpoints of a run: nested state as safetensors and JSON, in a folder that is there whole or not at all."""

import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from segadapt.errors import UserError
from segadapt.record import fsync_folder

FOLDER = "checkpoints"  # in the run folder
STATE = "state.json"
KEPT = 2  # the newest ones
SHARD_BYTES = 2**30  # of tensors in one file; twice as much host memory is needed to write it
MOST_SHARE = 0.02  # of the time that checkpoints by the clock may take

DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)  # whatever bytes may turn into

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """Tensors of a state that several processes hold in parts.

    Attributes:
        folder: its name in the checkpoint.
        write: makes that folder, with all processes together; returns the SHA-256 of each of its files.
    """

    folder: str
    tensors: Mapping[str, Tensor]
    write: Callable[[Path], dict[str, str]]


class Checkpoints:
    """{run folder}/checkpoints/00000123: what the rest of a run depends on after that many images.

    Args:
        path: the run folder.
        seconds: from one checkpoint to the next, or more where one takes long (see MOST_SHARE); None: not by the clock.
        images: from one checkpoint to the next; None: not by their number.
        clock: seconds.
    """

    def __init__(
        self,
        path: Path,
        *,
        seconds: float | None,
        images: int | None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.folder, self._seconds, self._images, self._clock = path / FOLDER, seconds, images, clock
        self.newest = 0  # images; 0: there is none
        self._since, self._cost_s = clock(), 0.0

    def is_due(self, images: int) -> bool:
        """After so many images of the stream."""
        if self.due_in(images) <= 0:
            return True
        wait_s = math.inf if self._seconds is None else max(self._seconds, self._cost_s / MOST_SHARE)
        return self._clock() - self._since >= wait_s

    def due_in(self, images: int) -> float:
        """Images from there to the checkpoint that is due by their number; infinite: none is."""
        return math.inf if self._images is None else self.newest + self._images - images

    def path_of(self, images: int) -> Path:
        """Where the checkpoint after so many images lies."""
        return self.folder / f"{images:08d}"

    def write(self, images: int, state: Mapping[str, Any], parts: Parts | None = None) -> None:
        """Save nested state after so many images, see `encode`, and its parts; it and the one before are kept.

        Raises:
            UserError: the disk is full or fails; the earlier checkpoints stay.
        """
        if images == self.newest:
            return
        began, path = self._clock(), self.path_of(images)
        try:
            write_folder(path, state, parts)
        except OSError as error:
            size = size_of(state) + (size_of(dict(parts.tensors)) if parts is not None else 0)
            needs = f"{(KEPT + 1) * size / 2**30:.2f} GiB for {KEPT + 1} of them"
            raise UserError(
                f"{path}: the checkpoint cannot be written ({error.strerror}); expected room of {needs}. Earlier ones "
                "are intact: make room, and the same command goes on."
            ) from error
        for other in self.folder.iterdir():
            if other.name not in (path.name, self.path_of(self.newest).name):
                shutil.rmtree(other)
        self.newest, self._since = images, self._clock()
        self._cost_s = self._since - began

    def read(self, is_usable: Callable[[Mapping[str, Any]], str | None]) -> Any:
        """The newest state that is whole; None: there is none. The tensors are on the CPU, read when they are used.

        What is passed over is named in one warning.

        Args:
            is_usable: what is wrong with a state for this run, in words; None: nothing.
        """
        for path in sorted(self.folder.glob("[0-9]*"), reverse=True):
            try:
                state = read_folder(path)
                fault = is_usable(state)
            except DAMAGE as error:
                fault = " ".join(f"{type(error).__name__}: {error}".split())
            else:
                if fault is None:
                    self.newest = int(path.name)
                    return state
            logger.warning("%s is damaged and passed over (%s)", path, fault)
        return None

    def clear(self) -> None:
        """Remove all, as nothing is left to do."""
        if self.folder.is_dir():
            shutil.rmtree(self.folder)


# --- files ---


def size_of(state: Any) -> int:
    """Bytes of the tensors of nested state."""
    tensors: dict[str, Tensor] = {}
    encode(state, tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def write_folder(path: Path, state: Mapping[str, Any], parts: Parts | None = None) -> None:
    """Nested state, see `encode`, and its parts, as a folder that is there whole or not at all.

    One that is there is replaced. OSError: it cannot be written, and nothing is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        _write(temporary, state, parts)
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write(folder: Path, state: Mapping[str, Any], parts: Parts | None) -> None:
    """state.json last, with the SHA-256 of the others and of itself."""
    tensors: dict[str, Tensor] = {}
    content = encode(state, tensors)
    files, of_parts = {}, {}
    if parts is not None:
        (folder / parts.folder).mkdir()
        of_parts = {f"{parts.folder}/{file}": digest for file, digest in parts.write(folder / parts.folder).items()}
        fsync_folder(folder / parts.folder)
    for number, names in enumerate(_shards(tensors)):
        data = save({name: tensors[name].detach().to("cpu", copy=True).contiguous() for name in names})
        file = f"{number:05d}.safetensors"
        files[file] = hashlib.sha256(data).hexdigest()
        _write_file(folder / file, data)
    body = {"files": files} | ({"parts": of_parts} if of_parts else {}) | {"state": content}
    _write_file(folder / STATE, json.dumps({"sha256": _digest(body), **body}, allow_nan=False).encode())
    fsync_folder(folder)


def _write_file(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_folder(folder: Path) -> Any:
    """What `write_folder` wrote but for the parts; the tensors are read when they are used.

    ValueError, KeyError, OSError: damaged.
    """
    whole = json.loads((folder / STATE).read_text(encoding="utf-8"))
    body = {name: whole[name] for name in ("files", "parts", "state") if name in whole}
    if whole["sha256"] != _digest(body):
        raise ValueError(f"{STATE} has another SHA-256")
    tensors = {}
    for name, expected in (body["files"] | body.get("parts", {})).items():
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                raise ValueError(f"{name} has another SHA-256")
    for name in body["files"]:
        with safe_open(folder / name, "pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return decode(body["state"], tensors)


def _shards(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names by file, each of SHARD_BYTES at most unless one tensor alone has more."""
    names, size = [], 0
    for name, tensor in tensors.items():
        bytes_ = tensor.numel() * tensor.element_size()
        if names and size + bytes_ > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += bytes_
    if names:
        yield names


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, allow_nan=False).encode()).hexdigest()


# --- nested state ---


def encode(value: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """Nested state as JSON values; its tensors, not copied, enter `tensors` under the path that leads to them.

    Args:
        value: dicts (with str or int keys), lists, tuples, tensors, None, bool, int, float, str.
    Raises:
        TypeError: a value of another type.
    """
    match value:
        case Tensor():
            assert name not in tensors, name
            tensors[name] = value
            return {"tensor": name}
        case dict():
            assert all(type(key) in (str, int) for key in value), name
            return {"dict": [[key, encode(item, tensors, f"{name}/{key}")] for key, item in value.items()]}
        case list():
            return [encode(item, tensors, f"{name}/{index}") for index, item in enumerate(value)]
        case tuple():
            return {"tuple": encode(list(value), tensors, name)}
        case float() if not math.isfinite(value):
            return {"float": repr(value)}
        case None | bool() | int() | float() | str():
            return value
    raise TypeError(f"{name} is a {type(value).__name__}, which a checkpoint does not hold")


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `encode` was given."""
    match value:
        case {"tensor": name}:
            return tensors[name]
        case {"dict": items}:
            return {key: decode(item, tensors) for key, item in items}
        case {"tuple": items}:
            return tuple(decode(items, tensors))
        case {"float": text}:
            return float(text)
        case list():
            return [decode(item, tensors) for item in value]
    return value
