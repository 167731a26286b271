"""Segmenters with random weights, of a family's config; of which no net can be made, that is one line."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from segadapt.errors import UserError, did_you_mean, in_one_line
from segadapt.models.discriminative.families import FAMILIES
from segadapt.models.discriminative.segmenter import NetSegmenter

CLASS_NAMES = {"id2label", "label2id"}  # of a config


def make_segmenter(
    family: str,
    config: Mapping[str, Any],
    num_classes: int,
    *,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    channel_order: str | None = None,
    gradient_checkpointing: bool = False,
) -> NetSegmenter:
    """A segmenter with random weights, for training; float32.

    Args:
        family: a name of FAMILIES.
        config: keyword arguments of its config class (depths, hidden_sizes ...).
        classes: their names, for its config.json; None: numbered.
        seed: the weights depend on it alone; the global generator is left as it was.
    Raises:
        UserError: no such family, a key that its config does not have or that names classes, a value of another type,
            values of which no net can be made, or gradient_checkpointing with a family that cannot recompute.
    """
    made = config_of(family, config, num_classes, classes=classes)
    with torch.random.fork_rng(devices=[]), explain_config("no net can be made of it"):
        torch.manual_seed(seed)
        net = FAMILIES[family].net(made)
    net.to(torch.device(device))
    return NetSegmenter(net, channel_order=channel_order, gradient_checkpointing=gradient_checkpointing)


@contextmanager
def explain_config(what: str) -> Iterator[None]:
    """Turn what a net says of its own config into one UserError line; only its making, or one forward, belongs inside.

    Lists of other lengths, sizes of 0, heads that do not divide: what transformers does not ask for.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (ValueError, ArithmeticError, LookupError, RuntimeError) as error:
        said = in_one_line(error).removeprefix("ValueError: ")
        raise UserError(f"model.discriminative.config: {what}: {said}. Correct it, or leave it out.") from error


def config_of(
    family: str, config: Mapping[str, Any], num_classes: int, *, classes: Sequence[str] | None = None
) -> PreTrainedConfig:
    """The config of a net of a family. Args and UserError: see make_segmenter."""
    if family not in FAMILIES:
        raise UserError(f"model.discriminative.family={family} is not a family.{did_you_mean(family, FAMILIES)}")
    kind = FAMILIES[family]
    _check_keys(config, kind.config, "model.discriminative.config")
    for name in sorted(CLASS_NAMES & config.keys()):
        raise UserError(f"model.discriminative.config.{name}: the data set names the classes; expected none here. "
                        "Leave it out.")  # fmt: skip
    names = [f"class_{index}" for index in range(num_classes)] if classes is None else list(classes)
    assert len(names) == num_classes
    id2label = dict(enumerate(names))
    label2id = {label: index for index, label in id2label.items()}
    try:
        made = kind.config(**{**config, "id2label": id2label, "label2id": label2id})
    except UserError:
        raise
    except (StrictDataclassError, ValueError) as error:
        said = value_at_fault(error)
        raise UserError(f"model.discriminative.config: {said}. Correct it, or leave it out.") from error
    encoder = getattr(made, "backbone_config", None)
    _check_drops(made, "model.discriminative.config")
    _check_drops(encoder, "model.discriminative.config.backbone_config")
    _check_swin(encoder)
    return made


def _check_drops(config: Any, prefix: str) -> None:
    """UserError: a share of what training drops that is none; transformers asks in the first step, or never."""
    for name, value in ({} if config is None else vars(config)).items():
        if "drop" in name and type(value) in (int, float) and not 0 <= value < 1:
            raise UserError(f"{prefix}.{name}={value}: expected at least 0 and less than 1. Correct it.")


def _check_swin(encoder: Any) -> None:
    """UserError: a Swin of which no net can be made, or none that can be run; transformers does not ask."""
    if getattr(encoder, "model_type", "") not in ("swin", "swinv2"):
        return
    if encoder.window_size < 1:
        raise UserError(f"model.discriminative.config.backbone_config.window_size={encoder.window_size}: expected 1 or "
                        "more. Correct it.")  # fmt: skip
    widths = [encoder.embed_dim * 2**stage for stage in range(len(encoder.depths))]
    heads = list(encoder.num_heads)
    if len(heads) != len(widths) or any(
        number < 1 or width % number for width, number in zip(widths, heads, strict=True)
    ):
        raise UserError(f"model.discriminative.config.backbone_config.num_heads={heads}: expected one number a stage "
                        f"that divides its channels, {widths} of embed_dim={encoder.embed_dim}. Correct one of "
                        "them.")  # fmt: skip


def value_at_fault(error: Exception) -> str:
    """Which value is wrong: the last line, without the type of the error that it quotes."""
    return str(error).splitlines()[-1].strip().removeprefix("ValueError: ").removeprefix("TypeError: ")


def _check_keys(config: Mapping[str, Any], kind: type[PreTrainedConfig], prefix: str) -> None:
    """UserError: a key that the config class does not have, also within a config of a part; it would have no effect."""
    known = {field.name.lstrip("_") for field in fields(kind)} | set(kind.attribute_map) | {"model_type"}
    known |= {name for name in ("out_features", "out_indices") if hasattr(kind, name)}  # of some encoders no fields
    for key, value in config.items():
        if key not in known:
            raise UserError(f"{prefix}.{key} is not a setting of {kind.model_type}.{did_you_mean(key, known)}")
        inner = value.get("model_type", "") if isinstance(value, Mapping) else ""
        if inner in CONFIG_MAPPING:
            _check_keys(value, CONFIG_MAPPING[inner], f"{prefix}.{key}")
        elif inner or inner is None:
            raise UserError(f"{prefix}.{key}.model_type={inner} is no model of transformers."
                            f"{did_you_mean(str(inner), CONFIG_MAPPING)}")  # fmt: skip
