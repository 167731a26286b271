"""DINOv2 with linear heads, Mask2Former and UPerNet behind the segmenter's protocol."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_networks import MASK2FORMER, SWIN
from torch import nn
from torch.nn import functional as F
from transformers import Mask2FormerForUniversalSegmentation, UperNetConfig, UperNetForSemanticSegmentation
from transformers.models.mask2former import modeling_mask2former

from segadapt.errors import UserError
from segadapt.models.discriminative.backbone import load_backbone
from segadapt.models.discriminative.families import FAMILIES
from segadapt.models.discriminative.load import load_segmenter
from segadapt.models.discriminative.make import make_segmenter
from segadapt.models.discriminative.semantic_map import FLOOR, semantic_map
from segadapt.models.set_up import fingerprint

VIT = {"hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
CONVNEXT = {"model_type": "convnext", "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 4, 1],
            "out_features": ["stage1", "stage2", "stage3", "stage4"]}  # fmt: skip
CONFIGS = {
    "mask2former": MASK2FORMER,
    "upernet": {"backbone_config": SWIN, "hidden_size": 16, "auxiliary_channels": 8, "pool_scales": [1, 2]},
}  # fmt: skip
KINDS = ("dinov2", "dinov2_with_registers")


def dinov2(kind="dinov2", **config):
    return make_segmenter("segadapt_dinov2", {"backbone_config": {"model_type": kind, **VIT}, **config}, 5, seed=1)


def image(height, width, dtype=torch.float32):
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=dtype)


def load(folder, num_classes=5):
    return load_segmenter(str(folder), num_classes=num_classes, device="cpu")


# --- DINOv2 ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [1, 4])
def test_the_head_sees_the_patch_tokens_of_the_last_layers(kind, layers):
    """Against the backbone's own layers, caught one by one; row-major patches, class and register tokens left out."""
    segmenter = dinov2(kind, layers=layers)
    net, seen = segmenter.net, []
    for layer in net.backbone.encoder.layer:
        layer.register_forward_hook(lambda _m, _i, out: seen.append(out if isinstance(out, torch.Tensor) else out[0]))
    with torch.no_grad():
        got = segmenter.logits(image(42, 70))
        tokens = [net.backbone.layernorm(one)[:, -15:] for one in seen[-layers:]]
        expected = torch.zeros(1, 5, 3, 5)
        for row in range(3):
            for column in range(5):
                features_D = torch.cat([one[0, 5 * row + column] for one in tokens])
                norm, conv = net.decode_head.norm, net.decode_head.classifier
                normed_D = (features_D - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
                expected[0, :, row, column] = conv.weight[:, :, 0, 0] @ normed_D + conv.bias
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_size_of_whole_patches_is_not_padded():
    segmenter, sizes = dinov2(), []
    segmenter.net.backbone.register_forward_pre_hook(
        lambda _m, _a, given: sizes.append(tuple(given["pixel_values"].shape[2:])), with_kwargs=True
    )
    with torch.no_grad():
        for size in ((28, 42), (29, 42), (41, 43), (5, 14)):
            segmenter.logits(image(*size))
    assert sizes == [(28, 42), (42, 42), (42, 56), (14, 14)]


class Positions(nn.Module):
    """In place of a backbone: each patch's tokens are the px coordinates of its centre in what it was given."""

    def __init__(self):
        super().__init__()
        self.layernorm = nn.Identity()

    def forward(self, pixel_values, output_hidden_states):
        rows, columns = (size // 14 for size in pixel_values.shape[2:])
        y, x = torch.meshgrid(14.0 * torch.arange(rows) + 7, 14.0 * torch.arange(columns) + 7, indexing="ij")
        tokens = torch.stack([y.flatten(), x.flatten()], dim=1)[None]
        last = torch.cat([torch.full((1, 1, 2), -1e6), tokens], dim=1)
        return type("Found", (), {"last_hidden_state": last, "hidden_states": (last,)})


@pytest.mark.parametrize(("height", "width"), [(28, 42), (64, 90), (57, 71), (83, 85)])
def test_rows_and_columns_cover_the_image_evenly_whatever_the_padding(height, width):
    """A value's place is the middle of its share of the image; at the rim no patch centre lies further out."""
    net = dinov2().net
    net.backbone, net.decode_head.norm = Positions(), nn.Identity()
    found = net.features(torch.zeros(1, 3, height, width))[0]
    for axis, size in enumerate((height, width)):
        count, before = found.shape[1 + axis], (-size % 14) // 2
        along = found[axis].select(1 - axis, 0)
        expected = [min(max((k + 0.5) * size / count + before, 7), 14 * count - 7) for k in range(count)]
        torch.testing.assert_close(along, torch.tensor(expected))


def test_padding_is_centred_and_of_the_mean_colour():
    segmenter, given = dinov2(), []
    segmenter.net.backbone.register_forward_pre_hook(
        lambda _m, _a, found: given.append(found["pixel_values"]), with_kwargs=True
    )
    with torch.no_grad():
        segmenter.logits(torch.ones(1, 3, 25, 14))
    assert [bool(row.any()) for row in given[0][0, 0]] == [False] + [True] * 25 + [False] * 2


def step(segmenter, rate=0.1):
    """One step of training on one batch; the loss before it."""
    label = torch.arange(12).reshape(1, 3, 4) % 5
    trained = [parameter for parameter in segmenter.net.parameters() if parameter.requires_grad]
    logits = segmenter.outputs(image(42, 56)).logits_BChw
    loss = F.cross_entropy(logits, label)
    gradients = torch.autograd.grad(loss, trained)
    with torch.no_grad():
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter -= rate * gradient
    return loss.item()


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_backbone_stays_bit_equal_and_in_eval_mode(kind):
    segmenter = dinov2(kind, layers=2).train()
    before = fingerprint(segmenter.net.backbone)
    losses = [step(segmenter) for _ in range(3)]
    assert losses[2] < losses[0]
    assert fingerprint(segmenter.net.backbone) == before
    assert not any(module.training for module in segmenter.net.backbone.modules())
    assert segmenter.net.decode_head.norm.training
    trained = {name for name, parameter in segmenter.parameters().items() if parameter.requires_grad}
    assert trained == set(segmenter.head_parameters())
    assert all(name.startswith("decode_head.") for name in trained)


@pytest.mark.parametrize("kind", KINDS)
def test_unfrozen_every_trained_parameter_has_a_gradient(kind):
    """DDP refuses those without; the mask token, which nothing reads, is among the embeddings that stay."""
    segmenter = dinov2(kind, frozen=False).train()
    segmenter.outputs(image(42, 56)).logits_BChw.square().mean().backward()
    trained = {name: parameter for name, parameter in segmenter.parameters().items() if parameter.requires_grad}
    assert all(parameter.grad is not None for parameter in trained.values())
    assert {name.split(".")[1] for name in trained} == {"encoder", "layernorm", "norm", "classifier"}
    before = fingerprint(segmenter.net.backbone.encoder)
    step(segmenter)
    assert fingerprint(segmenter.net.backbone.encoder) != before


def test_features_for_training_are_what_the_classifier_sees():
    segmenter = dinov2(layers=2)
    found = segmenter.outputs(image(30, 40))
    assert found.auxiliary_BChw is None
    assert found.features_BDyx.shape == (1, 32, 3, 3)
    torch.testing.assert_close(segmenter.net.decode_head.classifier(found.features_BDyx), found.logits_BChw)


def test_top_norms_of_dinov2():
    segmenter = dinov2()
    top = segmenter.top_norm_parameters()
    assert {name.rsplit(".", 1)[0] for name in top} == {
        "backbone.encoder.layer.4.norm1", "backbone.encoder.layer.4.norm2", "backbone.layernorm", "decode_head.norm",
    }  # fmt: skip
    assert len(segmenter.norm_parameters()) == 2 * (2 * 5 + 2)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "backbone_config.model_type=None is no backbone"),
        ({"backbone_config": {"model_type": "dino"}}, "Did you mean dinov2"),
        ({"backbone_config": {"model_type": "dinov2", "hiden_size": 8}}, r"backbone_config\.hiden_size is not a "
         r"setting of dinov2\. Did you mean hidden_size"),
        ({"backbone_config": {"model_type": "dinov2", **VIT}, "layers": 6}, "layers=6: the backbone has 5 layers"),
        ({"backbone_config": {"model_type": "dinov2", **VIT}, "layer": 1}, "Did you mean layers"),
    ],
)  # fmt: skip
def test_wrong_configs_of_dinov2_are_one_line(config, said):
    with pytest.raises(UserError, match=said) as error:
        make_segmenter("segadapt_dinov2", config, 5)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(
    "DINOV2" not in os.environ, reason="DINOV2 names no DINOv2-S file with dinov2*config.json beside it"
)
def test_the_real_weights_tell_images_apart():
    """Strictly read; and patches of a flat image are alike, those of a picture with two halves are not."""
    file = Path(os.environ["DINOV2"])
    (config,) = file.parent.glob("dinov2*config.json")
    inner = json.loads(config.read_text())
    del inner["stage_names"], inner["transformers_version"]
    segmenter = make_segmenter("segadapt_dinov2", {"backbone_config": inner}, 5)
    said = load_backbone(segmenter, str(file), revision=None, allow_pickle=False)
    assert "223 tensors into backbone" in said
    halves = torch.zeros(1, 3, 56, 56)
    halves[..., 28:] = 1
    with torch.no_grad():
        features = segmenter.outputs(halves).features_BDyx[0].flatten(1)
    likeness = F.normalize(features, dim=0).T @ F.normalize(features, dim=0)
    left = torch.tensor([0, 1, 4, 5])
    assert likeness[left][:, left].mean() > likeness[left][:, left + 2].mean() + 0.05


# --- Mask2Former and UPerNet ---


def test_the_semantic_map_is_the_sum_over_queries():
    generator = torch.Generator().manual_seed(0)
    classes, masks = torch.randn(2, 3, 5, generator=generator), torch.randn(2, 3, 2, 4, generator=generator)
    expected = torch.zeros(2, 4, 2, 4, dtype=torch.float64)
    for b in range(2):
        for q in range(3):
            exponents = classes[b, q].double().exp()
            for c in range(4):
                expected[b, c] += exponents[c] / exponents.sum() / (1 + (-masks[b, q].double()).exp())
    torch.testing.assert_close(semantic_map(classes, masks).double(), expected, rtol=1e-5, atol=1e-6)


def test_the_semantic_map_is_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        found = semantic_map(torch.zeros(1, 3, 5, dtype=torch.bfloat16), torch.zeros(1, 3, 2, 4, dtype=torch.bfloat16))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.full((1, 4, 2, 4), 3 * 0.2 * 0.5))


def test_logits_of_mask2former_stay_finite_where_no_query_says_anything():
    segmenter = make_segmenter("mask2former", CONFIGS["mask2former"], 5)
    with torch.no_grad():
        segmenter.net.class_predictor.bias[-1] = 1e4  # every query is "no object"
    logits = segmenter.logits(image(37, 53))
    torch.testing.assert_close(logits.min(), torch.tensor(FLOOR).log())
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in segmenter.net.parameters() if p.grad is not None)


@pytest.fixture
def native_mask2former(monkeypatch, tmp_path):
    """A folder of transformers' own class, whose loss would need scipy: in its place a module with the same buffer."""

    class Loss(nn.Module):
        def __init__(self, config, weight_dict):
            super().__init__()
            self.num_labels, self.eos_coef = config.num_labels, config.no_object_weight
            self.register_buffer("empty_weight", torch.ones(config.num_labels + 1))

    monkeypatch.setattr(modeling_mask2former, "Mask2FormerLoss", Loss)
    net = Mask2FormerForUniversalSegmentation(made_config("mask2former")).eval()
    net.save_pretrained(tmp_path / "native")
    return net, tmp_path / "native"


def made_config(family):
    return FAMILIES[family].config(**CONFIGS[family], id2label={index: str(index) for index in range(5)})


@pytest.mark.parametrize("size", [(64, 64), (37, 53)])
def test_a_folder_of_transformers_mask2former_gives_its_semantic_map(native_mask2former, size):
    net, folder = native_mask2former
    assert "criterion.empty_weight" in load_file(folder / "model.safetensors")
    segmenter = load(folder)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        got = segmenter.logits(image(*size))
        raw = net(pixel_values=(image(*size) - mean) / std)
    expected = semantic_map(raw.class_queries_logits, raw.masks_queries_logits)
    assert got.shape == (1, 5, -(-size[0] // 4), -(-size[1] // 4))
    torch.testing.assert_close(got.exp() - FLOOR, expected, rtol=1e-4, atol=1e-5)


def test_a_saved_mask2former_is_read_by_transformers(native_mask2former, tmp_path):
    _, folder = native_mask2former
    load(folder).save(tmp_path / "again")
    _, info = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert set(info["missing_keys"]) <= {"criterion.empty_weight"}
    assert not info["unexpected_keys"]
    assert fingerprint(load(tmp_path / "again").net) == fingerprint(load(folder).net)


@pytest.mark.parametrize("backbone", [SWIN, CONVNEXT], ids=["swin", "convnext"])
def test_a_folder_of_transformers_upernet_gives_its_logits(backbone, tmp_path):
    config = CONFIGS["upernet"] | {"backbone_config": backbone}
    net = UperNetForSemanticSegmentation(UperNetConfig(**config, id2label={k: str(k) for k in range(5)})).eval()
    net.save_pretrained(tmp_path / "native")
    segmenter = load(tmp_path / "native")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        got = segmenter.logits(image(64, 96))
        expected = net(pixel_values=(image(64, 96) - mean) / std).logits
    assert got.shape == (1, 5, 16, 24)
    torch.testing.assert_close(F.interpolate(got, (64, 96), mode="bilinear"), expected, rtol=1e-4, atol=1e-5)
    segmenter.save(tmp_path / "again")
    again = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "again")
    assert fingerprint(again) == fingerprint(net)


@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_reach_what_adaptation_moves(family):
    segmenter = make_segmenter(family, CONFIGS[family], 5)
    segmenter.logits(image(64, 64)).softmax(dim=1)[:, 0].mean().backward()
    norms, top = segmenter.norm_parameters(), segmenter.top_norm_parameters()
    unread = [name for name, parameter in norms.items() if parameter.grad is None]
    assert all("swin.layernorm" in name or "auxiliary" in name for name in unread)
    kept = {name for name in norms if name not in top}
    assert kept
    assert not any(part in name for name in kept for part in ("layers.3.", "stage4", "decode", "decoder", "criterion"))
    assert any("layers.2." in name for name in kept)
    assert any("layers.3." in name for name in top)


def test_top_norms_of_a_convnext_are_those_of_its_last_stage_not_of_each_fourth_layer():
    segmenter = make_segmenter("upernet", CONFIGS["upernet"] | {"backbone_config": CONVNEXT}, 5)
    top = [name for name in segmenter.top_norm_parameters() if name.startswith("backbone.encoder.")]
    assert top
    assert all(name.startswith("backbone.encoder.stages.3.") for name in top)


@pytest.mark.parametrize("family", CONFIGS)
def test_what_cannot_be_recomputed_is_refused(family):
    with pytest.raises(UserError, match=r"gradient_checkpointing=true: .* cannot recompute"):
        make_segmenter(family, CONFIGS[family], 5, gradient_checkpointing=True)
