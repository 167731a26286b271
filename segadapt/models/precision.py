"""Number formats inside which the networks run; weights are float32 throughout."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """float64 in tests; all else as float32."""
    return values if values.dtype == torch.float64 else values.float()


def autocast(device: torch.device, precision: str, *, caches: bool | None = None) -> torch.autocast | nullcontext:
    """bf16 for precision 'bf16', nothing for 'fp32'.

    A fresh context at each call, so that weights cached without grad are never reused (pytorch #65766).

    Args:
        caches: a weight is cast once in the outermost context; None: as around it, which is true.
    """
    if precision != "bf16":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=caches)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether CUDA may run float32 convolutions and matrix products in TF32 inside; as before outside."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
