"""Images in a folder of their class: {data_root}/{split}/{class}/*.jpg, as ImageNet is usually unpacked."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from segadapt.datasets.decode import image_size
from segadapt.datasets.files import IMAGE_SUFFIXES
from segadapt.errors import UserError, did_you_mean
from segadapt.stream import ahead


@dataclass(frozen=True)
class ImageFolder:
    """Images of one split by key, `{class}/{file name}`; no file has been opened.

    Attributes:
        classes: names in the order of their ids.
        keys: sorted.
    """

    path: Path
    classes: tuple[str, ...]
    keys: tuple[str, ...]

    def label_of(self, key: str) -> int:
        """Id of the class."""
        return self.classes.index(key.partition("/")[0])

    def keys_hash(self) -> str:
        """SHA-256 over the keys."""
        return hashlib.sha256("\n".join(self.keys).encode()).hexdigest()

    def manifest_hash(self) -> str:
        """SHA-256 over key and bytes of each file; the bytes are not read."""
        lines = (f"{key}\t{os.stat(self.path / key).st_size}" for key in self.keys)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def verify(self, *, workers: int, max_pixels: int) -> None:
        """Look at every file. UserError: the first that is cut, empty, no image or too large."""
        for _ in ahead(partial(_verify, self.path, max_pixels), self.keys, workers=workers):
            pass


def _verify(path: Path, max_pixels: int, key: str) -> None:
    image_size(path / key, max_pixels=max_pixels)


def list_images(data_root: str, split: str, setting: str, *, classes: Sequence[str] | None = None) -> ImageFolder:
    """The images of a split; hidden files are passed over.

    Args:
        setting: that names the split, for messages.
        classes: those of the training split, of which this one may have fewer; None: each folder is one.
    Raises:
        UserError: no such folder, less than two classes, an unknown one, a class without an image, an image outside of
            the folder of a class, or a file of another kind inside.
    """
    root = Path(data_root).expanduser()
    path = root / split
    if not path.is_dir():
        there = sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
        cure = "Set data.data_root." if not root.is_dir() else did_you_mean(split, there).strip()
        raise UserError(f"{setting}={split}: {path} is not a folder; expected the folder of a split, with one folder a "
                        f"class. {cure}")  # fmt: skip
    entries = sorted((entry for entry in os.scandir(path) if not entry.name.startswith(".")), key=lambda e: e.name)
    for entry in entries:
        if not entry.is_dir():
            raise UserError(f"{entry.path} lies in the folder of no class, so it has no label; expected "
                            f"{path}/CLASS/{entry.name}. Move it there, or remove it.")  # fmt: skip
    found = [entry.name for entry in entries]
    if classes is None and len(found) < 2:
        raise UserError(f"{setting}={split}: {path} holds the folders of {len(found)} classes ({', '.join(found)}); "
                        "expected 2 or more, a classifier of fewer learns nothing. Add the others, or correct "
                        "data.data_root.")  # fmt: skip
    for name in found:
        if classes is not None and name not in classes:
            raise UserError(f"{path}/{name} is of a class that the training images do not have."
                            f"{did_you_mean(name, classes)} Rename or remove it.")  # fmt: skip
    if not found:
        raise UserError(f"{setting}={split}: {path} is empty; expected a folder a class. Correct data.data_root.")
    keys = [f"{name}/{file}" for name in found for file in _images_of(path / name)]
    return ImageFolder(path, tuple(found if classes is None else classes), tuple(keys))


def _images_of(folder: Path) -> list[str]:
    """Names of its images, sorted. UserError: none, or another file or a folder among them."""
    names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    for name in names:
        if os.path.splitext(name)[1].lower() not in IMAGE_SUFFIXES:
            raise UserError(f"{folder / name} is no image file; expected only {', '.join(IMAGE_SUFFIXES)} in the "
                            "folder of a class. Remove it.")  # fmt: skip
    if not names:
        raise UserError(f"{folder} holds no image; expected at least one of the class. Add some, or remove the "
                        "folder.")  # fmt: skip
    return names
