"""The segmenter as CUDA graphs: two launches an image in place of thousands, which take the host longer than the GPU.

B images  3 RGB  H W image px  C dataset classes  h w logits, ceil(px / 4)
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MOST_SIZES = 16  # each keeps its input, its logits and some megabytes of graph; activations share one pool

Record = Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]  # work -> its result, and how to do it again


def cuda_recorder() -> Record:
    """Work given to it is captured; graphs of one recorder share memory, so they must not be under way together.

    Other threads may call CUDA meanwhile (a loader pins memory), hence the capture mode of this thread alone.
    """
    pool = torch.cuda.graph_pool_handle()

    def record(work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = work()
        return result, graph.replay

    return record


class Recording:
    """Forward for images of one size, and backward into the parameters that move.

    Args:
        forward: image [B, 3, H, W] -> logits, with a graph if anything moves.
        image_B3HW: of the size.
        moving: parameters; none: forward alone.
        grads: where their gradients shall arrive, one for each; shared by all sizes.
        record: see Record.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        image_B3HW: Tensor,
        moving: Sequence[nn.Parameter],
        grads: Sequence[Tensor],
        record: Record,
    ):
        self._image_B3HW = image_B3HW.clone()
        self._live: Tensor | None = None  # logits with their graph, from forward to backward
        self._used: list[tuple[nn.Parameter, Tensor]] = []

        def run_forward() -> Tensor:
            self._live = forward(self._image_B3HW)
            return self._live.detach()

        self._logits_BChw, self._replay_forward = record(run_forward)
        if not moving:
            self._live = None
            return
        self._grad_BChw = torch.empty_like(self._logits_BChw)

        def run_backward() -> None:
            assert self._live is not None
            found = torch.autograd.grad(self._live, moving, self._grad_BChw, allow_unused=True)
            self._live = None  # its memory may serve the next recording
            pairs = zip(moving, grads, found, strict=True)
            used = [(parameter, grad, value) for parameter, grad, value in pairs if value is not None]
            new = [value for _, _, value in used]
            torch._foreach_copy_([grad for _, grad, _ in used], new)  # pyright: ignore[reportPrivateImportUsage]
            self._used = [(parameter, grad) for parameter, grad, _ in used]

        _, self._replay_backward = record(run_backward)

    def forward(self, image_B3HW: Tensor) -> Tensor:
        """Logits in memory of their own."""
        self._image_B3HW.copy_(image_B3HW)
        self._replay_forward()
        return self._logits_BChw.clone()

    def backward(self, grad_BChw: Tensor) -> None:
        """Gradients of the last forward become the parameters' .grad, until the next backward overwrites them."""
        self._grad_BChw.copy_(grad_BChw)
        self._replay_backward()
        for parameter, grad in self._used:
            assert parameter.grad is None, "a recorded backward does not add to older gradients"
            parameter.grad = grad


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, recorder: "Recorder", recording: Recording, image_B3HW: Tensor) -> Tensor:
        recorder.runs += 1
        ctx.recorder, ctx.recording, ctx.run = recorder, recording, recorder.runs
        return recording.forward(image_B3HW)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, None]:
        assert ctx.run == ctx.recorder.runs, "another image came between forward and backward: its work is in the way"
        ctx.recording.backward(grads[0])
        return None, None, None, None


class Recorder:
    """A segmenter's forward; of each image size the first runs as it is, the second is recorded, the rest replayed.

    All recordings share their memory, so the backward of one forward comes before the next forward. And no graph of an
    earlier forward may be alive when a size comes the second time: its accumulators belong to another stream.

    Args:
        forward: as in Recording; with gradients enabled if anything moves.
        moving: as in Recording.
        record: see Record.
        most_sizes: further sizes are never recorded.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        moving: Sequence[nn.Parameter],
        *,
        record: Record,
        most_sizes: int = MOST_SIZES,
    ):
        self._forward, self._moving, self._record, self._most_sizes = forward, list(moving), record, most_sizes
        self._grads: list[Tensor] = []
        self._seen: set[torch.Size] = set()
        self.runs = 0  # replays of whatever size
        self.recordings: dict[torch.Size, Recording] = {}
        self._anchor = torch.zeros((), requires_grad=bool(self._moving))  # makes autograd call the backward

    def __call__(self, image_B3HW: Tensor) -> Tensor:
        """Logits [B, C, h, w] of an image [B, 3, H, W]."""
        size = image_B3HW.shape
        if size not in self.recordings:
            if size not in self._seen or len(self.recordings) == self._most_sizes:
                self._seen.add(size)  # this run also warms the kernels up
                return self._forward(image_B3HW)
            assert torch.is_grad_enabled() or not self._moving, "gradients can't be recorded where grad is off"
            self._grads = self._grads or [torch.empty_like(parameter) for parameter in self._moving]
            self.recordings[size] = Recording(self._forward, image_B3HW, self._moving, self._grads, self._record)
        return _Replay.apply(self._anchor, self, self.recordings[size], image_B3HW)  # type: ignore[no-any-return]
