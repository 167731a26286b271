"""Several devices at work at once: parts of the pairs pass through a split transformer, or through whole copies of it.

P (row, class) pairs   z y x latent channels and grid
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from segadapt.models.generative.stages import Stage

# of a split transformer: more parts wait less for each other, but cost the host more unless their work is recorded; of
# 4 and 8 parts, 4 were faster on two H200 unrecorded, and 8 recorded
SPLIT_PARTS, RECORDED_PARTS = 4, 8
CARRIERS = 2  # lanes of an owner: one gathers and adds while the other's numbers travel
SENT = 2**25  # numbers that travel between GPUs at a time


def count_parts(asked: int | None, *, devices: int, copies: int, recorded: bool) -> int:
    """Into how many parts pairs are cut: none on one device, else as asked and as many for each copy.

    Args:
        asked: None: 4 or, recorded, 8 on a split transformer, one for each of several copies.
    """
    if devices == 1:
        return 1
    if asked is None:
        asked = copies if copies > 1 else RECORDED_PARTS if recorded else SPLIT_PARTS
    return -(-asked // copies) * copies


class Lane:
    """A stream on every device for work that others must not wait for; on the CPU nothing.

    A copy between two GPUs makes both current streams wait for each other (PyTorch, aten/src/ATen/native/cuda/Copy.cu).
    On one stream a device, the second part would therefore begin when the first is back on the main device. Autograd
    runs the backward of an operation on the stream of its forward, so that backward overlaps as forward does.
    """

    def __init__(self, devices: Sequence[torch.device]):
        self._streams = [torch.cuda.Stream(device) for device in devices if device.type == "cuda"]

    def fork(self) -> None:
        """Let the lane wait for what its devices were given so far."""
        for stream in self._streams:
            stream.wait_stream(torch.cuda.current_stream(stream.device))

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Work given inside is the lane's."""
        with ExitStack() as entered:
            for stream in reversed(self._streams):  # the main device last: entering makes a device the current one
                entered.enter_context(torch.cuda.stream(stream))
            yield

    def join(self, device: torch.device | None = None) -> None:
        """Let the devices, or the one of them, wait for the lane."""
        for stream in self._streams:
            if device in (None, stream.device):
                torch.cuda.current_stream(stream.device).wait_stream(stream)


def read_later(tensor: Tensor) -> Callable[[], list[float]]:
    """Start a copy to the host; what is returned waits for it, and for nothing that the device is given meanwhile."""
    copy = tensor.to("cpu", non_blocking=True)
    if not tensor.is_cuda:
        return copy.tolist
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(tensor.device))

    def wait() -> list[float]:
        copied.synchronize()
        return copy.tolist()

    return wait


def send(sources: Sequence[Any], targets: Sequence[Any], *, add: bool) -> None:
    """Copy many tensors to another device, or add them there; many at a time, as each copy costs the host its time."""
    put: Any = torch._foreach_add_ if add else torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
    start = 0
    while start < len(sources):
        stop, numbers = start, 0
        while stop < len(sources) and numbers < SENT and sources[stop].dtype == sources[start].dtype:
            numbers, stop = numbers + sources[stop].numel(), stop + 1
        some = targets[start:stop]
        flat = torch.cat([source.reshape(-1) for source in sources[start:stop]]).to(some[0].device, non_blocking=True)
        put(list(some), [row.view_as(to) for row, to in zip(flat.split([t.numel() for t in some]), some, strict=True)])
        start = stop


class Parallel:
    """A transformer and how its work is shared out.

    One transformer, split over the devices or not: parts follow each other through it like cars through a line of
    stations (GPipe, Huang et al. 2019). Several, one a device: each takes a part. Then every parameter belongs to one
    of the copies: its gradient there is the sum over all, and it alone is updated (so the optimizer's state is shared
    out, as in ZeRO stage 1, Rajbhandari et al. 2020).

    Args:
        transformers: placed; the first one's inputs and outputs live on devices[0]. More than one: a copy each on
            devices[0], devices[1], ...
        devices: all that are used, the main one first.
        parts: into how many parts pairs are cut, at most; the same number for each copy.
        stages: of all transformers, where their blocks are recorded.
    """

    def __init__(
        self,
        transformers: Sequence[nn.Module],
        devices: Sequence[torch.device],
        *,
        parts: int,
        stages: Sequence[Stage] = (),
    ):
        assert parts >= 1, parts
        assert len(transformers) in (1, len(devices)), (len(transformers), devices)
        assert parts % len(transformers) == 0, (parts, len(transformers))
        self.transformers, self.devices, self.parts = tuple(transformers), tuple(devices), parts
        self._lanes = [Lane(devices) for _ in range(parts)] if parts > 1 else []
        copies = len(transformers) if len(transformers) > 1 else 0
        self._carriers = [Lane(devices) for _ in range(CARRIERS * copies)]
        if self._lanes:  # gradients of one weight come from several lanes; autograd waits for each, and warns
            torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        self._owner: dict[str, int] = {}  # of the parameters that move; empty for one transformer
        self._stages = stages
        self._updating = Lane(devices)
        self._arriving: list[Lane] = []  # lanes that update, carry gradients to owners, or owners' values to the copies
        self._read: list[Tensor] = []  # what the update reads; its memory must not go to others meanwhile
        self._sent: list[nn.Parameter] = []  # whose gradients are carried
        self._is_prepared = False

    # --- forward ---

    def velocities(self, part: Callable[[Any, slice], Tensor], pairs: int) -> Tensor:
        """[P, z, y, x] on the main device.

        Args:
            part: velocities of a slice of the pairs by a transformer, on the main device.
        """
        if not self._is_prepared:
            self.prepare()
        self._is_prepared = False
        count = min(self.parts, pairs)
        if count == 1:
            self._choose(0)
            return part(self.transformers[0], slice(0, pairs))
        ends = [pairs * index // count for index in range(count + 1)]
        lanes, out = self._lanes[:count], []
        for lane in lanes:
            lane.fork()
        for index, lane in enumerate(lanes):
            self._choose(index // len(self.transformers))
            with lane():
                out.append(part(self.transformers[index % len(self.transformers)], slice(*ends[index : index + 2])))
        for lane in lanes:
            lane.join()
        for velocity_Pzyx in out:
            if velocity_Pzyx.is_cuda:  # its memory is the lane's; the current stream reads it
                velocity_Pzyx.record_stream(torch.cuda.current_stream(velocity_Pzyx.device))
        return torch.cat(out)

    def prepare(self) -> None:
        """What `velocities` does before its parts; called earlier, it is done beside other work given before and after.

        No parameter may change between the two.
        """
        self.arrive()
        self._join_lanes()
        for stage in self._stages:
            stage.refresh()
        self._is_prepared = True

    def _join_lanes(self) -> None:
        """A stage reads weights and adds gradients on the lane of its part, which autograd does not know of."""
        for lane in self._lanes:
            lane.join()

    def _choose(self, part: int) -> None:
        for stage in self._stages:
            stage.part = part

    # --- update ---

    def update(self, step: Callable[[], bool], *, reads: Sequence[Tensor]) -> None:
        """Work of the optimizer; where it is a step (True), every copy gets the owners' values.

        It is done beside what the devices are given next, up to `arrive`.

        Args:
            reads: gradients, and whatever else was made by others.
        """
        self._updating.fork()
        with self._updating():
            if step():
                self.spread()
        self._arriving.append(self._updating)
        self._read = list(reads)

    def join_update(self) -> None:
        """Let the main device wait for the owners' new values; before the segmenter's are read, which has no copies."""
        self._updating.join(self.devices[0])

    # --- copies ---

    def own(self, names: Sequence[str]) -> dict[str, nn.Parameter]:
        """The parameters that move, by name: of several copies the owner's, so that each owns about as many numbers."""
        first = dict(self.transformers[0].named_parameters())
        if len(self.transformers) == 1:
            return {name: first[name] for name in names}
        load = [0] * len(self.transformers)
        for name in sorted(names, key=lambda name: (-first[name].numel(), name)):
            self._owner[name] = load.index(min(load))
            load[self._owner[name]] += first[name].numel()
        everywhere = [dict(transformer.named_parameters()) for transformer in self.transformers]
        return {name: everywhere[self._owner[name]][name] for name in names}

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Give each owner the sum of its parameter's gradients, in the order of the copies.

        The sums, and other copies without gradients, are there after `arrive`.
        """
        self._join_lanes()
        for lane, own, others in self._by_owner():
            self._arriving.append(lane)
            for copies in others:
                pairs = [(mine, theirs) for mine, theirs in zip(own, copies, strict=True) if theirs.grad is not None]
                for mine, _ in pairs:
                    mine.grad = torch.zeros_like(mine) if mine.grad is None else mine.grad
                send([theirs.grad for _, theirs in pairs], [mine.grad for mine, _ in pairs], add=True)
                self._sent += [theirs for _, theirs in pairs]

    @torch.no_grad()
    def spread(self) -> None:
        """Give every copy the owners' values, for after each change of a parameter; the next forward waits for them."""
        self.arrive()
        self._is_prepared = False
        for lane, own, others in self._by_owner():
            self._arriving.append(lane)
            for copies in others:
                send(own, copies, add=False)

    def arrive(self) -> None:
        """Let the devices wait for what is on its way; until then they score an image, and encode and segment the next.

        Before gradients or parameters are read, or written otherwise than by `update`.
        """
        while self._arriving:
            self._arriving.pop().join()
        self._read.clear()
        while self._sent:  # not before all lanes have met: another one would write where this one still reads
            self._sent.pop().grad = None

    def _by_owner(self) -> Iterator[tuple[Lane, list[nn.Parameter], list[list[nn.Parameter]]]]:
        """Of each owner, by lane, parameters and those of the other copies; inside the lane, so all links at once."""
        if not self._owner:
            return
        everywhere: list[Mapping[str, nn.Parameter]] = [dict(t.named_parameters()) for t in self.transformers]
        for lane in self._carriers:
            lane.fork()
        for index, lane in enumerate(self._carriers):
            owner = index // CARRIERS
            names = [name for name, of in self._owner.items() if of == owner][index % CARRIERS :: CARRIERS]
            of_copy = [[parameters[name] for name in names] for parameters in everywhere]
            with lane():
                yield lane, of_copy.pop(owner), of_copy
