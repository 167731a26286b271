"""Which parameters move at which rate, and the rule that moves them.

Groups are found by module type, never by the module's name: mmseg and NVIDIA match substrings of names, and
transformers 5 has renamed every module. Tables of positions are of no type, but have one of few names of their own.
On SegFormer-B0 of transformers encoder, its norms and head have 132, 60 and 13 tensors.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from segadapt.config_training import TrainOptimizerSettings, TrainSettings
from segadapt.errors import UserError
from segadapt.models.discriminative.segmenter import NetSegmenter
from segadapt.training.schedule import rate

OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], TrainOptimizerSettings, bool], torch.optim.Optimizer]] = {
    "adamw": lambda groups, o, fused: torch.optim.AdamW(groups, betas=(o.beta1, o.beta2), eps=o.eps, fused=fused),
    "sgd": lambda groups, o, fused: torch.optim.SGD(groups, momentum=o.momentum, fused=fused),
}

# of positions: Swin's of transformers and timm, then absolute ones of transformers and timm
TABLES = ("relative_position_bias_table", "position_embeddings", "pos_embed")
UNDECAYED = ("encoder norms", "encoder tables", "head norms")  # groups


def parameter_groups(
    segmenter: NetSegmenter, settings: TrainOptimizerSettings, *, more: Iterable[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Encoder, its norms and tables of positions without decay, head with lr_factor; each that moves is in exactly one.

    The head's BatchNorms are decayed, as in mmseg's and NVIDIA's SegFormer; its LayerNorms, of K-Net's kernels, are
    not; biases are. Frozen parameters are in none.

    Args:
        more: of the head's kind: the losses' own.
    Returns:
        groups with `name`, `base_lr` and `weight_decay`; empty ones are left out.
    """
    norms = {id(parameter) for parameter in segmenter.norm_parameters().values()}
    head = {id(parameter) for parameter in segmenter.head_parameters().values()}
    layer_norms = {id(p) for module in segmenter.net.modules() if isinstance(module, nn.LayerNorm)
                   for p in module.parameters()}  # fmt: skip
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in ("encoder", *UNDECAYED, "head")}
    for own_name, parameter in segmenter.parameters().items():
        if id(parameter) in head:
            name = "head norms" if id(parameter) in layer_norms else "head"
        elif id(parameter) in norms:
            name = "encoder norms"
        else:
            name = "encoder tables" if own_name.rsplit(".", 1)[-1] in TABLES else "encoder"
        groups[name].append(parameter)
    groups["head"] += more
    factor = {"head": settings.head_lr_factor, "head norms": settings.head_lr_factor}
    moving = {name: [p for p in params if p.requires_grad] for name, params in groups.items()}
    return [
        {
            "params": params,
            "name": name,
            "base_lr": settings.lr * factor.get(name, 1),
            "lr": settings.lr * factor.get(name, 1),
            "weight_decay": 0.0 if name in UNDECAYED else settings.weight_decay,
        }
        for name, params in moving.items()
        if params
    ]


def build_optimizer(
    segmenter: NetSegmenter, settings: TrainOptimizerSettings, *, more: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """Over `parameter_groups`, fused on CUDA.

    UserError: nothing moves.
    """
    groups = parameter_groups(segmenter, settings, more=more)
    if not groups:
        raise UserError("model.discriminative: every parameter is frozen; expected some that train. Unfreeze a part.")
    return OPTIMIZERS[settings.name](groups, settings, groups[0]["params"][0].is_cuda)


def set_rates(optimizer: torch.optim.Optimizer, t: int, train: TrainSettings) -> Mapping[str, float]:
    """Give each group its rate of step t (from 0); returns the rates by group."""
    for group in optimizer.param_groups:
        is_encoder = not group["name"].startswith("head")
        group["lr"] = rate(t, group["base_lr"], train.schedule, iters=train.iters, is_encoder=is_encoder)
    return {group["name"]: group["lr"] for group in optimizer.param_groups}
