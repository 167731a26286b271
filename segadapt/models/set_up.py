"""What comes before any model: the process, its devices, where checkpoints lie; and the hash of what was loaded."""

import gc
import hashlib
import os
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers.utils import logging as transformers_logging

import segadapt
from segadapt.config import RuntimeSettings
from segadapt.errors import UserError
from segadapt.models.generative.lora import plain_state

DEFAULT_THREADS = torch.get_num_threads()
BUNDLED = "segadapt:"  # prefix of the models inside the package


def resolve(checkpoint: str | None, setting: str) -> str:
    """A checkpoint as the loaders take it: bundled names become folders of the package.

    Raises:
        UserError: no checkpoint, or an unknown bundled name.
    """
    if checkpoint is None:
        raise UserError(f"{setting} has no value; expected a hub id or a folder. Set it in your experiment file.")
    if checkpoint.startswith("~"):
        return str(Path(checkpoint).expanduser())
    if not checkpoint.startswith(BUNDLED):
        return checkpoint
    weights = Path(segadapt.__file__).parent / "weights"
    folder = weights / checkpoint.removeprefix(BUNDLED)
    if not folder.is_dir():
        names = sorted(str(path.parent.relative_to(weights)) for path in weights.glob("*/*/*.json"))
        raise UserError(f"{setting}={checkpoint} is not a bundled model. Choose from: {', '.join(names)}.")
    return str(folder)


def devices_of(runtime: RuntimeSettings) -> list[int] | list[str]:
    """All visible GPUs as integers, or ['cpu']; the first one is the main device.

    Raises:
        UserError: cuda is asked for and no GPU is visible.
    """
    gpus = list(range(torch.cuda.device_count()))
    if runtime.device == "cuda" and not gpus:
        raise UserError("runtime.device=cuda, but no GPU is visible; expected one or more. Check CUDA_VISIBLE_DEVICES "
                        "and the driver, or set runtime.device=cpu.")  # fmt: skip
    return gpus if gpus and runtime.device != "cpu" else ["cpu"]


def set_up(runtime: RuntimeSettings) -> torch.device:
    """Process-wide switches of torch; returns the main device."""
    main = torch.device(devices_of(runtime)[0])
    transformers_logging.disable_progress_bar()  # ours is the only bar
    diffusers_logging.disable_progress_bar()
    torch.set_num_threads(runtime.threads or DEFAULT_THREADS)  # all three anew: --multirun shares one process
    torch.use_deterministic_algorithms(runtime.deterministic)
    if runtime.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    gc.collect()  # recorded and compiled models refer to themselves, and --multirun shares one process
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32
    if main.type == "cuda":
        torch.cuda.init()  # or the next call finds no allocator
        torch.cuda.empty_cache()
        for gpu in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(gpu)
    return main


def count(module: nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of all parameters and buffers, adapters left out."""
    digest = hashlib.sha256()
    for name, tensor in sorted(plain_state(module).items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
