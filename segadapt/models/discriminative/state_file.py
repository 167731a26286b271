"""One file of weights: names to tensors, or one line that says why not."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from segadapt.errors import UserError

PICKLES = (".pth", ".pt")
STATES = ("state_dict_ema", "state_dict")  # keys of weights, averaged ones of timm's scripts first
SUFFIXES = (".safetensors", *PICKLES)


def is_file(checkpoint: str) -> bool:
    """Whether a checkpoint names a file, there or not."""
    return Path(checkpoint).suffix in SUFFIXES or Path(checkpoint).expanduser().is_file()


def read_state(checkpoint: str, setting: str, *, allow_pickle: bool) -> dict[str, Tensor]:
    """Weights by name, on the CPU as they are stored; those under STATES where the file has one.

    Args:
        checkpoint: *.safetensors, or *.pth, *.pt, which torch's weights-only reader reads.
        setting: that holds it, for messages.
        allow_pickle: read *.pth and *.pt.
    Raises:
        UserError: no such file, another kind of file, a pickle without `allow_pickle` or with more than tensors and
            plain values, a damaged file, no weights in it.
    """
    path = Path(checkpoint).expanduser()
    if path.is_dir() or path.suffix not in SUFFIXES:
        raise UserError(f"{setting}={checkpoint} is no file of weights; expected a folder, or a file *.safetensors, "
                        "*.pth or *.pt.")  # fmt: skip
    if not path.is_file():
        raise UserError(f"{setting}={checkpoint}: there is no such file. Correct the path.")
    if path.suffix in PICKLES and not allow_pickle:
        raise UserError(
            f"{setting}={checkpoint} is a pickle, which can carry code; expected *.safetensors. Set "
            f"model.discriminative.allow_pickle=true if you trust its author: torch's weights-only reader reads it."
        )
    read = _read_pickle if path.suffix in PICKLES else _read_safetensors
    found = read(path, f"{setting}={checkpoint}")
    state = next((found[key] for key in STATES if key in found), found) if isinstance(found, Mapping) else None
    if not isinstance(state, Mapping) or not state:
        raise UserError(f"{setting}={checkpoint} holds no weights; expected tensors by name, at the top or under "
                        "`state_dict`. Give a checkpoint of a SegFormer.")  # fmt: skip
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"{setting}={checkpoint} holds a {type(value).__name__} as {name!r}; expected tensors by "
                            "name, at the top or under `state_dict`. Give a checkpoint of a SegFormer.")  # fmt: skip
    return {str(name): value.detach() for name, value in state.items()}


def _read_safetensors(path: Path, given: str) -> Any:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{given} is damaged or incomplete ({error}). Fetch it again.") from error


def _read_pickle(path: Path, given: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises anything; nothing of ours runs inside
        if refused := re.search(r"Unsupported global: GLOBAL (\S+\.\w+) ", str(error)):
            raise UserError(
                f"{given} holds {refused[1]}, and not only tensors and plain values; torch's weights-only reader "
                f"refuses it, as it could run code. If you trust its author, save its `state_dict` as *.safetensors."
            ) from error
        words = " ".join(str(error).split())[:100]
        said = f" ({words})" if re.search("[A-Za-z]", words) else ""  # of some there is a number alone
        raise UserError(f"{given} is damaged, incomplete or no file of torch{said}. Fetch it again.") from error
