"""Tiny runs of pretraining: settings, and an image folder of three classes."""

import sys
from pathlib import Path
from typing import Any

from quick_settings import quick_settings
from training_runs import TINY_SEGFORMER

from segadapt.config_pretraining import PretrainConfig

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from image_folder import write

THREE = ("leaves", "sky", "vehicle")
TINY = ("data.workers=0", "runtime=cpu", "model/discriminative=toytown_scratch", TINY_SEGFORMER,
        "train.batch_size=4", "train.iters=6", "train.schedule.warmup_iters=0", "train.validate_every=3")  # fmt: skip
SMALL_IMAGES = ("train.transforms.image_px=32", "train.transforms.validation_short_side_px=32")


def pretraining(root: Path | str, *overrides: str) -> PretrainConfig:
    """Of {root}/images, which `three_classes` writes."""
    given = (*TINY, f"data.data_root={root}/images", f"logging.root={root}", *overrides)
    return quick_settings("pretrain", list(given), PretrainConfig)


def three_classes(root: Path) -> Path:
    return write(root / "images", train=4, val=2, side_px=40, classes=THREE)


def tiny(root: Path, *overrides: str) -> Any:
    """With its images."""
    three_classes(root)
    return pretraining(root, *SMALL_IMAGES, *overrides)
