"""Parameter groups by module type, and what the rules are given."""

import pytest
import torch
from training_runs import training
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from segadapt.errors import UserError
from segadapt.models.discriminative.segmenter import NetSegmenter
from segadapt.training.optimizer import build_optimizer, parameter_groups, set_rates

RULE = ("train.optimizer.lr=1.0", "train.optimizer.head_lr_factor=10", "train.optimizer.weight_decay=0.5")


@pytest.fixture(scope="module")
def b0() -> NetSegmenter:
    """SegFormer-B0: transformers' default sizes."""
    with torch.device("meta"):
        net = SegformerForSemanticSegmentation(SegformerConfig(num_labels=150))
    return NetSegmenter(net)


def test_b0_has_132_60_and_13_tensors(b0, tmp_path):
    groups = parameter_groups(b0, training(tmp_path, *RULE).train.optimizer)
    shown = {group["name"]: (len(group["params"]), group["lr"], group["weight_decay"]) for group in groups}
    assert shown == {"encoder": (132, 1.0, 0.5), "encoder undecayed": (60, 1.0, 0.0), "head": (13, 10.0, 0.5)}


def test_every_parameter_is_in_one_group_and_frozen_ones_in_none(build_segmenter, tmp_path):
    segmenter, more = build_segmenter(), torch.nn.Parameter(torch.ones(2))
    frozen = {name for name in segmenter.parameters() if name.startswith("segformer.stages.0.")}
    for name in frozen:
        segmenter.parameters()[name].requires_grad_(False)
    groups = parameter_groups(segmenter, training(tmp_path).train.optimizer, more=[more])
    placed = sorted(id(parameter) for group in groups for parameter in group["params"])
    moving = [p for name, p in segmenter.parameters().items() if name not in frozen]
    assert frozen
    assert placed == sorted(id(parameter) for parameter in [*moving, more])
    assert id(more) in {id(parameter) for parameter in groups[-1]["params"]}
    assert groups[-1]["name"] == "head"


def test_nothing_to_move_is_refused(build_segmenter, tmp_path):
    segmenter = build_segmenter()
    segmenter.net.requires_grad_(False)
    with pytest.raises(UserError, match=r"every parameter is frozen"):
        build_optimizer(segmenter, training(tmp_path).train.optimizer)


@pytest.mark.parametrize(
    ("overrides", "kind", "given"),
    [
        (("train.optimizer.beta2=0.99", "train.optimizer.eps=1e-6"), torch.optim.AdamW,
         {"betas": (0.9, 0.99), "eps": 1e-6}),
        (("train.optimizer.name=sgd", "train.optimizer.momentum=0.8"), torch.optim.SGD,
         {"momentum": 0.8, "nesterov": False}),
    ],
    ids=["adamw", "sgd"],
)  # fmt: skip
def test_the_rule_and_its_numbers_are_those_of_the_settings(build_segmenter, tmp_path, overrides, kind, given):
    optimizer = build_optimizer(build_segmenter(), training(tmp_path, *overrides).train.optimizer)
    assert type(optimizer) is kind
    assert {name: optimizer.defaults[name] for name in given} == given


def test_rates_follow_the_schedule_group_by_group(build_segmenter, tmp_path):
    train = training(
        tmp_path, *RULE, "train.iters=5", "train.schedule.min_lr=0.1", "train.schedule.encoder_warmup_iters=2"
    ).train
    optimizer = build_optimizer(build_segmenter(), train.optimizer)
    assert set_rates(optimizer, 0, train) == pytest.approx({"encoder": 0.5**4, "encoder undecayed": 0.5**4, "head": 10})
    assert set_rates(optimizer, 2, train) == pytest.approx({"encoder": 0.55, "encoder undecayed": 0.55, "head": 5.05})
    assert set_rates(optimizer, 4, train) == pytest.approx({"encoder": 0.1, "encoder undecayed": 0.1, "head": 0.1})
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1] * 3)
