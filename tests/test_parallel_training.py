"""Two processes over gloo train as one does: DDP and FSDP2; they stop together and go on. BatchNorm is frozen."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import TINY, TINY_SEGFORMER

HERE = Path(__file__).parent
OWN = ("experiment.id=one", "train.batch_size=4", "train.optimizer.lr=0.01", "train.schedule.decay=constant",
       "train.ema_decay=0.9", "train.optimizer.clip_norm=0.5", "train.validate_every=3", "train.validation_images=3",
       "train.transforms.scale_low=0.4")  # fmt: skip

pytestmark = pytest.mark.slow


def begin(root: Path, *overrides: str, processes: int, batch_norm_learns: bool = False) -> subprocess.Popen:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(HERE / "parallel_training.py"), str(root)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]),
        "BATCH_NORM_LEARNS": str(int(batch_norm_learns)),
    }
    return subprocess.Popen([*command, *OWN, *overrides], env=environment, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> int:
    try:
        _, said = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes
        process.communicate(timeout=60)
        raise
    print(said[-3000:])
    return process.returncode


def left_by(root: Path) -> tuple[dict[str, torch.Tensor], dict]:
    folder = root / "train" / "one"
    return load_file(folder / "model" / "model.safetensors"), json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    root = tmp_path_factory.mktemp("single")
    assert finish(begin(root, processes=1)) == 0
    return left_by(root)


def assert_alike(root: Path, single) -> None:
    (model, results), (expected, its) = left_by(root), single
    assert model.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(model[name], value, rtol=1e-3, atol=1e-5, msg=lambda said, name=name: name + said)
    for which in ("validation", "last", "best"):
        assert results[which] == pytest.approx(its[which], abs=2e-3)
    assert results["tensors"] == its["tensors"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_train_as_one_does(tmp_path, single, kind, accumulate):
    """Weights, scores and the average, with clipping; three validation images for two processes."""
    own = (f"train.parallel={kind}", f"train.accumulate={accumulate}")
    assert finish(begin(tmp_path, *own, processes=2)) == 0
    assert_alike(tmp_path, single)
    assert left_by(tmp_path)[1]["processes"] == 2


def test_two_processes_train_as_one_does_by_replays(tmp_path, single, monkeypatch):
    """train.recorded averages gradients itself, as DDP's hooks do not see them."""
    monkeypatch.setenv("RECORDED", "1")
    own = ("train.parallel=ddp", "train.recorded=true", "train.accumulate=2")
    assert finish(begin(tmp_path, *own, processes=2)) == 0
    assert_alike(tmp_path, single)


@pytest.mark.parametrize("recorded", ["0", "1"])
def test_copies_begin_as_the_first_does(tmp_path, single, monkeypatch, recorded):
    """On hosts whose CPUs or files differ."""
    monkeypatch.setenv("RECORDED", recorded)
    monkeypatch.setenv("OTHER_START", "1")
    own = ("train.parallel=ddp", f"train.recorded={recorded == '1'}")
    assert finish(begin(tmp_path, *own, processes=2)) == 0
    assert_alike(tmp_path, single)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_signal_stops_both_and_both_go_on(tmp_path, single, kind):
    own = (f"train.parallel={kind}", "train.checkpoint_every=1", "train.validate_every=1")
    process = begin(tmp_path, *own, processes=2)
    folder, until = tmp_path / "train" / "one", time.monotonic() + 120
    while not list(folder.glob("checkpoints/0*")) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert finish(process) != 0
    assert not (folder / "results.json").exists()
    assert list(folder.glob("checkpoints/0*"))
    assert finish(begin(tmp_path, *own, processes=2)) == 0
    model, _ = left_by(tmp_path)
    for name, value in single[0].items():
        torch.testing.assert_close(model[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("kind", "rank"), [("ddp", 0), ("fsdp", 1)])
def test_a_signal_to_one_process_alone_stops_both_once_the_checkpoint_is_whole(tmp_path, monkeypatch, kind, rank):
    """torchrun ends the first process when the other has ended, and a second signal ends a write."""
    own = (f"train.parallel={kind}", "train.iters=12")
    for name, value in {"STOP_AT": "3", "STOP_RANK": str(rank), "TOLD": "1", "SLOW": "1.5"}.items():
        monkeypatch.setenv(name, value)
    assert finish(begin(tmp_path, *own, processes=2)) != 0
    folder = tmp_path / "train" / "one"
    (saved,) = folder.glob("checkpoints/*")
    assert 3 < int(saved.name) < 12
    assert not (folder / "results.json").exists()
    monkeypatch.setenv("STOP_AT", "0")
    assert finish(begin(tmp_path, *own, processes=2)) == 0
    assert left_by(tmp_path)[1]["steps"] == 12


def test_ddp_that_a_traceback_holds_ends_after_the_processes_have_parted(tmp_path):
    """Torch's own order of things hangs for ever in the first few times, see `joined`."""
    script = """
import sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from segadapt.signals import Stopped
from segadapt.training.parallel import joined
from training_runs import training

def stop():
    with joined(training(sys.argv[1], "train.parallel=ddp")):
        net = DistributedDataParallel(torch.nn.Linear(2, 2))
        dist.broadcast(torch.zeros(3), src=0)
        raise Stopped(15, "")

sys.setswitchinterval(5)
for _ in range(30):
    try:
        stop()
    except Stopped:
        pass
assert not dist.is_initialized()
"""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0",
             "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}  # fmt: skip
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=os.environ | alone, timeout=120, check=True)


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    process = begin(tmp_path, "train.parallel=ddp", "train.batch_size=3", processes=2)
    _, said = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "train.batch_size=3: expected a multiple of 2, 2 processes x train.accumulate=1. Use 4." in said


def test_what_the_first_process_alone_finds_is_said_once_and_by_no_traceback(tmp_path):
    """A run folder that is there has another setting."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "segadapt",
               "train", *TINY, TINY_SEGFORMER, *OWN, f"logging.root={tmp_path}", "train.transforms.crop_px=48",
               "train.schedule.warmup_iters=0", "train.parallel=ddp"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    said = []
    for iters in (3, 4):
        done = subprocess.run([*command, f"train.iters={iters}"], env=environment, capture_output=True, text=True)
        said.append((done.returncode, done.stderr))
    (status, _), (refused, line) = said
    assert status == 0, said
    assert refused == 1
    assert line.count("segadapt train: ") == 1
    assert "train.iters" in line
    assert line.count("Traceback (") == 1, "that of torchrun alone"
