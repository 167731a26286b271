"""Which parameters move at which rate, and the rule that moves them.

Groups are found by module type, never by name: mmseg and NVIDIA match substrings of names, and transformers 5 has
renamed every module. On SegFormer-B0 of transformers encoder, its norms and head have 132, 60 and 13 tensors.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from segadapt.config_loop import LoopSettings, TrainOptimizerSettings
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
    """Encoder and head, the latter with lr_factor, each with a part without decay; what moves is in exactly one.

    Frozen parameters are in none.

    Args:
        more: of the head's kind: the losses' own.
    Returns:
        groups with `name`, `base_lr` and `weight_decay`; empty ones are left out.
    """
    undecayed = {id(parameter) for parameter in UNDECAYED[settings.undecayed](segmenter)}
    head = {id(parameter) for parameter in segmenter.head_parameters().values()}
    groups: dict[str, list[nn.Parameter]] = {
        "encoder": [], "encoder undecayed": [], "head": [], "head undecayed": []
    }  # fmt: skip
    for parameter in segmenter.parameters().values():
        name = "head" if id(parameter) in head else "encoder"
        groups[f"{name} undecayed" if id(parameter) in undecayed else name].append(parameter)
    groups["head"] += more
    moving = {name: [p for p in params if p.requires_grad] for name, params in groups.items()}
    rates = {name: settings.lr * (settings.head_lr_factor if _is_head(name) else 1) for name in groups}
    return [
        {
            "params": params,
            "name": name,
            "base_lr": rates[name],
            "lr": rates[name],
            "weight_decay": 0.0 if name.endswith("undecayed") else settings.weight_decay,
        }
        for name, params in moving.items()
        if params
    ]


def _is_head(group: str) -> bool:
    return group.startswith("head")


def encoder_norms(segmenter: NetSegmenter) -> list[nn.Parameter]:
    """As in mmseg's and NVIDIA's SegFormer: the head's norms are decayed, and so are biases."""
    head = segmenter.head_parameters()
    return [parameter for name, parameter in segmenter.norm_parameters().items() if name not in head]


def norms_and_embeddings(segmenter: NetSegmenter) -> list[nn.Parameter]:
    """As in Mask2Former's and K-Net's: norms, embeddings, and what a module that is not of torch holds itself.

    The last are tables of positions, tokens, scales of layers, where mmseg matches names such as
    relative_position_bias_table, query_embed and level_embed.
    """
    return [
        *segmenter.norm_parameters().values(),
        *(
            parameter
            for module in segmenter.net.modules()
            if isinstance(module, nn.Embedding) or not any(_is_torchs(kind) for kind in type(module).__mro__)
            for parameter in module.parameters(recurse=False)
        ),
    ]


def _is_torchs(kind: type) -> bool:
    return kind is not nn.Module and kind.__module__.startswith("torch.nn.modules.")


def norms_and_biases(segmenter: NetSegmenter) -> list[nn.Parameter]:
    """As in the training of classifiers: only matrices and convolutions are decayed."""
    return [parameter for parameter in segmenter.parameters().values() if parameter.ndim < 2]


# train.optimizer.undecayed
UNDECAYED: dict[str, Callable[[NetSegmenter], list[nn.Parameter]]] = {
    "encoder_norms": encoder_norms,
    "norms_and_embeddings": norms_and_embeddings,
    "norms_and_biases": norms_and_biases,
}


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


def set_rates(optimizer: torch.optim.Optimizer, t: int, train: LoopSettings) -> Mapping[str, float]:
    """Give each group its rate of step t (from 0); returns the rates by group."""
    for group in optimizer.param_groups:
        own = {"iters": train.iters, "is_encoder": not _is_head(group["name"])}
        group["lr"] = rate(t, group["base_lr"], train.schedule, **own)
    return {group["name"]: group["lr"] for group in optimizer.param_groups}
