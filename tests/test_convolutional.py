"""ResNet, DeepLabV3, HRNet, OCR: sizes as published, arithmetic against loops, names of files, duties of families."""

import shutil

import numpy as np
import pytest
import torch
from conftest import CLASSES
from hypothesis import given, settings
from hypothesis import strategies as st
from quick_settings import quick_settings
from safetensors.torch import load_file, save_file
from steps import random_noise
from torch import nn
from torch.nn import functional as F
from training_runs import training
from transformers import ResNetConfig, ResNetModel

from segadapt import train
from segadapt.config_training import TrainConfig
from segadapt.errors import UserError
from segadapt.methods import METHODS
from segadapt.methods.build import build_method
from segadapt.models.discriminative.convolutional import Classifier
from segadapt.models.discriminative.deeplabv3 import DeepLabV3Config, PyramidHead
from segadapt.models.discriminative.families import FAMILIES
from segadapt.models.discriminative.hrnet import DROPPED, Exchange, Hrnet, HrnetConfig, hrnet_names
from segadapt.models.discriminative.load import load_segmenter, make_segmenter
from segadapt.models.discriminative.ocr import HrnetOcrConfig, OcrHead, region_vectors
from segadapt.models.discriminative.resnet import ResNet, resnet_names
from segadapt.parse import options_of

BRANCHES = {"hidden_sizes": [4, 8, 12, 16], "modules": [1, 2, 1], "blocks": 1, "stem_size": 4}
TINY = {  # family: config
    "segadapt_deeplabv3": {
        "depths": [1, 1, 2, 2], "widths": [2, 4, 6, 8], "stem_sizes": [4, 4, 8], "head_size": 8, "auxiliary_size": 8,
    },
    "segadapt_hrnet": BRANCHES,
    "segadapt_hrnet_ocr": BRANCHES | {"ocr_size": 8, "key_size": 4, "auxiliary_size": 8},
}  # fmt: skip
STRIDE = {"segadapt_deeplabv3": 8, "segadapt_hrnet": 4, "segadapt_hrnet_ocr": 4}
EVERY = pytest.mark.parametrize("family", TINY)


def make(family, num_classes=6, **more):
    return make_segmenter(family, TINY[family] | more, num_classes, seed=1)


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def disturbed(net, seed=0):
    """Norms and their statistics as after some training, so that none of them is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return net


def seeded(kind, *given):
    """A module in eval mode, the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return disturbed(kind(*given)).eval()


# Sizes


def shipped(file):
    """The discriminative model of the settings that have this file."""
    return quick_settings("train", [f"model/discriminative={file}"], TrainConfig).model.discriminative


def parameters_of(file, num_classes, **more):
    """Parameters of the shipped config, by part; no memory is taken."""
    chosen = shipped(file)
    family = FAMILIES[chosen.family]
    with torch.device("meta"):
        net = family.net(family.config(num_labels=num_classes, **{**chosen.config, **more}))
    return {name: sum(p.numel() for p in part.parameters()) for name, part in net.named_children()}


@pytest.mark.parametrize(
    ("file", "resnet", "deeplabv3"),
    # num_params of torchvision's resnet50 and deeplabv3_resnet50 (COCO with VOC labels), and of those with 101
    [("deeplabv3_r50_scratch", 25_557_032, 42_004_074), ("deeplabv3_r101_scratch", 44_549_160, 60_996_202)],
)
def test_deeplabv3_is_as_large_as_published(file, resnet, deeplabv3):
    """torchvision's has a 7x7 stem, 256 channels, 21 classes, and projects by a 1x1 convolution in place of a 3x3."""
    parts = parameters_of(file, 21, stem_sizes=[64], head_size=256)
    assert parts["encoder"] == resnet - 1000 * (2048 + 1)
    assert sum(parts.values()) - 8 * (5 * 256) * 256 == deeplabv3


@pytest.mark.parametrize(
    ("file", "millions"),  # of parameters, Wang et al. 2020, table 3 (Cityscapes, 19 classes); the code's README
    [("hrnet_w48_scratch", 65.8), ("hrnet_w18_scratch", 9.6)],
)
def test_hrnet_is_as_large_as_published(file, millions):
    """Its authors' head is a 1x1 convolution with bias where ours, openseg's, is a 3x3 one."""
    width = sum(shipped(file).config["hidden_sizes"])
    head = width * width + width + 2 * width + 19 * (width + 1)
    assert (parameters_of(file, 19)["encoder"] + head) / 1e6 == pytest.approx(millions, abs=0.1)


def test_ocr_is_as_large_as_published():
    """70.5 M on ADE20K (Xie et al. 2021, table 7), whose auxiliary head is a 1x1 convolution where ours is 3x3."""
    parts = parameters_of("hrnet_w48_ocr_scratch", 150)
    assert (sum(parts.values()) - 8 * 720 * 720) / 1e6 == pytest.approx(70.5, abs=0.05)
    assert sum(parameters_of("hrnet_w48_ocr_b_scratch", 150).values()) < sum(parts.values())


# ResNet


def resnet(output_stride=32, stem_sizes=(8,)):
    return seeded(ResNet, (1, 2, 2, 3), (2, 3, 4, 8), stem_sizes, output_stride)


def of_transformers(key):
    """Our name of a weight to the one that it has in transformers."""
    key = key.replace("stem.0.conv", "embedder.embedder.convolution").replace(
        "stem.0.bn", "embedder.embedder.normalization"
    )
    for layer in range(1, 5):
        key = key.replace(f"layer{layer}.", f"encoder.stages.{layer - 1}.layers.")
    for index in range(1, 4):
        key = key.replace(f".conv{index}.", f".layer.{index - 1}.convolution.")
        key = key.replace(f".bn{index}.", f".layer.{index - 1}.normalization.")
    return key.replace("downsample.0", "shortcut.convolution").replace("downsample.1", "shortcut.normalization")


def test_resnet_equals_that_of_transformers():
    ours = resnet()
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12, 16, 32], depths=[1, 2, 2, 3], layer_type="bottleneck"
    )  # fmt: skip
    theirs = ResNetModel(config).eval()
    theirs.load_state_dict({of_transformers(key): value for key, value in ours.state_dict().items()})
    pixels = noise(2, 3, 70, 99)
    with torch.no_grad():
        third, last = theirs(pixels, output_hidden_states=True).hidden_states[-2:]
        for found, expected in zip(ours(pixels), (third, last), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilation_fills_the_holes_of_the_strided_map(output_stride):
    """The algorithme a trous: at the strided map's own places the dense map has its values."""
    strided, dense = resnet(), resnet(output_stride)
    pixels = noise(1, 3, 97, 130)
    with torch.no_grad():
        (_, expected), (third, last) = strided(pixels), dense(pixels)
    step = 32 // output_stride
    assert third.shape[2:] == last.shape[2:] == (-(-97 // output_stride), -(-130 // output_stride))
    torch.testing.assert_close(last[:, :, ::step, ::step], expected)


def imagenet_file(state, stem):
    """A file as others wrote it: their stem's names, a classifier, no counters as before torch 0.4.1."""
    out = {"fc.weight": torch.zeros(1000, 32), "fc.bias": torch.zeros(1000)}
    for key, value in state.items():
        if not key.endswith("num_batches_tracked"):
            found = next(
                (theirs + key.removeprefix(ours) for ours, theirs in stem.items() if key.startswith(ours)), key
            )
            out[found] = value
    return out


THREE = [f"stem.{index}.{kind}." for index in range(3) for kind in ("conv", "bn")]
STEMS = {
    "torchvision": ((8,), dict(zip(THREE[:2], ["conv1.", "bn1."], strict=True))),
    "openseg": ((4, 4, 8), dict(zip(THREE, ["conv1.", "bn1.", "conv2.", "bn2.", "conv3.", "bn3."], strict=True))),
    "mmseg": (
        (4, 4, 8),
        dict(zip(THREE, ["stem.0.", "stem.1.", "stem.3.", "stem.4.", "stem.6.", "stem.7."], strict=True)),
    ),
}


@pytest.mark.parametrize("name", STEMS)
def test_imagenet_files_of_resnet_fit_key_by_key(name):
    sizes, stem = STEMS[name]
    source, target = resnet(stem_sizes=sizes), resnet(stem_sizes=sizes)
    for parameter in target.parameters():
        nn.init.zeros_(parameter)
    file = imagenet_file(source.state_dict(), stem)
    target.load_state_dict(resnet_names(file), strict=True)
    pixels = noise(1, 3, 64, 64)
    assert torch.equal(target(pixels)[1], source(pixels)[1])


def test_a_key_that_no_resnet_has_keeps_its_name_and_is_refused():
    file = imagenet_file(resnet().state_dict(), STEMS["torchvision"][1]) | {"layer5.0.conv1.weight": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "layer5\.0\.conv1\.weight"\. $'):
        resnet().load_state_dict(resnet_names(file), strict=True)


# DeepLabV3


def test_pyramid_sees_what_its_rates_say():
    config = DeepLabV3Config(widths=[1, 1, 1, 1], head_size=1, rates=[2, 5], num_labels=2)
    head = seeded(PyramidHead, config)
    x_BDhw = noise(1, 4, 15, 15).requires_grad_()
    reach = []
    for branch in head.branches:
        (gradient,) = torch.autograd.grad(branch.conv(x_BDhw)[0, 0, 7, 7], x_BDhw)
        reach.append({(y - 7, x - 7) for y, x in gradient[0].abs().sum(0).nonzero().tolist()})
    assert reach == [{(0, 0)}] + [{(y, x) for y in (-r, 0, r) for x in (-r, 0, r)} for r in (2, 5)]


def test_pyramid_pools_the_whole_image():
    head = seeded(PyramidHead, DeepLabV3Config(widths=[1, 1, 1, 1], head_size=9, rates=[2], num_labels=2))
    x_BDhw, seen = noise(1, 4, 9, 40), []
    head.project.register_forward_hook(lambda _, given, out: seen.append(given[0]))
    with torch.no_grad():
        head(x_BDhw)
    norm, mean_D = head.pool.bn.state_dict(), x_BDhw.double().numpy().mean(axis=(0, 2, 3))
    weight, bias, mean, variance = (norm[name].numpy() for name in ("weight", "bias", "running_mean", "running_var"))
    before = head.pool.conv.weight.detach()[:, :, 0, 0].numpy() @ mean_D
    expected_E = np.maximum((before - mean) / np.sqrt(variance + 1e-5) * weight + bias, 0)
    assert expected_E.any()
    np.testing.assert_allclose(seen[0][0, -9:].numpy(), np.tile(expected_E[:, None, None], (1, 9, 40)), rtol=1e-5)


def test_deeplabv3_refuses_to_train_on_single_images():
    segmenter = make("segadapt_deeplabv3").train()
    with pytest.raises(UserError, match=r"segadapt_deeplabv3 .*train\.batch_size of 2 or more\.$"):
        segmenter.outputs(torch.rand(1, 3, 64, 64))


# HRNet


def identity_like(exchange, middle):
    """Convolutions that pass `middle` on unchanged from any channel, and norms that do nothing."""
    for name, module in exchange.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
            if name.startswith("fuse_layers"):
                module.weight.data[..., module.kernel_size[0] // 2, module.kernel_size[1] // 2] = middle
        elif isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
    return exchange.eval()


def test_branches_are_summed_each_at_the_other_ones_size():
    """Blocks without weights pass on what is positive; a plane is what bilinear interpolation on corners keeps."""
    exchange = identity_like(Exchange((1, 1, 1), 1), middle=1.0)

    def plane(height, width, slope):
        return slope * np.add.outer(np.linspace(0, 2, height), np.linspace(0, 3, width))

    sizes = [(17, 25), (9, 13), (5, 7)]
    maps = [
        torch.tensor(plane(*size, slope)[None, None]).float() for size, slope in zip(sizes, (1, 10, 100), strict=True)
    ]
    with torch.no_grad():
        found = exchange(maps)
    # a plane of odd size, seen at every second pixel, is the plane of the smaller size
    for size, map_ in zip(sizes, found, strict=True):
        np.testing.assert_allclose(map_[0, 0].numpy(), plane(*size, 111), rtol=1e-5, atol=1e-4)


OFFICIAL = {  # of hrnetv2_w48_imagenet_pretrained.pth: names and shapes of some of its weights, of every kind
    "conv1.weight": (64, 3, 3, 3),
    "bn2.running_var": (64,),
    "layer1.0.downsample.0.weight": (256, 64, 1, 1),
    "layer1.3.conv2.weight": (64, 64, 3, 3),
    "transition1.0.0.weight": (48, 256, 3, 3),
    "transition1.1.0.0.weight": (96, 256, 3, 3),
    "transition1.1.0.1.bias": (96,),
    "stage2.0.branches.1.3.conv2.weight": (96, 96, 3, 3),
    "stage2.0.fuse_layers.0.1.0.weight": (48, 96, 1, 1),
    "stage2.0.fuse_layers.0.1.1.running_mean": (48,),
    "stage2.0.fuse_layers.1.0.0.0.weight": (96, 48, 3, 3),
    "transition2.2.0.0.weight": (192, 96, 3, 3),
    "stage3.3.branches.2.0.bn1.weight": (192,),
    "stage3.3.fuse_layers.2.0.0.0.weight": (48, 48, 3, 3),
    "stage3.3.fuse_layers.2.0.1.0.weight": (192, 48, 3, 3),
    "transition3.3.0.0.weight": (384, 192, 3, 3),
    "stage4.2.fuse_layers.3.0.0.1.weight": (48,),
    "stage4.2.fuse_layers.3.0.2.0.weight": (384, 48, 3, 3),
    "stage4.2.fuse_layers.0.3.0.weight": (48, 384, 1, 1),
}
CLASSIFIES = ("incre_modules.0.0.conv1.weight", "downsamp_modules.1.0.weight", "final_layer.1.bias", "classifier.bias")


def test_hrnet_has_the_names_and_shapes_of_its_authors():
    with torch.device("meta"):
        state = Hrnet(HrnetConfig()).state_dict()
    assert {name: tuple(state[name].shape) for name in OFFICIAL} == OFFICIAL
    modules = {name.split(".")[0] for name in state}
    assert modules == {name.split(".")[0] for name in OFFICIAL} | {"bn1", "conv2"}
    assert not any(name.startswith(("stage2.1", "stage3.4", "stage4.3")) for name in state)


def test_imagenet_file_of_hrnet_fits_key_by_key():
    config = HrnetConfig(**BRANCHES)
    source, target = seeded(Hrnet, config), Hrnet(config)
    file = {name: value for name, value in source.state_dict().items() if "num_batches" not in name}
    file |= {name: torch.zeros(1) for name in CLASSIFIES}
    target.load_state_dict(hrnet_names(file), strict=True)
    assert all(torch.equal(value, target.state_dict()[name]) for name, value in source.state_dict().items())
    assert {name.split(".")[0] for name in CLASSIFIES} == set(DROPPED)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "head\.weight"\. $'):
        target.load_state_dict(hrnet_names(file | {"head.weight": torch.zeros(1)}), strict=True)


# OCR


def test_region_vectors_are_means_under_a_softmax_over_pixels():
    pixels, regions = noise(2, 3, 4, 5, dtype=torch.float64), noise(2, 6, 4, 5, seed=1, dtype=torch.float64)
    found = region_vectors(pixels, regions).numpy()
    for image in range(2):
        for c in range(6):
            weights = np.exp(regions[image, c].numpy())
            expected = [(weights * pixels[image, d].numpy()).sum() / weights.sum() for d in range(3)]
            np.testing.assert_allclose(found[image, :, c, 0], expected, rtol=1e-12)


def test_pixels_attend_to_the_regions():
    """One pixel after the other, in float64."""
    config = HrnetOcrConfig(**TINY["segadapt_hrnet_ocr"], num_labels=3)
    head = seeded(OcrHead, 5, config).double()
    features, regions = noise(1, 5, 4, 6, dtype=torch.float64), noise(1, 3, 4, 6, seed=1, dtype=torch.float64)
    seen = {}
    for name in ("query", "key", "value", "context"):
        getattr(head, name).register_forward_hook(lambda _, given, out, name=name: seen.update({name: (given[0], out)}))
    with torch.no_grad():
        logits = head(features, regions)
    query_Khw, key_KC, value_KC = (seen[name][1][0].numpy() for name in ("query", "key", "value"))
    key_KC, value_KC = key_KC[..., 0], value_KC[..., 0]
    for y in range(4):
        for x in range(6):
            weights_C = np.exp([query_Khw[:, y, x] @ key_KC[:, c] / np.sqrt(config.key_size) for c in range(3)])
            expected_K = value_KC @ (weights_C / weights_C.sum())
            np.testing.assert_allclose(seen["context"][0][0, :, y, x].numpy(), expected_K, rtol=1e-12)
    assert logits.shape == (1, 3, 4, 6)


# Every family


@EVERY
@settings(max_examples=6)
@given(height=st.integers(64, 110), width=st.integers(64, 110))
def test_logits_cover_images_of_any_size(family, height, width):
    segmenter, stride = make(family), STRIDE[family]
    image_B3HW = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits_BChw = segmenter.logits(image_B3HW)
        assert logits_BChw.shape == (1, 6, -(-height // stride), -(-width // stride))
        with torch.autocast("cpu", torch.bfloat16):
            rough_BChw = segmenter.logits(image_B3HW)
    assert rough_BChw.dtype == torch.float32
    torch.testing.assert_close(rough_BChw, logits_BChw, rtol=0.1, atol=0.05 * float(logits_BChw.abs().max()))


@EVERY
def test_an_image_has_the_same_logits_alone_and_among_others(family):
    segmenter = make(family)
    image_B3HW = torch.rand(3, 3, 65, 80, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = segmenter.logits(image_B3HW)
        for index in range(3):
            torch.testing.assert_close(segmenter.logits(image_B3HW[index : index + 1])[0], together[index])


@EVERY
def test_outputs_have_what_training_asks_for(family):
    segmenter, seen = make(family), []
    has_auxiliary = "auxiliary_head" in dict(segmenter.net.named_children())
    segmenter.net.encoder.register_forward_hook(lambda _, __, out: seen.append(out))
    image_B3HW = torch.rand(2, 3, 65, 80)
    with torch.no_grad():
        plain = segmenter.outputs(image_B3HW)
        assert torch.equal(plain.logits_BChw, segmenter.logits(image_B3HW))
        found = segmenter.train().outputs(image_B3HW)
    last = seen[-1][-1] if isinstance(seen[-1], tuple) else seen[-1]
    assert torch.equal(found.features_BDyx, last)
    assert (found.auxiliary_BChw is not None) == has_auxiliary
    if found.auxiliary_BChw is not None:
        assert found.auxiliary_BChw.shape == found.logits_BChw.shape


@EVERY
def test_weights_start_as_published_and_depend_on_the_seed_alone(family):
    one, other = (make(family, num_classes=500).net for _ in range(2))
    for (name, module), again in zip(one.named_modules(), other.modules(), strict=True):
        if isinstance(module, nn.Conv2d):
            assert torch.equal(module.weight, again.weight), name
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            deviation = 0.01 if isinstance(module, Classifier) else (2 / fan_out) ** 0.5
            if module.weight.numel() > 500:
                assert module.weight.std().item() == pytest.approx(deviation, rel=0.15), name
            assert module.bias is None or not module.bias.any()


@EVERY
def test_parts_are_encoder_and_heads_and_the_top_is_the_last_stage(family):
    segmenter = make(family)
    rest = {name for name in segmenter.parameters() if not name.startswith("encoder.")}
    assert set(segmenter.head_parameters()) == rest
    last = "encoder.layer4." if family == "segadapt_deeplabv3" else "encoder.stage4."
    norms = segmenter.norm_parameters()
    assert set(segmenter.top_norm_parameters()) == {name for name in norms if name in rest or name.startswith(last)}
    assert any(name.startswith(last) for name in norms)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(family): the folder of a segmenter whose norms are not the identity."""
    folders = {}

    def folder(family):
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            segmenter = make(family)
            disturbed(segmenter.net)
            segmenter.save(folders[family])
        return folders[family]

    return folder


@EVERY
def test_saved_weights_come_back_and_are_strict(saved, family, tmp_path):
    first = make(family)
    disturbed(first.net)
    read = load_segmenter(str(saved(family)), num_classes=6, device="cpu")
    assert {key: getattr(read.net.config, key) for key in TINY[family]} == TINY[family]
    state = first.net.state_dict()
    assert state.keys() == read.net.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in read.net.state_dict().items())
    copy = shutil.copytree(saved(family), tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    del weights["head.classifier.weight"]
    weights["head.more"] = torch.zeros(1)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"head\.classifier\.weight is missing; head\.more is unexpected"):
        load_segmenter(str(copy), num_classes=6, device="cpu")
    with pytest.raises(UserError, match=r"its head has 6 classes, but the data set has 7"):
        load_segmenter(str(saved(family)), num_classes=7, device="cpu")


@EVERY
def test_sync_batch_norm_takes_the_place_of_every_norm(family):
    net = make(family).net
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(make(family).net)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in converted.modules())
    assert net.state_dict().keys() == converted.state_dict().keys()


@EVERY
def test_twenty_steps_lower_the_loss_of_one_batch(family):
    segmenter = make(family).train()
    generator = torch.Generator().manual_seed(0)
    image_B3HW = torch.rand(2, 3, 64, 64, generator=generator)
    label_BHW = (image_B3HW.mean(dim=1) > 0.5).long() + 2 * (torch.arange(64) > 30)
    optimizer = torch.optim.SGD(segmenter.net.parameters(), lr=0.1, momentum=0.9)
    losses = []
    torch.manual_seed(0)
    for _ in range(20):
        found = segmenter.outputs(image_B3HW)
        logits = [found.logits_BChw] + ([] if found.auxiliary_BChw is None else [found.auxiliary_BChw])
        sized = [F.interpolate(each, size=(64, 64), mode="bilinear") for each in logits]
        loss = sum(F.cross_entropy(each, label_BHW) for each in sized)
        loss.backward()
        assert all(parameter.grad is not None for parameter in segmenter.net.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


QUICK = {
    "eata": ("tta.options.fisher_images=2", "tta.options.distance=1", "tta.options.margin=1"),
    "rdumb": ("tta.options.reset_every=3", "tta.options.distance=1", "tta.options.margin=1"),
    "deyo": ("tta.options.margin=1", "tta.options.plpd=-1"),
    "rotta": ("tta.options.capacity=3", "tta.options.every=2"),
    "memo": ("tta.options.augmentations=2",),
    "sar": ("tta.options.margin=1",),
}


@pytest.mark.parametrize("family", ["segadapt_deeplabv3", "segadapt_hrnet_ocr"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_and_goes_back(name, family, compose_settings, build_teacher):
    given = compose_settings(f"tta.method={name}", "data.workers=0", "tta.optimizer.lr=1e-2", *QUICK.get(name, ()))
    segmenter = make(family, num_classes=len(CLASSES))
    if METHODS[name].has_teacher:
        method = METHODS[name](
            segmenter, build_teacher(), given.model, given.tta.optimizer, seed=0, precision="fp32",
            options=options_of(given.tta),
        )  # fmt: skip
    else:
        method = build_method(given, segmenter, memory=None)
    before = {key: value.clone() for key, value in segmenter.net.state_dict().items()}
    moving = {
        key for key in before if key in set(method.parameters()) or f"discriminative.{key}" in method.parameters()
    }
    done = [method.step(random_noise(seed), task="t", key=str(seed)) for seed in range(4)]
    assert all(step.is_finite and step.is_step_finite for step in done)
    assert all(step.logits_Chw.shape == done[0].logits_Chw.shape for step in done)
    moved = {key for key, value in segmenter.net.state_dict().items() if not torch.equal(value, before[key])}
    assert moved <= moving
    assert bool(moved) == bool(moving)
    method.reset()
    assert all(torch.equal(value, before[key]) for key, value in segmenter.net.state_dict().items())


def test_training_ends_in_a_folder_that_is_read(tmp_path):
    settings = training(tmp_path, "model.discriminative.family=segadapt_hrnet_ocr", "train.iters=2", "train.crop_px=64")
    settings.model.discriminative.config = TINY["segadapt_hrnet_ocr"]
    results = train.run(settings)
    segmenter = load_segmenter(f"{results['folder']}/model", num_classes=len(results["per_class"]), device="cpu")
    assert segmenter.net.config.model_type == "segadapt_hrnet_ocr"


@pytest.mark.parametrize(
    ("family", "wrong", "said"),
    [
        ("segadapt_deeplabv3", {"output_stride": 4}, r"config\.output_stride=4: expected 8 or 16\."),
        ("segadapt_deeplabv3", {"stem_sizes": [4, 4]}, r"config\.stem_sizes=\[4, 4\]: expected 1 or 3 numbers"),
        ("segadapt_deeplabv3", {"depths": [1, 0, 2, 2]}, r"config\.depths=\[1, 0, 2, 2\]: expected 4 numbers of 1 or"),
        ("segadapt_deeplabv3", {"head_sise": 4}, r"config\.head_sise is not a setting .*Did you mean head_size\?"),
        ("segadapt_hrnet", {"modules": [1, 2]}, r"config\.modules=\[1, 2\]: expected 3 numbers"),
        ("segadapt_hrnet", {"blocks": "many"}, r"config: TypeError: Field 'blocks' expected int, got str"),
        ("segadapt_hrnet_ocr", {"ocr_sizes": 4}, r"config\.ocr_sizes is not a setting .*Did you mean ocr_size\?"),
    ],
)
def test_a_wrong_config_is_refused_in_one_line(family, wrong, said):
    with pytest.raises(UserError, match=r"^model\.discriminative\." + said) as caught:
        make(family, **wrong)
    assert "\n" not in str(caught.value)


def test_recompute_that_a_net_does_not_have_is_refused():
    with pytest.raises(
        UserError, match=r"^model\.discriminative\.gradient_checkpointing=true: .*segadapt_hrnet cannot"
    ):
        make_segmenter("segadapt_hrnet", BRANCHES, 6, gradient_checkpointing=True)
