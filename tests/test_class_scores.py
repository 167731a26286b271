"""What `evaluate` writes beside the means: scores class by class, the matrix, and files for a benchmark's server.

C classes   n pixels
"""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import save
from matplotlib.axes import Axes
from PIL import Image
from quick_settings import quick_settings
from rich.console import Console
from torchmetrics.classification import (
    MulticlassF1Score,
    MulticlassJaccardIndex,
    MulticlassPrecision,
    MulticlassRecall,
)

from segadapt import adapt, class_scores, submission
from segadapt.config import EvaluateConfig
from segadapt.datasets.labels import CITYSCAPES, id_table, map_ids
from segadapt.datasets.toytown import CLASSES
from segadapt.errors import UserError

SMALL = ("model/discriminative=toytown", "runtime=cpu", "data.workers=0", "data.short_side_px=64", "data.limit=2")


def settings_of(*overrides: str) -> EvaluateConfig:
    return quick_settings("evaluate", [*SMALL, *overrides], EvaluateConfig)


def run(settings: EvaluateConfig) -> tuple[Path, str]:
    """The run's folder, and what it said."""
    said = io.StringIO()
    results = adapt.run(settings, console=Console(file=said, width=200))
    return Path(results["folder"]), said.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[EvaluateConfig, Path, str]:
    settings = settings_of(
        "data=toytown", f"logging.root={tmp_path_factory.mktemp('run')}", "logging.predictions=all",
        "evaluate.per_class=true", "evaluate.confusion_picture=true", "evaluate.submission=ids",
    )  # fmt: skip
    return settings, *run(settings)


def lines_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_scores_of_each_class_are_those_of_torchmetrics():
    """Class 4 is in labels and never predicted, 5 only predicted, 6 neither."""
    rng = np.random.default_rng(0)
    label_n, predicted_n = rng.integers(0, 5, 5000), rng.choice([0, 1, 2, 3, 5], 5000)
    counts_CC = np.zeros((7, 7), np.int64)
    np.add.at(counts_CC, (label_n, predicted_n), 1)
    rows = class_scores.rows(counts_CC, tuple("abcdefg"))
    kinds = (MulticlassJaccardIndex, MulticlassRecall, MulticlassF1Score, MulticlassPrecision, MulticlassRecall)
    undefined = ({6}, {5, 6}, {6}, {4, 6}, {5, 6})  # where torchmetrics says 0
    for column, (kind, without) in enumerate(zip(kinds, undefined, strict=True), start=1):
        expected_C = kind(7, average=None)(torch.from_numpy(predicted_n), torch.from_numpy(label_n))
        for c, row in enumerate(rows):
            value = float("nan") if c in without else expected_C[c].item()
            assert row[column] == pytest.approx(value, abs=1e-7, nan_ok=True), (kind, c)
    assert [row[6] for row in rows] == np.bincount(label_n, minlength=7).tolist()
    assert [row[7] for row in rows] == np.bincount(predicted_n, minlength=7).tolist()


def test_the_files_of_a_task_hold_its_matrix_and_its_scores(finished):
    _, folder, _ = finished
    task = json.loads((folder / "tasks" / "00_clean.json").read_text())
    counts_CC = np.array(task["confusion_matrix"])
    matrix = lines_of(folder / "tasks" / "00_clean.confusion.csv")
    assert [line.pop("label \\ prediction") for line in matrix] == list(CLASSES)
    assert [[int(line[name]) for name in CLASSES] for line in matrix] == counts_CC.tolist()
    lines = lines_of(folder / "tasks" / "00_clean.classes.csv")
    assert [line["class"] for line in lines] == list(CLASSES)
    for line in lines:
        expected = task["per_class"][line["class"]]
        assert line["IoU"] == ("" if expected is None else str(expected))
    defined = [float(line["Dice"]) for line in lines if line["Dice"]]
    assert np.mean(defined) == pytest.approx(task["mf1"])


def test_the_picture_shows_shares_of_each_label(finished, monkeypatch):
    _, folder, _ = finished
    with Image.open(folder / "tasks" / "00_clean.confusion.png") as image:
        assert min(image.size) >= 400
    shown = []
    real = Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda self, values, **more: shown.append(values) or real(self, values, **more))
    class_scores.picture(np.array([[3, 1], [0, 0]]), ("a", "b"))
    assert np.array_equal(shown[0], [[0.75, 0.25], [np.nan, np.nan]], equal_nan=True)


def test_the_table_is_printed_also_for_a_run_that_is_finished(finished):
    settings, folder, said = finished
    again, said_again = run(settings)
    assert again == folder
    assert "is finished" in said_again
    (line,) = [line for line in lines_of(folder / "tasks" / "00_clean.classes.csv") if line["class"] == "road"]
    for text in (said, said_again):
        (row,) = [row for row in text.splitlines() if "│ road" in row]
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        assert cells[1:3] == [f"{100 * float(line['IoU']):.2f}", f"{100 * float(line['Acc']):.2f}"]
        assert cells[6] == line["label px"]


# --- submissions ---


def test_a_submission_holds_the_predictions_as_grey_ids_at_the_images_size(finished):
    _, folder, _ = finished
    paths = sorted((folder / "submission" / "00_clean").iterdir())
    assert len(paths) == 2
    for path in paths:
        with Image.open(path) as image, Image.open(folder / "predictions" / "00_clean" / path.name) as prediction:
            assert (image.mode, sorted(image.size)) == ("L", [240, 320])
            assert np.array_equal(np.asarray(image), np.asarray(prediction))


def test_images_without_labels_are_submitted_and_not_scored(tmp_path):
    """Read back by the id map of ADE20K, the files hold the predictions."""
    rng = np.random.default_rng(0)
    for key, size in {"ADE_test_00000001": (70, 90), "ADE_test_00000002": (90, 70)}.items():
        save(tmp_path / "data" / "images" / f"{key}.png", rng.integers(0, 256, (*size, 3), np.uint8))
    common = ("data=folder", f"data.data_root={tmp_path / 'data'}", "data.classes=toytown",
              "evaluate.submission=ids_plus_one")  # fmt: skip
    folder, said = run(settings_of(*common, f"logging.root={tmp_path / 'alone'}"))
    assert "predictions only" in said
    assert not list((folder / "tasks").glob("*.csv"))
    both, _ = run(settings_of(*common, f"logging.root={tmp_path / 'both'}", "logging.predictions=all"))
    table_256 = id_table("zero_is_ignore", len(CLASSES))
    paths = sorted((folder / "submission" / "00_clean").iterdir())
    assert [path.name for path in paths] == ["ADE_test_00000001.png", "ADE_test_00000002.png"]
    for path, size in zip(paths, ((70, 90), (90, 70)), strict=True):
        ids_HW = np.asarray(Image.open(path))
        assert ids_HW.shape == size
        predicted_HW = np.asarray(Image.open(both / "predictions" / "00_clean" / path.name))
        assert np.array_equal(map_ids(ids_HW, table_256, path=path), predicted_HW)


def test_cityscapes_classes_become_its_label_ids(tmp_path):
    settings = settings_of("data=toytown", "evaluate.submission=cityscapes")
    file_ids_C = submission.file_ids(settings, len(CITYSCAPES))
    assert file_ids_C is not None
    classes_HW = np.arange(19, dtype=np.uint8)[:, None].repeat(3, 1)
    submission.write(tmp_path / "a.png", classes_HW, file_ids_C)
    ids_HW = np.asarray(Image.open(tmp_path / "a.png"))
    assert ids_HW[[0, 13, 18], 0].tolist() == [7, 26, 33]  # road, car, bicycle
    assert np.array_equal(map_ids(ids_HW, id_table("cityscapes_label_ids", 19), path=tmp_path), classes_HW)


def test_a_submission_to_cityscapes_of_other_classes_is_refused_before_work(tmp_path):
    settings = settings_of("data=toytown", "evaluate.submission=cityscapes", f"logging.root={tmp_path}")
    with pytest.raises(UserError, match=r"evaluate\.submission=cityscapes is for the 19 classes .* has 12"):
        adapt.run(settings)
    assert list(tmp_path.iterdir()) == []
