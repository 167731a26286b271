"""Segmenters from folders, hub ids and files of other code bases, strictly."""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.utils import logging as transformers_logging

from segadapt.errors import UserError
from segadapt.models.checkpoint_errors import explain_checkpoint_errors, local_folder
from segadapt.models.discriminative import keymaps
from segadapt.models.discriminative.families import FAMILIES
from segadapt.models.discriminative.make import value_at_fault
from segadapt.models.discriminative.segmenter import NetSegmenter
from segadapt.models.discriminative.state_file import is_file, read_state

SETTING = "model.discriminative.checkpoint"
ONEFLOW = ("pickled_data", "snapshot_done")  # files that every checkpoint of oneflow.save has one of


def load_segmenter(
    checkpoint: str,
    *,
    revision: str | None = None,
    num_classes: int | None,
    device: str | torch.device,
    channel_order: str | None = None,
    gradient_checkpointing: bool = False,
    allow_pickle: bool = False,
) -> NetSegmenter:
    """Read a segmenter with its head: float32, eval mode, on `device`.

    Args:
        checkpoint: folder (no network) or hub id, such as nvidia/segformer-b5-finetuned-ade-640-640, of any of
            FAMILIES; or a SegFormer file of NVIDIA's own code or of mmsegmentation, recognised by its keys.
        revision: branch, tag or commit of the hub id.
        num_classes: classes of the data set; the head is never made anew. None: there is no data set.
        channel_order: of the net's input, rgb or bgr; None: as its config says, else rgb.
        allow_pickle: also read pytorch_model.bin, *.pth and *.pt, with torch's weights-only reader.
    Raises:
        UserError: missing, gated or damaged checkpoint; another architecture; a head with other classes; a key that is
            missing, unexpected or of another shape.
    """
    if allow_pickle:
        check_torch_reads_pickles_safely(torch.__version__)
    read = _read_file if is_file(checkpoint) else _read_folder
    net, faults = read(checkpoint, revision=revision, num_classes=num_classes, allow_pickle=allow_pickle)
    if faults:
        to_fit, cure = (
            ("the SegFormer that their shapes describe", "Fetch the file again, complete, from where it was published.")
            if is_file(checkpoint)
            else (
                "their config.json",
                "Use the config that belongs to these weights, or save them anew with save_pretrained.",
            )
        )
        raise UserError(
            f"{SETTING}={checkpoint}: the weights do not fit {to_fit}: {listed(faults)}. Expected every key once, in "
            f"its shape. {cure}"
        )
    return NetSegmenter(net.to(device), channel_order=channel_order, gradient_checkpointing=gradient_checkpointing)


def _read_folder(
    checkpoint: str, *, revision: str | None, num_classes: int | None, allow_pickle: bool
) -> tuple[Any, list[str]]:
    """The net of a folder or hub id, and every key at fault, see `read_weights`."""
    source, where = open_folder(checkpoint, SETTING, revision=revision, allow_pickle=allow_pickle)
    with explain_checkpoint_errors("discriminative model", checkpoint, SETTING):
        found, _ = PreTrainedConfig.get_config_dict(source, **where)
        if not isinstance(found, Mapping):
            raise UserError(f"{SETTING}={checkpoint}: config.json holds no names with values. Fetch the folder again, "
                            "or correct the file.")  # fmt: skip
        # transformers takes a missing config.json for an empty one and would build its default architecture
        if "model_type" not in found and Path(source, "model", "config.json").is_file():
            raise UserError(f"{SETTING}={checkpoint} is the folder of a run; expected the model in it. Give "
                            f"{checkpoint.rstrip('/')}/model.")  # fmt: skip
        if found.get("model_type") not in FAMILIES:
            raise UserError(
                f"{SETTING}={checkpoint}: config.json has model_type {found.get('model_type')!r}; expected "
                f"one of {', '.join(FAMILIES)}. Give the folder or id of one of these, with a segmentation head."
            )
        if "ForImageClassification" in str(found.get("architectures")):
            raise UserError(
                f"{SETTING}={checkpoint} is a classifier of whole images; expected a segmenter. Train one on its "
                f"encoder, by model.discriminative.backbone={checkpoint} and checkpoint=null."
            )
        family = FAMILIES[found["model_type"]]
        if not isinstance(found.get("id2label") or {}, Mapping):
            raise UserError(f"{SETTING}={checkpoint}: config.json: id2label={found['id2label']!r}: expected numbers "
                            "with the names of classes. Fetch the folder again, or correct the file.")  # fmt: skip
        try:
            config = family.config.from_dict(found)
        except StrictDataclassError as error:
            raise UserError(f"{SETTING}={checkpoint}: config.json: {value_at_fault(error)}. Fetch the folder again, "
                            "or correct the file.") from error  # fmt: skip
        _check_classes(checkpoint, config.num_labels or 0, num_classes)
        return read_weights(family.net, source, config=config, use_safetensors=None if allow_pickle else True, **where)


def open_folder(
    checkpoint: str, setting: str, *, revision: str | None, allow_pickle: bool
) -> tuple[str, dict[str, Any]]:
    """Folder or hub id as transformers takes it, and the arguments that say which revision and whether to fetch.

    UserError: no such folder, one of pickles alone without `allow_pickle`, or one of OneFlow.
    """
    folder = local_folder(checkpoint, setting)
    if folder and any(found for name in ONEFLOW for found in (*folder.glob(name), *folder.glob(f"*/{name}"))):
        raise UserError(f"{setting}={checkpoint} is a checkpoint of OneFlow, as LiBai saves; only OneFlow reads it. "
                        "Write a *.safetensors file under NVIDIA's names there, and give that.")  # fmt: skip
    if not allow_pickle and folder and not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin")):
        raise UserError(
            f"{setting}={checkpoint} holds only pickled weights (*.bin), which can carry code; expected "
            f"model.safetensors. Convert it, or set model.discriminative.allow_pickle=true if you trust its author."
        )
    return str(folder or checkpoint), {"revision": revision, "local_files_only": folder is not None}


def _read_file(
    checkpoint: str, *, revision: str | None, num_classes: int | None, allow_pickle: bool
) -> tuple[Any, list[str]]:
    """The net of a file of NVIDIA or mmsegmentation, and every key at fault, under the names of transformers' modules.

    NVIDIA's weights get the class of transformers, and its LayerNorm eps of 1e-5 throughout, as NVIDIA's own files on
    the hub do; NVIDIA's code has 1e-6 in blocks and behind stages, which is less than 1e-4 of the logits.
    """
    state = read_state(checkpoint, SETTING, allow_pickle=allow_pickle)
    layout = keymaps.recognise(state)
    if layout is None:
        hint = (
            "These are names of transformers: give the folder, which holds config.json beside this file."
            if keymaps.is_of_transformers(state)
            else "Give a SegFormer of one of these, or a folder or hub id."
        )
        raise UserError(
            f"{SETTING}={checkpoint}: its {len(state)} keys, {min(state)} and others, are not those of "
            f"{' or '.join(one.name for one in keymaps.LAYOUTS)}. {hint}"
        )
    if not any(key.startswith("decode_head.") for key in state):
        raise UserError(
            f"{SETTING}={checkpoint}: an encoder of {layout.name} alone; expected also the keys decode_head.* of a "
            f"trained head. Give the file of a segmenter."
        )
    state = keymaps.renamed(state, layout)
    sizes, missing = keymaps.sizes(state, layout)
    if missing:
        return None, [f"{key} is missing" for key in missing]
    _check_classes(checkpoint, sizes["num_labels"], num_classes)
    family = FAMILIES[layout.model_type]
    return read_weights(family.net, None, config=family.config(**sizes), state_dict=state)


def _check_classes(checkpoint: str, found: int, expected: int | None) -> None:
    """UserError: the head has other classes than the data set."""
    if expected is not None and found != expected:
        raise UserError(
            f"{SETTING}={checkpoint}: its head has {found} classes, but the data set has {expected}. Choose a "
            f"checkpoint trained on this data set; a head is never made anew: train one on its encoder, by "
            f"model.discriminative.backbone={checkpoint} and checkpoint=null."
        )


def check_torch_reads_pickles_safely(version: str) -> None:
    """UserError: torch before 2.10, whose weights-only reader can run code (CVE-2025-32434, CVE-2026-24747)."""
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 10):
        raise UserError(
            f"model.discriminative.allow_pickle=true with torch {version}: its weights-only reader can run code from "
            f"the file; expected torch 2.10 or later. Upgrade torch, or use a checkpoint with safetensors."
        )


def listed(faults: Sequence[str], *, most: int = 8) -> str:
    """At most so many, and how many more there are."""
    return "; ".join(faults[:most]) + (f"; and {len(faults) - most} more" if len(faults) > most else "")


def read_weights(kind: Any, source: str | None, **options: Any) -> tuple[Any, list[str]]:
    """The net, and every key at fault in words; a net with faults is for the message only, never for use.

    Args:
        source: folder or hub id; None: the weights are in options["state_dict"].
    """
    options = options | {"dtype": torch.float32, "output_loading_info": True}
    # a net that is not built without values draws them, see foreign.py
    with without_load_report(), torch.random.fork_rng(devices=[]):
        try:
            net, info = kind.from_pretrained(source, **options)
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            # the library's error names no key: read once more to name them, and drop what was read
            _, info = kind.from_pretrained(source, ignore_mismatched_sizes=True, **options)
            net = None
    shapes = sorted((key, tuple(got), tuple(wanted)) for key, got, wanted in info["mismatched_keys"])
    return net, [
        *(f"{key} has shape {got}, expected {wanted}" for key, got, wanted in shapes),
        *(f"{key} is missing" for key in sorted(info["missing_keys"])),
        *(f"{key} is unexpected" for key in sorted(info["unexpected_keys"])),
    ]


@contextmanager
def without_load_report():
    """Keep the library's own table of bad keys off the terminal: our one line says it."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
