"""Every layout of processes trains as one process does, and goes on where any other stopped. BatchNorm is frozen."""

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from test_parallel_training import HERE, OWN, assert_alike, left_by
from training_runs import lines_of

pytestmark = pytest.mark.slow

TWO_D = ("train.parallel=2d", "train.tensor_parallel=2")
FOUR = "train.accumulate=4"
# SGD: AdamW would make steps of the learning rate out of rounding, where a gradient is next to 0
MMSEG = ("model.discriminative.family=segadapt_segformer_mmseg", "train.optimizer.name=sgd", "train.accumulate=2")
# name: the starts of a run one after the other, each of so many processes; the first stops within step 2, then 4
RUNS: dict[str, list[tuple[int, tuple[str, ...]]]] = {
    "one": [(1, ())],
    "tp": [(2, ("train.parallel=tp", "train.accumulate=2"))],
    "2d": [(4, TWO_D)],
    "pipeline-one": [(4, ("train.parallel=pipeline", FOUR)), (1, (FOUR,))],
    "one-2d-one": [(1, ()), (4, TWO_D), (1, ())],
    "mmseg": [(1, MMSEG)],
    "mmseg-fsdp-tp-pipeline": [(2, (*MMSEG, f"train.parallel={kind}")) for kind in ("fsdp", "tp", "pipeline")],
}
STOPS = (2, 4)


def free_port(stack: ExitStack) -> int:
    """Its socket is held open with the stack, so that no two are the same."""
    listening = stack.enter_context(socket.socket())
    listening.bind(("localhost", 0))
    return listening.getsockname()[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """All runs, in four processes."""
    root, starts = tmp_path_factory.mktemp("layouts"), []
    with ExitStack() as stack:
        for name, own in RUNS.items():
            for index, (processes, overrides) in enumerate(own):
                port = free_port(stack) if processes > 1 else None
                stop_at = STOPS[index] if index + 1 < len(own) else 0
                starts.append({"name": name, "processes": processes, "overrides": [*OWN, *overrides], "port": port,
                               "stop_at": stop_at})  # fmt: skip
    (root / "runs.json").write_text(json.dumps(starts))
    paths = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    own = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "MASTER_ADDR": "localhost"}
    command = [sys.executable, str(HERE / "parallel_layouts.py"), str(root), str(root / "runs.json")]
    processes = [subprocess.Popen(command, env=own | {"RANK": str(rank)}) for rank in range(4)]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0] * 4
    finally:
        for process in processes:
            process.kill()
    return root


@pytest.mark.parametrize("name", [name for name in RUNS if name not in ("one", "mmseg")])
def test_layouts_train_as_one_process_does(root, name):
    """Weights, average, scores and groups, with clipping and micro-batches; and the record of the steps.

    Where several are named, each went on from the checkpoint of the one before.
    """
    single = "mmseg" if name.startswith("mmseg") else "one"
    assert_alike(root / name, left_by(root / single))
    mine, its = (lines_of(root / which / "train" / "one") for which in (name, single))
    assert [line["step"] for line in mine] == [line["step"] for line in its]
    for line, other in zip(mine, its, strict=True):
        if "loss" in line:
            assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
            assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
            assert line["lr"] == other["lr"]
