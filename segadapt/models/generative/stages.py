"""Blocks of one device as one stage: compiled, and on a GPU recorded as CUDA graphs.

P pairs   N image tokens   L text tokens   F width of the transformer
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor, nn

from segadapt.models.generative.plan import Cost
from segadapt.models.recording import Graphs, Memory, Piece, Recorder, Tensors


def compile_blocks(transformer: SD3Transformer2DModel, *, backend: str = "inductor") -> None:
    """Regional compilation: each block's forward in place; after placement, and after adapters.

    Two kinds of block are compiled (the last one drops its text stream), each for the first number of pairs it sees,
    once more for any number, and once more for a single pair: no other chunk size compiles again.

    Args:
        backend: of torch.compile; 'aot_eager' runs the traced operations one by one, and needs no compiler.
    """
    # all blocks of all devices and copies share one cache, with an entry for each kind, device and size
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for block in transformer.transformer_blocks:
        # accelerate keeps the forward of a placed block under this name and calls it between its two hooks
        name = "_old_forward" if hasattr(block, "_hf_hook") else "forward"
        setattr(block, name, torch.compile(getattr(block, name), backend=backend))


def runs_of(transformer: SD3Transformer2DModel) -> list[tuple[torch.device, list[nn.Module]]]:
    """Consecutive blocks that live on the same device, in order."""
    runs: list[tuple[torch.device, list[nn.Module]]] = []
    for block in transformer.transformer_blocks:
        device = next(block.parameters()).device
        if not runs or runs[-1][0] != device:
            runs.append((device, []))
        runs[-1][1].append(block)
    return runs


class _Block(nn.Module):
    """Forward of a block whose weights functional_call can replace."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block, self._run = block, block.forward

    def forward(self, hidden_PNF: Tensor, text_PLF: Tensor, temb_PF: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        text_PLF, hidden_PNF = self._run(hidden_states=hidden_PNF, encoder_hidden_states=text_PLF, temb=temb_PF)
        return hidden_PNF, text_PLF, temb_PF


class Stage:
    """Takes the place of consecutive blocks: the first one's forward becomes the whole stage, the others pass through.

    With autocast it reads copies of the linear layers' weights in that number format, made once for all parts, where
    autocast casts them at each call; gradients are summed in float32 all the same.

    Args:
        blocks: of one device, compiled or not; hooks of accelerate go, as the stage fetches its inputs itself.
        memories: one for each part that may be under way.
        most_pairs: of a part.
        dtype: of the autocast inside which it is called; None: there is none.
        backend: of torch.compile, for the sum of gradients: PyTorch's own takes twice as long where formats differ.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        memories: Sequence[Memory],
        *,
        most_pairs: int,
        dtype: torch.dtype | None,
        backend: str,
    ):
        for block in blocks:
            remove_hook_from_module(block)
        self._blocks = [_Block(block) for block in blocks]
        self._memories, self._most_pairs, self._dtype = memories, most_pairs, dtype
        self._add = torch.compile(_add, backend=backend) if dtype else _add
        self.part = 0  # which one comes next
        self._recorders: list[Recorder] = []
        self._casts: list[tuple[Tensor, nn.Parameter]] = []  # copies of weights that move
        blocks[0].forward = self
        for block in blocks[1:]:
            block.forward = _pass_through

    def __call__(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, joint_attention_kwargs: Any = None
    ) -> tuple[Tensor | None, Tensor]:
        """[P, N, F], [P, L, F], [P, F] -> text states (None after the last block) and hidden states."""
        assert joint_attention_kwargs is None
        assert self._recorders, "refresh comes first"
        device = next(self._blocks[0].parameters()).device
        inputs = (each.to(device) for each in (hidden_states, encoder_hidden_states, temb))
        hidden_PNF, text_PLF, _ = self._recorders[self.part](*inputs)
        assert hidden_PNF is not None
        return text_PLF, hidden_PNF

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the copies of weights up to date; before the parts of an image."""
        if not self._recorders:  # not before all is known about what moves
            pieces = [self._piece(block) for block in self._blocks]
            self._recorders = [Recorder(pieces, memory, most_rows=self._most_pairs) for memory in self._memories]
        elif self._casts:
            copies, parameters = zip(*self._casts, strict=True)
            torch._foreach_copy_(copies, parameters)  # pyright: ignore[reportPrivateImportUsage]

    def _piece(self, block: _Block) -> Piece:
        dtype = self._dtype
        linear = {id(p) for module in block.modules() if isinstance(module, nn.Linear) for p in module.parameters()}
        read: dict[str, Tensor] = {}
        moving: list[tuple[nn.Parameter, Tensor]] = []
        for name, parameter in block.named_parameters():
            cast = dtype is not None and id(parameter) in linear
            leaf = parameter.detach().to(dtype if cast else parameter.dtype)
            read[name] = leaf.requires_grad_(parameter.requires_grad)
            if parameter.requires_grad:
                moving.append((parameter, leaf))
                if cast:
                    self._casts.append((leaf, parameter))

        def run(*state: Tensor) -> Tensors:
            return torch.func.functional_call(block, read, state)

        parameters, leaves = zip(*moving, strict=True) if moving else ((), ())
        return Piece(run, parameters, leaves, [torch.zeros_like(parameter) for parameter in parameters], self._add)


def compile_and_record(transformers: Sequence[SD3Transformer2DModel], cost: Cost) -> list[Stage]:
    """What the cost says of it, done to all blocks; the stages are for Parallel. After placement and adapters."""
    if cost.compiled:
        for transformer in transformers:
            compile_blocks(transformer)
    if not cost.recorded:
        return []
    dtype = torch.bfloat16 if cost.bf16 else None
    graphs = {"parts": cost.parts, "pairs": cost.pairs, "dtype": dtype}
    return record_stages(transformers, lambda *of: Graphs(*of).memory, **graphs)


def record_stages(
    transformers: Sequence[SD3Transformer2DModel],
    graphs: Callable[[torch.device, int], Callable[[], Memory]],
    *,
    parts: int,
    pairs: int,
    dtype: torch.dtype | None,
    backend: str = "inductor",
) -> list[Stage]:
    """Every run of blocks on one device becomes a stage; after placement and compilation.

    Args:
        graphs: of a device and a priority (see Graphs), where memories for recording come from. Of several stages on a
            device the earliest goes first.
        parts, pairs: all parts of all transformers, and the pairs at work in them together.
        dtype, backend: as in Stage.
    """
    stages = []
    for transformer in transformers:
        runs = runs_of(transformer)
        for index, (device, blocks) in enumerate(runs):
            new = graphs(device, -sum(other == device for other, _ in runs[index + 1 :]))
            memories = [new() for _ in range(parts // len(transformers))]
            stages.append(Stage(blocks, memories, most_pairs=-(-pairs // parts), dtype=dtype, backend=backend))
    return stages


def _add(sums: list[Tensor], new: list[Tensor]) -> None:
    torch._foreach_add_(sums, new)  # pyright: ignore[reportPrivateImportUsage]


def _pass_through(
    hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, joint_attention_kwargs: Any = None
) -> tuple[Tensor, Tensor]:
    return encoder_hidden_states, hidden_states
