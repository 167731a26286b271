"""What a run leaves on disk: its folder, its settings, JSON and label images; each file whole or not there at all."""

import hashlib
import io
import json
import logging
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from PIL import Image

from segadapt.errors import UserError
from segadapt.untrusted import check_inside, read_json

RESULTS = (
    "results.json",
    "checkpoints",
    "mirrored.json",
    "tasks",
    "predictions",
    "submission",
    "samples",
    "preview",
    "report.html",
    "adapted",
    "model",
    "model_last",
    "mit.safetensors",
    "records.jsonl",
    "timings.jsonl",
    "checkpoint.safetensors",
    "diagnosis.json",
    "diagnosis.png",
    "diagnosis.svg",
)  # of an earlier start of the same run
_ABSENT = object()

logger = logging.getLogger(__name__)


def plain(value: Any) -> Any:
    """Turn numpy values, tuples and paths into JSON values; NaN and infinity, unknown to JSON, become None."""
    match value:
        case np.ndarray() | np.generic():
            return plain(value.tolist())
        case float() if not math.isfinite(value):
            return None
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case Path():
            return str(value)
    return value


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole: to a temporary name, fsync, rename, fsync of the folder (made if need be).

    A reader, or a machine that loses power, sees the old file or the new one. OSError (disk full): the old one stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a write that fails has none
        raise
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON: keys in the given order, floats exact (shortest form that reads back equal), see `plain`."""
    write_bytes(path, (json.dumps(plain(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode())


def write_png_palette(path: Path, ids_HW: np.ndarray, palette_C3: np.ndarray) -> None:
    """Write ids (uint8 [H, W]) as an 8-bit palette PNG: pixels keep their ids, the palette (uint8 RGB) is for the eye.

    Ids without a colour, such as 255 (ignore), are black.
    """
    colours_2563 = np.zeros((256, 3), np.uint8)
    colours_2563[: len(palette_C3)] = palette_C3
    image = Image.fromarray(ids_HW)
    image.putpalette(colours_2563.tobytes())
    _write_png(path, image)


def write_png_grey(path: Path, ids_HW: np.ndarray) -> None:
    """Write ids (uint8 [H, W]) as an 8-bit grey PNG: pixels are ids."""
    _write_png(path, Image.fromarray(ids_HW))


def _write_png(path: Path, image: Image.Image) -> None:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())


class JsonLines:
    """One JSON value a line; a line is with the operating system as soon as `append` returns."""

    def __init__(self, path: Path, *, keep: Sequence[Any] = (), keep_bytes: int = 0):
        """keep: values of an earlier start, written first; keep_bytes: of an earlier start's file, the rest is cut."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        assert keep_bytes <= self._file.tell(), path
        self._file.truncate(keep_bytes)
        for value in keep:
            self.append(value)

    def append(self, value: Any) -> None:
        """Write one line, see `plain`. OSError (disk full): the lines before it stay, and no part of this one."""
        line = memoryview((json.dumps(plain(value), allow_nan=False, ensure_ascii=False) + "\n").encode())
        whole = os.fstat(self._file.fileno()).st_size
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            self._file.truncate(whole)
            error.filename = error.filename or self._file.name
            raise

    def sync(self) -> int:
        """Bring all lines to the disk; returns their bytes."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Bring all lines to the disk; a second call does nothing."""
        if not self._file.closed:
            self.sync()
            self._file.close()

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()


@dataclass(frozen=True)
class RunFolder:
    """{root}/{name}/{id}: where one run, with one set of settings, writes."""

    path: Path
    id: str

    @classmethod
    def open(
        cls, root: str | Path, name: str, *, run_id: str | None, settings: Mapping[str, Any], make: bool = True
    ) -> "RunFolder":
        """Make the folder, or find that of the same run; nothing in it is touched.

        Args:
            root: folder of all runs.
            name: experiment name; like the id of [A-Za-z0-9._-], not starting with a dot.
            run_id: None: the first 10 hex digits of the SHA-256 of the settings as canonical JSON.
            settings: all that can change results; JSON values.
            make: False: nothing is written, and the folder may not be there.
        Raises:
            UserError: a name or id of other characters, or a link that leaves root; a folder of another run or of
                none, or one not writable.
        """
        settings = plain(settings)
        run_id = settings_id(settings) if run_id is None else run_id
        for setting, value in {"experiment.name": name, "experiment.id": run_id}.items():
            if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", value):
                raise UserError(
                    f"{setting}={value!r}: expected letters, digits, '.', '_' and '-', not starting with '.', as it "
                    f"names a folder. Choose another {setting}."
                )
        path = Path(root, name, run_id).expanduser()
        check_inside(path, Path(root).expanduser(), cure="Remove the link, or choose another experiment.name.")
        try:
            if path.exists():
                _check_same_run(path, settings)
            if make:
                path.mkdir(parents=True, exist_ok=True)
            if make and not (path / "settings.json").exists():
                write_json(path / "settings.json", settings)
        except OSError as error:
            raise UserError(
                f"logging.root={root}: {path} cannot be written ({error.strerror}). Choose a folder of your own."
            ) from error
        return cls(path=path, id=run_id)

    @property
    def is_there(self) -> bool:
        """Some process has made it."""
        return (self.path / "settings.json").is_file()

    @contextmanager
    def locked(self) -> Iterator[str | None]:
        """Inside, this process alone works on the folder. Yields who did and went without a word; None: nobody.

        The lock is the operating system's and ends with the process, whatever ends it; `.lock` only says whose it is.
        Children do not inherit it. Windows has no such call, nor have some network file systems, which costs a warning:
        two processes at once are then not noticed.

        Raises:
            UserError: another process holds it.
        """
        path = self.path / ".lock"
        with path.open("a+", encoding="utf-8") as file:
            try:
                _lock(file.fileno())
            except BlockingIOError as error:
                file.seek(0)
                raise UserError(
                    f"Run folder {self.path} is at work: {file.read() or 'its owner is not told'}. Wait for it or stop "
                    "it; another experiment.id is another run."
                ) from error
            except OSError as error:
                logger.warning("%s cannot be locked (%s): start no second process on it", self.path, error.strerror)
            file.seek(0)
            earlier = file.read() or None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S%z')}")
            file.flush()
            for left in filter(_is_half_written, list(self.path.rglob(".*.tmp"))):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            try:
                yield earlier
            finally:
                file.truncate(0)

    def start_over(self, config: Mapping[str, Any], *, keep: bool = False) -> None:
        """Remove what an earlier start of the same run left, and write config.yaml; call it once nothing can fail.

        keep: nothing is removed, as this start goes on where that one stopped.
        """
        for result in () if keep else RESULTS:
            if (self.path / result).is_dir() and not (self.path / result).is_symlink():
                shutil.rmtree(self.path / result)
            else:
                (self.path / result).unlink(missing_ok=True)
        write_bytes(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(config))).encode())


def _is_half_written(path: Path) -> bool:
    """By a process that was killed."""
    return re.fullmatch(r"\..+\.\d+\.tmp", path.name) is not None


def settings_id(settings: Mapping[str, Any]) -> str:
    """First 10 hex digits of the SHA-256 of canonical JSON; the order of the keys does not matter."""
    text = json.dumps(plain(settings), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _check_same_run(path: Path, settings: Mapping[str, Any]) -> None:
    """UserError unless path is an empty folder or one that was started with these settings."""
    another = "Choose another experiment.id"
    if not path.is_dir():
        raise UserError(f"{path} is a file; expected a run folder. {another}.")
    stored = path / "settings.json"
    if not stored.exists():
        if not all(_is_half_written(left) for left in path.iterdir()):
            raise UserError(f"{path} holds files but no settings.json, so it is not a run folder. {another}.")
        return
    old = read_json(stored, cure=f"{another}, or remove the folder.")
    refuse_changes(path, old, settings, cure=f"{another}, or restore the value")


def refuse_changes(
    path: Path, earlier: Mapping[str, Any], now: Mapping[str, Any], *, cure: str, what: str = "Run folder"
) -> None:
    """UserError for the first value, by dotted name, that differs from the one a run folder was started with."""
    old, new = _flat(earlier), _flat(now)
    for name in [*new, *(name for name in old if name not in new)]:
        before, after = old.get(name, _ABSENT), new.get(name, _ABSENT)
        if before != after or type(before) is not type(after):
            raise UserError(
                f"{what} {path} was started with {_setting(name, before)}; now {_shown(after)}. A run is repeated "
                f"only unchanged. {cure}."
            )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} to {'a.b': 1}; lists stay values."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    return {
        name: leaf
        for key, item in value.items()
        for name, leaf in _flat(item, f"{prefix}.{key}" if prefix else key).items()
    }


def _setting(name: str, value: Any) -> str:
    return f"no {name}" if value is _ABSENT else f"{name}={_shown(value)}"


def _shown(value: Any) -> str:
    return "absent" if value is _ABSENT else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _lock(descriptor: int) -> None:
    """BlockingIOError: another process holds the lock; OSError: there are no locks here."""
    if os.name == "posix":
        import fcntl

        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock would be inherited by the data workers
        except PermissionError as error:  # EACCES, as some systems say it
            raise BlockingIOError(*error.args) from error


def fsync_folder(folder: Path) -> None:
    """Make a rename last; Windows has no such call."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
