"""From the data settings to a data set and its tasks."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from segadapt.config import DataSettings
from segadapt.corruptions import check_corruption
from segadapt.datasets import Dataset, Task
from segadapt.datasets.files import Files
from segadapt.datasets.labels import CLASS_SETS, MAX_CLASSES, palette
from segadapt.datasets.labels import PALETTES as NAMED_PALETTES
from segadapt.datasets.toytown import ToyTown
from segadapt.errors import UserError, did_you_mean


def class_names(classes: str) -> tuple[str, ...]:
    """Names of data.classes, in label order: a known list, or a text file with one name a line.

    Raises:
        UserError: neither; no name, a repeated one, or more names than a label byte holds.
    """
    known = CLASS_SETS | {"toytown": ToyTown.classes}
    if classes in known:
        return known[classes]
    path = Path(classes).expanduser()
    if not path.is_file():
        raise UserError(f"data.classes={classes} is neither a known class list nor a file with one name a line."
                        f"{did_you_mean(classes, known)}")  # fmt: skip
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"data.classes={classes}: byte {error.start} is not UTF-8. Save the file as UTF-8.") from error
    names = tuple(line.strip() for line in lines if line.strip())
    check_class_names(names, f"data.classes={classes}")
    return names


def check_class_names(names: Sequence[str], where: str) -> None:
    """UserError: no name, a repeated one, or more names than a label byte holds.

    where: how the message begins.
    """
    if not names or len(set(names)) != len(names):
        raise UserError(f"{where}: {len(names)} names, {len(set(names))} different; expected one name a class, each "
                        "once. Correct the list.")  # fmt: skip
    if len(names) > MAX_CLASSES:
        raise UserError(f"{where}: {len(names)} names; expected at most {MAX_CLASSES}, as label ids are bytes and 255 "
                        "is ignore. Merge classes.")  # fmt: skip


def build_files(data: DataSettings) -> Files:
    """A data set on disk. UserError: a setting that it needs is not there."""
    for name in ("data_root", "image_path"):
        if getattr(data, name) is None:
            raise UserError(f"data.{name} has no value; data.kind=files needs it. Set it in your experiment file.")
    names = class_names(data.classes)
    return Files(
        data_root=Path(str(data.data_root)).expanduser(),
        image_path=str(data.image_path),
        label_path=data.label_path,
        classes=names,
        palette_C3=NAMED_PALETTES[data.classes] if data.classes in NAMED_PALETTES else palette(len(names)),
        id_map=data.id_map,
        class_ids=data.label_class_ids,
        unknown_ids=data.unknown_ids,
        split=data.split,
        keys_file=data.keys_file,
        subset=data.subset,
        corruption_seed=data.corruption_seed,
        max_pixels=data.max_pixels,
    )


def build_toytown(data: DataSettings) -> ToyTown:
    """The bundled world. UserError: no count, other classes than its own, or a setting of files."""
    if data.count is None or data.classes != "toytown":
        raise UserError(f"data.count={data.count} and data.classes={data.classes}: data.kind=toytown needs a number "
                        "of images and data.classes=toytown. Use data=toytown.")  # fmt: skip
    if data.subset > 1 or data.keys_file is not None or data.label_class_ids:
        raise UserError(f"data.subset={data.subset}, data.keys_file={data.keys_file}, data.label_class_ids="
                        f"{data.label_class_ids}: data.kind=toytown reads no files. Set them to 1, null and []; "
                        "data.count is the number of images.")  # fmt: skip
    return ToyTown(
        split=data.split,
        count=data.count,
        world_seed=data.world_seed,
        weather=data.weather,
        tasks_seed=data.corruption_seed,
    )


DATASETS: dict[str, Callable[[DataSettings], Dataset]] = {
    "files": build_files,
    "toytown": build_toytown,
}


def build_dataset(data: DataSettings) -> Dataset:
    """The data set that the settings name. UserError: unknown, or as its own builder raises."""
    if data.kind not in DATASETS:
        raise UserError(f"data.kind={data.kind} is not a kind of data.{did_you_mean(data.kind, DATASETS)}")
    return DATASETS[data.kind](data)


def of_split(data: DataSettings, split: str) -> DataSettings:
    """The settings of a split; of another one than data.split all images count, as data.subset thins that one alone."""
    return dataclasses.replace(data, split=split, subset=data.subset if split == data.split else 1)


def build_tasks(data: DataSettings) -> list[Task]:
    """One task a corruption, in the order of the settings; the clean task where there is none; all `rounds` times.

    data.order=gradual: of each corruption the severities 1, 2, ... data.severity ... 2, 1 (Marsden et al. 2024).

    Raises:
        UserError: an unknown or repeated corruption; gradual without any.
    """
    on_disk = data.kind == "files" and "{corruption}" in str(data.image_path)
    for name in [] if on_disk else data.corruptions:  # a folder may have conditions of its own, such as night
        check_corruption(name, data.severity)
    if len(set(data.corruptions)) != len(data.corruptions):
        raise UserError(f"data.corruptions={data.corruptions} names one twice. Name each once.")
    if data.order == "gradual" and not data.corruptions:
        raise UserError("data.order=gradual, but data.corruptions is empty: nothing has a severity. Name corruptions.")
    severities = [0 if on_disk and "{severity}" not in str(data.image_path) else data.severity]
    if data.order == "gradual" and severities == [0]:
        raise UserError(
            f"data.order=gradual, but data.image_path={data.image_path} has no {{severity}}. Use order=tasks."
        )
    if data.order == "gradual":
        severities = [*range(1, data.severity), *range(data.severity, 0, -1)]
    conditions = [(name, severity) for name in data.corruptions for severity in severities] or [(None, 0)]
    visits: Counter[tuple[str | None, int]] = Counter()
    tasks = []
    for condition in conditions * data.rounds:
        visits[condition] += 1
        tasks.append(Task(len(tasks), *condition, visit=visits[condition]))
    return tasks
