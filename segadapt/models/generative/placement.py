"""Which transformer block lives on which device: an own plan, carried out by accelerate.dispatch_model.

The split is sequential: it buys memory, not speed. accelerate's own planner counts weights only, measures what is free
at the moment, and puts the overflow on the CPU without an error; this one counts training, depends on the configuration
alone, and refuses.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import dispatch_model
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import nn

from segadapt.errors import UserError

GIB = 2**30
# Bytes kept for backward per token and channel of one block, bf16 autocast over float32 weights. Measured on
# SD3-medium: 41 GiB for 16 more pairs, 24 blocks, 1024 + 333 tokens, width 1536 (0.107 GiB per pair and block).
ACTIVATION_BYTES = 55
CHECKPOINTED_BYTES = 4  # the same with activation checkpointing: the block's input, float32 at most
RESERVE_BYTES = GIB  # CUDA context, cuBLAS workspace, fragmentation

Device = int | str


@dataclass(frozen=True)
class Plan:
    """Contiguous blocks of each device that is used, and the bytes expected on it."""

    blocks: tuple[range, ...]
    loads: tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """Where every module of the transformer lives; `lines` print as a map."""

    device_map: dict[str, Device]  # module name -> device
    main_device: Device  # inputs, outputs, loose modules, segmenter, autoencoder, loss
    lines: tuple[str, ...]

    def device_of(self, name: str) -> torch.device:
        """The planned device of a parameter or buffer, by its name."""
        owners = [module for module in self.device_map if name == module or name.startswith(f"{module}.")]
        assert len(owners) == 1, f"{name} is covered by {owners} in the device map; expected exactly one entry"
        return torch.device(self.device_map[owners[0]])


def training_bytes(module: nn.Module, *, trained: bool, bf16_copies: bool = False, accumulates: bool = False) -> int:
    """Bytes of weights and buffers, and if trained of gradients and both AdamW moments: 16 per float32 parameter.

    Gradients and moments are counted for parameters that require a gradient, so adapters alone cost little.

    bf16_copies: autocast keeps a bf16 copy of every weight until backward, frozen ones beside adapters too (not where
        blocks are recomputed).
    accumulates: a sum of gradients is kept from image to image.
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
    if not trained:
        return weights + buffers
    moving = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    cast = 2 * sum(parameter.numel() for parameter in module.parameters()) if bf16_copies else 0
    return weights + (4 if accumulates else 3) * moving + cast + buffers


def activation_bytes(*, max_pairs: int, tokens: int, width: int, checkpointing: bool = False) -> int:
    """Bytes that one block keeps until backward for a chunk of `max_pairs` pairs of `tokens` image + text tokens."""
    return max_pairs * tokens * width * (CHECKPOINTED_BYTES if checkpointing else ACTIVATION_BYTES)


def plan(
    costs: Sequence[int],
    capacities: Sequence[int],
    *,
    fixed_main: int = 0,
    fixed_each: int = 0,
    names: Sequence[str] | None = None,
    trained: bool = True,
    checkpointing: bool = False,
) -> Plan:
    """Split blocks into contiguous runs, one for each device, with the smallest largest load; then the most even one.

    Exact dynamic programming over integers: first the smallest possible maximum, then under it the smallest sum of
    squared loads; of equal plans the one with fewer blocks on the later devices. With more devices than blocks, the
    first devices get one block each.

    Args:
        costs: bytes of each block, in order.
        capacities: bytes that each device can hold; the first one is the main device.
        fixed_main: bytes on the main device beside its blocks.
        fixed_each: bytes on every device beside its blocks, such as one block's activations while it is recomputed.
        names: of the devices; like trained and checkpointing for the message alone.
    Raises:
        UserError: no split fits.
    """
    count = min(len(capacities), len(costs))
    fixed = [fixed_each + (fixed_main if device == 0 else 0) for device in range(count)]
    prefix = [0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)

    def load(device: int, start: int, stop: int) -> int:
        return fixed[device] + prefix[stop] - prefix[start]

    def cuts(largest: int | None) -> tuple[int, list[int]] | None:
        """Best (score, ends of the runs): score is the maximum, or under a given maximum the sum of squares."""
        best: list[tuple[int, list[int]] | None] = [(0, [])] + [None] * len(costs)
        for device in range(count):
            row: list[tuple[int, list[int]] | None] = [None] * (len(costs) + 1)
            for stop in range(device + 1, len(costs) + 1):
                for start in range(device, stop):
                    bytes_here, before = load(device, start, stop), best[start]
                    if before is None or bytes_here > capacities[device]:
                        continue
                    if largest is None:
                        score = max(before[0], bytes_here)
                    elif bytes_here <= largest:
                        score = before[0] + bytes_here**2
                    else:
                        continue
                    if (known := row[stop]) is None or score <= known[0]:
                        row[stop] = (score, [*before[1], stop])
            best = row
        return best[-1]

    smallest = cuts(None)
    if smallest is None:
        names = names or [f"device {device}" for device in range(count)]
        cures = ["lower model.generative.max_pairs"]
        if trained and not checkpointing:
            cures.append("set model.generative.gradient_checkpointing=true")
        if trained:
            cures.append("freeze it (model.update.generative=false)")
        raise UserError(_no_room(costs, capacities[:count], fixed, names=names, trained=trained, cures=cures))
    even = cuts(smallest[0])
    assert even is not None, "the plan with the smallest maximum satisfies its own maximum"
    stops = even[1]
    blocks = tuple(range(start, stop) for start, stop in zip([0, *stops[:-1]], stops, strict=True))
    return Plan(blocks, tuple(load(device, run.start, run.stop) for device, run in enumerate(blocks)))


def _no_room(
    costs: Sequence[int],
    capacities: Sequence[int],
    fixed: Sequence[int],
    *,
    names: Sequence[str],
    trained: bool,
    cures: Sequence[str],
) -> str:
    """The message for a model that does not fit: what it needs, how far the devices go, what to do."""
    parts, start = [], 0
    for name, capacity, bytes_here in zip(names, capacities, fixed, strict=True):
        stop = start
        while stop < len(costs) and bytes_here + costs[stop] <= capacity:
            bytes_here, stop = bytes_here + costs[stop], stop + 1
        what = f"blocks {_run(range(start, stop))}" if stop > start else "room for no block"
        parts.append(f"{name} {what} ({bytes_here / GIB:.1f} of {capacity / GIB:.1f} GiB)")
        start = stop
    missing = sum(costs[start:])
    purpose = "to train (weights, gradients, AdamW, activations)" if trained else "frozen (weights, activations)"
    needs = f"The generative model needs {(sum(costs) + sum(fixed)) / GIB:.1f} GiB {purpose}, segmenter included"
    if missing:
        fate = "where it cannot be trained" if trained else "where it would crawl"
        parts.append(f"no room for {_run(range(start, len(costs)))}")
        needs += f"; {missing / GIB:.1f} GiB would land on the CPU, {fate}"
        first = "Make another GPU visible"
    else:
        needs += "; every device must hold at least one block"
        first = "Hide the device without room (CUDA_VISIBLE_DEVICES)"
    *others, last = cures
    return f"{needs}. Plan: {', '.join(parts)}. {', '.join([first, *others])}, or {last}."


def place(
    transformer: SD3Transformer2DModel,
    devices: Sequence[int] | Sequence[str],
    *,
    trained: bool,
    max_pairs: int,
    tokens: int,
    checkpointing: bool,
    bf16: bool = False,
    accumulates: bool = False,
    fixed_main_bytes: int = 0,
    force_hooks: bool = False,
    capacities: Sequence[int] | None = None,
) -> Placement:
    """Plan and dispatch; one device is a plain move. Afterwards never call `.to()` on the transformer or a parent.

    Loose modules (embeddings, norm_out, proj_out) live on the first device, the main one: inputs are given there, and
    the output returns there. dtype casts, adapters and requires_grad come before.

    Args:
        devices: GPU indices, all of them used; or "cpu" (several only to imitate a split, with force_hooks).
        trained: gradients and AdamW moments of what requires a gradient are counted; else the forward is expected to
            run without grad.
        max_pairs: (window, class) pairs in one forward.
        tokens: image + text tokens of one pair, (px / 16) ** 2 + L.
        checkpointing: whether the transformer recomputes activations; this does not switch it on.
        bf16: autocast, which keeps a bf16 copy of every weight until backward unless blocks are recomputed.
        accumulates: a sum of gradients is kept from image to image.
        fixed_main_bytes: segmenter, autoencoder and logits graph on the main device; the loose modules are added here.
        force_hooks: hooks even for one device, to test the split path.
        capacities: bytes of each device; default the whole GPU less 1 GiB, and no limit on the CPU.
    Raises:
        UserError: it does not fit, a device does not exist, or weights would lie on the CPU, disk or meta device.
    """
    names = [_name(device) for device in devices]
    _check_devices(transformer, devices, names)
    blocks, width = transformer.transformer_blocks, transformer.inner_dim
    one_block = activation_bytes(max_pairs=max_pairs, tokens=tokens, width=width)
    kept = activation_bytes(max_pairs=max_pairs, tokens=tokens, width=width, checkpointing=checkpointing)
    cost = {"trained": trained, "bf16_copies": bf16 and not checkpointing, "accumulates": accumulates}
    weights = [training_bytes(block, **cost) for block in blocks]
    loose = training_bytes(transformer, **cost) - sum(weights)
    split = plan(
        [weight + (kept if trained else 0) for weight in weights],
        [_capacity(device) for device in devices] if capacities is None else capacities,
        fixed_main=fixed_main_bytes + loose,
        # a block's activations exist one block at a time where they are recomputed or not kept at all
        fixed_each=one_block if checkpointing or not trained else 0,
        names=names,
        trained=trained,
        checkpointing=checkpointing,
    )
    main_device = devices[0]
    device_map: dict[str, Device] = {
        name: main_device for name, child in transformer.named_children() if child is not blocks
    }
    for device, run in zip(devices, split.blocks, strict=False):  # more devices than blocks: the rest stays empty
        device_map |= {f"transformer_blocks.{index}": device for index in run}
    placement = Placement(device_map, main_device, _lines(names, split))
    for name, _ in _tensors(transformer):
        placement.device_of(name)  # asserts that the map covers it
    dispatch_model(transformer, device_map, main_device=main_device, force_hooks=force_hooks)  # pyright: ignore
    assert_placed(transformer, placement)
    return placement


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


def _run(run: range) -> str:
    return f"{run.start}-{run.stop - 1}" if len(run) > 1 else f"{run.start}"


def _lines(names: Sequence[str], split: Plan) -> tuple[str, ...]:
    lines = [
        f"{name}: blocks {_run(run)}, {bytes_here / GIB:.1f} GiB estimated"
        for name, run, bytes_here in zip(names, split.blocks, split.loads, strict=False)
    ]
    lines[0] += " (main device: loose modules, segmenter, autoencoder and loss included)"
    lines += [f"{name}: unused, there are only {len(split.blocks)} blocks" for name in names[len(split.blocks) :]]
    return tuple(lines)
