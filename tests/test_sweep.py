"""Many commands over several GPUs: each once, again if changed, stopped by a failure."""

import json
import time
from pathlib import Path

import pytest
import torch

from segadapt.engines import visible_gpus

SEGADAPT_STUB = """import json, os, pathlib, sys, time
given = dict(part.split("=", 1) for part in sys.argv[2:])
with open("begun.txt", "a") as file:
    file.write(given["experiment.id"] + "\\n")
time.sleep(float(given.get("seconds", 0)))
if "fail" in given:
    sys.exit("the cause is " + given["fail"])
folder = pathlib.Path(given["logging.root"], given["experiment.name"], given["experiment.id"])
folder.mkdir(parents=True, exist_ok=True)
(folder / "results.json").write_text(json.dumps([os.environ["CUDA_VISIBLE_DEVICES"], sys.argv[1:]]))
"""


@pytest.fixture
def sweep(script, tmp_path, monkeypatch):
    """sweep(lines, ...): run jobs of a package that stands in for segadapt, on two GPUs by name."""
    module = script("sweep")
    (tmp_path / "segadapt").mkdir()
    (tmp_path / "segadapt/__init__.py").touch()  # a package without would stand behind one on PYTHONPATH
    (tmp_path / "segadapt/__main__.py").write_text(SEGADAPT_STUB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "visible_gpus", lambda: ["3", "5"])

    def run(*jobs: str, jobs_per_gpu: int = 1, seconds_limit: float = 60, keep_going: bool = False) -> bool:
        lines = [f"adapt logging.root=out experiment.name=a experiment.id={job}" for job in jobs]
        how = {"jobs_per_gpu": jobs_per_gpu, "seconds_limit": seconds_limit, "keep_going": keep_going}
        return module.run(lines, Path("logs"), common="x=1", **how)

    return run


def begun() -> list[str]:
    return sorted(Path("begun.txt").read_text().split())


def test_sweep_runs_every_job_once_on_one_gpu_each(sweep):
    assert sweep("j0 seconds=0.3", "j1 seconds=0.3", "j2 y='a b'")
    stored = [json.loads(Path(f"out/a/j{job}/results.json").read_text()) for job in range(3)]
    assert {gpu for gpu, _ in stored} == {"3", "5"}
    assert stored[2][1][-2:] == ["y=a b", "x=1"]
    assert sweep("j0 seconds=0.3", "j1 seconds=0.3", "j2 y='a b'")
    assert begun() == ["j0", "j1", "j2"]


def test_sweep_runs_again_what_has_changed_or_not_finished(sweep):
    assert sweep("j0", "j1", "j2")
    Path("out/a/j1/results.json").unlink()
    assert sweep("j0", "j1", "j2 y=2")
    assert begun() == ["j0", "j1", "j1", "j2", "j2"]


def test_sweep_takes_no_results_for_those_of_a_line_that_failed(sweep):
    assert sweep("j0")
    assert not sweep("j0 fail=rain")
    assert Path("out/a/j0/results.json").is_file()
    assert not sweep("j0 fail=rain")


def test_sweep_stops_after_a_failure_and_shows_its_cause(sweep, capsys):
    assert not sweep("j0 fail=rain", "j1 seconds=0.5", "j2", "j3")
    assert "the cause is rain" in capsys.readouterr().out
    assert begun() == ["j0", "j1"]
    assert Path("out/a/j1/results.json").is_file()
    assert not sweep("j0 fail=rain", "j1 seconds=0.5")
    assert begun() == ["j0", "j0", "j1"]


def test_sweep_that_keeps_going_runs_all_and_fails(sweep):
    assert not sweep("j0 fail=rain", "j1", "j2", "j3", keep_going=True)
    assert begun() == ["j0", "j1", "j2", "j3"]


def test_sweep_ends_its_jobs_at_the_limit(sweep, capsys):
    start = time.monotonic()
    assert not sweep("j0 seconds=30", "j1", "j2 seconds=30", seconds_limit=0.8)
    assert time.monotonic() - start < 10
    assert "2 jobs ended, 0 not begun" in capsys.readouterr().out
    assert not Path("out/a/j0").exists()


@pytest.mark.parametrize(("visible", "count", "expected"), [("", 0, []), (None, 2, ["0", "1"]), ("4,6", 2, ["4", "6"])])
def test_visible_gpus_keep_their_names(monkeypatch, visible, count, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert visible_gpus() == expected


# The jobs of a world
