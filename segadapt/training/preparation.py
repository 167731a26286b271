"""What the trainings do before their first step: what they refuse, their images, their folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from segadapt.config_pretraining import PretrainConfig
from segadapt.config_training import TrainConfig, TrainGenerativeConfig
from segadapt.datasets import Dataset
from segadapt.datasets.build import build_dataset, of_split
from segadapt.datasets.cache import Cached
from segadapt.errors import UserError
from segadapt.protocol import FREE, without
from segadapt.record import RunFolder
from segadapt.training.samples import check_range, check_transforms


def labelled_split(settings: Any, split: str) -> Dataset:
    """The data set of another split. UserError: it has no labels."""
    data = of_split(settings.data, split)
    if data.kind == "files" and data.label_path is None:
        raise UserError("data.label_path=null: training needs labels. Set data.label_path.")
    return build_dataset(data)


def cached(dataset: Dataset, settings: Any) -> Dataset:
    """The data set, or with data.cache its decoded samples in memory."""
    return Cached(dataset, workers=settings.data.workers) if settings.data.cache else dataset


def check_settings(settings: TrainConfig | TrainGenerativeConfig) -> None:
    """UserError: a setting that training would pass over in silence, or a range upside down."""
    data = settings.data
    if data.corruptions:
        raise UserError(f"data.corruptions={data.corruptions}: training reads the clean images, so it would have no "
                        "effect. Set data.corruptions=[].")  # fmt: skip
    if data.limit is not None:
        raise UserError(f"data.limit={data.limit}: training draws from all images, so it would have no effect. Set "
                        "data.limit=null; train.iters and train.validation_images set the amount.")  # fmt: skip
    if settings.logging.predictions != "none":
        raise UserError(f"logging.predictions={settings.logging.predictions}: training writes no predictions. Set "
                        "logging.predictions=none, and `evaluate` the trained model.")  # fmt: skip
    if settings.runtime.checkpoint_images is not None:
        raise UserError(f"runtime.checkpoint_images={settings.runtime.checkpoint_images}: training counts steps. Set "
                        "runtime.checkpoint_images=null; `train` has train.checkpoint_every.")  # fmt: skip
    for name in ("per_class", "confusion_picture", "submission"):
        value = getattr(settings.evaluate, name) if isinstance(settings, TrainConfig) else False
        if value not in (False, "none"):
            raise UserError(f"evaluate.{name}={value}: a validation writes scores alone. Leave it out, and `evaluate` "
                            "the trained model.")  # fmt: skip
    if isinstance(settings, TrainConfig):
        check_transforms(settings)
    else:
        check_range("train", settings.train, "scale_low", "scale_high")
        check_range("train", settings.train, "sigma_low", "sigma_high")
        check_range("train.broad", settings.train.broad, "grain_min_px", "grain_max_px")


def found_folder(settings: TrainConfig | TrainGenerativeConfig | PretrainConfig, *, make: bool = True) -> RunFolder:
    """The run's folder, made if need be unless make=False. UserError: it is another run's."""
    return RunFolder.open(
        settings.logging.root,
        settings.experiment.name,
        run_id=settings.experiment.id,
        settings=without(asdict(settings), FREE),
        make=make,
    )


@contextmanager
def open_folder(settings: TrainGenerativeConfig, *, checkpoint: str) -> Iterator[RunFolder]:
    """The run's folder, locked, and cleared of what an earlier start left unless its `checkpoint` is there.

    UserError: it is another run's, or another process's.
    """
    folder = found_folder(settings)
    with folder.locked():
        goes_on = not settings.experiment.restart and (folder.path / checkpoint).is_file()
        folder.start_over(asdict(settings), keep=goes_on)
        yield folder
