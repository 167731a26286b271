"""Training over the processes of torchrun: who is who, what they tell each other, copies (DDP) or parts of the weights.

What is counted or agreed on goes over gloo between the CPUs, so that no GPU waits for it; gradients go over NCCL.
Parts: shards (FSDP2) over the mesh dimension "dp", slices (tensor parallelism) over "tp", of one mesh.
"""

import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from segadapt.config_pretraining import PretrainConfig
from segadapt.config_training import TrainConfig, TrainSettings
from segadapt.errors import UserError, counted
from segadapt.signals import Stopped
from segadapt.training.tensor_parallel import refuse_slices, sliced

PATIENCE = timedelta(hours=2)  # with the first process, which alone looks at all files
_kept: dict[str, Any] = {}  # "group": of the newest `joined`, so that DDP is never the last to hold it


@dataclass(frozen=True)
class World:
    """This process among those of a run.

    Attributes:
        kind: train.parallel.
        local_rank: among those of this host: the GPU's number.
        together: processes in a row that work on the same images, each with its part of the weights.
        mesh: of the processes that hold parts of the weights, see `spread`; None: each has them all.
    """

    kind: str = "none"
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    together: int = 1
    mesh: DeviceMesh | None = None

    @property
    def is_main(self) -> bool:
        """It alone speaks, and writes what is whole."""
        return self.rank == 0

    @property
    def has_parts(self) -> bool:
        """A process may hold less than all weights."""
        return self.kind not in ("none", "ddp")

    @property
    def parts(self) -> int:
        """Into which a micro-batch of all processes is divided."""
        return self.size // self.together

    @property
    def part(self) -> int:
        """The one that this process works on."""
        return self.rank // self.together

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Over all processes; int64 or float64, any shape."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def sum_of_parts(self, value: Tensor) -> Tensor:
        """A floating tensor summed over the parts of a batch, on its device."""
        if self.size > 1:
            dist.all_reduce(value)
        return value / self.together

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

    def by_main(self, work: Callable[[], Any]) -> Any:
        """What comes of a work that the first process does alone, for all. UserError: in all, if it raises one."""
        done, refusal = None, None
        if self.is_main:
            try:
                done = work()
            except UserError as error:
                refusal = error
        done, refusal = self.of_main((done, refusal))
        if refusal is not None:
            raise refusal
        return done

    def every(self, value: Any) -> list[Any]:
        """What the processes have, in their order, for all."""
        held = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(held, value)
        return held

    @torch.no_grad()
    def share_buffers(self, net: nn.Module) -> None:
        """The first process's BatchNorm statistics for all: on the CPU each process has its own."""
        for buffer in net.buffers() if self.size > 1 else ():
            dist.broadcast(buffer, src=0)


@contextmanager
def joined(settings: TrainConfig | PretrainConfig) -> Iterator[World]:
    """The processes that torchrun has started, at work together inside.

    Their group outlives this. A traceback may hold DDP longer, and if DDP freed the group it would wait for gloo's
    threads with the GIL held, and they for the GIL, to free what was sent last: for ever.

    UserError: settings and torchrun do not say the same, or the batch cannot be divided.
    """
    kind, size = settings.train.parallel, int(os.environ.get("WORLD_SIZE", "1"))
    together = size if kind in ("tp", "pipeline") else 1
    choices = "ddp or fsdp"
    if isinstance(settings.train, TrainSettings):
        choices, sharing = "ddp, fsdp, tp, 2d or pipeline", settings.train.tensor_parallel
        if sharing is not None and kind != "2d":
            raise UserError(f"train.tensor_parallel={sharing} with train.parallel={kind}: it would have no effect. Set "
                            "it to null, or train.parallel=2d.")  # fmt: skip
        if kind == "2d":
            together = sharing or 2
    if settings.runtime.compile and kind not in ("none", "ddp"):
        raise UserError(f"runtime.compile=true with train.parallel={kind}: a net in parts is not compiled. Set "
                        "runtime.compile=null, or train.parallel=ddp.")  # fmt: skip
    if kind == "none" and size > 1:
        raise UserError(f"train.parallel=none under torchrun with {size} processes: each would train alone. Set "
                        f"train.parallel to {choices}, or start one process.")  # fmt: skip
    if kind != "none" and "RANK" not in os.environ:
        raise UserError(f"train.parallel={kind}, but torchrun has not started this process. Run torchrun "
                        "--nproc-per-node GPUS -m segadapt ..., or set train.parallel=none.")  # fmt: skip
    _refuse_division(settings, size, together)
    if kind == "none":
        yield World()
        return
    is_on_gpu = settings.runtime.device != "cpu" and torch.cuda.is_available()
    local_rank = int(os.environ["LOCAL_RANK"])
    if is_on_gpu:
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1)), torch.cuda.device_count()
        if here > gpus:  # in all processes of the host, so that the first one says it
            raise UserError(f"torchrun --nproc-per-node={here}, but {gpus} GPUs are visible on this host. Start one "
                            "process for each.")  # fmt: skip
        torch.cuda.set_device(local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if is_on_gpu else "gloo", timeout=PATIENCE)
    _kept["group"] = dist.group.WORLD
    sizes = {"fsdp": {"dp": size}, "tp": {"tp": size}, "2d": {"dp": size // together, "tp": together}}.get(kind)
    mesh = None
    if sizes is not None:
        mesh = init_device_mesh("cuda" if is_on_gpu else "cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    world = World(kind, int(os.environ["RANK"]), size, local_rank, together, mesh)
    stays_joined = False
    try:
        yield world
    except UserError:
        stays_joined = not world.is_main  # else the first may fail at its end before this one has said why
        raise
    except Stopped:
        world.of_main(None)  # torchrun ends the first, which writes and alone says it, when another has ended
        raise
    finally:
        if not stays_joined:
            dist.destroy_process_group()


def _refuse_division(settings: TrainConfig | PretrainConfig, size: int, together: int) -> None:
    """UserError: so many processes, of which `together` work on the same images, cannot share the batch."""
    t = settings.train
    if size % together:
        raise UserError(f"train.tensor_parallel={together} with {size} processes: expected a number that divides them. "
                        f"Set train.tensor_parallel to such a one, or start a multiple of {together}.")  # fmt: skip
    parts = size // together
    whole = parts * t.accumulate
    if t.batch_size % whole:
        who = counted(size, "process", "processes") + ("" if together == 1 else f" / {together} on the same images")
        raise UserError(f"train.batch_size={t.batch_size}: expected a multiple of {whole}, {who} x train.accumulate="
                        f"{t.accumulate}. Use {-(-t.batch_size // whole) * whole}.")  # fmt: skip


def refuse_parts(settings: TrainConfig, world: World, net: nn.Module) -> None:
    """UserError: processes that work on the same images cannot do so with this net or these losses."""
    t, kind = settings.train, world.kind
    if kind not in ("tp", "2d", "pipeline"):
        return
    if kind != "pipeline":
        refuse_slices(net, kind, world.together)
    if t.losses.contrast.weight:
        raise UserError(f"train.losses.contrast.weight={t.losses.contrast.weight} with train.parallel={kind}: each "
                        "process would draw anchors of its own in the same images. Set train.parallel=ddp or fsdp, "
                        "or train.losses.contrast.weight=0.")  # fmt: skip


def spread(module: nn.Module, net: nn.Module, world: World, *, is_recorded: bool = False) -> nn.Module:
    """The module as all processes train it together: their gradients are averaged.

    DDP takes each parameter for used, but for nets that say has_unread_weights; buffers stay each process's own, as the
    losses' memories are equal anyway. Slices first (tp), see `sliced`; then FSDP2 (dp) shards each block that the net
    names as one not to split, then the rest. BatchNorm becomes SyncBatchNorm on GPUs, over the parts of a batch.

    Args:
        module: what is called; it holds the net.
        is_recorded: copies get the first one's values and stay bare; `gradients.average` makes their gradients one.
    """
    device = next(net.parameters()).device
    dimensions = world.mesh.mesh_dim_names or () if world.mesh is not None else ()
    if world.parts > 1 and device.type == "cuda":
        group = world.mesh["dp"].get_group() if world.mesh is not None else None
        nn.SyncBatchNorm.convert_sync_batchnorm(module, group)
    if world.kind == "ddp" and is_recorded:
        for tensor in (each.detach() for each in [*module.parameters(), *module.buffers()]):  # as DDP does
            first = tensor.contiguous()  # NCCL sends no other
            dist.broadcast(first, 0)
            tensor.copy_(first)
    elif world.kind == "ddp":
        # of a side of length 1 any stride is right
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
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
    if world.mesh is not None and "tp" in dimensions:
        sliced(net, world.mesh["tp"])
    if world.mesh is not None and "dp" in dimensions:
        # a map of one pixel is a view, and nobody writes into it
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        mesh, names = world.mesh["dp"], set(getattr(net, "_no_split_modules", None) or ())
        for block in [block for block in net.modules() if type(block).__name__ in names]:
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
    return module
