"""UPerNet on Swin: as large as published, its head against transformers', its training, encoders of files."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quick_settings import quick_settings
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from training_runs import training
from transformers import ConvNextConfig, ConvNextForImageClassification, SwinConfig, SwinForImageClassification

from segadapt import train
from segadapt.config_training import TrainConfig
from segadapt.errors import UserError
from segadapt.losses import ClassWeights
from segadapt.models.discriminative.backbone import load_backbone
from segadapt.models.discriminative.families import FAMILIES
from segadapt.models.discriminative.make import make_segmenter
from segadapt.models.discriminative.upernet import average_pool
from segadapt.models.set_up import fingerprint

STAGES = ["stage1", "stage2", "stage3", "stage4"]
SIZES = {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2], "window_size": 4, "drop_path_rate": 0.0}
SWIN = {"model_type": "swin", **SIZES, "out_features": STAGES}
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1],
          "layer_type": "basic", "out_features": STAGES}  # fmt: skip
BROAD = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
CONVNEXT = {"model_type": "convnext", **BROAD, "out_features": STAGES}
CONFIG = {"backbone_config": SWIN, "hidden_size": 16, "auxiliary_channels": 8, "pool_scales": [1, 2]}


def made(**more):
    return make_segmenter("upernet", CONFIG | more, 5, seed=1)


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def parameters_of(file, num_classes):
    """Parameters of the shipped config, by part; no memory is taken."""
    chosen = quick_settings("train", [f"model/discriminative={file}"], TrainConfig).model.discriminative
    family = FAMILIES[chosen.family]
    with torch.device("meta"):
        net = family.net(family.config(num_labels=num_classes, **chosen.config))
    return {name: sum(p.numel() for p in part.parameters()) for name, part in net.named_children()}


@pytest.mark.parametrize(("size", "millions"), [("s", 81), ("b", 121), ("l", 234)])
def test_upernet_on_swin_is_as_large_as_published(size, millions):
    """Swin's paper (Liu et al. 2021), table 3: ADE20K, with the auxiliary head."""
    assert sum(parameters_of(f"upernet_swin_{size}", 150).values()) / 1e6 == pytest.approx(millions, abs=0.5)


@pytest.mark.parametrize("backbone", [SWIN, CONVNEXT, RESNET], ids=["swin", "convnext", "resnet"])
@pytest.mark.parametrize("size", [(64, 64), (70, 106)])
def test_outputs_have_what_training_asks_for(backbone, size):
    """The features are those that transformers' head classifies, caught on their way."""
    segmenter, seen = made(backbone_config=backbone), []
    segmenter.net.double()  # pools are sums of another order
    image_B3HW = images(2, 3, *size).double()
    with torch.no_grad():
        segmenter.net.decode_head.fpn_bottleneck.register_forward_hook(lambda _m, _i, out: seen.append(out))
        found = segmenter.outputs(image_B3HW)
        maps = segmenter.net.backbone(segmenter.normalised(image_B3HW)).feature_maps
        logits_BChw = segmenter.net.decode_head(maps)
        scored_BChw = segmenter.logits(image_B3HW)
        trained = segmenter.train().outputs(image_B3HW)
    assert torch.equal(seen[0], found.features_BDyx)
    torch.testing.assert_close(found.features_BDyx, seen[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.logits_BChw, logits_BChw, rtol=1e-9, atol=1e-12)
    assert torch.equal(found.logits_BChw, scored_BChw)
    assert found.auxiliary_BChw is None
    assert trained.auxiliary_BChw.shape == (2, 5, *maps[2].shape[2:])


@given(st.integers(1, 6), st.integers(1, 20), st.integers(1, 20))
def test_pools_and_their_gradient_are_torchs(n, height, width):
    image_BDyx = images(2, 3, height, width).double().requires_grad_()
    weights_BDnn = images(2, 3, n, n, seed=1).double()
    both = [pool(image_BDyx, n) for pool in (average_pool, F.adaptive_avg_pool2d)]
    grads = [torch.autograd.grad((mean_BDnn * weights_BDnn).sum(), image_BDyx)[0] for mean_BDnn in both]
    torch.testing.assert_close(*both, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_pools_add_in_float32_whatever_autocast_says(precision):
    image_BDyx = images(1, 2, 31, 33).to(precision)
    with torch.autocast("cpu", dtype=precision):
        found_BDnn = average_pool(image_BDyx, 2)
    assert found_BDnn.dtype == precision
    assert torch.equal(found_BDnn, average_pool(image_BDyx.double(), 2).to(precision))


@pytest.mark.parametrize("backbone", [SWIN, CONVNEXT, RESNET], ids=["swin", "convnext", "resnet"])
def test_twelve_steps_lower_the_loss_and_everything_that_trains_has_a_gradient(backbone):
    segmenter = made(backbone_config=backbone).train()
    image_B3HW = images(2, 3, 64, 64)
    label_BHW = (image_B3HW.mean(dim=1) > 0.5).long() + 2 * (torch.arange(64) > 30)
    trained = {name: p for name, p in segmenter.parameters().items() if p.requires_grad}
    assert {name for name in segmenter.parameters() if name not in trained} == (
        {"backbone.swin.layernorm.weight", "backbone.swin.layernorm.bias"} if backbone is SWIN else set()
    )
    optimizer, losses = torch.optim.AdamW(trained.values(), lr=1e-2), []
    for _ in range(12):
        found = segmenter.outputs(image_B3HW)
        sized = [F.interpolate(each, (64, 64), mode="bilinear") for each in (found.logits_BChw, found.auxiliary_BChw)]
        loss = sum(F.cross_entropy(each, label_BHW) for each in sized)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in trained.values())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"num_heads": [1, 1, 2, 3]},
            r"num_heads=\[1, 1, 2, 3\]: expected one number .* \[8, 16, 32, 64\] of embed_dim=8",
        ),
        ({"num_heads": [1, 1, 2]}, r"num_heads=\[1, 1, 2\]: expected one number a stage"),
        ({"num_heads": [1, 1, 2, 0]}, r"num_heads=\[1, 1, 2, 0\]: expected one number a stage"),
        ({"window_size": 0}, "window_size=0: expected 1 or more"),
        ({"drop_path_rate": 1.5}, r"drop_path_rate=1\.5: expected at least 0 and less than 1"),
        ({"model_type": "swn"}, r"model_type=swn is no model of transformers\. Did you mean swin\?"),
    ],
)
@pytest.mark.parametrize("family", ["upernet", "segadapt_knet", "mask2former"])
def test_a_swin_of_which_no_net_can_be_made_is_one_line(family, wrong, said):
    expected = rf"^model\.discriminative\.config\.backbone_config\.{said}[^\n]*$"
    with pytest.raises(UserError, match=expected):
        make_segmenter(family, {"backbone_config": SWIN | wrong}, 5)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("wrong", [{"embed_dim": 0}, {"embed_dim": -8}, {"out_features": ["stage9"]}])
def test_what_transformers_says_of_an_encoder_is_one_line(wrong):
    with pytest.raises(UserError, match=r"^model\.discriminative\.config: [^\n]*Correct it, or leave it out\.$"):
        made(backbone_config=SWIN | wrong)


def test_training_on_single_images_is_refused_before_it_begins(tmp_path):
    settings = training(tmp_path, "model.discriminative.family=upernet", "train.batch_size=1")
    settings.model.discriminative.config = CONFIG
    with pytest.raises(UserError, match=r"train\.batch_size=1 .*; upernet pools whole images, .*expected 2 or more"):
        train.run(settings)


@pytest.mark.parametrize("losses", ["default", "auxiliary"])
@pytest.mark.parametrize("has_head", [True, False])
def test_an_auxiliary_head_learns_by_its_loss_alone(losses, has_head, tmp_path):
    settings = training(tmp_path, f"train/losses={losses}")
    segmenter = made(use_auxiliary_head=has_head)
    if losses == "auxiliary" and not has_head:
        with pytest.raises(UserError, match=r"auxiliary\.weight=0\.4, but upernet has no auxiliary head"):
            train.build_objective(settings, segmenter, ClassWeights(None, None))
        return
    train.build_objective(settings, segmenter, ClassWeights(None, None))
    learning = [p.requires_grad for name, p in segmenter.parameters().items() if name.startswith("auxiliary_head.")]
    assert len(set(learning)) == has_head
    assert all(learns == (losses == "auxiliary") for learns in learning)


def test_a_swin_classifier_fills_the_encoder_and_the_maps_norms_start_anew(tmp_path):
    raw = SwinForImageClassification(SwinConfig(**SIZES, num_labels=7))
    with torch.no_grad():
        for parameter in raw.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    raw.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        segmenter = made()
        head = fingerprint(segmenter.net.decode_head)
        said = load_backbone(segmenter, str(source), revision=None, allow_pickle=False)
        assert fingerprint(segmenter.net.backbone.swin) == fingerprint(raw.swin)
        assert fingerprint(segmenter.net.decode_head) == head
        assert f": {len(raw.swin.state_dict())} tensors into backbone; left out, as a head" in said
        assert said.endswith("made anew, as no bare encoder has it: " + ", ".join(
            f"hidden_states_norms.{stage}.{kind}" for stage in STAGES for kind in ("bias", "weight")
        ))  # fmt: skip
        for norm in segmenter.net.backbone.hidden_states_norms.values():
            assert bool((norm.weight == 1).all() and (norm.bias == 0).all())


def test_the_encoder_of_a_whole_upernet_brings_its_norms(tmp_path):
    first, second = (make_segmenter("upernet", CONFIG, 3, seed=seed) for seed in (1, 2))
    with torch.no_grad():
        first.net.backbone.hidden_states_norms["stage2"].weight.fill_(3.0)
    first.save(tmp_path)
    said = load_backbone(second, str(tmp_path / "model.safetensors"), revision=None, allow_pickle=False)
    assert fingerprint(second.net.backbone) == fingerprint(first.net.backbone)
    assert "anew, as no bare" not in said


def test_a_convnext_classifier_leaves_the_norm_that_nothing_reads(tmp_path):
    raw = ConvNextForImageClassification(ConvNextConfig(**BROAD, num_labels=7))
    raw.save_pretrained(tmp_path)
    segmenter = made(backbone_config=CONVNEXT)
    said = load_backbone(segmenter, str(tmp_path), revision=None, allow_pickle=False)
    assert "left out, as nothing reads it: convnext.layernorm.bias, convnext.layernorm.weight; made anew" in said
    ours = segmenter.net.backbone.state_dict()
    theirs = {name: value for name, value in raw.convnext.state_dict().items() if not name.startswith("layernorm")}
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda s: s.pop("swin.embeddings.norm.bias"), r"embeddings\.norm\.bias is missing"),
        (lambda s: s.update(extra=torch.zeros(2)), "extra is unexpected"),
    ],
)
def test_every_other_key_counts(edit, said, tmp_path):
    SwinForImageClassification(SwinConfig(**SIZES, num_labels=7)).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    edit(state)
    save_file(state, tmp_path / "edited.safetensors")
    with pytest.raises(UserError, match=f"{said}. Expected every key once"):
        load_backbone(made(), str(tmp_path / "edited.safetensors"), revision=None, allow_pickle=False)


def test_another_window_is_refused(tmp_path):
    SwinForImageClassification(SwinConfig(**SIZES | {"window_size": 5}, num_labels=7)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"window_size 5, model\.discriminative\.config has 4; expected the same"):
        load_backbone(made(), str(tmp_path), revision=None, allow_pickle=False)
