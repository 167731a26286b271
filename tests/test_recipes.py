"""The shipped recipes: the numbers of NVIDIA's SegFormer and of DINOv2's heads, in every file that takes them over."""

import pytest

from segadapt.config_training import TrainConfig
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
