"""The shipped recipes: the numbers of NVIDIA's SegFormer and of DINOv2's heads, in every file that takes them over."""

import pytest

from segadapt.config_training import TrainConfig
from segadapt.models.discriminative.families import FAMILIES
from segadapt.parse import from_overrides

SIZES = ("b0", "b1", "b2", "b3", "b4", "b5")


def recipe(name):
    return from_overrides("train", [f"experiment={name}", "data.data_root=data"], TrainConfig)


def test_b5_at_640_is_nvidias():
    """local_configs/segformer/B5/segformer.b5.640x640.ade.160k.py; all but the three sizes as at 512."""
    given, other = recipe("segformer_b5_640_ade20k"), recipe("segformer_b5_ade20k")
    assert (given.data.short_side_px, given.train.transforms.box_short_px, given.train.transforms.crop_px) == (640,) * 3
    assert (given.train.transforms.box_long_px, given.evaluate.long_side_px, given.evaluate.window_px) == (
        2048, 2048, None)  # fmt: skip
    given.experiment.name = other.experiment.name
    given.data.short_side_px = other.data.short_side_px
    given.train.transforms.box_short_px, given.train.transforms.crop_px = 512, 512
    assert given == other


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("data", "iters", "batch", "side", "split", "rule"),
    [
        ("ade20k", 160_000, 16, 512, ("training", "validation"), ("aligned32", None)),
        ("cityscapes", 160_000, 8, 1024, ("train", "val"), ("box", (1024, 768))),
        ("coco_stuff", 80_000, 16, 512, ("train2017", "val2017"), ("box", None)),
    ],
)
def test_segformers_recipe_is_nvidias(size, data, iters, batch, side, split, rule):
    settings = recipe(f"segformer_{size}_{data}")
    t, e, chosen = settings.train, settings.evaluate, settings.model.discriminative
    assert (chosen.backbone, chosen.checkpoint) == (f"nvidia/mit-{size}", None)
    assert (settings.data.name, settings.data.split, t.validation_split) == (data, *split)
    assert (t.iters, t.batch_size, settings.data.short_side_px) == (iters, batch, side)
    o, s = t.optimizer, t.schedule
    assert (o.name, o.lr, o.head_lr_factor, o.weight_decay, o.beta1, o.beta2) == ("adamw", 6e-5, 10, 0.01, 0.9, 0.999)
    assert (s.kind, s.decay, s.power, s.min_lr, s.warmup_iters, s.warmup_factor) == (
        "multiplied", "poly", 1, 0, 1500, 1e-6)  # fmt: skip
    r = t.transforms
    assert (r.resize, r.box_long_px, r.box_short_px, r.crop_px, r.scale_low, r.scale_high) == (
        "box", 2048, side, side, 0.5, 2)  # fmt: skip
    assert (r.cat_max_ratio, r.flip, r.photometric) == (0.75, 0.5, True)
    windows = (e.window_px, e.stride_px) if e.window_px else None
    assert (e.input_resize, windows, e.logit_resize) == (*rule, "two_step")


def test_mask2formers_recipe_is_the_published_one():
    """mmsegmentation's configs/mask2former/mask2former_swin-s_8xb2-160k_ade20k-512x512.py and its bases."""
    settings = recipe("mask2former_swin_s_ade20k")
    t, e, chosen = settings.train, settings.evaluate, settings.model.discriminative
    assert (chosen.family, chosen.checkpoint) == ("mask2former", None)
    assert chosen.backbone == "microsoft/swin-small-patch4-window7-224"
    swin = chosen.config["backbone_config"]
    assert (swin["depths"], swin["window_size"], swin["drop_path_rate"]) == ([2, 2, 18, 2], 7, 0.3)
    made = FAMILIES["mask2former"].config(**chosen.config)
    assert (made.num_queries, made.decoder_layers - 1, made.encoder_layers, made.num_attention_heads) == (100, 9, 6, 8)
    assert (settings.data.name, t.iters, t.batch_size, settings.data.short_side_px) == ("ade20k", 160_000, 16, 512)
    o, s, r, m = t.optimizer, t.schedule, t.transforms, t.losses.masks
    assert (o.name, o.lr * o.head_lr_factor, o.lr, o.weight_decay, o.undecayed, o.clip_norm) == (
        "adamw", pytest.approx(1e-4), 1e-5, 0.05, "norms_and_embeddings", 0.01)  # fmt: skip
    assert (s.kind, s.decay, s.power, s.min_lr, s.warmup_iters) == ("chained", "poly", 0.9, 0, 0)
    assert (r.resize, r.scale_low, r.scale_high, r.scale_step, r.longest_px, r.crop_px, r.cat_max_ratio) == (
        "short_side", 0.5, 2, 0.1, 2048, 512, 0.75)  # fmt: skip
    assert (t.losses.cross_entropy.weight, m.weight, m.class_weight, m.mask_weight, m.dice_weight) == (0, 1, 2, 5, 5)
    assert (m.no_object_weight, m.points, m.oversample, m.importance) == (0.1, 12_544, 3, 0.75)
    assert (e.input_resize, e.long_side_px, e.size_divisor, e.window_px) == ("box", 2048, 32, None)


@pytest.mark.parametrize("name", ["s_linear", "b_linear", "s_ms", "b_ms"])
def test_dinov2s_recipe(name):
    settings = recipe(f"dinov2_{name}_ade20k")
    t, e, chosen = settings.train, settings.evaluate, settings.model.discriminative
    assert chosen.backbone == f"facebook/dinov2-{'small' if name[0] == 's' else 'base'}"
    assert chosen.config["layers"] == (4 if name.endswith("ms") else 1)
    assert (t.iters, t.batch_size, t.optimizer.lr, t.optimizer.weight_decay) == (40_000, 16, 1e-3, 1e-4)
    assert (t.schedule.kind, t.schedule.power, t.schedule.warmup_iters) == ("multiplied", 1, 1500)
    assert (t.transforms.resize, t.transforms.crop_px, settings.data.short_side_px) == ("short_side", 512, 512)
    assert (e.input_resize, e.window_px, e.stride_px) == ("short_side", 512, 341)
