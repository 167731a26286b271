"""Images and labels on disk, in any layout that a path template can say."""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from segadapt.datasets import Sample, Source, Task
from segadapt.datasets.decode import ids_size, image_size, read_ids, read_image
from segadapt.datasets.labels import id_table, map_ids
from segadapt.errors import UserError, did_you_mean
from segadapt.untrusted import check_inside

PLACEHOLDERS = ("data_root", "split", "corruption", "severity", "key")
NAMED = 3  # keys of a message
NEAR = 8  # names of a folder in a message
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


class Template:
    """A path template: '{data_root}/images/{split}/{key}.*'. Keys are found below the folder in front of {key}.

    The text behind {key} is the exact end of a file name; '.*' is any of IMAGE_SUFFIXES, in upper or lower case.
    """

    def __init__(self, setting: str, text: str):
        """UserError: unknown placeholder, {key} missing or not directly behind a '/', no suffix, or a '..' folder."""
        names = re.findall(r"\{([^{}]*)\}", text)
        for name in names:
            if name not in PLACEHOLDERS:
                raise UserError(f"{setting}={text}: {{{name}}} is not a placeholder.{did_you_mean(name, PLACEHOLDERS)}")
        self.folder, _, self.tail = text.partition("/{key}")
        if names.count("key") != 1 or not self.tail or set("/{}") & set(self.tail):
            raise UserError(
                f"{setting}={text}: expected one {{key}} directly behind a '/', and only a suffix behind it. "
                f"Write it like {{data_root}}/images/{{split}}/{{key}}.*"
            )
        if ".." in text.split("/"):
            raise UserError(f"{setting}={text}: '..' leaves the folder of the data. Name the folder itself.")
        self.setting, self.text = setting, text
        self.wants_corruption = "corruption" in names
        if "severity" in names and not self.wants_corruption:
            raise UserError(f"{setting}={text}: {{severity}} without {{corruption}}. Add {{corruption}} to the path.")

    def fill(self, values: Mapping[str, object]) -> Path:
        """Put values into the folder in front of {key}."""
        return Path(re.sub(r"\{([^{}]*)\}", lambda match: str(values[match[1]]), self.folder))

    def key_of(self, name: str) -> str | None:
        """'city/a.JPG' -> 'city/a'; None if the name has another ending."""
        if self.tail == ".*":
            stem, suffix = os.path.splitext(name)
            return stem if suffix.lower() in IMAGE_SUFFIXES else None
        return name.removesuffix(self.tail) if name.endswith(self.tail) else None

    def list(self, folder: Path, data_root: Path) -> dict[str, Path]:
        """Map the key of every file below folder to its path, sorted; hidden files and linked folders are left out.

        Raises:
            UserError: no such folder, no file of that ending, two files with one key, or a linked file that lies
                neither below folder nor below data_root.
        """
        if not folder.is_dir():
            near = _nearest(folder)
            missing = len(folder.absolute().parts) - len(near.parts)
            is_split = "{split}" in [*reversed(self.folder.split("/")), *[""] * missing][missing - 1]
            cure = (
                "Set the split, data.split or train.validation_split, to one of these"
                if is_split
                else "Set data.data_root to the folder of the data set"
            )
            raise UserError(
                f"{self.setting}: {folder} is not a folder; {_held(near)} {cure}, or correct {self.setting}."
            )
        paths: dict[str, Path] = {}
        others: Counter[str] = Counter()
        for parent, folders, names in os.walk(folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                path = Path(parent, name)
                key = self.key_of(path.relative_to(folder).as_posix())
                if key is None or name.startswith("."):
                    others[os.path.splitext(name)[1] or name] += 1
                    continue
                if key in paths:
                    raise UserError(
                        f"{path} and {paths[key]} have the same key {key}; expected one file a key. Remove one, or "
                        f"name the suffix in {self.setting}."
                    )
                if path.is_symlink():
                    check_inside(path, folder, data_root, cure="Copy the file, or set data.data_root above both.")
                paths[key] = path
        if not paths:
            there = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(NAMED)) or "nothing"
            raise UserError(
                f"{self.setting}: no file in {folder} ends in {self.tail}; expected at least one, it holds {there}. "
                "Correct the template."
            )
        return dict(sorted(paths.items()))


class Files:
    """A data set on disk; implements `segadapt.datasets.Dataset`.

    If image_path holds {corruption}, corrupted images are read from disk; if not, they are made from the clean image.
    """

    def __init__(
        self,
        *,
        data_root: str | Path,
        image_path: str,
        label_path: str | None,
        classes: tuple[str, ...],
        palette_C3: np.ndarray,
        id_map: str,
        split: str,
        corruption_seed: int,
        class_ids: Sequence[int] = (),
        unknown_ids: str = "error",
        keys_file: str | None = None,
        subset: int = 1,
        max_pixels: int = 2**26,
    ):
        """Check the settings; no file is touched.

        Args:
            image_path: template, see `Template`.
            label_path: template; None: the images have no labels.
            palette_C3: uint8 RGB, one row a class.
            id_map: a name of `labels.ID_MAPS`.
            split: fills {split}.
            corruption_seed: of the corruptions made here, see `segadapt.corruptions.corrupt`.
            class_ids, unknown_ids: see `labels.id_table`.
            keys_file: text file with the keys of the split, one a line; {data_root} and {split} are filled in. None:
                the keys of all images.
            subset: X >= 1: of the sorted keys those at X - 1, 2 X - 1, ..., a 1/X of the set. Those of 2 X are among
                those of X (the rule of cheapseg's subsample_dataset.sh).
            max_pixels: larger files are refused by their header, before decoding.
        Raises:
            UserError: a bad template, an unknown id map, too many classes, a split with '..', or max_pixels too large.
        """
        pillow_limit = 2 * (Image.MAX_IMAGE_PIXELS or 2**62)  # above it, Pillow opens no file
        if not 1 <= max_pixels <= pillow_limit:
            raise UserError(f"data.max_pixels={max_pixels}; expected 1..{pillow_limit}. Choose a number in that range.")
        self.classes, self.palette_C3 = classes, palette_C3
        self._table_256 = id_table(id_map, len(classes), class_ids=class_ids, unknown_ids=unknown_ids)
        self._image = Template("data.image_path", image_path)
        self._label = Template("data.label_path", label_path) if label_path is not None else None
        self._values: dict[str, str | Path] = {"data_root": data_root, "split": _inside("data.split", split)}
        self._seed, self._max_pixels = corruption_seed, max_pixels
        self._keys_file, self._subset = keys_file, subset
        self._listed: dict[tuple[str, Path], dict[str, Path]] = {}

    def keys(self, task: Task) -> list[str]:
        """List the folders anew and return the sorted keys of the images. UserError: see Dataset, `Template.list`;
        a key of keys_file without image, or a subset without any."""
        self._listed.clear()
        images, labels = self._paths(self._image, task), self._paths(self._label, task)
        keys = list(images) if self._keys_file is None else self._listed_keys(images)
        missing = [key for key in keys if key not in labels]
        if self._label and missing:
            stray = sum(key not in images for key in labels)
            raise UserError(
                f"{self._folder(self._label, task)}: no label for {len(missing)} of {len(keys)} images "
                f"({_first(missing)}); {stray} of {len(labels)} labels have no image. Add the labels, remove the "
                f"images, or correct data.label_path."
            )
        chosen = keys[self._subset - 1 :: self._subset]
        if not chosen:
            raise UserError(
                f"data.subset={self._subset}: there are only {len(keys)} images, so none is left. Lower it."
            )
        return chosen

    def _listed_keys(self, images: Mapping[str, Path]) -> list[str]:
        """The keys of keys_file, sorted. UserError: no such file, none in it, one twice, or one without image."""
        path = Path(re.sub(r"\{(data_root|split)\}", lambda match: str(self._values[match[1]]), str(self._keys_file)))
        path = path.expanduser()
        if not path.is_file():
            raise UserError(f"data.keys_file: {path} is not a file; {_held(_nearest(path))} Correct data.keys_file or "
                            "data.split.")  # fmt: skip
        try:
            keys = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise UserError(f"data.keys_file: byte {error.start} of {path} is not UTF-8. Save it as UTF-8.") from error
        if not keys or len(set(keys)) != len(keys):
            raise UserError(f"data.keys_file: {path} has {len(keys)} keys, {len(set(keys))} different; expected each "
                            "once. Correct the file.")  # fmt: skip
        if missing := [key for key in keys if key not in images]:
            raise UserError(
                f"data.keys_file: no image for {len(missing)} of {len(keys)} keys of {path} ({_first(missing)}); keys "
                f"of images look like {_first(list(images))}. Correct the file or data.image_path."
            )
        return sorted(keys)

    def missing_images(self, task: Task) -> list[str]:
        """Sorted keys of the labels without image: a folder may hold part of a set, but the caller should say so."""
        images = self._paths(self._image, task)
        return [key for key in self._paths(self._label, task) if key not in images]

    def load(self, task: Task, key: str) -> Sample:
        """Read one sample, corrupted as the task says. UserError names the unreadable file, bad id or other size."""
        image_path = self._path(self._image, task, key=key)
        image_HW3 = read_image(image_path, max_pixels=self._max_pixels)
        label_HW = None
        if self._label:
            label_path = self._path(self._label, task, key=key)
            label_HW = self._read_label(label_path, image_path, image_size_px=image_HW3.shape[:2])
        if task.corruption and not self._image.wants_corruption:
            from segadapt.corruptions import corrupt

            image_HW3 = corrupt(image_HW3, task.corruption, severity=task.severity, seed=self._seed, key=key)
        return Sample(key=key, image_HW3=image_HW3, label_HW=label_HW)

    def source(self, task: Task, key: str) -> Source:
        """The two paths, from the listing alone. UserError: the key is not listed."""
        label = str(self._path(self._label, task, key=key)) if self._label else None
        return Source(str(self._path(self._image, task, key=key)), label, is_file=True)

    def verify(self, task: Task, key: str, *, label: bool) -> None:
        """See Dataset and `decode.image_size`."""
        image_path = self._path(self._image, task, key=key)
        image_size_px = image_size(image_path, max_pixels=self._max_pixels)
        if self._label:
            label_path = self._path(self._label, task, key=key)
            if label:
                self._read_label(label_path, image_path, image_size_px=image_size_px)
            else:
                _check_equal(label_path, ids_size(label_path, max_pixels=self._max_pixels), image_path, image_size_px)
        if task.corruption and not self._image.wants_corruption:
            from segadapt.corruptions import SMALLEST_PX, corrupt

            if min(image_size_px) < SMALLEST_PX:  # corrupt says so in its own words
                blank_HW3 = np.zeros((*image_size_px, 3), np.uint8)
                corrupt(blank_HW3, task.corruption, severity=task.severity, seed=self._seed, key=key)

    def _read_label(self, label_path: Path, image_path: Path, *, image_size_px: tuple[int, ...]) -> np.ndarray:
        """uint8 [H, W], 0..C-1 or 255. UserError: unreadable, of another size than its image, or an unknown id."""
        ids_HW = read_ids(label_path, max_pixels=self._max_pixels)
        _check_equal(label_path, ids_HW.shape, image_path, image_size_px)
        return map_ids(ids_HW, self._table_256, path=label_path)

    def _folder(self, template: Template, task: Task) -> Path:
        if template.wants_corruption and task.corruption is None:
            raise UserError(
                f"{template.setting}={template.text}: the clean task has no {{corruption}}. Give the path of the clean "
                f"images, or leave the clean task out."
            )
        corruption = _inside("data.corruptions", task.corruption or "")
        return template.fill(self._values | {"corruption": corruption, "severity": task.severity})

    def _paths(self, template: Template | None, task: Task) -> dict[str, Path]:
        """Key -> path of a task's images or labels, listed once between two calls of `keys`."""
        if template is None:
            return {}
        folder = self._folder(template, task)
        listing = (template.tail, folder)
        if listing not in self._listed:
            self._listed[listing] = template.list(folder, Path(self._values["data_root"]))
        return self._listed[listing]

    def _path(self, template: Template, task: Task, *, key: str) -> Path:
        """Only listed files are ever opened, so a key cannot lead out of its folder."""
        paths = self._paths(template, task)
        if key not in paths:
            folder = self._folder(template, task)
            raise UserError(
                f"{folder}: no file for key {key}; {len(paths)} others are there. Restore it, or list anew."
            )
        return paths[key]


def _inside(setting: str, value: str) -> str:
    """Return value; UserError if it would climb out of the data folder."""
    if ".." in PurePosixPath(value.replace("\\", "/")).parts:
        raise UserError(f"{setting}={value}: '..' leaves the folder of the data. Name a folder inside it.")
    return value


def _check_equal(label_path: Path, label_px: tuple[int, ...], image_path: Path, image_px: tuple[int, ...]) -> None:
    """UserError: the sizes (H, W) of a pair differ."""
    if label_px != image_px:
        raise UserError(
            f"{label_path}: label of {label_px[1]} x {label_px[0]} px, but its image {image_path} has {image_px[1]} x "
            f"{image_px[0]} px; expected equal sizes. Resize the image file, or fetch the pair again."
        )


def _first(keys: list[str]) -> str:
    """'a, b, c, ...'."""
    return ", ".join(keys[:NAMED]) + (", ..." if len(keys) > NAMED else "")


def _nearest(path: Path) -> Path:
    """The folder above a path that is there."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def _held(folder: Path) -> str:
    """A sentence on what is in a folder."""
    names = sorted(child.name for child in folder.iterdir() if not child.name.startswith("."))
    shown = ", ".join(names[:NEAR]) + (", ..." if len(names) > NEAR else "")
    return f"{folder} holds {shown or 'nothing'}."
