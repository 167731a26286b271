"""Checkpoints of tensors that processes hold in parts: each writes its own, and any layout of processes reads them.

torch.distributed.checkpoint (DCP), its files in safetensors: no pickle is read.
"""

import hashlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from segadapt.training.parallel import World

FOLDER = "shards"  # in a checkpoint

logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)  # its debug reports are on warning level


def write(folder: Path | None, tensors: Mapping[str, Tensor], world: World) -> dict[str, str]:
    """Write all tensors into a folder, by all processes together; what several have alike is written once.

    Args:
        folder: of the first process, which makes it; nothing is read from the others.
        tensors: what this process holds: DTensors, and whole ones.
    Returns:
        SHA-256 of each file, in every process.
    Raises:
        OSError: a process cannot write, in every process.
    """
    folder = world.of_main(folder)
    assert folder is not None
    try:
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        with _one_process_may_do_it():
            save({name: _with_axis(tensor) for name, tensor in tensors.items()}, storage_writer=writer)
    except CheckpointException as error:
        for fault, _ in error.failures.values():
            if isinstance(fault, OSError):
                raise OSError(fault.errno, fault.strerror) from error
        raise
    own = {path.name: _sha256(path) for path in sorted(folder.iterdir())[world.rank :: world.size]}
    return {name: digest for part in world.every(own) for name, digest in part.items()}


def names_in(folder: Path) -> list[str]:
    """Of the tensors that `write` wrote."""
    return list(HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata)


def read(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors in place, of one process or of several, in whatever layout; each process reads its part alone."""
    reader = HuggingFaceStorageReader(str(folder))
    with _one_process_may_do_it():
        load({name: _with_axis(tensor) for name, tensor in tensors.items()}, storage_reader=reader, no_dist=True)


@contextmanager
def _one_process_may_do_it() -> Iterator[None]:
    """Without torch's warning that it takes this for a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _with_axis(tensor: Tensor) -> Tensor:
    """A view with one axis of a tensor that has none, which DCP cannot slice."""
    return tensor if tensor.ndim else tensor.view(1)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
