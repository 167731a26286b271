"""Across processes, on the bundled models: reset equals a fresh process, and the same seed gives the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
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


def test_an_error_ends_the_reading_processes_too(tmp_path):
    """Its traceback holds what reads ahead."""
    script = """
import time
from segadapt import stream

def slowly(item):
    time.sleep(0.01)
    return item

def read():
    ahead = stream.ahead(slowly, list(range(10000)), workers=2)
    for item in ahead:
        if item == 20:
            raise RuntimeError("a bug")

read()
"""
    (tmp_path / "script.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True,
                          timeout=60)  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.endswith("RuntimeError: a bug\n")


@pytest.mark.parametrize(
    ("signums", "status"), [([signal.SIGINT] * 2, 130), ([signal.SIGTERM], 143), ([signal.SIGKILL], -9)]
)
def test_the_writing_processes_end_with_the_first(tmp_path, signums, status):
    """SIGINT comes to all, as Ctrl-C does, and again at once; the others to the first process alone."""
    command = [sys.executable, "-m", "segadapt", "corrupt", "data=toytown_c", "data.workers=2", "data.limit=400",
               f"corrupt.output={tmp_path}"]  # fmt: skip
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    while not list(tmp_path.rglob("*.png")):
        assert process.poll() is None
        time.sleep(0.1)
    for signum in signums:
        (os.killpg if signum == signal.SIGINT else os.kill)(process.pid, signum)
        time.sleep(0.002)
    _, said = process.communicate(timeout=30)  # all that have its standard error have ended
    assert process.returncode == status
    name = signums[0].name
    lines = [f"segadapt corrupt: {name}; the same command goes on with the images that are missing"]
    assert [line for line in said.decode().splitlines() if "segadapt corrupt" in line] == lines[: status > 0]
    assert "Traceback" not in said.decode()
    written = [path.read_bytes() for path in tmp_path.rglob("*.png")]
    assert 0 < len(written) < 400 * 15
    assert all(content.endswith(b"IEND\xaeB`\x82") for content in written)


def test_two_processes_write_the_same_bytes(tmp_path):
    one, two = (adapt(tmp_path / seed, "data.corruptions=[fog]", hash_seed=seed) for seed in ("3", "4"))
    assert (one / "records.jsonl").read_bytes() == (two / "records.jsonl").read_bytes()
    matrices = [json.loads((run / "tasks" / "00_fog-5.json").read_text())["confusion_matrix"] for run in (one, two)]
    assert matrices[0] == matrices[1]
    assert one.name == two.name
