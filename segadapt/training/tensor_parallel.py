"""Tensor parallelism: processes that work on the same images, each with a slice of the widest layers.

Linear layers in pairs, the first by its outputs (column), the second by its inputs (row), so that nothing is sent
between them: Shoeybi et al., "Megatron-LM", 2019, section 3. A depth-wise convolution between them needs nothing of
the other channels.
"""

from collections.abc import Callable
from math import gcd
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import conv2d

from segadapt.errors import UserError

LINEAR = {"column": ColwiseParallel, "row": RowwiseParallel}


def segformer_plan(net: Any, size: int) -> dict[str, str]:
    """Mix-FFN of every block; attention by heads, where their number divides, else each process has it whole."""
    plan = {}
    for name, attention, mlp in _blocks(net):
        plan |= {f"{name}.mlp.fc1": "column", f"{name}.mlp.dwconv.dwconv": "channel", f"{name}.mlp.fc2": "row"}
        assert mlp.fc1.out_features % size == 0, "see refuse_slices"
        if attention.num_attention_heads % size == 0:
            plan |= {f"{name}.attention.{part}_proj": "column" for part in "qkv"}
            plan[f"{name}.attention.o_proj"] = "row"
    return plan


# model_type of a net -> (net, number of processes) to the names of its sliced layers, each with how it is sliced.
PLANS: dict[str, Callable[[Any, int], dict[str, str]]] = {
    "segformer": segformer_plan,
    "segadapt_segformer_mmseg": segformer_plan,
}


def refuse_slices(net: Any, kind: str, size: int) -> None:
    """UserError: train.parallel=kind slices this net over so many processes, and it cannot be."""
    if (chosen := net.config.model_type) not in PLANS:
        raise UserError(f"train.parallel={kind}: {chosen} has no plan of slices; expected one of {', '.join(PLANS)}. "
                        "Set train.parallel=ddp or fsdp.")  # fmt: skip
    most = gcd(*(mlp.fc1.out_features for _, _, mlp in _blocks(net)))
    if most % size:
        divisors = ", ".join(str(number) for number in range(2, most + 1) if most % number == 0)
        cure = "Set train.tensor_parallel to one" if kind == "2d" else "Start as many processes as one"
        raise UserError(f"train.parallel={kind} over slices of {size} processes: expected a divisor of {most}, which "
                        f"divides the channels of every Mix-FFN. {cure} of {divisors}.")  # fmt: skip


def _blocks(net: Any) -> list[tuple[str, Any, Any]]:
    """Name, attention and Mix-FFN of each block."""
    return [
        (f"segformer.stages.{stage}.blocks.{index}", block.attention, block.mlp)
        for stage, own in enumerate(net.segformer.stages)
        for index, block in enumerate(own.blocks)
    ]


def sliced(net: Any, mesh: DeviceMesh) -> None:
    """Put this process's slices in the place of the planned layers; weights are named and, in whole, as before.

    All processes hold the same net. Draws inside a slice are the same in all slices.

    Args:
        mesh: of one dimension.
    """
    plan = PLANS[net.config.model_type](net, mesh.size())
    linear = {name: LINEAR[how]() for name, how in plan.items() if how in LINEAR}
    parallelize_module(net, mesh, linear, src_data_rank=None)
    for name in (name for name, how in plan.items() if how == "channel"):
        net.set_submodule(name, ChannelConv2d(net.get_submodule(name), mesh))


class ChannelConv2d(nn.Conv2d):
    """A depth-wise convolution of this process's channels, [B, channels / processes, h, w].

    Its weights are DTensors: as plain ones those of two processes would stand under one name in a checkpoint.
    """

    def __init__(self, whole: Any, mesh: DeviceMesh):
        assert whole.groups == whole.in_channels == whole.out_channels
        assert whole.bias is not None
        assert whole.padding_mode == "zeros"
        super().__init__(
            whole.in_channels, whole.out_channels, whole.kernel_size, whole.stride, whole.padding, whole.dilation,
            whole.groups, device="meta",
        )  # fmt: skip
        for name, parameter in whole.named_parameters():
            slices = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
            setattr(self, name, nn.Parameter(slices, requires_grad=parameter.requires_grad))
        self.train(whole.training)

    def forward(self, x: Tensor) -> Tensor:
        """Of the slice alone."""
        weight, bias = (cast(DTensor, own).to_local() for own in (self.weight, self.bias))
        return conv2d(x, weight, bias, self.stride, cast(Any, self.padding), self.dilation, groups=x.shape[1])
