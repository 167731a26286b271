"""Where the transformer lives: its blocks split over the devices by accelerate.dispatch_model, or a copy on each."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_module
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import nn

from segadapt.errors import UserError
from segadapt.models.generative.parallel import count_parts
from segadapt.models.generative.plan import GIB, RESERVE_BYTES, Cost, Plan, deal, plan, run_text

Device = int | str
PAIRS = (40, 32, 24, 20, 16, 12, 10, 8, 6, 5, 4, 3, 2, 1)  # on each device, tried in this order
HEAD = ("norm_out", "proj_out")  # of the transformer, after its blocks; 5 of SD3-medium's 2,028 million parameters
MOST_PAIRS = 40  # on all devices: two windows of 20 candidates; more takes memory and saves little time


@dataclass(frozen=True)
class Placement:
    """Where every module of the transformer lives; `lines` print as a map."""

    device_map: dict[str, Device]  # module name -> device
    main_device: Device  # inputs, outputs, embedders, segmenter, loss
    lines: tuple[str, ...]

    def device_of(self, name: str) -> torch.device:
        """The planned device of a parameter or buffer, by its name."""
        owners = [module for module in self.device_map if name == module or name.startswith(f"{module}.")]
        assert len(owners) == 1, f"{name} is covered by {owners} in the device map; expected exactly one entry"
        return torch.device(self.device_map[owners[0]])


def place(
    transformer: SD3Transformer2DModel,
    devices: Sequence[int] | Sequence[str],
    cost: Cost,
    *,
    force_hooks: bool = False,
    capacities: Sequence[int] | None = None,
    virtual_stages: int = 1,
) -> Placement:
    """Plan and dispatch; one device is a plain move. Afterwards never call `.to()` on the transformer or a parent.

    Embedders live on the first device, the main one: inputs are given there, and the output returns there. What follows
    the last block lives with it. dtype casts, adapters and requires_grad come before.

    Args:
        devices: GPU indices, all of them used; or "cpu" (several only to imitate a split, with force_hooks).
        cost: of a step; what is no block is added to the main device here.
        force_hooks: hooks even for one device, to test the split path.
        capacities: bytes of each device; default the whole GPU less 1 GiB, and no limit on the CPU.
        virtual_stages: runs of blocks of each device, see plan.deal.
    Raises:
        UserError: it does not fit, a device does not exist, or weights would lie on the CPU, disk or meta device.
    """
    names = [_name(device) for device in devices]
    _check_devices(transformer, devices, names)
    blocks, split = transformer.transformer_blocks, plan_split(transformer, devices, cost, capacities)
    main_device = devices[0]
    device_map: dict[str, Device] = {
        name: main_device for name, child in transformer.named_children() if child is not blocks
    }
    runs = deal(split.blocks, virtual_stages)
    for index, run in runs:  # more devices than blocks: the rest stays empty
        device_map |= {f"transformer_blocks.{block}": devices[index] for block in run}
        device_map |= dict.fromkeys(HEAD, devices[index])
    placement = Placement(device_map, main_device, _lines(names, split, runs))
    for name, _ in _tensors(transformer):
        placement.device_of(name)  # asserts that the map covers it
    dispatch_model(transformer, device_map, main_device=main_device, force_hooks=force_hooks)  # pyright: ignore
    _keep_hooks_at_seams(transformer, device_map)
    assert_placed(transformer, placement)
    return placement


def _keep_hooks_at_seams(transformer: SD3Transformer2DModel, device_map: Mapping[str, Device]) -> None:
    """Drop accelerate's hooks on what lies inside a module of the map: its inputs are on the right device already.

    There are some thirty in a block. Each looks through its arguments on the host, and each ends a compiled region.
    """
    for name in device_map:
        placed = transformer.get_submodule(name)
        for inner in placed.modules():
            if inner is not placed:
                remove_hook_from_module(inner)
                vars(inner).pop("forward", None)  # accelerate leaves the bound method there, which Dynamo guards


def plan_split(
    transformer: SD3Transformer2DModel, devices: Sequence[Device], cost: Cost, capacities: Sequence[int] | None
) -> Plan:
    """Which blocks each device would take; nothing moves. UserError: it does not fit."""
    kept, running = cost.block_bytes(width=transformer.inner_dim)
    weights = [cost.weight_bytes(block) for block in transformer.transformer_blocks]
    return plan(
        [weight + kept for weight in weights],
        [_capacity(device) for device in devices] if capacities is None else capacities,
        fixed_main=cost.fixed_main_bytes + cost.weight_bytes(transformer) - sum(weights),
        fixed_last=cost.fixed_last_bytes,
        fixed_each=running,  # a block's activations exist one block at a time where they are not kept
        even_blocks=cost.parts > 1,
        names=[_name(device) for device in devices],
        trained=cost.trained,
        checkpointing=cost.checkpointing,
    )


def share_out(
    transformer: SD3Transformer2DModel,
    devices: Sequence[int] | Sequence[str],
    cost: Cost,
    *,
    copied: bool,
    max_pairs: int | None,
    parts: int | None,
    capacities: Sequence[int] | None = None,
) -> Cost:
    """The cost with the pairs at work and the parts that they are cut into, as many as fit where not given.

    Fewer parts take less memory: where not even one pair fits, there are none. What still does not fit, placing tells.

    Args:
        copied: the transformer, to each device; else split over them.
        max_pairs: for each device; None: the most that fit.
        parts: as in count_parts.
    """
    count, copies = len(devices), len(devices) if copied else 1
    limits = list(capacities or map(_capacity, devices))
    fits = copies_fit if copied else plan_split
    several = count_parts(parts, devices=count, copies=copies, recorded=cost.recorded)
    for now in dict.fromkeys((several, max(several // 2, copies), copies) if parts is None else (several,)):
        choices = [max_pairs] if max_pairs else [each for each in PAIRS if each * count <= MOST_PAIRS or each == 1]
        for each in choices:
            asked = replace(cost, pairs=each * count, parts=now)
            if max_pairs is None and parts is None and now > copies and asked.pairs < 2 * now:
                break  # parts of less than two pairs: rather fewer parts
            try:
                fits(transformer, devices, asked, limits)
            except UserError:
                continue
            return asked
    return replace(cost, pairs=(max_pairs or 1) * count, parts=several if parts else copies)


def replicate(
    transformer: SD3Transformer2DModel,
    devices: Sequence[int] | Sequence[str],
    cost: Cost,
    *,
    capacities: Sequence[int] | None = None,
) -> tuple[list[SD3Transformer2DModel], list[Placement]]:
    """The transformer itself on the first device, and a copy on each other; adapters and requires_grad come before.

    Args:
        devices, cost, capacities: as in place.
    Raises:
        UserError: a copy does not fit, or as in place.
    """
    names = [_name(device) for device in devices]
    _check_devices(transformer, devices, names)
    loads = copies_fit(transformer, devices, cost, capacities)
    copies, placements = [], []
    for device, name, load in reversed(list(zip(devices, names, loads, strict=True))):  # the model itself last
        one = transformer if len(copies) == len(devices) - 1 else copy.deepcopy(transformer)
        nn.Module.to(one, torch.device(device))
        main = " (main device: segmenter and loss included)" if one is transformer else ""
        line = f"{name}: whole copy, {load / GIB:.1f} GiB estimated{main}"
        copies.insert(0, one)
        placements.insert(0, Placement({child: device for child, _ in one.named_children()}, device, (line,)))
        assert_placed(one, placements[0])
    return copies, placements


def copies_fit(
    transformer: SD3Transformer2DModel, devices: Sequence[Device], cost: Cost, capacities: Sequence[int] | None
) -> list[int]:
    """Bytes of the copy on each device. UserError: one does not fit."""
    loads = copy_bytes(transformer, cost, copies=len(devices))
    for device, load, capacity in zip(devices, loads, capacities or map(_capacity, devices), strict=True):
        if load > capacity:
            raise UserError(f"model.generative.placement=replicate: a copy of the generative model needs "
                            f"{load / GIB:.1f} GiB on {_name(device)}; it has {capacity / GIB:.1f}. Lower "
                            "model.generative.max_pairs, set model.generative.gradient_checkpointing=true, or split "
                            "the model (model.generative.placement=dispatch).")  # fmt: skip
    return loads


def copy_bytes(transformer: SD3Transformer2DModel, cost: Cost, *, copies: int) -> list[int]:
    """Bytes on each device that holds a whole transformer, the main one first."""
    kept, running = cost.block_bytes(width=transformer.inner_dim, copies=copies)
    each = cost.weight_bytes(transformer, copies=copies) + len(transformer.transformer_blocks) * kept + running
    moving = sum(p.numel() * p.element_size() for p in transformer.parameters() if p.requires_grad and cost.trained)
    loads = [each + (moving // 4 if copies > 1 else 0)] * copies  # gradients and values on their way, 2 GiB for SD3
    loads[0] += cost.fixed_main_bytes
    loads[-1] += cost.fixed_last_bytes
    return loads


def comparison(
    transformer: SD3Transformer2DModel,
    devices: Sequence[int] | Sequence[str],
    cost: Cost,
    *,
    max_pairs: int | None,
    parts: int | None,
    capacities: Sequence[int] | None = None,
) -> str:
    """Whether copies are a choice on these devices, and why they would be, in one line; arguments as in share_out."""
    limits = list(capacities or map(_capacity, devices))
    shared = share_out(transformer, devices, cost, copied=True, max_pairs=max_pairs, parts=parts, capacities=limits)
    loads = copy_bytes(transformer, shared, copies=len(devices))
    size = f"a whole copy on each device ({max(loads) / GIB:.1f} GiB)"
    if all(load <= limit for load, limit in zip(loads, limits, strict=True)):
        why = f"{size} fits with {shared.pairs} pairs at work, and none waits for another"
        verdict = "is faster" if shared.pairs >= cost.pairs else f"may be faster or not (split: {cost.pairs} pairs)"
        return f"model.generative.placement=replicate {verdict}: {why}"
    return f"model.generative.placement=replicate is no choice: {size} does not fit into {min(limits) / GIB:.1f} GiB"


def assert_placed(transformer: nn.Module, placement: Placement) -> None:
    """Check before each task that nothing has moved a part of the split model: `parent.to()` does so silently.

    Raises:
        RuntimeError: a parameter or buffer is not where the map says.
    """
    for name, tensor in _tensors(transformer):
        if tensor.device != (planned := placement.device_of(name)):
            raise RuntimeError(
                f"{name} of the generative model is on {tensor.device}; the placement says {planned}. A split model "
                f"must never be moved: look for .to() or .cuda() on it or on a parent."
            )


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _check_devices(transformer: nn.Module, devices: Sequence[Device], names: Sequence[str]) -> None:
    """UserError: no device, one that cannot train, CPU beside GPUs, a GPU that is not visible, or no weights."""
    listed = ", ".join(names)
    if not devices:
        raise UserError("The generative model was given no device; expected GPU indices or cpu. Make a GPU visible.")
    if any(isinstance(device, str) and device != "cpu" for device in devices) or len({type(d) for d in devices}) > 1:
        raise UserError(
            f"The generative model was given the devices {listed}; expected GPU indices alone or cpu alone: weights on "
            f"the CPU beside GPUs, on disk or on meta cannot be trained. Name only GPUs."
        )
    visible = torch.cuda.device_count()
    if any(isinstance(device, int) and device >= visible for device in devices):
        raise UserError(
            f"The generative model was planned for {listed}, but {visible} GPUs are visible. Set "
            f"CUDA_VISIBLE_DEVICES to that many, or name fewer."
        )
    for name, tensor in _tensors(transformer):
        if tensor.is_meta:
            raise UserError(
                f"The generative model has no weights for {name} (meta device); expected them in memory. Load the "
                f"checkpoint without device_map and offloading."
            )


def _capacity(device: Device) -> int:
    # the whole GPU, not what is free just now: the plan shall depend on the configuration alone
    if isinstance(device, str):
        return 2**63
    return torch.cuda.get_device_properties(device).total_memory - RESERVE_BYTES


def _name(device: Device) -> str:
    return f"cuda:{device}" if isinstance(device, int) else device


def _lines(names: Sequence[str], split: Plan, runs: Sequence[tuple[int, range]]) -> tuple[str, ...]:
    texts = [" ".join(run_text(run) for of, run in runs if of == index) for index in range(len(split.blocks))]
    lines = [
        f"{name}: blocks {text}, {bytes_here / GIB:.1f} GiB estimated"
        for name, text, bytes_here in zip(names, texts, split.loads, strict=False)
    ]
    lines[0] += " (main device: embedders, segmenter and loss included)"
    lines += [f"{name}: unused, there are only {len(split.blocks)} blocks" for name in names[len(split.blocks) :]]
    return tuple(lines)
