"""Scores class by class, and the confusion matrix, of a task of `evaluate`: files to open elsewhere, and a table.

C dataset classes
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from segadapt.metrics import scores
from segadapt.record import write_bytes
from segadapt.tables import comma_separated
from segadapt.terminal import results_table
from segadapt.untrusted import read_json

COLUMNS = ("class", "IoU", "Acc", "Dice", "precision", "recall", "label px", "predicted px")
INCHES = 0.22  # of the picture, a class


def rows(counts_CC: np.ndarray, classes: Sequence[str]) -> list[list[Any]]:
    """A line a class, in their order: fractions, NaN where not defined, and counts; see COLUMNS."""
    found = scores(counts_CC)
    values = (found.iou_C, found.acc_C, found.f1_C, found.precision_C, found.acc_C)
    pixels = (counts_CC.sum(axis=1), counts_CC.sum(axis=0))
    return [list(row) for row in zip(classes, *(column.tolist() for column in (*values, *pixels)), strict=True)]


def write(folder: Path, slug: str, counts_CC: np.ndarray, classes: Sequence[str], *, has_picture: bool) -> None:
    """SLUG.classes.csv, SLUG.confusion.csv (rows: labels, columns: predictions, px), and SLUG.confusion.png if asked.

    Args:
        counts_CC: int64 [C label, C prediction].
    """
    of_class = [["" if _is_nan(value) else value for value in row] for row in rows(counts_CC, classes)]
    write_bytes(folder / f"{slug}.classes.csv", comma_separated(COLUMNS, of_class).encode())
    lines = [[name, *row] for name, row in zip(classes, counts_CC.tolist(), strict=True)]
    write_bytes(folder / f"{slug}.confusion.csv", comma_separated(["label \\ prediction", *classes], lines).encode())
    if has_picture:
        write_bytes(folder / f"{slug}.confusion.png", picture(counts_CC, classes))


def tables(folder: Path) -> list[Table]:
    """Of each labelled task of a finished run, for the terminal; in percent. UserError: a file that cannot be read."""
    found = []
    for path in sorted((folder / "tasks").glob("*.json")):
        task = read_json(path, cure="Run again with experiment.restart=true.")
        if task["miou"] is not None:
            counts_CC = np.array(task["confusion_matrix"], np.int64)
            found.append(results_table(rows(counts_CC, tuple(task["per_class"])), COLUMNS, title=task["task"]))
    return found


def picture(counts_CC: np.ndarray, classes: Sequence[str]) -> bytes:
    """PNG of the matrix, each row divided by its label's px; white: no px."""
    from matplotlib.figure import Figure

    label_C1 = counts_CC.sum(axis=1, keepdims=True)
    shares_CC = np.divide(counts_CC, label_C1, out=np.full(counts_CC.shape, np.nan), where=label_C1 > 0)
    side = max(4.0, INCHES * len(classes))
    figure = Figure(figsize=(side + 1.5, side + 1), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(shares_CC, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize="x-small")
    axes.set_yticks(range(len(classes)), classes, fontsize="x-small")
    axes.set(xlabel="prediction", ylabel="label")
    figure.colorbar(shown, label="share of the label's px", shrink=0.6)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100)
    return out.getvalue()


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
