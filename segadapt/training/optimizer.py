"""Which parameters move at which rate, and the rule that moves them.

Groups are found by module type, never by name: mmseg and NVIDIA match substrings of names, and transformers 5 has
renamed every module. On SegFormer-B0 of transformers they have 132, 60 and 13 tensors.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from segadapt.config_pretraining import PretrainSettings
from segadapt.config_training import TrainOptimizerSettings, TrainSettings
from segadapt.errors import UserError
from segadapt.models.discriminative.segmenter import NetSegmenter
from segadapt.training.schedule import rate

OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], TrainOptimizerSettings, bool], torch.optim.Optimizer]] = {
    "adamw": lambda groups, o, fused: torch.optim.AdamW(groups, betas=(o.beta1, o.beta2), eps=o.eps, fused=fused),
    "sgd": lambda groups, o, fused: torch.optim.SGD(groups, momentum=o.momentum, fused=fused),
}


def parameter_groups(
    segmenter: NetSegmenter, settings: TrainOptimizerSettings, *, more: Iterable[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Encoder, its norms without decay, and head with lr_factor; each parameter that moves is in exactly one.

    The head's norms are decayed, as in mmseg's and NVIDIA's SegFormer; so are biases. Frozen parameters are in none.

    Args:
        more: of the head's kind: the losses' own.
    Returns:
        groups with `name`, `base_lr` and `weight_decay`; empty ones are left out.
    """
    norms = {id(parameter) for parameter in segmenter.norm_parameters().values()}
    head = {id(parameter) for parameter in segmenter.head_parameters().values()}
    groups: dict[str, list[nn.Parameter]] = {"encoder": [], "encoder norms": [], "head": []}
    for parameter in segmenter.parameters().values():
        name = "head" if id(parameter) in head else "encoder norms" if id(parameter) in norms else "encoder"
        groups[name].append(parameter)
    groups["head"] += more
    return _as_groups(groups, settings, without_decay=("encoder norms",))


def classifier_groups(
    segmenter: NetSegmenter, settings: TrainOptimizerSettings, *, more: Iterable[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """As `parameter_groups`, but only matrices and convolutions are decayed: no norm and no bias, nor the head's."""
    head = {id(parameter) for parameter in segmenter.head_parameters().values()}
    groups = {"encoder": [], "encoder norms and biases": [], "head": [], "head bias": []}
    for parameter in segmenter.parameters().values():
        decayed, others = ("head", "head bias") if id(parameter) in head else ("encoder", "encoder norms and biases")
        groups[decayed if parameter.ndim > 1 else others].append(parameter)
    groups["head"] += more
    return _as_groups(groups, settings, without_decay=("encoder norms and biases", "head bias"))


def _as_groups(
    groups: Mapping[str, list[nn.Parameter]], settings: TrainOptimizerSettings, *, without_decay: tuple[str, ...]
) -> list[dict[str, Any]]:
    """What moves of them, those of the head at its own rate."""
    moving = {name: [p for p in params if p.requires_grad] for name, params in groups.items()}
    rates = {name: settings.lr * (settings.head_lr_factor if _is_head(name) else 1) for name in groups}
    return [
        {
            "params": params,
            "name": name,
            "base_lr": rates[name],
            "lr": rates[name],
            "weight_decay": 0.0 if name in without_decay else settings.weight_decay,
        }
        for name, params in moving.items()
        if params
    ]


def _is_head(group: str) -> bool:
    return group.startswith("head")


def build_optimizer(
    segmenter: NetSegmenter,
    settings: TrainOptimizerSettings,
    *,
    more: Iterable[nn.Parameter] = (),
    groups_of: Callable[..., list[dict[str, Any]]] = parameter_groups,
) -> torch.optim.Optimizer:
    """Over the groups, fused on CUDA.

    Args:
        groups_of: parameter_groups or classifier_groups.
    Raises:
        UserError: nothing moves.
    """
    groups = groups_of(segmenter, settings, more=more)
    if not groups:
        raise UserError("model.discriminative: every parameter is frozen; expected some that train. Unfreeze a part.")
    return OPTIMIZERS[settings.name](groups, settings, groups[0]["params"][0].is_cuda)


def set_rates(optimizer: torch.optim.Optimizer, t: int, train: TrainSettings | PretrainSettings) -> Mapping[str, float]:
    """Give each group its rate of step t (from 0); returns the rates by group."""
    for group in optimizer.param_groups:
        own = {"iters": train.iters, "is_encoder": not _is_head(group["name"])}
        group["lr"] = rate(t, group["base_lr"], train.schedule, **own)
    return {group["name"]: group["lr"] for group in optimizer.param_groups}
