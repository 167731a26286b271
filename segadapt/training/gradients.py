"""What the processes of a training make of each other's gradients: one mean, one norm."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from segadapt.training.parallel import World
from segadapt.training.sharded import is_sliced, local


@contextmanager
def synchronised(module: nn.Module, *, last: bool) -> Iterator[None]:
    """Inside, a backward sends gradients only with the last micro-batch of a step."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    is_copy = isinstance(module, DistributedDataParallel) and not last
    with cast(DistributedDataParallel, module).no_sync() if is_copy else nullcontext():
        yield


@torch.no_grad()
def average(tensor: Tensor, world: World) -> None:
    """Make the tensors of all processes that train copies one, in place: their mean."""
    dist.all_reduce(tensor)
    tensor.div_(world.parts)


@torch.no_grad()
def agree(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Make the gradients of weights that are not sliced one in the processes that are together: their mean.

    They are equal but for rounding, which GPUs may do in any order; left alone the weights would part.
    """
    if world.together > 1 and world.mesh is not None:
        grads = [local(p.grad) for p in parameters if p.grad is not None and not is_sliced(p)]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat, group=world.mesh["tp"].get_group())
        means = (flat / world.together).split([grad.numel() for grad in grads])
        for grad, mean in zip(grads, means, strict=True):
            grad.copy_(mean.view_as(grad))


@torch.no_grad()
def clip(parameters: Iterable[nn.Parameter], most: float | None, world: World) -> Tensor:
    """Scale the gradient to an L2 norm of `most` if it is larger, over all its parts; returns the norm before.

    Tensors of several meshes are in no common operation of torch: each process adds up the squares of what it has, each
    by its share of it.
    """
    by_copies: dict[int, list[Tensor]] = {}
    for grad in (parameter.grad for parameter in parameters if parameter.grad is not None):
        by_copies.setdefault(copies_of(grad, world), []).append(local(grad))
    squares = [torch.nn.utils.get_total_norm(own).square() / copies for copies, own in by_copies.items()]
    square = torch.stack(squares).sum()
    if list(by_copies) != [world.size]:
        dist.all_reduce(square)
        norm = square.sqrt()
    else:
        norm = (square * world.size).sqrt()
    if most is not None:
        factor = (most / (norm + 1e-6)).clamp(max=1)
        grads = [grad for own in by_copies.values() for grad in own]
        torch._foreach_mul_(grads, factor)  # pyright: ignore[reportPrivateImportUsage]
    return norm


def copies_of(tensor: Tensor, world: World) -> int:
    """Processes that have the same part of it."""
    if not isinstance(tensor, DTensor):
        return 1 if world.kind == "pipeline" else world.size
    sizes = (tensor.device_mesh.size(dim) for dim, own in enumerate(tensor.placements) if not own.is_replicate())
    return world.size // math.prod(sizes)
