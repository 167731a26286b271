"""Trainings on parts of the images: a sweep with a folder for each, and their table and plot."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from image_files import save
from training_runs import TINY_SEGFORMER

from segadapt import subsets
from segadapt.config_verbs import ResultsConfig
from segadapt.errors import UserError
from segadapt.parse import from_overrides
from segadapt.results import run, run_folders


def write(root: Path, name: str, *, x: int, seed: int, last: float | None, best: float, lr: float = 0.1) -> Path:
    """A run folder as train leaves it."""
    folder = root / name
    folder.mkdir(parents=True)
    settings = {"experiment": {"seed": seed}, "data": {"name": "own", "split": "train", "subset": x, "data_root": name},
                "train": {"optimizer": {"lr": lr}, "losses": {"lovasz": {"weight": 0}}}}  # fmt: skip
    results = {"last": {"miou": last}, "best": {"miou": best}, "training": {"images": 40 // x},
               "validated_on": {"split": "val", "images": 9}}  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture
def runs(tmp_path) -> Path:
    root = tmp_path / "runs"
    write(root, "a", x=2, seed=0, last=0.5, best=0.6)
    write(root, "b", x=1, seed=0, last=0.7, best=0.7)
    write(root, "c", x=1, seed=1, last=0.8, best=0.9)
    write(root, "d", x=4, seed=0, last=None, best=0.25)
    return root


def built(root: Path) -> list[subsets.Curve]:
    return subsets.build(run_folders([str(root)], trained=True))


def tables(root: Path, *overrides: str) -> str:
    file = root.parent / "out"
    run(from_overrides("results", [f"runs=[{root}]", "table=subsets", f"output={file}", *overrides], ResultsConfig))
    return file.read_text()


def test_a_row_a_subset_with_last_and_best(runs):
    (curve,) = built(runs)
    assert [(point.x, point.images) for point in curve.points] == [(1, 40), (2, 20), (4, 10)]
    assert curve.points[0].best == {0: 0.7, 1: 0.9}
    assert curve.data == "own train, scored on 9 images of val"
    (title, header, *rows) = [line for line in tables(runs).splitlines() if line and not line.startswith("| ---")]
    assert title == curve.data
    assert rows[0].split("|")[1:-1] == [" 1 ", " 40 ", " 2 ", " 75.00 ± 7.07 ", " 80.00 ± 14.14 "]
    assert "50.00" in rows[1]
    assert "chosen on the images that it is a score of" in rows[-1]
    assert "mIoU of the last step" in header


def test_other_settings_are_another_curve_named_by_them(runs):
    write(runs, "e", x=1, seed=0, last=0.1, best=0.1, lr=0.3)
    assert [title.partition("; ")[2] for title in subsets.titles(built(runs))] == [
        "train.optimizer.lr=0.1", "train.optimizer.lr=0.3"
    ]  # fmt: skip


def test_every_format_has_the_same_numbers(runs):
    assert json.loads(tables(runs, "format=json"))[0]["points"][1]["last"] == {"0": 0.5}
    _, *rows = csv.reader(tables(runs, "format=csv").splitlines())
    assert [row[1:4] for row in rows] == [["1", "40", "2"], ["2", "20", "1"], ["4", "10", "1"]]
    assert r"75.00 $\pm$ 7.07" in tables(runs, "format=latex")


@pytest.mark.parametrize(("kind", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_the_plot_is_written_beside_the_table_and_always_the_same(runs, tmp_path, kind, start):
    found = []
    for name in ("one", "two"):
        tables(runs, f"plot={tmp_path / name}.{kind}")
        found.append((tmp_path / f"{name}.{kind}").read_bytes())
    assert found[0].startswith(start)
    assert found[0] == found[1]


@pytest.mark.parametrize("given", [["plot=curve.pdf"], ["table=ranked", "plot=curve.svg"]])
def test_a_plot_that_would_not_be_made_is_refused(runs, given):
    with pytest.raises(UserError, match=r"^plot=curve\.\w+ with table=\w+: expected a file \.svg or \.png with table="):
        tables(runs, *given)


def test_the_same_run_twice_and_other_images_are_refused(runs):
    again = write(runs, "again", x=2, seed=0, last=0.5, best=0.6)
    with pytest.raises(
        UserError, match=r"data\.subset=2 with experiment\.seed=0 is there twice under the same settings"
    ):
        built(runs)
    settings = json.loads((again / "settings.json").read_text())
    settings["experiment"]["seed"] = 7
    (again / "settings.json").write_text(json.dumps(settings))
    results = json.loads((again / "results.json").read_text())
    (again / "results.json").write_text(json.dumps(results | {"training": {"images": 21}}))
    with pytest.raises(UserError, match=r"20 training images at data\.subset=2, another run has 21|21 training images"):
        built(runs)


def test_without_a_finished_training_there_is_no_table(runs, capsys):
    for name in ("a", "c", "d"):
        (runs / name / "results.json").unlink()
    assert len(built(runs)) == 1
    assert "left out, not finished: 3 runs (a, c, d)" in capsys.readouterr().err
    (runs / "b" / "results.json").unlink()
    with pytest.raises(UserError, match=r"^runs: none of `train` has finished"):
        built(runs)


def test_runs_of_other_verbs_are_no_points(tmp_path):
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "settings.json").write_text('{"method": "tent"}')
    with pytest.raises(UserError, match=r"a run of another verb; expected one of train\."):
        built(tmp_path / "runs")


@pytest.mark.parametrize(
    ("given", "said"),
    [("plot=curve.svg", r"plot=curve\.svg with table=\w+: .* Set table=subsets"),
     ("table=subsets plot=curve.pdf", r"plot=curve\.pdf with table=subsets: .* Correct the name")],
)  # fmt: skip
def test_a_plot_needs_its_table_and_a_kind_of_picture(given, said):
    with pytest.raises(UserError, match=said):
        run(from_overrides("results", ["runs=[x]", *given.split()], ResultsConfig))


def test_a_sweep_over_subsets_leaves_a_folder_each_and_one_curve(segadapt, tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for index in range(count):
            save(tmp_path / f"own/{split}/image/{index}.png", rng.integers(0, 256, (48, 48, 3), np.uint8))
            save(tmp_path / f"own/{split}/label/{index}.png", rng.integers(0, 2, (48, 48)).astype(np.uint8))
    (tmp_path / "classes.txt").write_text("one\ntwo\n")
    status, _, said = segadapt(
        "train", "--multirun", "data=own_folder", "data.data_root=own", "data.classes=classes.txt", "data.split=train",
        "data.id_map=as_is", "data.short_side_px=48", "data.workers=0", "runtime=cpu", "train.validation_split=val",
        TINY_SEGFORMER, "train.batch_size=2", "train.iters=1", "train.schedule.warmup_iters=0", "data.count=null",
        "train.transforms.crop_px=48", "data.subset=1,2,4",
    )  # fmt: skip
    assert status == 0, said
    (curve,) = built(Path("outputs/train"))
    assert [(point.x, point.images) for point in curve.points] == [(1, 4), (2, 2), (4, 1)]
    assert len(list(Path("outputs/train").iterdir())) == 3
