"""T2T-ViT: as large as published, its attentions against loops, names of its authors' files, training."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_upernet import images, parameters_of
from torch.nn import functional as F

from segadapt.errors import UserError
from segadapt.models.discriminative.backbone import load_backbone
from segadapt.models.discriminative.make import make_segmenter
from segadapt.models.discriminative.t2t import (
    DropPath,
    T2tConfig,
    T2tEncoder,
    TokenPerformer,
    TokensToToken,
    TokenTransformer,
    sinusoids,
)
from segadapt.models.set_up import fingerprint

KINDS = ("performer", "transformer")
CONFIG = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "token_size": 8, "image_size": 64,
          "head_size": 16, "drop_path_rate": 0.0, "dropout": 0.0}  # fmt: skip


def made(*, seed=1, recompute=False, **more):
    return make_segmenter("segadapt_t2t", CONFIG | more, 5, seed=seed, gradient_checkpointing=recompute)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("size", "width", "millions"), [(14, 384, 21.5), (19, 448, 39.2)])
def test_t2t_as_classifier_is_as_large_as_published(size, width, millions):
    """Table 2 of the paper, whose count has what does not learn: table of positions, random features (32 of 64, twice).

    The classifier of ImageNet is one linear layer of 1000 rows.
    """
    encoder = parameters_of(f"t2t_vit_{size}_scratch", 5)["encoder"]
    total = encoder + (1 + 14 * 14) * width + 2 * 32 * 64 + 1000 * (width + 1)
    assert total / 1e6 == pytest.approx(millions, abs=0.05)


# --- arithmetic ---


@pytest.mark.parametrize("size", [(64, 64), (65, 90), (67, 71)])
def test_tokens_are_overlapping_neighbourhoods(size):
    """Of a layer that passes the middle of a neighbourhood on, the map is the image at every fourth pixel from 1."""
    module = TokensToToken(T2tConfig(**CONFIG))

    class Middle(torch.nn.Module):
        def __init__(self, area):
            super().__init__()
            self.area = area

        def forward(self, x_BTU):
            return x_BTU.unflatten(2, (-1, self.area))[..., self.area // 2]

    module.attention1, module.attention2, module.project = Middle(49), Middle(9), Middle(9)
    image_B3HW = images(1, 3, *size)
    maps = module(image_B3HW)
    for found, start, stride in zip(maps, (1, 1, 1), (4, 8, 16), strict=True):
        expected = image_B3HW[:, :, start::stride, start::stride][:, :, : found.shape[2], : found.shape[3]]
        assert torch.equal(found, expected)
        assert all(abs(count * stride - side) <= stride for count, side in zip(found.shape[2:], size, strict=True))


def test_a_performer_is_attention_by_products_of_random_features():
    """Token by token in float64, with the shortcut on the value."""
    torch.manual_seed(0)
    layer = TokenPerformer(6, 4).double().eval()
    x = random(1, 5, 6)
    with torch.no_grad():
        found = layer(x)[0]
        key, query, value = (part.numpy() for part in layer.kqv(layer.norm1(x))[0].chunk(3, dim=1))
        w = layer.w.numpy()
        phi = lambda v: np.array([np.exp(row @ v - v @ v / 2) for row in w]) / np.sqrt(2)  # noqa: E731
        for t in range(5):
            weights = np.array([phi(query[t]) @ phi(key[s]) for s in range(5)])
            taken = sum(weight * value[s] for s, weight in enumerate(weights)) / (weights.sum() + 1e-8)
            expected = torch.from_numpy(value[t]) + layer.proj(torch.from_numpy(taken))
            expected = expected + layer.mlp(layer.norm2(expected))
            torch.testing.assert_close(found[t], expected)
    np.testing.assert_allclose(w @ w.T, 2 * np.eye(2), atol=1e-6)


def test_a_token_transformer_is_softmax_attention_of_one_head():
    torch.manual_seed(0)
    layer = TokenTransformer(6, 4).double().eval()
    x = random(1, 5, 6)
    with torch.no_grad():
        found = layer(x)[0]
        query, key, value = layer.attn.qkv(layer.norm1(x))[0].chunk(3, dim=1)
        taken = (query @ key.T / 6**0.5).softmax(dim=1) @ value
        expected = value + layer.attn.proj(taken)
        torch.testing.assert_close(found, expected + layer.mlp(layer.norm2(expected)))


def test_positions_are_sinusoids_and_another_grid_interpolates_them():
    table = sinusoids(5, 6)[0].numpy()
    for position in range(5):
        for pair in range(3):
            angle = position / 10000 ** (2 * pair / 6)
            np.testing.assert_allclose(
                table[position, 2 * pair : 2 * pair + 2], [np.sin(angle), np.cos(angle)], atol=1e-6
            )
    encoder = T2tEncoder(T2tConfig(**CONFIG))
    assert encoder.positions(4, 4) is encoder.pos_embed
    encoder.pos_embed[:, 1:, 0] = torch.arange(4.0).repeat_interleave(4)  # of each entry its row
    found = encoder.positions(8, 6)
    assert torch.equal(found[:, 0], encoder.pos_embed[:, 0])
    rows = found[0, 1:, 0].reshape(8, 6)
    torch.testing.assert_close(rows, rows[:, :1].expand(8, 6))
    torch.testing.assert_close(rows + rows.flip(0), torch.full((8, 6), 3.0))
    assert bool((rows.diff(dim=0)[1:-1] > 0).all())


def test_the_trunk_without_branches_passes_on_the_tokens_under_its_norm():
    """So the class token is left out, and positions are added once."""
    net = made().net
    encoder = net.encoder
    for block in encoder.blocks:
        for layer in (block.attn.proj, block.mlp.fc2):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    with torch.no_grad():
        image_B3HW = images(2, 3, 64, 64)
        tokens = encoder.tokens_to_token(image_B3HW)[-1] + encoder.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
        found = encoder(image_B3HW)[-1]
    torch.testing.assert_close(found, F.layer_norm(tokens.movedim(1, 3), (16,)).movedim(3, 1))


def test_drop_path_keeps_the_mean_and_whole_images():
    layer = DropPath(0.25)
    torch.manual_seed(0)
    found = layer(torch.ones(4000, 2, 3))
    assert {round(value, 4) for value in found.unique().tolist()} == {0.0, round(4 / 3, 4)}
    assert bool((found.flatten(1).min(dim=1).values == found.flatten(1).max(dim=1).values).all())
    assert found.mean().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(layer.eval()(found), found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(64, 64), (67, 102)])
def test_an_image_has_the_same_logits_alone_and_among_others(kind, size):
    segmenter, image_B3HW = made(token_attention=kind), images(3, 3, *size)
    with torch.no_grad():
        together = segmenter.logits(image_B3HW)
        assert together.shape == (3, 5, *((side - 3) // 4 + 1 for side in size))
        for index in range(3):
            torch.testing.assert_close(segmenter.logits(image_B3HW[index : index + 1])[0], together[index])
        with torch.autocast("cpu", torch.bfloat16):
            rough = segmenter.logits(image_B3HW)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, together, rtol=0.1, atol=0.1 * float(together.abs().max()))


# --- files ---

ATTENTION1 = {
    "performer": {"w", "kqv.weight", "kqv.bias", "proj.weight", "proj.bias", "mlp.0.weight", "mlp.0.bias",
                  "mlp.2.weight", "mlp.2.bias"},
    "transformer": {"attn.qkv.weight", "attn.proj.weight", "attn.proj.bias", "mlp.fc1.weight", "mlp.fc1.bias",
                    "mlp.fc2.weight", "mlp.fc2.bias"},
}  # fmt: skip
NORMS = {"norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_encoder_has_the_names_and_shapes_of_its_authors(kind):
    with torch.device("meta"):
        state = T2tEncoder(T2tConfig(token_attention=kind)).state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert {name.split(".")[0] for name in shapes} == {"tokens_to_token", "cls_token", "pos_embed", "blocks", "norm"}
    for name in ("attention1", "attention2"):
        start = f"tokens_to_token.{name}."
        assert {key.removeprefix(start) for key in shapes if key.startswith(start)} == ATTENTION1[kind] | NORMS
    assert {key.removeprefix("blocks.13.") for key in shapes if key.startswith("blocks.13.")} == (
        ATTENTION1["transformer"] | NORMS
    )
    assert (shapes["pos_embed"], shapes["cls_token"]) == ((1, 197, 384), (1, 1, 384))
    assert shapes["tokens_to_token.project.weight"] == (384, 576)
    assert shapes["blocks.0.mlp.fc1.weight"] == (1152, 384)
    first = "kqv" if kind == "performer" else "attn.qkv"
    assert shapes[f"tokens_to_token.attention1.{first}.weight"] == (192, 147)


def test_an_imagenet_file_fits_key_by_key(tmp_path):
    """With a classifier, averaged weights, and the prefix that DDP writes; one key more or less is refused."""
    source, target = made(seed=2), made()
    file = {f"module.{name}": value.contiguous() for name, value in source.net.encoder.state_dict().items()}
    file |= {"module.head.weight": torch.zeros(1000, 16), "module.head.bias": torch.zeros(1000)}
    path = str(tmp_path / "t2t.safetensors")
    torch.save({"state_dict_ema": file, "state_dict": {"other": torch.zeros(1)}}, tmp_path / "t2t.pth")
    said = load_backbone(target, str(tmp_path / "t2t.pth"), revision=None, allow_pickle=True)
    assert fingerprint(target.net.encoder) == fingerprint(source.net.encoder)
    assert said.endswith("left out, as a head is made anew: module.head.weight, module.head.bias")
    save_file(file | {"module.extra": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"extra is unexpected"):
        load_backbone(target, path, revision=None, allow_pickle=False)
    save_file(file, path)
    with pytest.raises(UserError, match=r"pos_embed has shape \(1, 17, 16\), expected \(1, 26, 16\)"):
        load_backbone(made(image_size=80), path, revision=None, allow_pickle=False)


# --- training, parts, refusals ---


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_lower_the_loss_and_everything_that_trains_has_a_gradient(kind):
    segmenter = made(token_attention=kind).train()
    image_B3HW = images(8, 3, 48, 48)
    label_BHW = (torch.arange(48)[:, None] // 12 + torch.arange(8)[:, None, None]).expand(8, 48, 48) % 5
    image_B3HW = image_B3HW * 0.2 + label_BHW[:, None] / 6
    optimizer, losses = torch.optim.AdamW(segmenter.net.parameters(), lr=1e-2), []
    torch.manual_seed(0)
    for _ in range(20):
        logits = segmenter.outputs(image_B3HW).logits_BChw
        loss = F.cross_entropy(F.interpolate(logits, (48, 48), mode="bilinear"), label_BHW)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in segmenter.net.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_recomputed_gradients_are_the_same():
    gradients = []
    for recompute in (False, True):
        segmenter = made(recompute=recompute, drop_path_rate=0.5)
        segmenter.logits(images(2, 3, 64, 64)).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in segmenter.parameters().items()})
    assert all(torch.equal(value, gradients[1][name]) for name, value in gradients[0].items())
    assert not any(module.training for module in segmenter.net.modules() if isinstance(module, DropPath))
    assert all(block.gradient_checkpointing and block.training for block in segmenter.net.encoder.blocks)


def test_parts_are_encoder_and_head_and_the_top_is_the_last_layer():
    segmenter = made()
    assert all(name.startswith("head.") for name in segmenter.head_parameters())
    assert {name.rsplit(".", 1)[0] for name in segmenter.top_norm_parameters()} == {
        "encoder.blocks.2.norm1", "encoder.blocks.2.norm2", "encoder.norm", "head.convs.0.bn", "head.convs.1.bn",
        "head.convs.2.bn", "head.fusion_conv.bn",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"num_attention_heads": 3}, r"hidden_size=16: expected a multiple of num_attention_heads=3\."),
        ({"token_attention": "linear"}, r"token_attention=linear: expected one of performer, transformer\."),
        ({"token_size": 7}, r"token_size=7: expected an even number\."),
        ({"image_size": 100}, r"image_size=100: expected a multiple of 16\."),
        ({"mlp_ratio": 0}, r"mlp_ratio=0: expected more than 0\."),
        ({"drop_path_rate": 1.0}, r"drop_path_rate=1\.0: expected at least 0 and less than 1\."),
        ({"num_hidden_layers": 0}, r"num_hidden_layers=0: expected 1 or more\."),
    ],
)
def test_a_wrong_config_is_refused_in_one_line(wrong, said):
    with pytest.raises(UserError, match=r"^model\.discriminative\.config: " + said) as caught:
        made(**wrong)
    assert "\n" not in str(caught.value)
