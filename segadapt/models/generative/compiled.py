"""Regional compilation: one block of the transformer is compiled, and the code serves all blocks like it."""

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel


def compile_blocks(transformer: SD3Transformer2DModel, *, backend: str = "inductor") -> None:
    """Compile each block's forward in place; after placement, and after adapters.

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
