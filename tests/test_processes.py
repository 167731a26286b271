"""Across processes, on the bundled models: reset equals a fresh process, and the same seed gives the same bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
DEMO = ("data.limit=3", "runtime.threads=1", "data.workers=1")


def adapt(folder: Path, *overrides: str, hash_seed: str) -> Path:
    """Run `segadapt adapt experiment=toytown_c` in a process of its own; returns its run folder."""
    command = [sys.executable, "-m", "segadapt", "adapt", "experiment=toytown_c", "runtime=cpu", *DEMO, *overrides]
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    done = subprocess.run([*command, f"logging.root={folder}"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = (folder / "toytown-c").iterdir()
    return run


def records(run: Path, task: str) -> list[dict]:
    return [line for line in map(json.loads, (run / "records.jsonl").read_text().splitlines()) if line["task"] == task]


def test_a_task_after_a_reset_equals_the_task_alone_in_a_fresh_process(tmp_path):
    after = adapt(tmp_path / "after", "data.corruptions=[gaussian_noise,snow]", hash_seed="1")
    alone = adapt(tmp_path / "alone", "data.corruptions=[snow]", hash_seed="2")
    assert len(records(alone, "snow/5")) == 3
    assert records(after, "snow/5") == records(alone, "snow/5")
    continual = adapt(
        tmp_path / "continual", "data.corruptions=[gaussian_noise,snow]", "tta.continual=true", hash_seed="1"
    )
    assert records(continual, "snow/5") != records(alone, "snow/5")


def test_two_processes_write_the_same_bytes(tmp_path):
    one, two = (adapt(tmp_path / seed, "data.corruptions=[fog]", hash_seed=seed) for seed in ("3", "4"))
    assert (one / "records.jsonl").read_bytes() == (two / "records.jsonl").read_bytes()
    matrices = [json.loads((run / "tasks" / "00_fog-5.json").read_text())["confusion_matrix"] for run in (one, two)]
    assert matrices[0] == matrices[1]
    assert one.name == two.name
