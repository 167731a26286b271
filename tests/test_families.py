"""What the table of families says of losses and of small images, against the networks."""

from types import SimpleNamespace
from typing import cast

import pytest
import torch
from quick_settings import quick_settings
from tiny_networks import MASK2FORMER, SWIN, TINY

from segadapt import train
from segadapt.config_training import TrainConfig
from segadapt.errors import UserError
from segadapt.models.discriminative.families import FAMILIES
from segadapt.models.discriminative.make import make_segmenter
from segadapt.models.discriminative.segmenter import NetSegmenter

CONVNEXT = {"model_type": "convnext", "hidden_sizes": [8] * 4, "depths": [1] * 4,
            "out_features": ["stage1", "stage2", "stage3", "stage4"]}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "config", "losses", "said"),
    [
        ("mask2former", MASK2FORMER, "default", "mask2former: its own loss is train/losses=masks; now cross_entropy"),
        ("mask2former", MASK2FORMER, "masks", None),
        ("upernet", {"backbone_config": SWIN}, "lovasz",
         "upernet: its own loss is train/losses=auxiliary; now cross_entropy, lovasz"),
        ("upernet", {"backbone_config": SWIN, "use_auxiliary_head": False}, "default", None),
        ("segadapt_knet", {"backbone_config": SWIN}, "auxiliary",
         "segadapt_knet: its own loss is train/losses=knet; now cross_entropy, auxiliary"),
        ("segadapt_knet", {"backbone_config": SWIN}, "knet", None),
        ("segadapt_hrnet", TINY["segadapt_hrnet"], "default", None),
    ],
)  # fmt: skip
def test_heads_that_no_loss_reads_are_told(family, config, losses, said):
    chosen = quick_settings("train", [f"train/losses={losses}"], TrainConfig)
    asked = SimpleNamespace(family=FAMILIES[family], net=SimpleNamespace(config=FAMILIES[family].config(**config)))
    assert train.unread_line(chosen, cast(NetSegmenter, asked)) == (said and f"{said} alone")


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("segformer", {"depths": [1] * 4, "hidden_sizes": [4] * 4, "num_attention_heads": [1] * 4}),
        ("upernet", {"backbone_config": CONVNEXT, "hidden_size": 4, "auxiliary_channels": 4}),
    ],
)
def test_the_least_side_of_a_family_passes_and_one_px_less_does_not(family, config):
    segmenter = make_segmenter(family, config, 3)
    least_px = segmenter.family.least_px(segmenter.net.config)
    assert segmenter.logits(torch.zeros(1, 3, least_px, 64)).shape[:2] == (1, 3)
    less_13HW = torch.zeros(1, 3, least_px - 1, 64)
    with pytest.raises(RuntimeError, match="Kernel size"):
        segmenter.net(pixel_values=less_13HW)
    said = rf"an image of {least_px - 1} x 64 px is too small for {family}; expected {least_px} px or more"
    for ask in (segmenter.logits, segmenter.outputs):
        with pytest.raises(UserError, match=said):
            ask(less_13HW)
