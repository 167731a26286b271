"""Tiny trainings one after the other in processes that stay: RANK=0 python tests/parallel_layouts.py ROOT RUNS.json

RUNS: a list of {name, processes, port, overrides, stop_at}; a process whose rank is not below `processes` sits a run
out. BatchNorm stays in eval mode, as in parallel_training.py. A run of several starts has one name.
"""

import json
import os
import sys
from pathlib import Path

import torch
from parallel_training import step_with_signal, train_without_batch_norm
from training_runs import QUIET, training

from segadapt import train
from segadapt.models.discriminative.segmenter import NetSegmenter
from segadapt.signals import Stopped
from segadapt.training import agreement
from segadapt.training.loop import Training

if __name__ == "__main__":
    torch.set_num_threads(1)
    agreement.SECONDS = 0.0
    NetSegmenter.train, Training._step = train_without_batch_norm, step_with_signal
    root, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    for run in json.loads(Path(sys.argv[2]).read_text()):
        if rank >= run["processes"]:
            continue
        is_alone = run["port"] is None
        theirs = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": run["processes"], "MASTER_PORT": run["port"]}
        for name, value in theirs.items():
            os.environ.pop(name, None)
            if not is_alone:
                os.environ[name] = str(value)
        os.environ["STOP_AT"] = str(run["stop_at"])
        try:
            train.run(training(root / run["name"], *run["overrides"]), console=QUIET)
        except Stopped:
            assert run["stop_at"], run
