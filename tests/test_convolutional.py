"""ResNet, DeepLabV3, HRNet, OCR: as large as published, their arithmetic against loops, names of ImageNet's files."""

import itertools

import numpy as np
import pytest
import torch
from quick_settings import quick_settings
from tiny_networks import BRANCHES, TINY, noise, seeded
from torch import nn
from training_runs import training
from transformers import ResNetConfig, ResNetModel

from segadapt import train
from segadapt.config_training import TrainConfig
from segadapt.errors import UserError
from segadapt.models.discriminative.deeplabv3 import DeepLabV3Config, PyramidHead
from segadapt.models.discriminative.families import FAMILIES
from segadapt.models.discriminative.hrnet import DROPPED, Exchange, Hrnet, HrnetConfig, hrnet_names
from segadapt.models.discriminative.ocr import HrnetOcrConfig, OcrHead, region_vectors
from segadapt.models.discriminative.resnet import ResNet, resnet_names

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
    ("file", "millions"),  # of parameters, of the classifier of ImageNet: mmclassification's table of HRNet
    [("hrnet_w18_scratch", 21.30), ("hrnet_w32_scratch", 41.23), ("hrnet_w48_scratch", 77.47)],
)
def test_hrnet_as_encoder_of_a_classifier_is_as_large_as_published(file, millions):
    """Each branch is widened by a bottleneck block, joined to the next coarser one, and all to 2048 and 1000."""
    total, wide = parameters_of(file, 1)["encoder"], [128, 256, 512, 1024]
    for channels, out in zip(shipped(file).config["hidden_sizes"], wide, strict=True):
        width = out // 4
        convolutions = channels * width + 9 * width**2 + width * out + channels * out
        total += convolutions + 2 * (width + width + out + out)
    total += sum(9 * fine * coarse + 3 * coarse for fine, coarse in itertools.pairwise(wide))
    total += 1024 * 2048 + 3 * 2048 + 1000 * (2048 + 1)
    assert total / 1e6 == pytest.approx(millions, abs=0.005)


def test_hrnet_as_segmenter_is_as_large_as_published():
    """65.8 M on Cityscapes, whose head is a 1x1 convolution with bias where ours, openseg's, is a 3x3 one."""
    head = 720 * 720 + 3 * 720 + 19 * (720 + 1)
    assert (parameters_of("hrnet_w48_scratch", 19)["encoder"] + head) / 1e6 == pytest.approx(65.8, abs=0.1)


def test_ocr_is_as_large_as_published():
    """70.5 M on ADE20K (Xie et al. 2021, figure 1), with a 1x1 convolution in the auxiliary head where ours is 3x3."""
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


def test_refinement_passes_on_what_is_below_zero():
    head, seen = seeded(PyramidHead, DeepLabV3Config(widths=[1, 1, 1, 1], head_size=9, rates=[2], num_labels=2)), []
    head.classifier.register_forward_hook(lambda _, given, out: seen.append(given[0]))
    head(noise(1, 4, 9, 9) * 10)
    assert seen[0].min() < 0


@pytest.mark.parametrize(("more", "given"), [((), 1), (("train.accumulate=2",), 2)])
def test_deeplabv3_refuses_single_images_before_anything_is_made(tmp_path, more, given):
    """Its pooled branch normalises one vector an image: it once failed in the first step, with train.batch_size alone
    for a cure."""
    settings = training(tmp_path, "model.discriminative.family=segadapt_deeplabv3", f"train.batch_size={given}", *more)
    settings.model.discriminative.config = TINY["segadapt_deeplabv3"]
    said = rf"^train\.batch_size={given} with 1 process x train\.accumulate={given} is one image .*segadapt_deeplabv3"
    with pytest.raises(UserError, match=rf"{said}[^\n]*number of processes\.$"):
        train.run(settings)
    assert not any(tmp_path.iterdir())


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
