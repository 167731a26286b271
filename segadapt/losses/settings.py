"""Before training: settings of the losses that contradict each other, and the class weights that they ask for.

N images   C classes
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.utils.import_utils import is_scipy_available

from segadapt import stream
from segadapt.config_training import ClassWeightsSettings, ContrastSettings, LossesSettings, MasksSettings
from segadapt.datasets import Dataset, Task
from segadapt.errors import UserError, did_you_mean
from segadapt.losses.objective import LOSSES
from segadapt.training.class_weights import class_weights

HERE = "train.losses"
WEIGHTED = ("cross_entropy", "auxiliary", "stages", "ohem", "focal")  # they read class weights
REDUCED = ("cross_entropy", "auxiliary", "stages", "focal")  # they follow `reduction`


class ClassWeights(NamedTuple):
    """What class_weights_of found."""

    weights_C: Tensor | None  # float32; None: all classes alike
    pixels_C: np.ndarray | None  # int64, labelled pixels of each class; None: they were not asked for

    def shown(self, classes: Sequence[str]) -> dict[str, dict[str, float]]:
        """For a record: of each class what was found, by name."""
        found = {"weight": self.weights_C, "pixels": self.pixels_C}
        return {
            name: dict(zip(classes, values.tolist(), strict=True))
            for name, values in found.items()
            if values is not None
        }

    @staticmethod
    def read(found: Mapping[str, Mapping[str, float]]) -> "ClassWeights":
        """What `shown` gave."""
        weights, pixels = (list(found[name].values()) if name in found else None for name in ("weight", "pixels"))
        return ClassWeights(
            None if weights is None else torch.tensor(weights),
            None if pixels is None else np.array(pixels, np.int64),
        )


def losses_on(losses: LossesSettings) -> list[str]:
    """Names of the losses with a weight."""
    return [name for name in (*LOSSES, "auxiliary", "stages", "masks", "contrast") if getattr(losses, name).weight]


def reduction_of(losses: LossesSettings) -> str:
    """`reduction`, or "none" where no loss that is on reads it."""
    return losses.reduction if set(REDUCED) & set(losses_on(losses)) else "none"


def check_losses(losses: LossesSettings, *, iters: int) -> None:
    """UserError: a setting that nothing would read, a term that would never count, or two that contradict.

    Args:
        iters: optimizer steps of the training.
    """
    on = losses_on(losses)
    if not on:
        raise UserError(f"{HERE}: every weight is 0, so nothing would be learned. Set {HERE}.cross_entropy.weight=1.")
    recipe = losses.class_weights.recipe
    for setting, plain, readers in (("class_weights.recipe", "none", WEIGHTED), ("reduction", "valid", REDUCED)):
        value = recipe if plain == "none" else losses.reduction
        if value != plain and not set(readers) & set(on):
            raise UserError(f"{HERE}.{setting}={value}, but of {', '.join(readers)} none is on: it would have no "
                            f"effect. Set it to {plain}, or one of their weights above 0.")  # fmt: skip
    if losses.reduction == "all" and recipe != "none":
        raise UserError(f"{HERE}.reduction=all with {HERE}.class_weights.recipe={recipe}: a sum over all pixels has no "
                        "weighted mean. Set reduction=valid, or recipe=none.")  # fmt: skip
    _check_class_weights(losses.class_weights)
    _check_masks(losses.masks)
    _check_contrast(losses.contrast, iters=iters)


def _check_class_weights(own: ClassWeightsSettings) -> None:
    here = f"{HERE}.class_weights"
    if bool(own.values) != (own.recipe == "list"):
        raise UserError(f"{here}.values={own.values} with {here}.recipe={own.recipe}: expected values with recipe=list "
                        "and with no other. Set both.")  # fmt: skip
    if any(not math.isfinite(value) or value < 0 for value in own.values) or (own.values and not any(own.values)):
        raise UserError(f"{here}.values={own.values}: expected finite numbers of at least 0, and one above 0. Correct "
                        "them.")  # fmt: skip
    if own.cap is not None and own.recipe != "max_over_count":
        raise UserError(f"{here}.cap={own.cap} with {here}.recipe={own.recipe}: it would have no effect. Set cap=null, "
                        "or recipe=max_over_count.")  # fmt: skip
    if own.absent and own.recipe in ("none", "list"):
        raise UserError(f"{here}.absent={own.absent} with {here}.recipe={own.recipe}: no labels are counted, so it "
                        "would have no effect. Set absent=[].")  # fmt: skip


def _check_masks(own: MasksSettings) -> None:
    here = f"{HERE}.masks"
    if not own.weight:
        return
    if not (own.class_weight or own.mask_weight or own.dice_weight):
        raise UserError(f"{here}.weight={own.weight} with class_weight, mask_weight and dice_weight all 0: nothing "
                        "would be learned. Set one above 0; published are 2, 5 and 5.")  # fmt: skip
    if not is_scipy_available():
        raise UserError(f"{here}.weight={own.weight} needs scipy, which matches queries with masks, and it is not "
                        "installed. Run pip install 'segadapt[mask2former]', or set it to 0.")  # fmt: skip


def _check_contrast(own: ContrastSettings, *, iters: int) -> None:
    here, m = f"{HERE}.contrast", own.memory
    if not own.weight:
        if m.enabled:
            raise UserError(f"{here}.memory.enabled=true with {here}.weight=0: nothing would read the memory. Set "
                            "weight above 0, or enabled=false.")  # fmt: skip
        return
    if own.warmup_iters >= iters:
        raise UserError(f"{here}.warmup_iters={own.warmup_iters} with train.iters={iters}: the weight of the contrast "
                        f"loss would stay 0. Set warmup_iters to an eighth of train.iters, {iters // 8}.")  # fmt: skip
    if own.fill == "repeat" and (own.min_views is None or own.min_views >= own.max_views):
        raise UserError(f"{here}.fill=repeat with {here}.min_views={own.min_views} and max_views={own.max_views}: only "
                        "classes with enough pixels take part, so nothing would be repeated. Set min_views below "
                        "max_views, or fill=shrink.")  # fmt: skip
    rows = min(m.region_rows, m.pixel_rows)
    if m.enabled and m.min_filled > rows:
        raise UserError(f"{here}.memory.min_filled={m.min_filled}, but a class has at most {rows} rows of one "
                        f"kind, which would never be read. Set it to {rows} or less.")  # fmt: skip


def class_weights_of(losses: LossesSettings, dataset: Dataset, keys: Sequence[str], *, workers: int) -> ClassWeights:
    """The class weights that the settings ask for; a recipe reads all these labels once.

    Args:
        keys: of the training images, of the clean task.
        workers: processes that read ahead; the result does not depend on it.
    Raises:
        UserError: a list of another length than the classes; a class that no label shows and that `absent` does not
            name, or the other way round; a label that cannot be read.
    """
    own, here, classes = losses.class_weights, f"{HERE}.class_weights", dataset.classes
    if own.recipe == "none":
        return ClassWeights(None, None)
    if own.recipe == "list":
        if len(own.values) != len(classes):
            raise UserError(f"{here}.values has {len(own.values)} numbers, but the data set has {len(classes)} classes "
                            f"({', '.join(classes[:3])}, ...). Give each class one, in label order.")  # fmt: skip
        return ClassWeights(torch.tensor(own.values), None)
    pixels_NC = np.stack(list(stream.ahead(partial(_pixels_of, dataset), keys, workers=workers)))
    pixels_C = pixels_NC.sum(axis=0)
    if unknown := [name for name in own.absent if name not in classes]:
        raise UserError(f"{here}.absent: {unknown[0]} is not a class.{did_you_mean(unknown[0], classes)}")
    if missing := [name for name, count in zip(classes, pixels_C, strict=True) if not count and name not in own.absent]:
        raise UserError(f"{here}.recipe={own.recipe}: no label of {len(keys)} training images shows {missing}; "
                        "expected pixels of each class, to weigh it. Name them in "
                        f"{here}.absent, or set recipe=none.")  # fmt: skip
    if shown := [name for name in own.absent if pixels_C[classes.index(name)]]:
        raise UserError(f"{here}.absent={own.absent}: the training labels show {shown[0]} at "
                        f"{pixels_C[classes.index(shown[0])]} pixels. Take it out of the list.")  # fmt: skip
    weights_C = np.nan_to_num(class_weights(own.recipe, pixels_NC, cap=own.cap))  # of absent ones 0, which none reads
    return ClassWeights(torch.from_numpy(weights_C).float(), pixels_C)


def _pixels_of(dataset: Dataset, key: str) -> np.ndarray:
    label_HW = dataset.load(Task(0), key).label_HW
    assert label_HW is not None, "training needs labels; the verbs check it first"
    return np.bincount(label_HW.ravel(), minlength=256)[: len(dataset.classes)]
