"""Pretrained encoders into made segmenters: every weight in its place, every fault one line."""

import json
from unittest.mock import Mock

import pytest
import torch
from foreign_segformer import DEPTHS, HEAD_WIDTH, WIDTHS, MmsegNet, nvidia_state, scramble
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import (
    Dinov2Config,
    Dinov2Model,
    PreTrainedConfig,
    SegformerConfig,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
)

from segadapt import train
from segadapt.config_training import TrainConfig
from segadapt.errors import UserError
from segadapt.models.discriminative.backbone import load_backbone
from segadapt.models.discriminative.families import FAMILIES
from segadapt.models.discriminative.load import load_segmenter
from segadapt.models.discriminative.make import make_segmenter
from segadapt.models.set_up import fingerprint
from segadapt.parse import from_overrides

CONFIG = {"depths": list(DEPTHS), "hidden_sizes": list(WIDTHS), "decoder_hidden_size": HEAD_WIDTH}
VIT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}


def made(family="segformer", config=CONFIG):
    return make_segmenter(family, config, 5, seed=3)


def put(segmenter, path, *, revision=None, allow_pickle=False):
    return load_backbone(segmenter, str(path), revision=revision, allow_pickle=allow_pickle)


@pytest.fixture(scope="module")
def classifier():
    """A MiT as it was pretrained, with its ImageNet head of 7 classes."""
    return scramble(SegformerForImageClassification(SegformerConfig(**CONFIG, num_labels=7)))


@pytest.fixture(scope="module")
def folder(classifier, tmp_path_factory):
    path = tmp_path_factory.mktemp("mit")
    classifier.save_pretrained(path)
    return path


@pytest.fixture
def official(classifier, tmp_path):
    """The same weights as in NVIDIA's mit_b*.pth: no `backbone.` in front, and `head.*`."""
    segmenter = scramble(SegformerForSemanticSegmentation(SegformerConfig(**CONFIG, num_labels=5)))
    segmenter.segformer.load_state_dict(classifier.segformer.state_dict())
    segmenter.save_pretrained(tmp_path / "whole")
    state = nvidia_state(load_file(tmp_path / "whole" / "model.safetensors"))
    state = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    return state | {"head.weight": torch.ones(7, WIDTHS[-1]), "head.bias": torch.ones(7)}


@pytest.mark.parametrize("family", ["segformer", "segadapt_segformer_mmseg"])
def test_a_mit_folder_fills_the_encoder_and_leaves_the_head(family, folder, classifier):
    segmenter = made(family)
    head = fingerprint(segmenter.net.decode_head)
    said = put(segmenter, folder)
    assert fingerprint(segmenter.net.segformer) == fingerprint(classifier.segformer)
    assert fingerprint(segmenter.net.decode_head) == head
    assert said.endswith("left out, as a head is made anew: classifier.bias, classifier.weight")


def test_an_official_mit_file_is_the_same_encoder(official, classifier, tmp_path):
    torch.save(official, tmp_path / "mit_b0.pth")
    segmenter = made()
    with pytest.raises(UserError, match="is a pickle"):
        put(segmenter, tmp_path / "mit_b0.pth")
    said = put(segmenter, tmp_path / "mit_b0.pth", allow_pickle=True)
    assert fingerprint(segmenter.net.segformer) == fingerprint(classifier.segformer)
    assert f"{len(classifier.segformer.state_dict())} tensors into segformer" in said
    assert said.endswith("head.weight, head.bias")


def test_norms_and_packed_projections_of_an_official_file_are_not_swapped(official, tmp_path):
    """Every tensor of one block has a number of its own; keys come first in kv."""
    block, width = "block2.1", WIDTHS[1]
    for index, key in enumerate(sorted(key for key in official if key.startswith(f"{block}."))):
        official[key] = torch.full_like(official[key], float(index))
    official[f"{block}.attn.kv.weight"][width:] = -1.0
    save_file({key: value.contiguous() for key, value in official.items()}, tmp_path / "mit.safetensors")
    segmenter = made()
    put(segmenter, tmp_path / "mit.safetensors")
    got = segmenter.net.segformer.stages[1].blocks[1]
    for module, key in ((got.layernorm_before, "norm1"), (got.layernorm_after, "norm2"), (got.mlp.fc1, "mlp.fc1"),
                        (got.mlp.fc2, "mlp.fc2"), (got.attention.q_proj, "attn.q")):  # fmt: skip
        assert torch.equal(module.weight, official[f"{block}.{key}.weight"]), key
        assert torch.equal(module.bias, official[f"{block}.{key}.bias"]), key
    assert torch.equal(got.attention.k_proj.weight, official[f"{block}.attn.kv.weight"][:width])
    assert torch.equal(got.attention.v_proj.weight, torch.full((width, width), -1.0))


def test_encoder_of_a_segmenter_of_mmsegmentation(tmp_path):
    """A whole segmenter's file is a backbone too: for another data set."""
    net = scramble(MmsegNet(9), seed=1)
    save_file({key: value.contiguous() for key, value in net.state_dict().items()}, tmp_path / "mmseg.safetensors")
    segmenter = made("segadapt_segformer_mmseg")
    said = put(segmenter, tmp_path / "mmseg.safetensors")
    image = torch.rand(1, 3, 65, 97, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = segmenter.net.segformer(image, output_hidden_states=True).hidden_states
        for one, other in zip(got, net.backbone(image), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert "decode_head.conv_seg.weight" in said


@pytest.mark.parametrize("names", ["file", "module"])
def test_dinov2_from_a_folder_and_from_a_file_of_either_naming(names, tmp_path):
    raw = scramble(Dinov2Model(Dinov2Config(**VIT)))
    raw.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        if names == "module":
            save_file(
                {key: value.contiguous() for key, value in raw.state_dict().items()}, tmp_path / "model.safetensors"
            )
        segmenter = make_segmenter("segadapt_dinov2", {"backbone_config": {"model_type": "dinov2", **VIT}}, 5)
        said = put(segmenter, source)
        assert fingerprint(segmenter.net.backbone) == fingerprint(raw)
        assert "left out" not in said


def edited(state, tmp_path, edit):
    state = dict(state)
    edit(state)
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "edited.safetensors")
    return tmp_path / "edited.safetensors"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda s: s.pop("norm2.bias"), r"stages\.1\.layer_norm\.bias is missing"),
        (lambda s: s.update(extra=torch.zeros(2)), "extra is unexpected"),
        (lambda s: s.update({"norm1.weight": torch.zeros(5)}), r"has shape \(5,\), expected"),
        (lambda s: [s.pop(key) for key in list(s) if "block" in key], "and .* more"),
    ],
)
def test_every_key_of_a_file_counts(edit, said, official, tmp_path):
    segmenter = made()
    before = fingerprint(segmenter.net)
    with pytest.raises(UserError, match=said) as error:
        put(segmenter, edited(official, tmp_path, edit))
    assert "\n" not in str(error.value)
    assert fingerprint(segmenter.net) == before


def test_a_folder_of_another_size_or_kind_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"has hidden_sizes .*has \[16, 16, 40, 64\]; .*another model/discriminative"):
        put(made(config=CONFIG | {"hidden_sizes": [16, 16, 40, 64]}), folder)
    with pytest.raises(UserError, match=r": [^;]* has shape [^;]*; [^;]*; and \d+ more\..*Choose the config of these"):
        put(made(config=CONFIG | {"hidden_sizes": [16, 16, 40, 64]}), folder / "model.safetensors")
    Dinov2Model(Dinov2Config(**VIT)).save_pretrained(tmp_path / "vit")
    with pytest.raises(UserError, match="model_type 'dinov2'; expected segformer"):
        put(made(), tmp_path / "vit")
    with pytest.raises(UserError, match="neither a folder that exists nor a hub id"):
        put(made(), tmp_path / "gone")
    with pytest.raises(UserError, match="no such file"):
        put(made(), tmp_path / "gone.safetensors")
    with pytest.raises(UserError, match="revision=main beside the file"):
        put(made(), tmp_path / "gone.safetensors", revision="main")


def test_a_classifier_is_no_checkpoint(folder):
    with pytest.raises(UserError, match=r"is a classifier of whole images; .* model\.discriminative\.backbone="):
        load_segmenter(str(folder), num_classes=11, device="cpu")


def test_a_hub_that_gives_nothing_leaves_random_weights(monkeypatch):
    """But not under a frozen encoder."""
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", Mock(side_effect=OSError("no connection")))
    with pytest.raises(UserError, match=r"could not be fetched .*, or backbone=null for random weights\.$"):
        put(made(), "owner/mit")
    frozen = make_segmenter("segadapt_dinov2", {"backbone_config": {"model_type": "dinov2", **VIT}}, 5)
    with pytest.raises(UserError, match=r"to a copy of it\.$"):
        put(frozen, "owner/dinov2")


def test_an_error_without_words_is_not_quoted(tmp_path):
    (tmp_path / "junk.pth").write_bytes(b"\x80\x02h\x07.")
    with pytest.raises(UserError, match=r"no file of torch\. Fetch it again"):
        put(made(), tmp_path / "junk.pth", allow_pickle=True)


def test_a_folder_without_a_config_says_what_is_expected(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"^model\.discriminative\.backbone=[^\n]*: expected a folder with config"):
        put(made(), tmp_path)


def test_what_no_shape_tells_is_compared(folder, tmp_path):
    """Twice the heads, half as wide: every weight has the same shape."""
    found = json.loads((folder / "config.json").read_text()) | {"num_attention_heads": [2, 4, 10, 16]}
    (tmp_path / "config.json").write_text(json.dumps(found))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(UserError, match=r"num_attention_heads \[2, 4, 10, 16\], .* has \[1, 2, 5, 8\]"):
        put(made(), tmp_path)


def settings(*overrides):
    given = ["data=toytown", "runtime=cpu", *overrides]
    return from_overrides("train", given, TrainConfig)


def test_training_starts_from_the_backbone(folder, classifier, capsys):
    config = ["{" + ",".join(f"{key}: {value}" for key, value in CONFIG.items()) + "}"]
    chosen = settings(
        "model/discriminative=segformer_b0_scratch",
        f"model.discriminative.config={config[0]}",
        f"model.discriminative.backbone={folder}",
    )
    segmenter = train.build(chosen, ("a", "b", "c"), torch.device("cpu"), console=Console())
    assert fingerprint(segmenter.net.segformer) == fingerprint(classifier.segformer)
    assert f"backbone {folder}: " in capsys.readouterr().out


def test_settings_that_would_have_no_effect_are_refused(folder):
    both = settings(
        "model/discriminative=toytown",
        f"model.discriminative.backbone={folder}",
    )  # fmt: skip
    with pytest.raises(UserError, match=r"backbone beside checkpoint="):
        train.build(both, tuple("abcdefghijkl"), torch.device("cpu"))
    frozen = settings("model/discriminative=dinov2_s_linear", "model.discriminative.backbone=null")
    with pytest.raises(UserError, match="the encoder is frozen, and would stay random"):
        train.build(frozen, ("a", "b", "c"), torch.device("cpu"))


# --- the shipped networks ---

MILLIONS = {"b0": (3.32, 0.43), "b1": (13.15, 0.56), "b2": (24.20, 3.27), "b3": (44.07, 3.27), "b4": (60.84, 3.27),
            "b5": (81.44, 3.27)}  # fmt: skip
DEPTHS_OF = {"b0": [2, 2, 2, 2], "b1": [2, 2, 2, 2], "b2": [3, 4, 6, 3], "b3": [3, 4, 18, 3], "b4": [3, 8, 27, 3],
             "b5": [3, 6, 40, 3]}  # fmt: skip


def shipped(name, num_classes):
    """The net of a preset on the meta device: no memory, no time."""
    chosen = settings(f"model/discriminative={name}").model.discriminative
    family = FAMILIES[chosen.family]
    with torch.device("meta"):
        return family.net(family.config(**chosen.config, id2label={index: str(index) for index in range(num_classes)}))


@pytest.mark.parametrize("size", MILLIONS)
def test_depths_and_parameters_of_the_segformers(size):
    """Xie et al. 2021, with 150 classes, in millions: encoder and head."""
    net = shipped(f"segformer_{size}_scratch", 150)
    found = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (net.segformer, net.decode_head)]
    assert [round(millions, 2) for millions in found] == pytest.approx(MILLIONS[size], abs=0.006)
    assert [len(stage.blocks) for stage in net.segformer.stages] == DEPTHS_OF[size]
    assert net.config.drop_path_rate == 0.1
    assert list(net.config.num_attention_heads) == [1, 2, 5, 8]


@pytest.mark.parametrize(
    ("name", "width", "layers", "registers"),
    [("dinov2_s_linear", 384, 1, 0), ("dinov2_b_ms", 768, 4, 0), ("dinov2_s_ms", 384, 4, 0),
     ("dinov2_b_linear", 768, 1, 0), ("dinov2_s_registers_linear", 384, 1, 4),
     ("dinov2_b_registers_linear", 768, 1, 4)],
)  # fmt: skip
def test_shapes_of_the_dinov2_presets(name, width, layers, registers):
    net = shipped(name, 150)
    assert net.backbone.embeddings.position_embeddings.shape == (1, 37 * 37 + 1, width)
    assert net.decode_head.classifier.weight.shape == (150, width * layers, 1, 1)
    assert len(net.backbone.encoder.layer) == 12
    assert sum("register_tokens" in name for name, _ in net.named_parameters()) == bool(registers)
