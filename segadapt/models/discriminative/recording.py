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
        self._run = 0
        self.used: list[tuple[nn.Parameter, Tensor]] = []

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
            self.used = [(parameter, grad) for parameter, grad, _ in used]

        _, self._replay_backward = record(run_backward)

    def forward(self, image_B3HW: Tensor) -> tuple[Tensor, int]:
        """Logits, and the number of this run."""
        self._image_B3HW.copy_(image_B3HW)
        self._replay_forward()
        self._run += 1
        return self._logits_BChw.clone(), self._run

    def backward(self, grad_BChw: Tensor, run: int) -> None:
        """Gradients of the last run become the parameters' .grad, until the next one overwrites them."""
        assert run == self._run, "another image of this size came between forward and backward"
        self._grad_BChw.copy_(grad_BChw)
        self._replay_backward()
        for parameter, grad in self.used:
            assert parameter.grad is None, "a recorded backward does not add to older gradients"
            parameter.grad = grad


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, recording: Recording, image_B3HW: Tensor) -> Tensor:
        ctx.recording = recording
        logits_BChw, ctx.run = recording.forward(image_B3HW)
        return logits_BChw

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ctx.recording.backward(grads[0], ctx.run)
        return None, None, None


class Recorder:
    """A segmenter's forward; of each image size the first runs as it is, the second is recorded, the rest replayed.

    Args:
        forward: as in Recording; under the caller's grad mode.
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
        self._grads = [torch.empty_like(parameter) for parameter in self._moving]
        self._seen: set[torch.Size] = set()
        self.recordings: dict[torch.Size, Recording] = {}
        self._anchor = torch.zeros((), requires_grad=bool(self._moving))  # makes autograd call the backward

    def __call__(self, image_B3HW: Tensor) -> Tensor:
        """Logits [B, C, h, w] of an image [B, 3, H, W]."""
        size = image_B3HW.shape
        if size not in self.recordings:
            if size not in self._seen or len(self.recordings) == self._most_sizes:
                self._seen.add(size)  # this run also warms the kernels up
                return self._forward(image_B3HW)
            self.recordings[size] = Recording(self._forward, image_B3HW, self._moving, self._grads, self._record)
        return _Replay.apply(self._anchor, self.recordings[size], image_B3HW)  # type: ignore[no-any-return]
