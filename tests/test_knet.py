"""K-Net: its stages against loops, its four outputs and their loss, its size, groups of its parameters, recipe."""

import math

import numpy as np
import pytest
import torch
from quick_settings import quick_settings
from test_recipes import recipe
from test_upernet import CONFIG as UPERNET
from test_upernet import images, parameters_of
from torch.nn import functional as F
from training_runs import training

from segadapt import train
from segadapt.config_training import TrainConfig
from segadapt.errors import UserError
from segadapt.losses import ClassWeights
from segadapt.models.discriminative.make import make_segmenter
from segadapt.training.optimizer import parameter_groups

CONFIG = UPERNET | {"update_size": 8, "update_heads": 4, "feedforward_size": 12, "dropout": 0.0}
KNET = ("model.discriminative.family=segadapt_knet", "train.iters=2", "train/losses=knet")


def made(**more):
    return make_segmenter("segadapt_knet", CONFIG | more, 5, seed=1)


def grown(segmenter):
    """Weights as after some training: classes differ, norms are not the identity."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in segmenter.parameters().values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return segmenter


# --- size ---


def stage_parameters(d, e, wide):
    """Of a kernel-update stage, layer by layer as the paper's section 3.2 lists them; d channels, pieces of e."""
    linear = lambda a, b: a * b + b  # noqa: E731
    norm = lambda a: 2 * a  # noqa: E731
    update = 2 * linear(e, 2 * e) + 2 * (linear(e, e) + norm(e)) + 2 * norm(e) + linear(e, e) + norm(e)
    attention = 4 * linear(d, d) + norm(d)
    feedforward = linear(d, wide) + linear(wide, d) + norm(d)
    return linear(d, d) + update + attention + feedforward + d * d + norm(d) + linear(d, d)


def test_knet_is_upernet_and_three_stages():
    """No count is published: UPerNet's is, 234 M (see test_upernet), and a stage's is by formula."""
    parts = parameters_of("knet_swin_l", 150)
    assert parts["stages"] == 3 * stage_parameters(512, 256, 2048)
    assert (sum(parts.values()) - parts["stages"]) / 1e6 == pytest.approx(234, abs=0.5)


def test_the_stages_begin_as_xavier_has_it():
    """And LayerNorm as one; transformers' own start would be a normal one of 0.02."""
    for stage in made(hidden_size=64, update_size=32).net.stages:
        for name, parameter in stage.named_parameters():
            if parameter.ndim > 1:
                bound = math.sqrt(6 / sum(parameter.shape[:2]))
                assert 0.9 * bound < parameter.abs().max() <= bound, name
                assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1), name
            elif "norm" in name and name.endswith("weight"):
                assert (parameter == 1).all(), name


# --- arithmetic ---


def test_a_stage_is_that_of_the_paper():
    """One pixel, class and piece after the other, in float64."""
    torch.manual_seed(0)
    segmenter = made()
    stage = grown(segmenter).net.stages[0].double()
    x, kernels, logits = (
        torch.randn(shape, dtype=torch.float64) for shape in ((1, 16, 3, 4), (1, 5, 16), (1, 5, 3, 4))
    )
    with torch.no_grad():
        got_logits, got_kernels = stage(x, kernels, logits)

    def linear(module, v):
        v = module.weight.detach().numpy() @ v
        return v if module.bias is None else v + module.bias.detach().numpy()

    def norm(module, v):
        v = (v - v.mean()) / np.sqrt(v.var() + module.eps)
        return v * module.weight.detach().numpy() + module.bias.detach().numpy()

    def sigmoid(v):
        return 1 / (1 + np.exp(-v))

    weight_DD = stage.transform.weight.detach().numpy()[:, :, 0, 0]
    bias_D = stage.transform.bias.detach().numpy()
    x_Dhw = np.einsum("ed,dhw->ehw", weight_DD, x[0].numpy()) + bias_D[:, None, None]
    exponents = np.exp(logits[0].numpy())
    share_Chw = exponents / exponents.sum(axis=0)
    update, new = stage.update, []
    for c in range(5):
        pixels_D = sum(share_Chw[c, i, j] * x_Dhw[:, i, j] for i in range(3) for j in range(4))
        pieces = []
        for first in (0, 8):
            f = linear(update.of_pixels, pixels_D[first : first + 8])
            k = linear(update.of_kernel, kernels[0, c, first : first + 8].numpy())
            both = f[:8] * k[:8]
            gates = [sigmoid(norm(gate[1], linear(gate[0], both))) for gate in (update.pixel_gate, update.kernel_gate)]
            mixed = gates[0] * norm(update.pixel_norm, f[8:]) + gates[1] * norm(update.kernel_norm, k[8:])
            pieces.append(np.maximum(norm(update.out[1], linear(update.out[0], mixed)), 0))
        new.append(np.concatenate(pieces))
    parts = [linear(stage.query_key_value, kernel) for kernel in new]
    attended = []
    for c in range(5):
        found = []
        for head in range(4):
            at = slice(4 * head, 4 * head + 4)
            weights = np.array([np.exp(parts[c][:16][at] @ other[16:32][at] / 2) for other in parts])
            found.append(sum(w * other[32:][at] for w, other in zip(weights / weights.sum(), parts, strict=True)))
        attended.append(norm(stage.attention_norm, new[c] + linear(stage.attended, np.concatenate(found))))
    for c in range(5):
        inner = np.maximum(linear(stage.feedforward[0], attended[c]), 0)
        kernel = norm(stage.feedforward_norm, attended[c] + linear(stage.feedforward[2], inner))
        np.testing.assert_allclose(got_kernels[0, c].numpy(), kernel, rtol=1e-9)
        last = linear(
            stage.classifying[3], np.maximum(norm(stage.classifying[1], linear(stage.classifying[0], kernel)), 0)
        )
        np.testing.assert_allclose(got_logits[0, c].numpy(), np.einsum("d,dhw->hw", last, x_Dhw), rtol=1e-9)


def test_classes_have_no_order():
    """Kernels begin as the classifier's weights: its rows in another order give the same logits in that order."""
    segmenter, order = grown(made()), torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        segmenter.net.double()
        before = segmenter.logits(images(1, 3, 64, 64).double())
        classifier = segmenter.net.decode_head.classifier
        for parameter in classifier.parameters():
            parameter.copy_(parameter[order].clone())
        after = segmenter.logits(images(1, 3, 64, 64).double())
    assert (before[:, order] - before).abs().max() > 0.1
    torch.testing.assert_close(after, before[:, order])


@pytest.mark.parametrize("size", [(64, 64), (70, 106)])
def test_an_image_has_the_same_logits_alone_and_among_others(size):
    segmenter, image_B3HW = grown(made()), images(3, 3, *size).double()
    segmenter.net.double()
    with torch.no_grad():
        together = segmenter.logits(image_B3HW)
        assert together.shape == (3, 5, *(-(-side // 4) for side in size))
        for index in range(3):
            torch.testing.assert_close(segmenter.logits(image_B3HW[index : index + 1])[0], together[index])


def test_under_autocast_shares_are_float32_and_logits_about_the_same():
    segmenter, image_B3HW = made(), images(2, 3, 64, 64)
    with torch.no_grad():
        exact = segmenter.logits(image_B3HW)
        with torch.autocast("cpu", torch.bfloat16):
            rough = segmenter.logits(image_B3HW)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.1, atol=0.1 * float(exact.abs().max()))


# --- training ---


def test_training_sees_four_outputs_and_their_loss_is_the_sum():
    segmenter = grown(made())
    image_B3HW, label_BHW = images(2, 3, 64, 64), torch.arange(64).expand(2, 64, 64) % 5
    objective = train.build_objective(
        quick_settings("train", [*KNET], TrainConfig), segmenter, ClassWeights(None, None)
    )
    with torch.no_grad():
        plain = segmenter.outputs(image_B3HW)
        assert plain.stages_BChw == ()
        assert torch.equal(plain.logits_BChw, segmenter.logits(image_B3HW))
        found = segmenter.train().outputs(image_B3HW)
        terms = objective(found, label_BHW, step=1)
    assert len(found.stages_BChw) == 3
    torch.testing.assert_close(segmenter.net.decode_head.classifier(found.features_BDyx), found.stages_BChw[0])
    each = [
        F.cross_entropy(F.interpolate(logits, (64, 64), mode="bilinear"), label_BHW)
        for logits in (*found.stages_BChw, found.logits_BChw, found.auxiliary_BChw)
    ]
    torch.testing.assert_close(terms.values["stages"], sum(each[:3]))
    torch.testing.assert_close(terms.total, sum(each[:4]) + 0.4 * each[4])
    assert terms.weights == {"cross_entropy": 1, "auxiliary": 0.4, "stages": 1}


def test_ten_steps_lower_the_loss_of_eight_images_and_everything_that_trains_has_a_gradient(tmp_path):
    segmenter = made(hidden_size=32)
    settings = training(tmp_path, *KNET)
    objective = train.build_objective(settings, segmenter, ClassWeights(None, None))
    segmenter.train()
    image_B3HW = images(8, 3, 48, 48)
    label_BHW = (torch.arange(48)[:, None] // 12 + torch.arange(8)[:, None, None]).expand(8, 48, 48) % 5
    image_B3HW = image_B3HW * 0.2 + label_BHW[:, None] / 6
    trained = [parameter for parameter in segmenter.parameters().values() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(10):
        terms = objective(segmenter.outputs(image_B3HW), label_BHW, step=1)
        optimizer.zero_grad()
        terms.total.backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
        losses.append(float(terms.total.detach()))
    assert losses[-1] < 0.85 * losses[0]


def test_earlier_stages_that_a_network_does_not_have_are_refused(tmp_path):
    settings = training(tmp_path, "train.losses.stages.weight=1")
    with pytest.raises(UserError, match=r"stages\.weight=1\.0, but upernet has one output, .*choose segadapt_knet\.$"):
        train.build_objective(settings, make_segmenter("upernet", UPERNET, 5), ClassWeights(None, None))


# --- groups, parts, refusals ---


def test_norms_of_kernels_and_tables_of_positions_are_not_decayed(tmp_path):
    segmenter = made()
    o = training(tmp_path, "train.optimizer.weight_decay=0.5", "train.optimizer.head_lr_factor=2",
                 "train.optimizer.undecayed=norms_and_embeddings").train.optimizer  # fmt: skip
    names = {id(parameter): name for name, parameter in segmenter.parameters().items()}
    groups = {group["name"]: group for group in parameter_groups(segmenter.train(), o)}
    shown = {name: (group["lr"] / o.lr, group["weight_decay"]) for name, group in groups.items()}
    assert shown == {
        "encoder": (1, 0.5), "encoder undecayed": (1, 0.0), "head": (2, 0.5), "head undecayed": (2, 0.0)
    }  # fmt: skip
    in_group = {name: {names[id(p)] for p in group["params"]} for name, group in groups.items()}
    norms = set(segmenter.norm_parameters())
    tables = in_group["encoder undecayed"] - norms
    assert {name.rsplit(".", 1)[1] for name in tables} == {"relative_position_bias_table"}
    assert len(tables) == 5
    kernels = {name for name in in_group["head undecayed"] if name.startswith("stages.")}
    assert len(kernels) == 3 * 2 * 8
    assert in_group["head undecayed"] - norms == set()


def test_parts_are_encoder_and_heads_and_the_top_is_the_last_stage():
    segmenter = made()
    rest = {name for name in segmenter.parameters() if not name.startswith("backbone.")}
    assert set(segmenter.head_parameters()) == rest
    norms, top = segmenter.norm_parameters(), segmenter.top_norm_parameters()
    kept = set(norms) - set(top)
    assert kept
    assert not any("layers.3." in name or "stage4" in name or name in rest for name in kept)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"update_size": 5}, r"hidden_size=16: expected a multiple of update_size=5\."),
        ({"update_heads": 3}, r"hidden_size=16: expected a multiple of update_heads=3\."),
        ({"stages": 0}, r"stages=0: expected 1 or more\."),
        ({"dropout": 1.0}, r"dropout=1\.0: expected at least 0 and less than 1\."),
    ],
)
def test_a_wrong_config_is_refused_in_one_line(wrong, said):
    with pytest.raises(UserError, match=r"^model\.discriminative\.config: " + said) as caught:
        made(**wrong)
    assert "\n" not in str(caught.value)


def test_recompute_is_refused():
    with pytest.raises(UserError, match=r"gradient_checkpointing=true: segadapt_knet cannot recompute"):
        make_segmenter("segadapt_knet", CONFIG, 5, gradient_checkpointing=True)


# --- recipe ---


def test_knets_recipe_is_mmsegmentations():
    settings = recipe("knet_swin_l_ade20k")
    t, chosen = settings.train, settings.model.discriminative
    assert chosen.backbone == "microsoft/swin-large-patch4-window7-224-in22k"
    inner = chosen.config["backbone_config"]
    assert (inner["embed_dim"], inner["num_heads"], inner["drop_path_rate"]) == (192, [6, 12, 24, 48], 0.3)
    assert (chosen.family, chosen.config["stages"]) == ("segadapt_knet", 3)
    assert (settings.data.name, settings.data.split, settings.data.subset) == ("ade20k", "training", 1)
    assert (t.iters, t.batch_size, t.transforms.crop_px) == (80_000, 16, 512)
    o, s = t.optimizer, t.schedule
    assert (o.name, o.lr, o.head_lr_factor, o.weight_decay, o.clip_norm) == ("adamw", 6e-5, 1, 5e-4, 1)
    assert (s.kind, s.decay, s.milestones, s.gamma, s.warmup_iters, s.warmup_factor) == (
        "chained", "step", [60_000, 72_000], 0.1, 1000, 1e-3)  # fmt: skip
    assert (t.losses.cross_entropy.weight, t.losses.stages.weight, t.losses.auxiliary.weight) == (1, 1, 0.4)
    assert (t.losses.reduction, settings.evaluate.input_resize) == ("all", "box")
