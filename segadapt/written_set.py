"""A folder of files that a verb writes once: claimed by its settings, each file whole, restartable at any point."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from segadapt.errors import UserError
from segadapt.record import write_bytes
from segadapt.untrusted import read_json

SETTINGS = "settings.json"
WRITE_ANEW = "Delete the whole set and write it again."


def write_whole(path: Path, content: bytes) -> None:
    """See `record.write_bytes`. UserError: it cannot be written; what was written before stays."""
    try:
        write_bytes(path, content)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}). Free space or correct the folder's permissions, "
            "then run the same command again: finished files are kept."
        ) from error


def claim(output: Path, identity: Mapping[str, Any]) -> None:
    """Store the settings in a new set; compare them with those of an existing one.

    Args:
        identity: JSON values; all that decides the bytes of the files.
    Raises:
        UserError: no folder, one of something else, or a set of other settings.
    """
    path = output / SETTINGS
    if output.is_file():
        raise UserError(f"{output} is a file; expected a folder. Choose another output.")
    if not path.is_file():
        entries = output.iterdir() if output.is_dir() else ()
        foreign = next((entry.name for entry in entries if not entry.name.endswith(".tmp")), None)
        if foreign is not None:
            raise UserError(
                f"{output}: holds {foreign!r} but no settings.json, so it was not started by this command. "
                "Choose a new or empty folder."
            )
        write_whole(path, as_json(dict(identity)))
        return
    stored = read_json(path, cure=WRITE_ANEW)
    for field in [*identity, *(field for field in stored if field not in identity)]:
        old, new = stored.get(field), identity.get(field)
        if old != new:
            raise UserError(
                f"{output} was started with {field}={old!r}; now {new!r}. A set is continued only unchanged. "
                "Choose another output folder, or restore the value."
            )


def check_key(key: str) -> None:
    """UserError: a file of this name would lie outside of its folder."""
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts) or PurePosixPath(key).is_absolute() or {"\\", "\0"} & set(key):
        raise UserError(
            f"image key {key!r} would not stay inside the output folder; expected names joined by single slashes. "
            "Rename the image."
        )


@contextmanager
def progress_bar(*, shown: bool) -> Iterator[Progress]:
    """With what is done, what there is to do, and the time of both."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not shown) as bar:
        yield bar


def as_json(document: dict) -> bytes:
    """Indented, with a last newline."""
    return (json.dumps(document, indent=1) + "\n").encode()
