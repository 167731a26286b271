"""How many bytes a transformer needs to train, and which of its blocks each device takes.

accelerate's own planner counts weights only, measures what is free at the moment, and puts the overflow on the CPU
without an error; this one counts training, depends on the configuration alone, and refuses.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from segadapt.errors import UserError

GIB = 2**30
# Bytes kept for backward per token and channel of one block, bf16 autocast over float32 weights. Measured on
# SD3-medium: 41 GiB for 16 more pairs, 24 blocks, 1024 + 333 tokens, width 1536 (0.107 GiB per pair and block).
ACTIVATION_BYTES = 55
COMPILED_BYTES = 38  # the same with compiled blocks, which recompute cheap operations (1.67 GiB a pair: 37)
CHECKPOINTED_BYTES = 4  # the same with activation checkpointing: the block's input, float32 at most
RESERVE_BYTES = GIB  # CUDA context, cuBLAS workspace, fragmentation


@dataclass(frozen=True)
class Cost:
    """What decides how much memory a step takes, beside the transformer and the devices.

    Gradients and AdamW moments are counted for what requires a gradient, so adapters alone cost little.
    """

    trained: bool  # else the forward is expected to run without grad
    pairs: int  # (window, class) pairs at work at once, on all devices together
    tokens: int  # image + text tokens of one pair, (px / 16) ** 2 + L
    checkpointing: bool = False  # the transformer recomputes activations; this does not switch it on
    compiled: bool = False  # its blocks are
    recorded: bool = False  # its blocks are: one bf16 copy and one set of gradients serve all parts
    bf16: bool = False  # autocast, which keeps a bf16 copy of every weight until backward unless blocks are recomputed
    accumulates: bool = False  # a sum of gradients is kept from image to image
    parts: int = 1  # forwards of one backward: each keeps a bf16 copy, and gradients of several wait for each other
    fixed_main_bytes: int = 0  # on the main device: segmenter, logits' graph, text embeddings
    fixed_last_bytes: int = 0  # on the last device: autoencoder

    def weight_bytes(self, module: nn.Module, *, copies: int = 1) -> int:
        """Weights and buffers, and if trained gradients, both AdamW moments, and bf16 copies of the weights.

        Args:
            module: the transformer or a part of it.
            copies: whole transformers that share out moments, sums and parts; each keeps all its own gradients.
        """
        parts = 1 if self.recorded else -(-self.parts // copies)
        weights = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
        buffers = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
        if not self.trained:
            kept = 2 * sum(p.numel() for p in module.parameters()) if self.recorded and self.bf16 else 0
            return weights + buffers + kept
        moving = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
        has_copies = self.bf16 and not self.checkpointing
        cast = 2 * parts * sum(parameter.numel() for parameter in module.parameters()) if has_copies else 0
        gradients = moving * (2 if parts > 1 else 1)
        return weights + gradients + (3 if self.accumulates else 2) * moving // copies + cast + buffers

    def block_bytes(self, *, width: int, copies: int = 1) -> tuple[int, int]:
        """Bytes of one block's activations for the pairs of one transformer: until backward, and while it runs."""
        numbers = -(-self.pairs // copies) * self.tokens * width
        running = (COMPILED_BYTES if self.compiled else ACTIVATION_BYTES) * numbers * (1 if self.bf16 else 2)
        if not self.trained:
            return 0, running
        return (CHECKPOINTED_BYTES * numbers, running) if self.checkpointing else (running, 0)


@dataclass(frozen=True)
class Plan:
    """Contiguous blocks of each device that is used, and the bytes expected on it."""

    blocks: tuple[range, ...]
    loads: tuple[int, ...]


def deal(blocks: Sequence[range], virtual_stages: int) -> list[tuple[int, range]]:
    """(device, blocks) along the transformer: each device's number of blocks, in so many runs as even as possible.

    Interleaved pipeline stages (Narayanan et al. 2021): with v runs a device, parts reach the next v times as soon.
    """
    out, start = [], 0
    for turn in range(virtual_stages):
        for device, run in enumerate(blocks):
            stop = start + len(run) * (turn + 1) // virtual_stages - len(run) * turn // virtual_stages
            if stop > start:
                out.append((device, range(start, stop)))
            start = stop
    return out


def training_bytes(module: nn.Module, *, trained: bool, accumulates: bool = False) -> int:
    """Bytes of weights and buffers, and if trained of gradients and both AdamW moments: 16 per float32 parameter."""
    return Cost(trained, pairs=0, tokens=0, accumulates=accumulates).weight_bytes(module)


def plan(
    costs: Sequence[int],
    capacities: Sequence[int],
    *,
    fixed_main: int = 0,
    fixed_last: int = 0,
    fixed_each: int = 0,
    even_blocks: bool = False,
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
        fixed_main, fixed_last: bytes on the first device, the main one, and on the last, beside their blocks.
        fixed_each: bytes on every device beside its blocks, such as one block's activations while it is recomputed.
        even_blocks: before that, have as few blocks on the fullest device as fit: where devices work at the same time,
            the one with the most blocks keeps the others waiting.
        names: of the devices; like trained and checkpointing for the message alone.
    Raises:
        UserError: no split fits.
    """
    count = min(len(capacities), len(costs))
    fixed = [fixed_each] * count
    fixed[0] += fixed_main
    fixed[-1] += fixed_last
    prefix = [0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)

    def load(device: int, start: int, stop: int) -> int:
        return fixed[device] + prefix[stop] - prefix[start]

    def cuts(most: int, largest: int | None = None) -> tuple[int, list[int]] | None:
        """Best (score, ends of the runs), at most so many blocks each: score is the maximum, or under a given maximum
        the sum of squares."""
        best: list[tuple[int, list[int]] | None] = [(0, [])] + [None] * len(costs)
        for device in range(count):
            row: list[tuple[int, list[int]] | None] = [None] * (len(costs) + 1)
            for stop in range(device + 1, len(costs) + 1):
                for start in range(max(device, stop - most), stop):
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

    choices = range(-(-len(costs) // count), len(costs) + 1) if even_blocks else [len(costs)]
    most, smallest = next(((most, best) for most in choices if (best := cuts(most))), (0, None))
    if smallest is None:
        names = names or [f"device {device}" for device in range(count)]
        cures = ["lower model.generative.max_pairs"]
        if trained and not checkpointing:
            cures.append("set model.generative.gradient_checkpointing=true")
        if trained:
            cures.append("freeze it (model.update.generative=false)")
        raise UserError(_no_room(costs, capacities[:count], fixed, names=names, trained=trained, cures=cures))
    even = cuts(most, smallest[0])
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
        what = f"blocks {run_text(range(start, stop))}" if stop > start else "room for no block"
        parts.append(f"{name} {what} ({bytes_here / GIB:.1f} of {capacity / GIB:.1f} GiB)")
        start = stop
    missing = sum(costs[start:])
    purpose = "to train (weights, gradients, AdamW, activations)" if trained else "frozen (weights, activations)"
    needs = f"The generative model needs {(sum(costs) + sum(fixed)) / GIB:.1f} GiB {purpose}, segmenter included"
    if missing:
        fate = "where it cannot be trained" if trained else "where it would crawl"
        parts.append(f"no room for {run_text(range(start, len(costs)))}")
        needs += f"; {missing / GIB:.1f} GiB would land on the CPU, {fate}"
        first = "Make another GPU visible"
    else:
        needs += "; every device must hold at least one block"
        first = "Hide the device without room (CUDA_VISIBLE_DEVICES)"
    *others, last = cures
    return f"{needs}. Plan: {', '.join(parts)}. {', '.join([first, *others])}, or {last}."


def run_text(run: range) -> str:
    """As printed: 0-10."""
    return f"{run.start}-{run.stop - 1}" if len(run) > 1 else f"{run.start}"
