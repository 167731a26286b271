"""Mask2Former's loss against a slow form of its own, its parts of a step, its training, and what is refused."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from quick_settings import quick_settings
from safetensors.torch import load_file
from tiny_networks import MASK2FORMER, SWIN
from torch.nn import functional as F
from training_runs import QUIET, Cut, lines_of, training
from transformers import SwinConfig, SwinForImageClassification
from transformers.utils.import_utils import is_scipy_available

from segadapt import train
from segadapt.config_training import LossesSettings, TrainConfig
from segadapt.errors import UserError
from segadapt.losses import Objective, check_losses, settings
from segadapt.models.discriminative import Outputs, Queries
from segadapt.models.discriminative.backbone import load_backbone
from segadapt.models.discriminative.load import load_segmenter
from segadapt.models.discriminative.make import make_segmenter
from segadapt.models.set_up import fingerprint
from segadapt.training.loop import Training
from segadapt.training.optimizer import parameter_groups

needs_scipy = pytest.mark.skipif(not is_scipy_available(), reason="needs segadapt[mask2former]")
MASKS = "train/losses=masks"
CLASSES, QUERIES, POINTS = 4, 5, 40


def losses_of(*overrides: str) -> LossesSettings:
    return quick_settings("train", [MASKS, f"train.losses.masks.points={POINTS}", *overrides], TrainConfig).train.losses


def build(*overrides: str, num_queries=QUERIES) -> Objective:
    return Objective(losses_of(*overrides), num_classes=CLASSES, feature_channels=4, class_weights_C=None, seed=0,
                     num_queries=num_queries)  # fmt: skip


def batch(seed=0, *, images=3, num_queries=QUERIES):
    """Raw logits of two layers with graphs on a grid of 6 x 8, and labels of 12 x 16 with a void rim."""
    generator = torch.Generator().manual_seed(seed)
    class_LBQn = tuple(
        torch.randn(images, num_queries, CLASSES + 1, generator=generator).requires_grad_() for _ in range(2)
    )
    mask_LBQhw = tuple(
        3 * torch.randn(images, num_queries, 6, 8, generator=generator).requires_grad_() for _ in range(2)
    )
    label_BHW = torch.randint(0, CLASSES, (images, 3, 4), generator=generator)
    label_BHW = label_BHW.repeat_interleave(4, 1).repeat_interleave(4, 2)
    label_BHW[:, :2] = 255
    label_BHW[0, :, :8], label_BHW[0, :, 8:] = 1, 255
    logits_BChw = torch.zeros(images, CLASSES, 6, 8)
    return Outputs(logits_BChw, None, torch.zeros(images, 4, 6, 8), queries=Queries(class_LBQn, mask_LBQhw)), label_BHW


# --- the slow form ---


def sampled(map_hw: np.ndarray, points_P2: np.ndarray) -> np.ndarray:
    """Bilinear at points (x, y) in 0..1, pixel centres at half numbers, 0 outside."""
    padded, found = np.pad(map_hw, 1), []
    for x, y in points_P2:
        column, row = x * map_hw.shape[1] + 0.5, y * map_hw.shape[0] + 0.5  # in the padded map, from its first centre
        left, top = int(np.floor(column)), int(np.floor(row))
        right, down = column - left, row - top
        found.append(
            padded[top, left] * (1 - right) * (1 - down) + padded[top, left + 1] * right * (1 - down)
            + padded[top + 1, left] * (1 - right) * down + padded[top + 1, left + 1] * right * down
        )  # fmt: skip
    return np.array(found)


def bce(logits_P: np.ndarray, truth_P: np.ndarray) -> float:
    return float(np.mean(np.log1p(np.exp(-np.abs(logits_P))) + np.maximum(logits_P, 0) - logits_P * truth_P))


def dice(logits_P: np.ndarray, truth_P: np.ndarray) -> float:
    p = 1 / (1 + np.exp(-logits_P))
    return 1 - (2 * (p * truth_P).sum() + 1) / (p.sum() + truth_P.sum() + 1)


def slowly(queries: Queries, label_BHW: torch.Tensor, *, oversample=3, importance=0.75) -> dict[str, float]:
    """The three terms in float64, image by image and permutation by permutation, with the draws of the real one."""
    total: dict[str, float] = {"masks_class": 0.0, "masks_bce": 0.0, "masks_dice": 0.0}
    truths = [{c: (one == c).double().numpy() for c in range(CLASSES) if (one == c).any()} for one in label_BHW]
    for classes, masks in zip(queries.class_LBQn, queries.mask_LBQhw, strict=True):
        class_BQn, mask_BQhw = classes.detach().double().numpy(), masks.detach().double().numpy()
        pairs, weights, said = [], 0.0, 0.0  # (query's mask, true mask)
        for class_Qn, mask_Qhw, truth in zip(class_BQn, mask_BQhw, truths, strict=True):
            points = torch.rand(1, POINTS, 2)[0].double().numpy()
            p_Qn = np.exp(class_Qn) / np.exp(class_Qn).sum(axis=1, keepdims=True)
            mine, its = [sampled(one, points) for one in mask_Qhw], {c: sampled(truth[c], points) for c in truth}
            cost = {
                (q, c): -2 * p_Qn[q, c] + 5 * bce(mine[q], its[c]) + 5 * dice(mine[q], its[c])
                for q in range(len(mine)) for c in truth
            }  # fmt: skip
            best = min(
                itertools.permutations(range(len(mine)), len(truth)),
                key=lambda queries: sum(cost[q, c] for q, c in zip(queries, truth, strict=True)),
            )
            class_of = dict(zip(best, truth, strict=True))
            for q in range(len(mine)):
                weight = 1 if q in class_of else 0.1
                said -= weight * np.log(p_Qn[q, class_of.get(q, CLASSES)])
                weights += weight
            pairs += [(mask_Qhw[q], truth[class_of[q]]) for q in sorted(class_of)]
        total["masks_class"] += said / weights
        many_MP2 = torch.rand(len(pairs), POINTS * oversample, 2).double().numpy()
        few_MP2 = torch.rand(len(pairs), POINTS - int(POINTS * importance), 2).double().numpy()
        for (mine_hw, its_HW), many_P2, few_P2 in zip(pairs, many_MP2, few_MP2, strict=True):
            unsure = np.argsort(np.abs(sampled(mine_hw, many_P2)), kind="stable")[: int(POINTS * importance)]
            points = np.concatenate([many_P2[unsure], few_P2])
            found, true = sampled(mine_hw, points), sampled(its_HW, points)
            total["masks_bce"] += bce(found, true) / len(pairs)
            total["masks_dice"] += dice(found, true) / len(pairs)
    return total


@needs_scipy
@pytest.mark.parametrize("seed", range(3))
def test_the_loss_is_that_of_a_slow_form_with_the_same_draws(seed):
    outputs, label_BHW = batch(seed)
    assert outputs.queries is not None
    torch.manual_seed(seed)
    terms = build()(outputs, label_BHW, step=1)
    torch.manual_seed(seed)
    expected = slowly(outputs.queries, label_BHW)
    assert {name: value.item() for name, value in terms.values.items()} == pytest.approx(expected, rel=1e-4)
    assert terms.weights == {"masks_class": 2, "masks_bce": 5, "masks_dice": 5}
    assert terms.total.item() == pytest.approx(sum(terms.weights[name] * expected[name] for name in expected), rel=1e-4)
    terms.total.backward()
    assert all(one.grad.isfinite().all() and one.grad.any() for one in outputs.queries.class_LBQn)  # pyright: ignore


@needs_scipy
def test_void_is_in_no_mask_and_counts_against_all():
    label_BHW = torch.full((1, 12, 16), 255)
    label_BHW[:, :, :8] = 2
    class_BQn = torch.zeros(1, QUERIES, CLASSES + 1)
    class_BQn[0, :, CLASSES], class_BQn[0, 0, 2] = 30, 60
    right_BQhw = torch.full((1, QUERIES, 12, 16), -30.0)
    right_BQhw[0, 0, :, :8] = 30
    wide_BQhw = right_BQhw.clone()
    wide_BQhw[0, 0] = 30  # the mask reaches over the void
    found = []
    for mask_BQhw in (right_BQhw, wide_BQhw):
        torch.manual_seed(0)
        outputs = Outputs(
            torch.zeros(1, CLASSES, 12, 16), None, torch.zeros(1, 4, 6, 8), queries=Queries((class_BQn,), (mask_BQhw,))
        )
        found.append(build("train.losses.masks.points=4000", "train.losses.masks.importance=0")(
            outputs, label_BHW, step=1).values)  # fmt: skip
    assert found[0]["masks_class"] < 1e-6
    assert found[0]["masks_bce"] < 1  # points between the two sides' centres
    assert found[0]["masks_dice"] < 0.05
    assert found[1]["masks_bce"] > 10
    assert found[1]["masks_dice"] > 0.3


@needs_scipy
@pytest.mark.parametrize("images", [1, 3])
def test_images_of_void_alone_teach_no_object(images):
    outputs, label_BHW = batch(images=images)
    label_BHW[:] = 255
    assert outputs.queries is not None
    terms = build()(outputs, label_BHW, step=1)
    expected = sum(
        F.cross_entropy(of_class.flatten(0, 1), torch.full((images * QUERIES,), CLASSES))
        for of_class in outputs.queries.class_LBQn
    )
    torch.testing.assert_close(terms.values["masks_class"], expected.detach())  # pyright: ignore
    assert terms.values["masks_bce"] == terms.values["masks_dice"] == 0
    terms.total.backward()
    for values in outputs.queries.mask_LBQhw:
        assert values.grad_fn is not None
    for of_class in outputs.queries.class_LBQn:
        assert of_class.grad.isfinite().all()  # pyright: ignore


@needs_scipy
@pytest.mark.parametrize("num_queries", [2, QUERIES])
def test_parts_of_a_step_add_up_to_the_whole_with_less_queries_than_classes_too(monkeypatch, num_queries):
    """Each term has its own shares. The same points for every mask, so that draws do not differ."""
    outputs, label_BHW = batch(2, images=4, num_queries=num_queries)
    label_BHW[2] = 255
    points_P2 = torch.rand(POINTS * 3, 2, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(torch, "rand", lambda count, size, _, device: points_P2[:size].repeat(count, 1, 1))
    objective = build("train.losses.cross_entropy.weight=1", num_queries=num_queries)
    whole, q = objective(outputs, label_BHW, step=1), outputs.queries
    assert q is not None
    parts, amounts, values = [slice(0, 1), slice(1, 2), slice(2, 4)], [], []
    for part in parts:
        amounts.append(objective.amounts(label_BHW[part]))
    shares = torch.stack(amounts) / objective.amounts(label_BHW)
    torch.testing.assert_close(shares.sum(dim=0), torch.ones(4, dtype=torch.float64))
    for part, shares_T in zip(parts, shares, strict=True):
        cut = Queries(tuple(one[part] for one in q.class_LBQn), tuple(one[part] for one in q.mask_LBQhw))
        values.append(
            objective(Outputs(outputs.logits_BChw[part], None, outputs.features_BDyx[part], queries=cut),
                      label_BHW[part], step=1, shares_T=shares_T)
        )  # fmt: skip
    assert list(whole.values) == ["cross_entropy", "masks_class", "masks_bce", "masks_dice"]
    assert sum(one.total.item() for one in values) == pytest.approx(whole.total.item(), rel=1e-6)
    for index, name in enumerate(whole.values):
        found = sum(shares[place, index] * one.values[name] for place, one in enumerate(values))
        assert found.item() == pytest.approx(whole.values[name].item(), rel=1e-6)  # pyright: ignore


# --- the net ---


def tiny_training(root, *overrides):
    settings = training(
        root, MASKS, "train.losses.masks.points=64", "model.discriminative.family=mask2former", "train.iters=2",
        "train.transforms.crop_px=64", "train.accumulate=2", "train.batch_size=2", *overrides,
    )  # fmt: skip
    settings.model.discriminative.config = dict(MASK2FORMER)
    return settings


@needs_scipy
def test_every_parameter_that_moves_has_a_gradient(tmp_path):
    """DDP refuses those without; the norm behind Swin's last layer, which no map passes, stays as it is."""
    settings = tiny_training(tmp_path)
    segmenter = train.build(settings, tuple("abcde"), torch.device("cpu"))
    objective = train.build_objective(settings, segmenter, settings_of_no_weights())
    label_BHW = torch.zeros(1, 64, 64, dtype=torch.long)
    objective(segmenter.train().outputs(torch.rand(1, 3, 64, 64)), label_BHW, step=1).total.backward()
    without = {name for name, parameter in segmenter.parameters().items() if parameter.grad is None}
    assert without == {f"model.pixel_level_module.encoder.swin.layernorm.{kind}" for kind in ("weight", "bias")}
    assert not any(segmenter.parameters()[name].requires_grad for name in without)


def settings_of_no_weights():
    return settings.ClassWeights(None, None)


def test_outputs_are_those_of_the_scores_and_of_each_layer():
    segmenter, image = make_segmenter("mask2former", MASK2FORMER, 5), torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        found = segmenter.outputs(image)
        torch.testing.assert_close(found.logits_BChw, segmenter.logits(image))
    assert found.queries is not None
    assert [tuple(one.shape) for one in found.queries.class_LBQn] == [(2, 5, 6)] * 3
    assert [tuple(one.shape) for one in found.queries.mask_LBQhw] == [(2, 5, 16, 24)] * 3
    assert found.features_BDyx.shape == (2, 32, 16, 24)


@needs_scipy
def test_a_training_that_was_cut_goes_on_to_the_same_bits_and_is_read(tmp_path, monkeypatch):
    """Points are drawn by the step's own seed."""
    one = train.run(tiny_training(tmp_path / "one"), console=QUIET)["folder"]
    settings, real, calls = tiny_training(tmp_path / "two", "train.checkpoint_every=1"), Training._step, []

    def cut(self, *given, **named):
        calls.append(1)
        if len(calls) == 2:
            raise Cut
        return real(self, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", cut)
        with pytest.raises(Cut):
            train.run(settings, console=QUIET)
    other = train.run(settings, console=QUIET)["folder"]
    states = [load_file(Path(folder, "model", "model.safetensors")) for folder in (one, other)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    (line,) = [line for line in lines_of(one) if "terms" in line]
    assert set(line["terms"]) == {"masks_class", "masks_bce", "masks_dice"}
    assert line["loss"] == pytest.approx(sum(line["weights"][name] * line["terms"][name] for name in line["terms"]))
    results = json.loads(Path(one, "results.json").read_text())
    saved = load_segmenter(str(Path(one, "model")), num_classes=len(results["per_class"]), device="cpu")
    assert (results["loss_reduction"], saved.net.config.loss_reduction) == ("none", "none")
    assert torch.equal(saved.net.class_predictor.weight, states[0]["class_predictor.weight"])


@needs_scipy
@pytest.mark.slow
def test_it_learns_four_images_by_heart():
    """Coloured halves and quarters, each colour a class."""
    torch.manual_seed(0)
    segmenter = make_segmenter("mask2former", MASK2FORMER, CLASSES, seed=0)
    objective, generator = build(), torch.Generator().manual_seed(0)
    label_BHW = (
        torch.randint(0, CLASSES, (4, 2, 2), generator=generator).repeat_interleave(32, 1).repeat_interleave(32, 2)
    )
    colours_C3 = torch.rand(CLASSES, 3, generator=generator)
    image_B3HW = colours_C3[label_BHW].permute(0, 3, 1, 2).contiguous()
    rule, losses = torch.optim.AdamW(segmenter.net.parameters(), lr=3e-3), []
    segmenter.train()
    for step in range(150):
        terms = objective(segmenter.outputs(image_B3HW), label_BHW, step=step + 1)
        rule.zero_grad()
        terms.total.backward()
        rule.step()
        losses.append(terms.total.item())
    with torch.no_grad():
        predicted = F.interpolate(segmenter.eval().logits(image_B3HW), (64, 64), mode="bilinear").argmax(dim=1)
    assert losses[-1] < losses[0] / 4
    assert (predicted == label_BHW).float().mean() > 0.95


def test_its_weights_begin_as_its_authors_have_them_whatever_the_version_of_transformers():
    """Standard deviations; those of torch's Linear and of kaiming_uniform(a=1) are (3 x inputs)^-1/2, inputs^-1/2."""
    config = MASK2FORMER | {"feature_size": 64, "hidden_dim": 64, "mask_feature_size": 64, "num_queries": 100}
    net = make_segmenter("mask2former", config, 150, seed=0).net
    decoder, module = net.model.pixel_level_module.decoder, net.model.transformer_module
    expected = {
        decoder.level_embed: 1,
        module.queries_embedder.weight: 1,
        module.queries_features.weight: 1,
        module.level_embed.weight: 1,
        decoder.mask_projection.weight: 64**-0.5,
        decoder.layer_1[0].weight: (64 * 9) ** -0.5,
        decoder.input_projections[0][0].weight: (2 / (64 + decoder.input_projections[0][0].in_channels)) ** 0.5,
        decoder.encoder.layers[0].fc1.weight: (2 / (64 + 16)) ** 0.5,
        net.class_predictor.weight: (3 * 64) ** -0.5,
        **{block.get_submodule("0").weight: (3 * 64) ** -0.5
           for block in module.decoder.mask_predictor.mask_embedder.layers},
        module.decoder.layers[0].fc1.weight: (2 / (64 + 16)) ** 0.5,
    }  # fmt: skip
    found = [weight.std().item() / std for weight, std in expected.items()]
    assert found == pytest.approx([1] * len(expected), rel=0.15)
    assert decoder.encoder.layers[0].self_attn.sampling_offsets.bias.abs().max() == 4  # points a head looks at, px


def test_sizes_of_which_no_net_can_be_made_are_one_line():
    said = r"^model\.discriminative\.config: no net can be made of it: embed_dim must be div[^\n]* 30[^\n]*\. Correct"
    with pytest.raises(UserError, match=said):
        make_segmenter("mask2former", MASK2FORMER | {"hidden_dim": 30, "num_attention_heads": 4}, CLASSES)


@pytest.fixture(scope="module")
def swin(tmp_path_factory):
    """A Swin as it was pretrained, with its ImageNet head."""
    torch.manual_seed(5)
    net = SwinForImageClassification(
        SwinConfig(**{k: v for k, v in SWIN.items() if k != "out_features"}, id2label=dict(enumerate("abcdefg")))
    )
    folder = tmp_path_factory.mktemp("swin")
    net.save_pretrained(folder)
    return net, folder


def test_a_swin_of_imagenet_fills_the_encoder_all_but_the_norms_of_its_maps(swin):
    net, folder = swin
    segmenter = make_segmenter("mask2former", MASK2FORMER, 5, seed=3)
    said = load_backbone(segmenter, str(folder), revision=None, allow_pickle=False)
    encoder = segmenter.net.model.pixel_level_module.encoder
    assert fingerprint(encoder.swin) == fingerprint(net.swin)
    assert f"{len(net.swin.state_dict())} tensors into model.pixel_level_module.encoder; left out" in said
    assert "made anew, as no bare encoder has it: hidden_states_norms.stage1" in said
    assert said.count("hidden_states_norms.stage") == 8
    assert "left out, as a head is made anew: classifier.bias, classifier.weight" in said
    wrong = make_segmenter("mask2former", MASK2FORMER | {"backbone_config": SWIN | {"window_size": 2}}, 5)
    with pytest.raises(UserError, match=r"has window_size 4, model\.discriminative\.config has 2"):
        load_backbone(wrong, str(folder), revision=None, allow_pickle=False)


def test_norms_embeddings_and_tables_are_not_decayed_where_asked_for(tmp_path):
    overrides = ("train.optimizer.undecayed=norms_and_embeddings", "train.optimizer.lr=1",
                 "train.optimizer.head_lr_factor=10", "train.optimizer.weight_decay=0.05")  # fmt: skip
    segmenter = make_segmenter("mask2former", MASK2FORMER, 5)
    names = {id(parameter): name for name, parameter in segmenter.parameters().items()}
    groups = parameter_groups(segmenter, training(tmp_path, *overrides).train.optimizer)
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in groups] == [
        ("encoder", 1, 0.05), ("encoder undecayed", 1, 0), ("head", 10, 0.05), ("head undecayed", 10, 0)]  # fmt: skip
    of = {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}
    assert sum(map(len, of.values())) == len(names)
    tables = {name for name in names.values() if "relative_position_bias_table" in name}
    assert tables
    assert tables < of["encoder undecayed"]
    left = of["encoder undecayed"] - tables
    assert all("norm" in name for name in left)
    others = {name for name in of["head undecayed"] if name not in segmenter.norm_parameters()}
    assert {name.split(".", 2)[2] for name in others} == {
        "queries_embedder.weight", "queries_features.weight", "level_embed.weight", "decoder.level_embed"}  # fmt: skip
    assert not any("norm" in name for name in of["encoder"] | of["head"])


# --- what is refused ---


def test_a_net_without_queries_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "is_scipy_available", lambda: True)
    with pytest.raises(UserError, match=r"train\.losses\.masks\.weight=1\.0, but segformer has no queries"):
        train.run(training(tmp_path, MASKS), console=QUIET)


def test_without_scipy_the_cure_is_one_line(monkeypatch):
    monkeypatch.setattr(settings, "is_scipy_available", lambda: False)
    with pytest.raises(UserError, match=r"needs scipy.*Run pip install 'segadapt\[mask2former\]'") as error:
        check_losses(losses_of(), iters=10)
    assert "\n" not in str(error.value)


def test_three_weights_of_0_are_refused():
    zeros = [f"train.losses.masks.{name}_weight=0" for name in ("class", "mask", "dice")]
    with pytest.raises(UserError, match="class_weight, mask_weight and dice_weight all 0: nothing would be learned"):
        check_losses(losses_of(*zeros), iters=10)
