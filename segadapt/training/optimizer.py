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


HEAD = ("head", "head undecayed")  # names of groups


def parameter_groups(
    segmenter: NetSegmenter, settings: TrainOptimizerSettings, *, more: Iterable[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Encoder, and head with lr_factor, each with a part without decay; each parameter that moves is in exactly one.

    undecayed=encoder_norms: the head's norms are decayed, as in mmseg's and NVIDIA's SegFormer; so are biases.
    norms_and_embeddings, as in Mask2Former's: neither norms, nor embeddings and tables. Frozen parameters are in none.

    Args:
        more: of the head's kind: the losses' own.
    Returns:
        groups with `name`, `base_lr` and `weight_decay`; empty ones are left out.
    """
    undecayed = {id(parameter) for parameter in segmenter.norm_parameters().values()}
    head = {id(parameter) for parameter in segmenter.head_parameters().values()}
    names = {False: ("encoder", "encoder norms"), True: ("head", "head")}  # is in the head: decayed, and not
    if settings.undecayed == "norms_and_embeddings":
        undecayed |= {id(parameter) for parameter in table_parameters(segmenter.net)}
        names = {False: ("encoder", "encoder undecayed"), True: ("head", "head undecayed")}
    groups: dict[str, list[nn.Parameter]] = {name: [] for both in names.values() for name in both}
    for parameter in segmenter.parameters().values():
        groups[names[id(parameter) in head][id(parameter) in undecayed]].append(parameter)
    groups["head"] += more
    moving = {name: [p for p in params if p.requires_grad] for name, params in groups.items()}
    return [
        {
            "params": params,
            "name": name,
            "base_lr": settings.lr * (settings.head_lr_factor if name in HEAD else 1),
            "lr": settings.lr * (settings.head_lr_factor if name in HEAD else 1),
            "weight_decay": settings.weight_decay if name in ("encoder", "head") else 0.0,
        }
        for name, params in moving.items()
        if params
    ]


def table_parameters(net: nn.Module) -> list[nn.Parameter]:
    """Embeddings, and what a module that is not of torch holds itself: tables of positions, tokens, scales of layers.

    Where mmseg matches names such as relative_position_bias_table, query_embed and level_embed.
    """
    return [
        parameter
        for module in net.modules()
        if isinstance(module, nn.Embedding) or not any(_is_torchs(kind) for kind in type(module).__mro__)
        for parameter in module.parameters(recurse=False)
    ]


def _is_torchs(kind: type) -> bool:
    return kind is not nn.Module and kind.__module__.startswith("torch.nn.modules.")


def build_optimizer(
    segmenter: NetSegmenter, settings: TrainOptimizerSettings, *, more: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """Over `parameter_groups`, AdamW fused on CUDA; a group of tensors on several meshes becomes several of one name.

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
        is_encoder = group["name"] not in HEAD
        group["lr"] = rate(t, group["base_lr"], train.schedule, iters=train.iters, is_encoder=is_encoder)
    return {group["name"]: group["lr"] for group in optimizer.param_groups}
