"""A device without memory: one line that says what was at work, and which settings to lower."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

from segadapt.errors import UserError

# plain RuntimeErrors of torch: the host's, and what a CUDA library says in place of torch's own error
ALSO = ("DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")


@contextmanager
def explain_shortage(what: Callable[[], str], cures: Callable[[], Iterable[str]]) -> Iterator[None]:
    """UserError in place of torch's: what was at work, what the device was asked for, what to lower.

    Args:
        what, cures: asked if memory was short; what would take less, the cheapest first.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        is_known = isinstance(error, torch.OutOfMemoryError | MemoryError) or any(said in str(error) for said in ALSO)
        if not is_known:
            raise
        said = ". ".join(str(error).splitlines()[0].split(". ")[:3]) if str(error) else "the host is out of memory"
        raise UserError(f"{what()}: {said.rstrip('.')}. To need less: {', or '.join(cures())}.") from error
