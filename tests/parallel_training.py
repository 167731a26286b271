"""A tiny training in one of several processes: torchrun --nproc-per-node N tests/parallel_training.py ROOT OVERRIDE ...

BatchNorm stays in eval mode unless BATCH_NORM_LEARNS=1: on the CPU each process would have statistics of its own.
STOP_AT=N: a signal comes within step N, to all processes or to STOP_RANK alone; TOLD=SECONDS: see agreement.SECONDS.
OTHER_START=1: all processes but the first build other weights. SLOW=SECONDS: what writing a file of a checkpoint takes
at least. RECORDED=1: train.recorded works on the CPU. What the losses hold at the end is left in
ROOT/objective-RANK.pt.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from again import Captured
from tiny_networks import MASK2FORMER, SWIN, TINY
from training_runs import QUIET, training
from transformers.models.mask2former import modeling_mask2former

from segadapt import checkpoint, train
from segadapt.losses import Objective
from segadapt.models.discriminative.segmenter import NetSegmenter
from segadapt.signals import Stopped
from segadapt.training import agreement, learner
from segadapt.training.loop import Training

plain_train, plain_step, plain_build = NetSegmenter.train, Training._step, train.build_objective
plain_write_file = checkpoint._write_file
built: list[Objective] = []


def train_without_batch_norm(self: NetSegmenter) -> NetSegmenter:
    plain_train(self)
    for module in self.net.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    return self


def step_with_signal(self: Training, *given, **named) -> dict:
    is_told = os.environ.get("STOP_RANK", str(self.world.rank)) == str(self.world.rank)
    if is_told and self.step + 1 == int(os.environ.get("STOP_AT", "0")):
        os.kill(os.getpid(), signal.SIGTERM)
    return plain_step(self, *given, **named)


def build_and_keep(settings, segmenter, *given) -> Objective:
    if os.environ.get("OTHER_START") == "1" and os.environ.get("RANK", "0") != "0":
        with torch.no_grad():
            for tensor in (*segmenter.net.parameters(), *segmenter.net.buffers()):
                tensor.add_(1)
    built.append(plain_build(settings, segmenter, *given))
    return built[-1]


def slow_write_file(*given) -> object:
    time.sleep(float(os.environ.get("SLOW", "0")))
    return plain_write_file(*given)


class SamePoints:
    """torch for the loss of masks, but that it draws the same points for every mask in every process."""

    points_P2 = torch.rand(300, 2, generator=torch.Generator().manual_seed(0))

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    def rand(self, count: int, size: int, _: int, device: torch.device) -> torch.Tensor:
        return self.points_P2[:size].repeat(count, 1, 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    agreement.SECONDS = float(os.environ.get("TOLD", "0"))  # 0: in each step
    checkpoint._write_file = slow_write_file
    if os.environ.get("BATCH_NORM_LEARNS") != "1":
        NetSegmenter.train = train_without_batch_norm
    Training._step, train.build_objective = step_with_signal, build_and_keep
    if os.environ.get("RECORDED") == "1":
        learner.memory_of, train.refuse_recorded = Captured, lambda *_: None
    root = Path(sys.argv[1])
    settings = training(root, *sys.argv[2:])
    if settings.model.discriminative.family == "segadapt_deeplabv3":
        settings.model.discriminative.config = TINY["segadapt_deeplabv3"] | {"dropout": 0.0}
    if settings.model.discriminative.family == "mask2former":
        settings.model.discriminative.config = MASK2FORMER | {"backbone_config": SWIN | {"drop_path_rate": 0.0}}
        modeling_mask2former.torch = SamePoints()  # pyright: ignore[reportPrivateImportUsage]
    try:
        train.run(settings, console=QUIET)
    except Stopped as stopped:
        sys.exit(128 + stopped.signum)
    torch.save(dict(built[0].named_buffers()), root / f"objective-{os.environ.get('RANK', '0')}.pt")
