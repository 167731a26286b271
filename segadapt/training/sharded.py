"""Tensors of which a process may have a part alone: DTensors, over the dimensions "dp" and "tp" of a mesh."""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard


def local(tensor: Tensor) -> Tensor:
    """This process's part, which shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, the same in each process, which all must ask for; of a tensor that is not sharded itself.

    Shards are put together to slices, then slices: torch has no single way from shards of slices, and warns.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    mesh, names = tensor.device_mesh, tensor.device_mesh.mesh_dim_names
    if mesh.ndim == 1:
        return tensor.full_tensor()
    assert names == ("dp", "tp")
    shard, cut = (_plain(placement) for placement in tensor.placements)
    shape = list(tensor.shape)
    if isinstance(cut, Shard):
        shape[cut.dim] //= mesh.size(1)
    like = torch.empty(shape, device="meta")
    own = DTensor.from_local(tensor.to_local(), mesh["dp"], [shard], shape=like.shape, stride=like.stride())
    return DTensor.from_local(own.full_tensor(), mesh["tp"], [cut]).full_tensor()


def _plain(placement: Any) -> Placement:
    """Of shards of slices torch says _StridedShard."""
    return placement if isinstance(placement, Replicate) else Shard(placement.dim)


def is_sliced(tensor: Tensor) -> bool:
    """Among the processes that are together each has a part of its own."""
    names = tensor.device_mesh.mesh_dim_names or () if isinstance(tensor, DTensor) else ()
    return "tp" in names and not cast(DTensor, tensor).placements[names.index("tp")].is_replicate()


def by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Those of one mesh, or of none, together, as torch takes them for an operation on many."""
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    return list(groups.values())


@torch.no_grad()
def fill(tensor: Tensor, values: Tensor) -> None:
    """Overwrite in place, each process its part, with the whole of it on any device."""
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        for dim in reversed(range(mesh.ndim)):  # slices first, whose shards FSDP took
            placement: Any = tensor.placements[dim]
            if isinstance(placement, Replicate):
                continue
            parts = values.chunk(mesh.size(dim), placement.dim)
            rank = mesh.get_local_rank(dim)
            values = parts[rank] if rank < len(parts) else values.narrow(placement.dim, 0, 0)
    local(tensor).copy_(values)
