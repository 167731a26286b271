"""What is empty or alone has a defined result: one image, one window, one class, nothing to score."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from image_files import save

from segadapt.methods import METHODS

QUICK = {
    "rotta": ("tta.options.capacity=2", "tta.options.every=2"),
    "memo": ("tta.options.augmentations=2",),
    "eata": ("tta.options.fisher_alpha=0",),
    "cotta": ("tta.options.scales=[1.0]",),
}


def results_of(root: Path) -> dict:
    [path] = (root.parent / "runs").rglob("results.json")
    return json.loads(path.read_text())


@pytest.fixture
def one_class(root, saved_models):
    """Only sky, in the data and in the models."""
    (root / "names.txt").write_text("sky")
    for path in (root / "labels").iterdir():
        save(path, np.zeros((40, 48), np.uint8))
    return saved_models(("sky",))


@pytest.mark.parametrize("method", METHODS)
def test_one_class_is_always_right(segadapt, root, overrides_of, one_class, method):
    command = overrides_of(f"tta.method={method}", *QUICK.get(method, ()), *one_class)
    status, _, stderr = segadapt("adapt", *command)
    assert status == 0, stderr
    results = results_of(root)
    assert results["mean"]["miou"] == 1
    assert results["tasks"][0]["steps_skipped"] == 0


def test_one_image(segadapt, root, overrides_of):
    for key in "bc":
        (root / f"images/{key}.png").unlink()
        (root / f"labels/{key}.png").unlink()
    assert segadapt("adapt", *overrides_of("data.workers=2"))[0] == 0
    assert results_of(root)["tasks"][0]["images"] == 1


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 200), (200, 3), (7, 9)])
def test_an_image_smaller_than_a_window_is_enlarged_to_one(segadapt, root, overrides_of, height, width):
    save(root / "images/b.png", np.zeros((height, width, 3), np.uint8))
    save(root / "labels/b.png", np.zeros((height, width), np.uint8))
    status, stdout, stderr = segadapt("adapt", *overrides_of("logging.predictions=all"))
    assert (status, stderr) == (0, ""), stdout
    assert results_of(root)["tasks"][0]["images"] == 3


def test_labels_that_ignore_everything_give_no_score_and_not_zero(segadapt, root, overrides_of):
    for path in (root / "labels").iterdir():
        save(path, np.full((40, 48), 255, np.uint8))
    status, stdout, _ = segadapt("adapt", *overrides_of())
    assert status == 0
    results = results_of(root)
    assert (results["mean"]["miou"], results["tasks"][0]["miou"]) == (None, None)
    assert set(results["tasks"][0]["per_class"].values()) == {None}
    table = [line for line in stdout.splitlines() if "clean" in line and "3" in line]
    assert any(" - " in line for line in table)


def test_a_constant_image_moves_nothing_to_where_it_cannot_return(segadapt, root, overrides_of):
    """No variance, as a lens cap has: normalisation divides by it."""
    for path in (root / "images").iterdir():
        save(path, np.zeros((40, 48, 3), np.uint8))
    assert segadapt("adapt", *overrides_of())[0] == 0
    [path] = (root.parent / "runs").rglob("records.jsonl")
    losses = [json.loads(line)["loss"] for line in path.read_text().splitlines()]
    assert all(loss is not None and math.isfinite(loss) for loss in losses)
