"""A tiny training in one of several processes: torchrun --nproc-per-node N tests/parallel_training.py ROOT OVERRIDE ...

BatchNorm stays in eval mode unless BATCH_NORM_LEARNS=1: on the CPU each process would have statistics of its own.
"""

import os
import sys
from pathlib import Path

import torch
from training_runs import QUIET, training

from segadapt import train
from segadapt.models.discriminative.segmenter import NetSegmenter
from segadapt.signals import Stopped

plain_train = NetSegmenter.train


def train_without_batch_norm(self: NetSegmenter) -> NetSegmenter:
    plain_train(self)
    for module in self.net.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    return self


if __name__ == "__main__":
    torch.set_num_threads(1)
    if os.environ.get("BATCH_NORM_LEARNS") != "1":
        NetSegmenter.train = train_without_batch_norm
    try:
        train.run(training(Path(sys.argv[1]), *sys.argv[2:]), console=QUIET)
    except Stopped as stopped:
        sys.exit(128 + stopped.signum)
