"""Work as CUDA graphs: two launches in place of thousands, which take the host longer than the GPU.

Shapes are those of whatever is recorded: the segmenter takes an image [B, 3, H, W] and gives logits [B, C, h, w]; a
stage of the transformer takes and gives the hidden states of P pairs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

MOST_SIZES = 16  # of images: each keeps its input, its logits and some megabytes of graph

Tensors = Sequence[Tensor | None]


class Memory(Protocol):
    """Where work is recorded; activations of all that is recorded in it share the place."""

    def warm_up(self, work: Callable[[], Any]) -> None:
        """Do it once: kernels are compiled and chosen."""
        ...

    def record(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Its result, and how to do it again: from the same inputs' memory into the same results' memory."""
        ...


class Graphs:
    """CUDA graphs of one device. Their replays follow each other, whatever streams they are asked for on.

    So parts that pass through several devices keep their order, and gradients are added by one at a time.

    Args:
        priority: beside other work of the device; the lower number goes first, 0 is the last.
    """

    def __init__(self, device: torch.device, priority: int = 0):
        self._device = device
        # recorded work keeps the priority of this stream; one less, as lanes draw on the 32 streams of priority 0, and
        # cuBLAS has one workspace a stream
        self.stream = torch.cuda.Stream(device, priority=priority - 1)
        self._last = torch.cuda.Event()  # end of the last replay; waiting for one that never was is nothing

    def memory(self) -> "GraphMemory":
        """Of its recordings one forward at a time may wait for its backward; other memories' may wait beside it."""
        return GraphMemory(self)

    def replay(self, graph: torch.cuda.CUDAGraph) -> None:
        """On the current stream, after the last replay."""
        stream = torch.cuda.current_stream(self._device)
        self.wait(stream)
        graph.replay()
        self._last.record(stream)

    def wait(self, stream: torch.cuda.Stream) -> None:
        """Let a stream wait for the last replay."""
        stream.wait_event(self._last)


class GraphMemory:
    """See Memory. Other threads may call CUDA meanwhile (a loader pins memory): they do not end a capture."""

    def __init__(self, graphs: Graphs):
        self._graphs, self._stream, self._pool = graphs, graphs.stream, torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], Any]) -> None:
        self._graphs.wait(self._stream)  # whose replays use this stream's workspace, and add to the same gradients
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            work()
        self._stream.synchronize()

    def record(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self._stream.device),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            result = work()
        return result, lambda: self._graphs.replay(graph)


@dataclass(frozen=True)
class Piece:
    """Some of the work: its outputs are the inputs of the next, in number and order."""

    run: Callable[..., Tensors]
    parameters: Sequence[nn.Parameter]  # that move
    leaves: Sequence[Tensor]  # what `run` reads in their place, perhaps in another number format; or they themselves
    grads: Sequence[Tensor]  # memory in which their .grad shall be, as large as they are
    add: Callable[[list[Tensor], list[Tensor]], Any] = torch._foreach_add_  # pyright: ignore[reportPrivateImportUsage]


def _enter(state: Tensors) -> list[Tensor | None]:
    return [None if t is None else t.detach().requires_grad_(t.requires_grad) for t in state]


def _first(tensors: Tensors, rows: int) -> list[Tensor | None]:
    return [None if t is None else t.detach()[:rows] for t in tensors]


def _settle(values: Tensors, places: Tensors | None) -> list[Tensor | None]:
    """Without their graph; in the places, where there are any and they are not there already."""
    out: list[Tensor | None] = []
    for value, place in zip(values, places or [None] * len(values), strict=True):
        if value is None or place is None or value.data_ptr() == place.data_ptr():
            out.append(None if value is None else value.detach())
        else:
            out.append(place.copy_(value.detach()))
    return out


class Recording:
    """Forward for inputs of one size, and backward into them and the parameters that move.

    Backward goes piece by piece: the gradients of one are added before those of the next exist.

    Args:
        pieces: see Piece.
        inputs: of the size; those that require a gradient get one.
        memory: see Memory.
        larger: a recording of the same kind and more rows, whose inputs' and outputs' places this one shares.
    """

    def __init__(
        self, pieces: Sequence[Piece], inputs: Sequence[Tensor], memory: Memory, *, larger: "Recording | None" = None
    ):
        self._pieces, self._with_grad = pieces, torch.is_grad_enabled()
        rows = len(inputs[0])
        own = _settle([t.detach().clone() for t in inputs], None if larger is None else _first(larger._inputs, rows))
        needs_grad = [self._with_grad and t.requires_grad for t in inputs]
        self._inputs = [t.requires_grad_(needs) for t, needs in zip(own, needs_grad, strict=True) if t is not None]
        self._out_places = None if larger is None else _first(larger._outputs, rows)
        self._in_places = None if larger is None or not larger.has_backward else _first(larger._in_grads, rows)
        self._live: list[tuple[Piece, Tensors, Tensors]] = []  # from forward to backward: pieces, inputs, outputs
        self._used: dict[nn.Parameter, Tensor] = {}  # parameters that get a gradient, and where it is
        self._out_grads: Tensors = []  # places for those of the outputs
        memory.warm_up(self._there_and_back)
        self.has_backward = any(grad is not None for grad in self._out_grads)
        if larger is not None and self.has_backward:
            self._out_grads = _first(larger._out_grads, rows)
        self._outputs, self._replay_forward = memory.record(self._run_forward)
        if self.has_backward:
            self._in_grads, self._replay_backward = memory.record(self._run_backward)
        self._live = []

    def close(self) -> None:
        """Let go of the graphs and of their places; it is of no use afterwards."""
        vars(self).clear()

    def _there_and_back(self) -> None:
        """Each piece forward and at once backward with gradients of zero, so that one piece's activations exist."""
        state: Tensors = self._inputs
        with torch.set_grad_enabled(self._with_grad):
            for piece in self._pieces:
                entered = _enter(state)
                state = piece.run(*entered)
                grads = [None if t is None or not t.requires_grad else torch.zeros_like(t) for t in state]
                if any(grad is not None for grad in grads):
                    self._leave(piece, entered, state, grads)
                self._out_grads = grads

    def _run_forward(self) -> Tensors:
        self._live, state = [], self._inputs
        with torch.set_grad_enabled(self._with_grad):
            for piece in self._pieces:
                entered = _enter(state)
                state = piece.run(*entered)
                if self._with_grad:
                    self._live.append((piece, entered, state))
        return _settle(state, self._out_places)

    def _run_backward(self) -> Tensors:
        grads = self._out_grads
        while self._live:
            grads = self._leave(*self._live.pop(), grads)
        return _settle(grads, self._in_places)

    def _leave(self, piece: Piece, entered: Tensors, left: Tensors, grads: Tensors) -> Tensors:
        """Backward of a piece: gradients of its inputs; those of its parameters are added."""
        ends = [(t, grad) for t, grad in zip(left, grads, strict=True) if t is not None and grad is not None]
        outputs, given = zip(*((t, grad) for t, grad in ends if t.requires_grad), strict=True)
        wanted = [t for t in entered if t is not None and t.requires_grad]
        with torch.autocast(given[0].device.type, enabled=False):  # else it casts what the forward left in float32
            arrived = iter(torch.autograd.grad(outputs, [*wanted, *piece.leaves], given, allow_unused=True))
        back = [next(arrived) if t is not None and t.requires_grad else None for t in entered]
        rows = zip(piece.parameters, piece.grads, arrived, strict=True)
        used = [(parameter, grad, new) for parameter, grad, new in rows if new is not None]
        self._used |= {parameter: grad for parameter, grad, _ in used}
        if used:
            piece.add([grad for _, grad, _ in used], [new for *_, new in used])
        return back

    def forward(self, inputs: Sequence[Tensor]) -> Tensors:
        """Outputs in memory of their own."""
        with torch.no_grad():
            for own, given in zip(self._inputs, inputs, strict=True):
                own.copy_(given)
            self._replay_forward()
            return [None if t is None else t.clone() for t in self._outputs]

    @torch.no_grad()
    def backward(self, grads: Tensors) -> Tensors:
        """Add the gradients of the last forward to the parameters' .grad; those of the inputs are returned."""
        for own, given in zip(self._out_grads, grads, strict=True):
            if own is not None:
                own.zero_() if given is None else own.copy_(given)
        new = [(parameter, grad) for parameter, grad in self._used.items() if parameter.grad is not grad]
        if new:
            torch._foreach_zero_([grad for _, grad in new])  # pyright: ignore[reportPrivateImportUsage]
        for parameter, grad in new:
            assert parameter.grad is None, "a recorded backward adds to gradients in memory of its own alone"
            parameter.grad = grad
        self._replay_backward()
        return [None if t is None else t.clone() for t in self._in_grads]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, recorder: "Recorder", recording: Recording, *inputs: Tensor) -> Any:
        ctx.recorder, ctx.recording, ctx.run = recorder, recording, recorder.runs
        ctx.set_materialize_grads(False)
        return tuple(recording.forward(inputs))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        assert ctx.run == ctx.recorder.runs, "another forward came before this backward: its work is in the way"
        return None, None, None, *ctx.recording.backward(grads)


class Recorder:
    """Pieces of work in a row, recorded for each size of their inputs.

    All recordings share the memory of activations, so the backward of one forward comes before the next forward.

    Args:
        pieces: see Piece.
        memory: see Memory.
        plain: the same work as it is: for the first time that a size is seen, and for sizes beyond `most_sizes`. No
            graph of it may be alive when its size comes the second time: its accumulators belong to another stream.
        most_sizes: with `plain`.
        most_rows: the first recording is for so many rows of all inputs, and smaller ones find room in its memory.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        memory: Memory,
        *,
        plain: Callable[..., Tensors] | None = None,
        most_sizes: int = MOST_SIZES,
        most_rows: int = 0,
    ):
        self._pieces, self._memory, self._plain = list(pieces), memory, plain
        self._most_sizes, self._most_rows = most_sizes, most_rows
        self._seen: set[Any] = set()
        self.runs = 0  # replays of whatever size
        self.recordings: dict[Any, Recording] = {}
        self._largest: dict[Any, Recording] = {}  # of each kind, where most_rows are known
        self._anchor = torch.zeros((), requires_grad=True)  # makes autograd call the backward

    def __call__(self, *inputs: Tensor) -> Tensors:
        """The outputs of the last piece."""
        kind = torch.is_grad_enabled(), *(t.requires_grad for t in inputs)
        size = kind, *(t.shape for t in inputs)
        if size not in self.recordings:
            if self._plain and (size not in self._seen or len(self.recordings) == self._most_sizes):
                self._seen.add(size)
                return self._plain(*inputs)
            if len(inputs[0]) < self._most_rows and kind not in self._largest:
                most = [t.detach()[:1].expand(self._most_rows, *t.shape[1:]) for t in inputs]
                most = [t.requires_grad_(given.requires_grad) for t, given in zip(most, inputs, strict=True)]
                self._largest[kind] = Recording(self._pieces, most, self._memory)
                self.recordings[kind, *(t.shape for t in most)] = self._largest[kind]
            larger = self._largest.get(kind) if len(inputs[0]) < self._most_rows else None
            self.recordings[size] = Recording(self._pieces, inputs, self._memory, larger=larger)
            if len(inputs[0]) == self._most_rows:
                self._largest.setdefault(kind, self.recordings[size])
        recording = self.recordings[size]
        self.runs += 1
        if not recording.has_backward:
            return recording.forward(inputs)
        return _Replay.apply(self._anchor, self, recording, *inputs)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Let go of all recordings, whoever holds them; it is of no use afterwards."""
        for recording in self.recordings.values():
            recording.close()
        self.recordings.clear()
        self._largest.clear()


def recorder_of(
    run: Callable[..., Tensors], memory: Memory | None, moving: Sequence[nn.Parameter] = ()
) -> Callable[..., Tensors]:
    """The same work, recorded where there is a memory.

    Args:
        run: of inputs on the memory's device.
        moving: parameters that it reads and that get gradients.
    """
    if memory is None:
        return run
    grads = [torch.empty_like(parameter) for parameter in moving]
    return Recorder([Piece(run, moving, moving, grads)], memory, plain=run)
