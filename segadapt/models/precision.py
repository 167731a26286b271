"""Number formats inside which the networks run; weights are float32 throughout."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


def autocast(device: torch.device, precision: str) -> torch.autocast | nullcontext:
    """bf16 for precision 'bf16', nothing for 'fp32'.

    A fresh context at each call, so that weights cached without grad are never reused (pytorch #65766).
    """
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether CUDA may run float32 convolutions and matrix products in TF32 inside; as before outside."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
