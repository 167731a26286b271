"""The images of a segmenter's training: those that it draws from, and those that it is validated on."""

from dataclasses import dataclass
from typing import Any

from segadapt import metrics, scoring, stream
from segadapt.config_training import TrainConfig
from segadapt.datasets import Dataset, Task
from segadapt.datasets.labels import IGNORE
from segadapt.errors import UserError, counted
from segadapt.losses import ClassWeights, class_weights_of
from segadapt.models.discriminative.segmenter import NetSegmenter
from segadapt.out_of_memory import explain_shortage
from segadapt.stream import Entry
from segadapt.training.parallel import World
from segadapt.training.preparation import labelled_split
from segadapt.training.recorded import is_recorded


@dataclass(frozen=True)
class Images:
    """Listed, and no file of them opened.

    Attributes:
        dataset, drawn: the training split, and its images.
        held_out, entries: the validation split, and the images of a validation in order.
        num_shared: of `entries`, those that are in `drawn` too.
        origin: hashes of keys, order and sizes, which a run that goes on must find unchanged.
    """

    dataset: Dataset
    drawn: list[Entry]
    held_out: Dataset
    entries: list[Entry]
    num_shared: int
    origin: dict[str, Any]


class PixelScores:
    """Scores of a validation, as `evaluate` has them."""

    chosen_by = "miou"

    def __init__(self, settings: TrainConfig, images: Images, world: World):
        self._settings, self._world, self._held_out = settings, world, images.held_out
        self._entries = list(images.entries[world.rank :: world.size])

    def __call__(self, segmenter: NetSegmenter) -> dict[str, Any]:
        """Fractions, of the pixels of all processes; `iou` by class."""
        with explain_shortage(lambda: "validation", lambda: self._cures(segmenter)):
            counts_CC = scoring.count(segmenter, self._held_out, self._entries, settings=self._settings)
        scores = metrics.scores(self._world.sum(counts_CC))
        return {"miou": scores.miou, "macc": scores.macc, "aacc": scores.aacc, "iou": scores.iou_C.tolist()}

    def _cures(self, segmenter: NetSegmenter) -> list[str]:
        lower = f"lower data.short_side_px={self._settings.data.short_side_px}"
        return [lower, "set train.recorded=false"] if is_recorded(self._settings, segmenter) else [lower]


def list_images(settings: TrainConfig) -> Images:
    """The images of the settings. UserError: no labels, no image, or classes of which nothing could be learned."""
    data, t = settings.data, settings.train
    dataset, held_out = labelled_split(settings, data.split), labelled_split(settings, t.validation_split)
    if len(dataset.classes) < 2:
        raise UserError(f"data.classes={data.classes} has one class: a softmax over it is always right, and "
                        "nothing would be learned. Name the background as a class too.")  # fmt: skip
    drawn = [Entry(Task(0), key) for key in dataset.keys(Task(0))]
    entries = stream.order(held_out, Task(0), seed=settings.experiment.seed, shuffle=True, limit=t.validation_images)
    known = {_name(dataset, data.split, entry) for entry in drawn}
    return Images(
        dataset,
        drawn,
        held_out,
        entries,
        num_shared=sum(_name(held_out, t.validation_split, entry) in known for entry in entries),
        origin={
            "training": {"images": len(drawn), "keys_sha256": stream.order_hash(drawn)},
            "validation_order_sha256": stream.order_hash(entries),
            "manifest_sha256": {"training": stream.manifest_hash(dataset, drawn),
                                "validation": stream.manifest_hash(held_out, entries)},
        },
    )  # fmt: skip


def _name(dataset: Dataset, split: str, entry: Entry) -> tuple[str, str]:
    """Of an image: its path, whatever the split; or the key of a drawn one within its split."""
    source = dataset.source(entry.task, entry.key)
    return ("" if source.is_file else split), source.image


def shared_line(settings: TrainConfig, images: Images) -> str:
    """What is said of validation images that are trained on: an overfit check, or a slip that flatters every score."""
    split, count = settings.train.validation_split, len(images.entries)
    return (f"train.validation_split={split}: {images.num_shared} of {count} validation images are training images "
            "too; their scores say how well these were learned, not how others are segmented. Set "
            "train.validation_split to a split of its own, unless that is meant.")  # fmt: skip


def read_labels(settings: TrainConfig, images: Images) -> ClassWeights:
    """Look at every file once, and weigh the classes.

    UserError: a damaged file, a label that cannot be, or labels that all are ignored.
    """
    workers = settings.data.workers
    for dataset, entries, split in (
        (images.dataset, images.drawn, settings.data.split),
        (images.held_out, images.entries, settings.train.validation_split),
    ):
        stream.verify(dataset, entries, workers=workers)
        labels = (dataset.load(entry.task, entry.key).label_HW for entry in entries)
        if all(label_HW is None or (label_HW == IGNORE).all() for label_HW in labels):
            count, name = counted(len(entries), "label"), settings.data.name
            raise UserError(f"data.name={name}, split {split}: no pixel of its {count} is of a class, all are ignored; "
                            "nothing could be learned, or scored. Correct data.id_map or data.label_class_ids; "
                            "`segadapt check check.samples=8` draws labels.")  # fmt: skip
    keys = [entry.key for entry in images.drawn]
    return class_weights_of(settings.train.losses, images.dataset, keys, workers=workers)
