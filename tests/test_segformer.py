"""The segmenter: equal to the raw library, strict about weights, recompute that happens in eval mode."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import SEGFORMER as TINY
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import SegformerForSemanticSegmentation
from transformers.image_transforms import normalize
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from segadapt.errors import UserError
from segadapt.models.discriminative import load as loading
from segadapt.models.discriminative.load import load_segmenter
from segadapt.models.discriminative.make import make_segmenter


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segformer")
    make_segmenter("segformer", TINY, 5, seed=3).save(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def image(height=65, width=97, dtype=torch.float32):
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=dtype)


def load(folder, num_classes=5, **options):
    return load_segmenter(str(folder), num_classes=num_classes, device="cpu", **options)


def edit_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("grad", [False, True])
def test_logits_equal_the_raw_library_bit_for_bit(saved, grad):
    raw = SegformerForSemanticSegmentation.from_pretrained(saved).eval()
    segmenter = load(saved)
    pixels = (image() - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        3, 1, 1
    )
    with torch.set_grad_enabled(grad):
        expected, got = raw(pixel_values=pixels).logits, segmenter.logits(image())
    assert torch.equal(got, expected)
    assert got.shape == (1, 5, 17, 25)
    if grad:
        for logits in (expected, got):
            logits.square().sum().backward()
        pairs = zip(raw.parameters(), segmenter.net.parameters(), strict=True)
        for one, other in pairs:
            assert one.grad is not None
            assert other.grad is not None
            assert torch.equal(one.grad, other.grad)


def test_normalisation_is_that_of_the_library(saved):
    image_HW3 = np.random.default_rng(0).random((32, 40, 3), dtype=np.float32)
    pixels_HW3 = normalize(image_HW3, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    segmenter = load(saved)
    image_13HW, pixels_13HW = (torch.from_numpy(array).permute(2, 0, 1)[None] for array in (image_HW3, pixels_HW3))
    with torch.no_grad():
        torch.testing.assert_close(segmenter.logits(image_13HW), segmenter.net(pixel_values=pixels_13HW).logits)


def test_logits_are_float32_under_autocast_and_float64_for_a_float64_net(saved):
    segmenter = load(saved)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert segmenter.logits(image()).dtype == torch.float32
    segmenter.net.double()
    assert segmenter.logits(image(dtype=torch.float64)).dtype == torch.float64


def test_recompute_happens_in_eval_mode_and_changes_nothing(saved):
    outcome = {}
    for recompute in (False, True):
        segmenter, calls = load(saved, gradient_checkpointing=recompute), []
        for name, module in segmenter.net.named_modules():
            if name.endswith("layernorm_before"):  # inside the layer: the wrapper itself is called once in any case
                module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        before = {name: buffer.clone() for name, buffer in segmenter.net.named_buffers()}
        loss = segmenter.logits(image()).square().mean()
        loss.backward()
        outcome[recompute] = loss, {name: parameter.grad for name, parameter in segmenter.parameters().items()}
        assert len(calls) == (8 if recompute else 4)
        assert all(torch.equal(buffer, before[name]) for name, buffer in segmenter.net.named_buffers())
    assert torch.equal(outcome[False][0], outcome[True][0])
    for name, gradient in outcome[False][1].items():
        torch.testing.assert_close(outcome[True][1][name], gradient, rtol=0, atol=5e-5)


def test_eval_after_training_keeps_recompute_and_dropout_off(saved):
    segmenter = load(saved, gradient_checkpointing=True)
    segmenter.net.train()
    segmenter.eval()
    training = {type(module).__name__ for module in segmenter.net.modules() if module.training}
    assert training == {"SegformerLayer"}


def test_norm_parameters_are_the_affine_ones_of_norm_layers(saved):
    segmenter = load(saved)
    norms = segmenter.norm_parameters()
    expected = [
        p for m in segmenter.net.modules() if isinstance(m, nn.LayerNorm | nn.BatchNorm2d) for p in m.parameters()
    ]
    assert {id(parameter) for parameter in norms.values()} == {id(parameter) for parameter in expected}
    everything = segmenter.parameters()
    assert all(everything[name] is parameter and parameter.ndim == 1 for name, parameter in norms.items())
    assert "decode_head.batch_norm.weight" in norms


def test_saved_and_loaded_weights_are_equal(saved, tmp_path):
    first = load(saved)
    first.save(tmp_path)
    second = load(tmp_path)
    assert all(torch.equal(value, second.net.state_dict()[name]) for name, value in first.net.state_dict().items())
    assert not second.net.training
    assert {parameter.dtype for parameter in second.net.parameters()} == {torch.float32}


def test_half_precision_file_is_read_as_float32(copy):
    edit_weights(copy, lambda w: w.update({k: v.half() for k, v in w.items() if v.is_floating_point()}))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    assert {parameter.dtype for parameter in load(copy).net.parameters()} == {torch.float32}


FAULTS = {
    "dropped": (lambda w: w.pop("decode_head.classifier.bias"), "decode_head.classifier.bias is missing"),
    "dropped buffer": (lambda w: w.pop("decode_head.batch_norm.running_var"), "running_var is missing"),
    "added": (lambda w: w.update({"extra.weight": torch.zeros(2)}), "extra.weight is unexpected"),
    "reshaped": (
        lambda w: w.update({"decode_head.classifier.weight": torch.zeros(7, 16, 1, 1)}),
        r"decode_head.classifier.weight has shape \(7, 16, 1, 1\), expected \(5, 16, 1, 1\)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_key_must_fit(copy, fault):
    edit, message = FAULTS[fault]
    edit_weights(copy, edit)
    with pytest.raises(UserError, match=message):
        load(copy)


def test_head_with_other_classes_is_refused_with_both_numbers(saved):
    with pytest.raises(UserError, match="head has 5 classes, but the data set has 19"):
        load(saved, num_classes=19)


def test_broken_folders_are_explained(copy, tmp_path):
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match="incomplete or damaged") as error:
        load(copy)
    assert error.value.__cause__ is not None
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match="incomplete or damaged"):
        load(copy)
    (copy / "config.json").unlink()
    with pytest.raises(UserError, match="model_type None; expected one of segformer"):
        load(copy)
    with pytest.raises(UserError, match="neither a folder that exists nor a hub id"):
        load(tmp_path / "nowhere")


def test_pickled_weights_need_the_flag(copy):
    expected = load(copy).net.state_dict()
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match="allow_pickle=true"):
        load(copy)
    got = load(copy, allow_pickle=True).net.state_dict()
    assert all(torch.equal(got[name], value) for name, value in expected.items())


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_code_in_a_pickle_never_runs(copy, tmp_path, allow_pickle):
    torch.save({"decode_head.classifier.bias": Malicious(tmp_path / "ran")}, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError):
        load(copy, allow_pickle=allow_pickle)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("version", "fine"), [("2.9.1+cu128", False), ("2.10.0", True), ("3.0.0a0", True)])
def test_old_torch_may_not_read_pickles(version, fine):
    if fine:
        loading.check_torch_reads_pickles_safely(version)
    else:
        with pytest.raises(UserError, match=r"expected torch 2\.10 or later"):
            loading.check_torch_reads_pickles_safely(version)


def test_built_weights_depend_on_the_seed_alone():
    state = torch.get_rng_state()
    first, second, other = (make_segmenter("segformer", TINY, 3, seed=seed).net.state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not torch.equal(first["decode_head.classifier.weight"], other["decode_head.classifier.weight"])


def test_built_net_checks_its_settings():
    with pytest.raises(UserError, match=r"depthz is not a setting of segformer\. Did you mean depths"):
        make_segmenter("segformer", {"depthz": [1]}, 3)
    with pytest.raises(UserError, match=r"^model\.discriminative\.config\.label2id: the data set names the classes"):
        make_segmenter("segformer", {"label2id": {"a": 0}}, 3)
    named = make_segmenter("segformer", TINY, 3, classes="abc").net.config
    assert (named.id2label, named.label2id) == ({0: "a", 1: "b", 2: "c"}, {"a": 0, "b": 1, "c": 2})


def test_a_bgr_net_sees_the_channels_turned_each_with_its_own_mean_and_keeps_that_when_saved(saved, tmp_path):
    plain, bgr = load(saved), load(saved, channel_order="bgr")
    turned = (image() - torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_DEFAULT_STD).view(
        3, 1, 1
    )
    with torch.no_grad():
        expected = plain.net(pixel_values=turned[:, [2, 1, 0]]).logits
        assert torch.equal(bgr.logits(image()), expected)
        bgr.save(tmp_path / "bgr")
        assert torch.equal(load(tmp_path / "bgr").logits(image()), expected)
        assert torch.equal(load(tmp_path / "bgr", channel_order="rgb").logits(image()), plain.logits(image()))


def test_a_net_from_random_weights_takes_the_channel_order_too(tmp_path):
    made = [make_segmenter("segformer", TINY, 5, seed=3, channel_order=order) for order in ("bgr", None)]
    with torch.no_grad():
        assert not torch.equal(made[0].logits(image()), made[1].logits(image()))
    made[0].save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["channel_order"] == "bgr"
