"""W&B that raises, never answers, or is killed: the run ends, its files are whole, and there is one warning."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from segadapt import wandb_mirror
from segadapt.wandb_mirror import Wandb


class Client:
    """What wandb.init returns; from its n-th call on it does as it is told."""

    def __init__(self, fault, at: int):
        self.fault, self.at, self.calls, self.summary = fault, at, 0, self

    def call(self, *_, **__):
        self.calls += 1
        if self.calls >= self.at:
            self.fault()

    define_metric = log = update = finish = call


def refuse():
    raise ConnectionError("down: https://user:hunter2@wandb.example/api")


def block_forever():
    threading.Event().wait()


@pytest.mark.parametrize("fault", [refuse, block_forever])
@pytest.mark.parametrize("at", [1, 5, 9])
def test_a_run_outlives_its_client(segadapt, root, overrides_of, monkeypatch, caplog, fault, at):
    command = ("adapt", *overrides_of("tta.method=tent", "experiment.id=one", "experiment.restart=true"))
    folder, files = root.parent / "runs/adapt/one", ("records.jsonl", "tasks/00_clean.json")
    assert segadapt(*command)[0] == 0
    expected = [without_seconds(folder / name) for name in files]
    client, noted, torn_down = Client(fault, at), root / "noted.json", []
    monkeypatch.setattr(
        wandb_mirror,
        "open_mirror",
        lambda *_, **__: Wandb(client, noted, lambda: torn_down.append(1), call_timeout_s=0.5, finish_timeout_s=0.5),
    )
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        status, _, _ = segadapt(*command)
    assert status == 0
    assert time.monotonic() - began < 20
    assert [without_seconds(folder / name) for name in files] == expected
    assert (folder / "results.json").exists()
    [warning] = [record.getMessage() for record in caplog.records if record.name == "segadapt.wandb_mirror"]
    assert "copy lost, the run goes on and its files are complete" in warning
    assert ("no answer in 0.5 s" if fault is block_forever else "ConnectionError") in warning
    assert "hunter2" not in warning
    assert client.calls == at, "it is not asked again"
    assert torn_down == [1]


def without_seconds(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if '"seconds"' not in line]


def test_a_call_that_ends_in_time_is_waited_for(tmp_path):
    done = []
    client = Client(lambda: (time.sleep(0.2), done.append(1)), at=1)
    mirror = Wandb(client, tmp_path / "noted.json", lambda: None, call_timeout_s=5)
    mirror.summary({"miou": 0.5})
    assert done == [1]


KILLING = """
import os, signal, sys
from pathlib import Path
from segadapt.__main__ import main
from segadapt.methods.tent import Tent

def children(pid):
    tasks = Path(f"/proc/{pid}/task").iterdir()
    found = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return found + [below for child in found for below in children(child)]

own = Tent.step
def step(self, image_3HW, *, task, key):
    if key == "b":
        killed = children(os.getpid())
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        Path("killed").write_text(str(len(killed)))
    return own(self, image_3HW, task=task, key=key)
Tent.step = step
sys.argv[0] = "segadapt"
main()
"""


# without the address of a service that an earlier test of this process may have started
OF_ITS_OWN = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}


@pytest.mark.slow
def test_a_run_outlives_the_service_of_wandb(tmp_path, root, overrides_of):
    pytest.importorskip("wandb")
    command = overrides_of("tta.method=tent", "data.shuffle=false", "experiment.id=one", "logging.wandb.mode=offline")
    done = subprocess.run(
        [sys.executable, "-c", KILLING, "adapt", *command],
        cwd=tmp_path,
        env=OF_ITS_OWN | {"HOME": str(tmp_path)},
        timeout=200,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int((tmp_path / "killed").read_text()) >= 1
    folder = root.parent / "runs/adapt/one"
    assert json.loads((folder / "results.json").read_text())["tasks"][0]["images"] == 3
    assert [json.loads(line)["key"] for line in (folder / "records.jsonl").read_text().splitlines()] == ["a", "b", "c"]
    assert done.stderr.count("copy lost, the run goes on") == 1
    assert "Traceback" not in done.stderr
