"""What a run leaves on disk: its folder, its settings, JSON and label images; each file whole or not there at all."""

import hashlib
import io
import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
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
    "tasks",
    "predictions",
    "adapted",
    "model",
    "records.jsonl",
    "timings.jsonl",
    "checkpoint.safetensors",
    "diagnosis.json",
    "diagnosis.png",
    "diagnosis.svg",
)  # of an earlier start of the same run
_ABSENT = object()


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
    _fsync_folder(path.parent)


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
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())


class JsonLines:
    """One JSON value a line, in a file begun anew; a line is with the operating system as soon as `append` returns."""

    def __init__(self, path: Path, *, keep: Sequence[Any] = ()):
        """keep: values of an earlier start, written first."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb", buffering=0)
        for value in keep:
            self.append(value)

    def append(self, value: Any) -> None:
        """Write one line, see `plain`. OSError (disk full): the lines before it stay, and no part of this one."""
        line = memoryview((json.dumps(plain(value), allow_nan=False, ensure_ascii=False) + "\n").encode())
        whole = self._file.tell()
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            self._file.truncate(whole)
            error.filename = error.filename or self._file.name
            raise

    def close(self) -> None:
        """Bring all lines to the disk; a second call does nothing."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
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
    def open(cls, root: str | Path, name: str, *, run_id: str | None, settings: Mapping[str, Any]) -> "RunFolder":
        """Make the folder, or find that of the same run; nothing in it is touched.

        Args:
            root: folder of all runs.
            name: experiment name; like the id of [A-Za-z0-9._-], not starting with a dot.
            run_id: None: the first 10 hex digits of the SHA-256 of the settings as canonical JSON.
            settings: all that can change results; JSON values.
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
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / "settings.json", settings)
        except OSError as error:
            raise UserError(
                f"logging.root={root}: {path} cannot be written ({error.strerror}). Choose a folder of your own."
            ) from error
        return cls(path=path, id=run_id)

    def start_over(self, config: Mapping[str, Any], *, resume: str | None = None) -> None:
        """Remove what an earlier start of the same run left, and write config.yaml; call it once nothing can fail.

        resume: file name of a checkpoint; where it lies in the folder, nothing is removed.
        """
        for result in () if resume and (self.path / resume).is_file() else RESULTS:
            if (self.path / result).is_dir() and not (self.path / result).is_symlink():
                shutil.rmtree(self.path / result)
            else:
                (self.path / result).unlink(missing_ok=True)
        write_bytes(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(config))).encode())


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
        if any(path.iterdir()):
            raise UserError(f"{path} holds files but no settings.json, so it is not a run folder. {another}.")
        return
    old = _flat(read_json(stored, cure=f"{another}, or remove the folder."))
    new = _flat(settings)
    for name in [*new, *(name for name in old if name not in new)]:
        before, now = old.get(name, _ABSENT), new.get(name, _ABSENT)
        if before != now or type(before) is not type(now):
            raise UserError(
                f"Run folder {path} was started with {_setting(name, before)}; now {_shown(now)}. A run is repeated "
                f"only unchanged. {another}, or restore the value."
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


def _fsync_folder(folder: Path) -> None:
    """Make a rename last; Windows has no such call."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
