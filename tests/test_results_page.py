"""docs/results.md against real runs: every file and column is on the page, and the page has no other."""

import json
import re
from pathlib import Path

import pytest
from documents import ROOT
from quick_settings import quick_settings

from segadapt.adapt import run
from segadapt.config import EvaluateConfig
from segadapt.datasets.toytown import CLASSES

PAGE = (ROOT / "docs" / "results.md").read_text()
GONE = {"checkpoints/", "mirrored.json"}  # of a run that has not finished, or has a copy


def rows(heading: str) -> set[str]:
    """What the first column of a section's table names."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    firsts = re.findall(r"^\| ([^|]+) \|", section, re.MULTILINE)
    return {name for first in firsts for name in re.findall(r"`([^`]+)`", first)}


@pytest.fixture(scope="module")
def folders(compose_settings, saved_models, tmp_path_factory) -> list[Path]:
    """Runs that leave all there is: a teacher with every kind of record, the source alone, and a scored segmenter."""
    models = saved_models(CLASSES)
    small = ("data.corruptions=[fog]", "data.limit=1", "data.workers=0", "logging.predictions=all")
    everything = ("model.generative.draws=2", "model.generative.windows=entropy", "tta.diagnose_every=1",
                  "tta.save_adapted=true")  # fmt: skip
    root = tmp_path_factory.mktemp("runs")
    runs = [(*small, *everything), (*small, "tta.forward_mode=discriminative_only")]
    settings = [compose_settings(*models, f"logging.root={root}", *each) for each in runs]
    evaluated = (
        "data=toytown_c",
        "runtime=cpu",
        "evaluate.submission=ids",
        "evaluate.confusion_picture=true",
        models[0],
    )
    settings.append(quick_settings("evaluate", [*small, *evaluated, f"logging.root={root}"], EvaluateConfig))
    return [Path(run(each)["folder"]) for each in settings]


def test_every_file_is_on_the_page(folders):
    found = set()
    for folder in folders:
        for path in folder.rglob("*"):
            parts = path.relative_to(folder).parts
            if path.is_file():
                task = ["TASK".join(part.split("00_fog-5")) for part in parts]
                name = "/".join(task) if task[0] != "adapted" else "adapted/TASK/"
                found.add(re.sub(r"(predictions|samples|submission)/TASK/[^/.]+", r"\1/TASK/KEY", name))
    assert sorted(found) == sorted(rows("Files") - GONE)


@pytest.mark.parametrize("name", ["records", "timings"])
def test_every_column_of_a_line_is_on_the_page(folders, name):
    lines = [json.loads(line) for folder in folders for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    assert sorted(set().union(*lines)) == sorted(rows(rf"`{name}\.jsonl`"))


def test_every_column_of_the_results_is_on_the_page(folders):
    found = set()
    for folder in folders:
        results = json.loads((folder / "results.json").read_text())
        found |= set(results) | {f"tasks.{name}" for task in results["tasks"] for name in task}
        of_task = json.loads((folder / "tasks" / "00_fog-5.json").read_text())
        assert set(of_task) - set(results["tasks"][0]) == {"confusion_matrix"}
    assert sorted(found) == sorted(rows(r"`results\.json`"))
