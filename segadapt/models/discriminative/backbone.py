"""Pretrained weights into the encoder of a segmenter that was made from scratch, strictly."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from segadapt.config import DiscriminativeSettings
from segadapt.errors import UserError
from segadapt.models.checkpoint_errors import explain_checkpoint_errors
from segadapt.models.discriminative.load import check_torch_reads_pickles_safely, listed, open_folder, read_weights
from segadapt.models.discriminative.segmenter import NetSegmenter
from segadapt.models.discriminative.state_file import is_file, read_state

SETTING = "model.discriminative.backbone"
# modules of classifiers and of whole segmenters, which no encoder has; a head is always made anew
HEADS = ("head.", "classifier.", "decode_head.", "auxiliary_head.")
# of an encoder's config: what tells its size, then what no shape of a weight tells
SIZES = ("hidden_sizes", "embed_dim", "hidden_size", "depths")
NO_SHAPE_TELLS = ("num_attention_heads", "strides", "layer_norm_eps", "hidden_act", "window_size")


def start_from(
    settings: DiscriminativeSettings, segmenter: NetSegmenter, console: Console | None = None
) -> NetSegmenter:
    """The same segmenter, ready for training: with `backbone` its encoder's weights replaced, which the console says.

    UserError: a backbone beside a checkpoint; none under a frozen encoder; see `load_backbone`.
    """
    family, config = segmenter.family, segmenter.net.config
    if settings.checkpoint is not None:
        return segmenter
    if settings.backbone is not None:
        said = load_backbone(
            segmenter, settings.backbone, revision=settings.revision, allow_pickle=settings.allow_pickle
        )
        if console is not None:
            console.print(said, highlight=False, soft_wrap=True, markup=False)
    elif family.encoder in family.frozen(config):
        raise UserError(f"{SETTING}=null: the encoder is frozen, and would stay random. Set it, or "
                        "model.discriminative.config.frozen=false.")  # fmt: skip
    return segmenter


def load_backbone(segmenter: NetSegmenter, backbone: str, *, revision: str | None, allow_pickle: bool) -> str:
    """Replace the encoder's random weights; gives one line that says what was read and what was left out.

    Args:
        backbone: a folder or hub id that transformers reads, of a bare encoder or of a net around one; or a file, see
            read_state, with names that the family's `encoder_names` knows: for SegFormer those of NVIDIA's mit_b*.pth,
            of mmsegmentation and of transformers, for DINOv2 those of transformers.
        allow_pickle: also read pytorch_model.bin, *.pth and *.pt, with torch's weights-only reader.
    Raises:
        UserError: missing, gated or damaged weights, or of another architecture; a key that is missing, unexpected or
            of another shape, but for those of HEADS.
    """
    name = segmenter.family.encoder
    if allow_pickle:
        check_torch_reads_pickles_safely(torch.__version__)
    encoder = segmenter.net.get_submodule(name)
    read = _read_file if is_file(backbone) else _read_folder
    state, faults, dropped = read(segmenter, encoder, backbone, revision=revision, allow_pickle=allow_pickle)
    of_bare = [fault for fault in faults if re.fullmatch(segmenter.family.bare_faults, fault)]
    faults = [fault for fault in faults if fault not in of_bare]
    if faults:
        raise UserError(
            f"{SETTING}={backbone}: the weights do not fit the encoder that model.discriminative.config describes: "
            f"{listed(faults, most=2)}. Expected every key once, in its shape. Choose the config of these weights, "
            "such as another model/discriminative of the family."
        )
    encoder.load_state_dict(state)
    left_out = f"; left out, as a head is made anew: {', '.join(dropped)}" if dropped else ""
    anew = [fault.removesuffix(" is missing") for fault in of_bare if fault.endswith(" is missing")]
    unread = [fault.removesuffix(" is unexpected") for fault in of_bare if fault.endswith(" is unexpected")]
    left_out += f"; left out, as nothing reads it: {', '.join(unread)}" if unread else ""
    made_anew = f"; made anew, as no bare encoder has it: {', '.join(anew)}" if anew else ""
    return f"backbone {backbone}: {len(state) - len(anew)} tensors into {name}{left_out}{made_anew}"


def _read_folder(
    segmenter: NetSegmenter, encoder: nn.Module, backbone: str, *, revision: str | None, allow_pickle: bool
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Weights under the encoder's names, every key at fault in words, and keys that were left out."""
    if not isinstance(encoder, PreTrainedModel):
        raise UserError(f"{SETTING}={backbone}: {segmenter.net.config.model_type} takes a file of ImageNet weights; "
                        "expected *.safetensors, *.pth or *.pt. Give the file.")  # fmt: skip
    source, where = open_folder(backbone, SETTING, revision=revision, allow_pickle=allow_pickle)
    is_needed = segmenter.family.encoder in segmenter.family.frozen(segmenter.net.config)
    without = "" if is_needed else ", or backbone=null for random weights"
    with explain_checkpoint_errors("backbone", backbone, SETTING, without=without):
        found, _ = PreTrainedConfig.get_config_dict(source, **where)
        _check_config(backbone, found, encoder)
        safe = None if allow_pickle else True
        net, faults = read_weights(type(encoder), source, config=encoder.config, use_safetensors=safe, **where)
    dropped = [fault for fault in faults if fault.startswith(HEADS) and fault.endswith(" is unexpected")]
    faults = [fault for fault in faults if fault not in dropped]
    return net.state_dict() if net else {}, faults, [fault.removesuffix(" is unexpected") for fault in dropped]


def _read_file(
    segmenter: NetSegmenter, encoder: nn.Module, backbone: str, *, revision: str | None, allow_pickle: bool
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """As `_read_folder`. UserError: a revision, which no file has."""
    if revision is not None:
        raise UserError(f"model.discriminative.revision={revision} beside the file {SETTING}={backbone}: it would have "
                        "no effect. Set it to null.")  # fmt: skip
    stored = read_state(backbone, SETTING, allow_pickle=allow_pickle)
    renamed = segmenter.family.encoder_names(encoder)
    dropped = [
        key for key in stored if key.removeprefix("backbone.").startswith(HEADS) or not renamed({key: stored[key]})
    ]
    state = renamed({key: value for key, value in stored.items() if key not in dropped})
    if isinstance(encoder, PreTrainedModel):  # which knows the names of older versions too
        net, faults = read_weights(type(encoder), None, config=encoder.config, state_dict=state)
        return net.state_dict() if net else {}, faults, dropped
    return state, _faults(state, encoder.state_dict()), dropped


def _faults(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Every key of another shape, missing or unexpected, in words."""
    shapes = {
        key: (tuple(state[key].shape), tuple(expected[key].shape)) for key in sorted(state.keys() & expected.keys())
    }
    return [
        *(f"{key} has shape {got}, expected {wanted}" for key, (got, wanted) in shapes.items() if got != wanted),
        *(f"{key} is missing" for key in sorted(expected.keys() - state.keys())),
        *(f"{key} is unexpected" for key in sorted(state.keys() - expected.keys())),
    ]


def _check_config(backbone: str, found: dict[str, Any], encoder: Any) -> None:
    """UserError: an encoder of another kind or size, or other in what no shape of a weight tells."""
    kind = encoder.config_class  # not that of encoder.config, which may be a subclass of ours
    if "model_type" not in found:
        raise UserError(f"{SETTING}={backbone}: expected a folder with config.json and model.safetensors, or a file of "
                        "weights; there is no config.json with a model_type. Of a run give its model/.")  # fmt: skip
    if found["model_type"] != kind.model_type:
        raise UserError(f"{SETTING}={backbone}: config.json has model_type {found['model_type']!r}; expected "
                        f"{kind.model_type}. Give weights of that architecture.")  # fmt: skip
    theirs = kind.from_dict(found)
    for name in (*SIZES, *NO_SHAPE_TELLS):
        values = (getattr(config, name, None) for config in (theirs, encoder.config))
        one, other = (list(value) if isinstance(value, tuple) else value for value in values)  # JSON has no tuples
        if one != other:
            cure = f"Set {name} there" + (", or choose another model/discriminative" if name in SIZES else "")
            raise UserError(f"{SETTING}={backbone}: its config.json has {name} {one}, model.discriminative.config has "
                            f"{other}; expected the same. {cure}.")  # fmt: skip
