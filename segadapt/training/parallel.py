"""Training over the processes of torchrun: who is who, what they tell each other, copies (DDP) or shards (FSDP2).

What is counted or agreed on goes over gloo between the CPUs, so that no GPU waits for it; gradients go over NCCL.
"""

import inspect
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from segadapt.config_pretraining import PretrainConfig
from segadapt.config_training import TrainConfig
from segadapt.errors import UserError

PATIENCE = timedelta(hours=2)  # with the first process, which alone looks at all files


@dataclass(frozen=True)
class World:
    """This process among those of a run.

    Attributes:
        kind: train.parallel.
        local_rank: among those of this host: the GPU's number.
    """

    kind: str = "none"
    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """It alone writes and speaks."""
        return self.rank == 0

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Over all processes; int64 or float64, any shape."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def added_up(self, value: Tensor) -> Tensor:
        """A tensor summed over all processes, on its device."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def largest(self, values: np.ndarray) -> np.ndarray:
        """Of all processes, value by value; int64 or float64."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def _reduced(self, values: np.ndarray, operation: Any) -> np.ndarray:
        assert values.dtype in (np.int64, np.float64), values.dtype
        reduced = torch.from_numpy(values.copy())
        if self.size > 1:
            dist.all_reduce(reduced, operation)
        return reduced.numpy()

    def of_main(self, value: Any) -> Any:
        """What the first process has, for all."""
        held = [value]
        if self.size > 1:
            dist.broadcast_object_list(held, src=0, device=torch.device("cpu"))
        return held[0]

    @torch.no_grad()
    def share_buffers(self, net: nn.Module) -> None:
        """The first process's BatchNorm statistics for all: on the CPU each process has its own."""
        for buffer in net.buffers() if self.size > 1 else ():
            dist.broadcast(buffer, src=0)


@contextmanager
def joined(settings: TrainConfig | PretrainConfig) -> Iterator[World]:
    """The processes that torchrun has started, at work together inside.

    UserError: settings and torchrun do not say the same, or the batch cannot be divided.
    """
    kind, size = settings.train.parallel, int(os.environ.get("WORLD_SIZE", "1"))
    if kind == "none" and size > 1:
        raise UserError(f"train.parallel=none under torchrun with {size} processes: each would train alone. Set "
                        "train.parallel=ddp or fsdp, or start one process.")  # fmt: skip
    if kind != "none" and "RANK" not in os.environ:
        raise UserError(f"train.parallel={kind}, but torchrun has not started this process. Run torchrun "
                        "--nproc-per-node GPUS -m segadapt train ..., or set train.parallel=none.")  # fmt: skip
    parts = size * settings.train.accumulate
    if settings.train.batch_size % parts:
        raise UserError(f"train.batch_size={settings.train.batch_size}: expected a multiple of {parts}, {size} "
                        f"processes x train.accumulate={settings.train.accumulate}. Use "
                        f"{-(-settings.train.batch_size // parts) * parts}.")  # fmt: skip
    if kind == "none":
        yield World()
        return
    is_on_gpu = settings.runtime.device != "cpu" and torch.cuda.is_available()
    world = World(kind, int(os.environ["RANK"]), size, int(os.environ["LOCAL_RANK"]))
    if is_on_gpu:
        if world.local_rank >= torch.cuda.device_count():
            raise UserError(f"torchrun --nproc-per-node: process {world.local_rank} of this host, but "
                            f"{torch.cuda.device_count()} GPUs are visible. Start one process for each.")  # fmt: skip
        torch.cuda.set_device(world.local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if is_on_gpu else "gloo", timeout=PATIENCE)
    try:
        yield world
    finally:
        dist.destroy_process_group()


def spread(module: nn.Module, net: nn.Module, world: World) -> nn.Module:
    """The module as all processes train it together: their gradients are averaged.

    DDP takes each parameter for used, but for nets that say has_unread_weights; buffers stay each process's own, as the
    losses' memories are equal anyway. FSDP2 shards each block that the net names as one not to split, then the rest.
    BatchNorm becomes SyncBatchNorm on GPUs.

    Args:
        module: what is called; it holds the net.
    """
    device = next(net.parameters()).device
    if world.size > 1 and device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(module)
    if world.kind == "ddp":
        known = inspect.signature(DistributedDataParallel).parameters
        buffers: Any = {("forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"): False}
        ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(
            module,
            device_ids=ids,
            gradient_as_bucket_view=True,
            find_unused_parameters=getattr(net, "has_unread_weights", False),
            **buffers,
        )
    if world.kind == "fsdp":
        mesh = init_device_mesh(device.type, (world.size,))
        names = set(getattr(net, "_no_split_modules", None) or ())
        for block in [block for block in net.modules() if type(block).__name__ in names]:
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
    return module


@contextmanager
def synchronised(module: nn.Module, *, last: bool) -> Iterator[None]:
    """Inside, a backward sends gradients only with the last micro-batch of a step."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    is_copy = isinstance(module, DistributedDataParallel) and not last
    with cast(DistributedDataParallel, module).no_sync() if is_copy else nullcontext():
        yield


def clip(parameters: Iterable[nn.Parameter], most: float | None) -> Tensor:
    """Scale the gradient to an L2 norm of `most` if it is larger, over all shards; returns the norm before."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(grads))
    if most is not None:
        factor = (most / (norm + 1e-6)).clamp(max=1)
        torch._foreach_mul_([local(grad) for grad in grads], factor)  # pyright: ignore[reportPrivateImportUsage]
    return norm


# --- tensors that may be sharded ---


def local(tensor: Tensor) -> Tensor:
    """This process's part, which shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, the same in each process, which all must ask for; of a tensor that is not sharded itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(tensor: Tensor, values: Tensor) -> None:
    """Overwrite in place, each process its part, with the whole of it on any device."""
    if isinstance(tensor, DTensor):
        values = distribute_tensor(values.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
        local(tensor).copy_(local(values))
    else:
        tensor.copy_(values)
