"""Which parameters move at which rate, and the rule that moves them.

Groups are found by module type, never by name: mmseg and NVIDIA match substrings of names, and transformers 5 has
renamed every module. On SegFormer-B0 of transformers they have 132, 60 and 13 tensors.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from segadapt.config_training import TrainOptimizerSettings, TrainSettings
from segadapt.errors import UserError
from segadapt.models.discriminative.segmenter import NetSegmenter
from segadapt.training.schedule import rate
from segadapt.training.sharded import by_mesh

OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], TrainOptimizerSettings, bool], torch.optim.Optimizer]] = {
    "adamw": lambda groups, o, fused: torch.optim.AdamW(groups, betas=(o.beta1, o.beta2), eps=o.eps, fused=fused),
    # torch has no fused SGD of what FSDP shards
    "sgd": lambda groups, o, _: torch.optim.SGD(groups, momentum=o.momentum),
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
    factor, decay = {"head": settings.head_lr_factor}, {"encoder norms": 0.0}
    moving = {name: [p for p in params if p.requires_grad] for name, params in groups.items()}
    return [
        {
            "params": params,
            "name": name,
            "base_lr": settings.lr * factor.get(name, 1),
            "lr": settings.lr * factor.get(name, 1),
            "weight_decay": decay.get(name, settings.weight_decay),
        }
        for name, params in moving.items()
        if params
    ]


def build_optimizer(
    segmenter: NetSegmenter, settings: TrainOptimizerSettings, *, more: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """Over `parameter_groups`; AdamW is fused on CUDA. A group of several meshes becomes several of one name.

    UserError: nothing moves.
    """
    groups = parameter_groups(segmenter, settings, more=more)
    if not groups:
        raise UserError("model.discriminative: every parameter is frozen; expected some that train. Unfreeze a part.")
    groups = [group | {"params": params} for group in groups for params in by_mesh(group["params"])]
    return OPTIMIZERS[settings.name](groups, settings, groups[0]["params"][0].is_cuda)


def set_rates(optimizer: torch.optim.Optimizer, t: int, train: TrainSettings) -> Mapping[str, float]:
    """Give each group its rate of step t (from 0); returns the rates by group."""
    for group in optimizer.param_groups:
        is_encoder = group["name"] != "head"
        group["lr"] = rate(t, group["base_lr"], train.schedule, iters=train.iters, is_encoder=is_encoder)
    return {group["name"]: group["lr"] for group in optimizer.param_groups}
