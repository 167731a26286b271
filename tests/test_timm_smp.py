"""Encoders of timm and nets of smp: with a stand-in for timm everywhere, with the packages where they are installed."""

import importlib
import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import CLASSES
from safetensors.torch import save_file
from steps import random_noise
from tiny_networks import disturbed
from torch import distributed as dist
from torch import nn
from training_runs import training

from segadapt import train
from segadapt.errors import UserError
from segadapt.methods.build import build_method
from segadapt.models.discriminative.backbone import load_backbone
from segadapt.models.discriminative.foreign import explain_arguments, explain_images, own_names, pools_images
from segadapt.models.discriminative.load import load_segmenter
from segadapt.models.discriminative.make import make_segmenter
from segadapt.training.parallel import World, spread


class NormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: one forward for both."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x_BDyx):
        return self.act(super().forward(x_BDyx))


class Encoder(nn.ModuleDict):
    """As timm's FeatureListNet: channels last, a map of stride 2, names joined by underscores, a buffer in no file."""

    def __init__(self, out_indices=(0, 1, 2), width=4, only=None):
        super().__init__()
        names = [("stem", "stages.0", "stages.1")[index] for index in out_indices]
        for name, channels in (("stem", 3), ("stages_0", width), ("stages_1", width)):
            self[name] = nn.Sequential(nn.Conv2d(channels, width, 3, 2, 1, bias=False), NormAct(width))
        self.register_buffer("shift", torch.linspace(0, 1, width), persistent=False)
        self.output_fmt = "NHWC"
        self.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "fixed_input_size": only is not None,
                               "input_size": (3, only, only)}  # fmt: skip
        self.only = only  # as of LeViT, whose attention knows where its maps end, px
        self.feature_info = SimpleNamespace(
            out_indices=tuple(out_indices),
            reduction=lambda: [2 ** (index + 1) for index in out_indices],
            channels=lambda: [width for _ in out_indices],
            module_name=lambda: names,
        )

    def forward(self, x_BDyx):
        assert x_BDyx.shape[2] < 1000, "Input height doesn't match model (224)."
        if self.only not in (None, x_BDyx.shape[2]):
            raise RuntimeError("The size of tensor a (1) must match\nthe size of tensor b (2)")
        maps = []
        for stage in self.values():
            x_BDyx = stage(x_BDyx) + self.shift[:, None, None]
            maps.append(x_BDyx.movedim(1, 3))
        return [maps[index] for index in self.feature_info.out_indices]


@pytest.fixture
def stand_in(monkeypatch):
    """What segadapt asks of timm; every call, so that a test sees that nothing is fetched."""
    timm, calls = ModuleType("timm"), []

    def create_model(name, **given):
        calls.append((name, given))
        assert (given.pop("pretrained"), given.pop("features_only")) == (False, True)
        return Encoder(**given)

    timm.__dict__.update(
        __version__="1.0",
        is_model=lambda name: name == "tiny",
        list_models=lambda: ["tiny", "large"],
        layers=SimpleNamespace(BatchNormAct2d=NormAct),
        create_model=create_model,
    )
    monkeypatch.setitem(sys.modules, "timm", timm)
    return calls


class SmpModel(nn.Module):
    """As smp's models: three parts in turn, for sizes of whole multiples, a pool to one value in front of a norm."""

    requires_divisible_input_shape = True

    def __init__(self, pools):
        super().__init__()
        self.encoder, self.segmentation_head = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 6, 1)
        self.encoder.output_stride = 32
        pool = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)]
        self.decoder = nn.Sequential(*pool, nn.Upsample(scale_factor=32)) if pools else nn.BatchNorm2d(4)

    def forward(self, x_B3HW):
        return self.segmentation_head(self.decoder(self.encoder(x_B3HW)))


@pytest.fixture
def smp_stand_in(monkeypatch, stand_in):
    """What segadapt asks of smp: `pooled` and other nets, on r18 and efficientnet-b0."""
    smp = ModuleType("segmentation_models_pytorch")
    names = ["r18", "efficientnet-b0"]
    smp.__dict__.update(
        __version__="0.6",
        MODEL_ARCHITECTURES_MAPPING={name: lambda encoder_depth=5: None for name in ("unet", "pooled", "pspnet")},
        encoders=SimpleNamespace(get_encoder_names=lambda: names),
        create_model=lambda arch, name, encoder_weights, classes, **options: SmpModel(arch == "pooled"),
    )
    monkeypatch.setitem(sys.modules, smp.__name__, smp)


def tiny_smp(arch, **more):
    return make_segmenter("segadapt_smp", {"arch": arch, "encoder_name": "r18"} | more, 6, seed=1)


def tiny(**more):
    return make_segmenter("segadapt_timm", {"encoder_name": "tiny", "head_size": 8} | more, 6, seed=1)


def image(height, width, images=1):
    return torch.rand(images, 3, height, width, generator=torch.Generator().manual_seed(0))


def assert_comes_back(segmenter, folder, size=(64, 96)):
    """Saved and read: the same config, weights and logits; nothing is drawn from the global generator."""
    disturbed(segmenter.net)
    segmenter.save(folder)
    before = torch.get_rng_state()
    read = load_segmenter(str(folder), num_classes=6, device="cpu")
    assert torch.equal(before, torch.get_rng_state())
    state = segmenter.net.state_dict()
    assert state.keys() == read.net.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in read.net.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(read.logits(image(*size)), segmenter.logits(image(*size)), rtol=1e-4, atol=1e-5)
    return read


# Without the packages


@pytest.mark.parametrize(("extra", "name"), [("timm", "timm"), ("smp", "segmentation_models_pytorch")])
def test_a_missing_package_names_its_extra(monkeypatch, extra, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"^model\.discriminative\.family=segadapt_{extra}: {name} cannot be imported"
                                        rf".*pip install 'segadapt\[{extra}\]'\.$"):  # fmt: skip
        make_segmenter(f"segadapt_{extra}", {}, 6)


@pytest.mark.parametrize("family", ["segadapt_timm", "segadapt_smp"])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"encoder_name": "hf-hub:timm/resnet50"}, r"encoder_name=hf-hub:timm/resnet50: expected the plain name"),
        ({"options": {"checkpoint_path": "x.pth"}}, r"options\.checkpoint_path is not an option: .*weights are"),
        ({"options": {"pretrained": True}}, r"options\.pretrained is not an option"),
        ({"encodername": "x"}, r"encodername is not a setting of .*Did you mean encoder_name\?"),
    ],
)
def test_nothing_is_fetched_or_read_by_a_config(family, wrong, said):
    with pytest.raises(UserError, match=r"^model\.discriminative\.config\." + said) as caught:
        make_segmenter(family, wrong, 6)
    assert "\n" not in str(caught.value)


def test_maps_of_stride_4_and_more_are_taken_and_stay_so(stand_in, tmp_path):
    segmenter = tiny()
    assert segmenter.net.config.out_indices == [1, 2]
    assert segmenter.net.config.image_mean == [0.5, 0.5, 0.5]
    read = assert_comes_back(segmenter, tmp_path)
    assert torch.equal(read.net.encoder.shift, torch.linspace(0, 1, 4))
    assert stand_in == [("tiny", {}), ("tiny", {"out_indices": (1, 2)})]
    assert tiny(out_indices=[0, 2]).logits(image(64, 96)).shape == (1, 6, 32, 48)


def test_normalised_by_what_the_encoder_was_trained_with(stand_in):
    segmenter = tiny()
    assert torch.equal(segmenter.normalised(torch.full((1, 3, 2, 2), 0.75)), torch.ones(1, 3, 2, 2))


@pytest.mark.parametrize(("given", "other", "expected"), [
    ("image_mean", "image_std", [0.25, 0.25, 0.25]), ("image_std", "image_mean", [0.5, 0.5, 0.5]),
])  # fmt: skip
def test_a_mean_or_a_deviation_alone_is_used(stand_in, given, other, expected):
    config = tiny(**{given: [0.1, 0.2, 0.3]}).net.config
    assert getattr(config, given) == [0.1, 0.2, 0.3]
    assert getattr(config, other) == expected


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"image_mean": []},
            r": image_mean=\[\] in the config of segadapt_timm: expected three finite numbers, of RGB",
        ),
        ({"image_mean": [0.5, 0.5]}, r": image_mean=\[0\.5, 0\.5\] in .*: expected three finite numbers"),
        ({"image_std": [0.5, 0.0, 0.5]}, r": image_std=\[0\.5, 0\.0, 0\.5\] in .*: expected .* numbers above 0"),
        ({"image_std": [0.5, 0.5, float("nan")]}, r": image_std=\[0\.5, 0\.5, nan\] in .*: expected three finite"),
        ({"dropout": 1.5}, r"\.config: dropout=1\.5: expected at least 0 and less than 1\."),
        ({"head_size": 0}, r"\.config: head_size=0: expected 1 or more\."),
        ({"out_indices": []}, r"\.config: out_indices=\[\]: expected one number or more, from 0 and rising\."),
        ({"out_indices": [1, 1]}, r"\.config: out_indices=\[1, 1\]: expected one number or more"),
        ({"out_indices": [2, 1]}, r"\.config: out_indices=\[2, 1\]: expected one number or more"),
        ({"out_indices": [-1]}, r"\.config: out_indices=\[-1\]: expected one number or more"),
        (
            {"out_indices": [0, 9]},
            r"\.config: timm's tiny with out_indices=\[0, 9\] cannot be built: IndexError: tuple",
        ),
        ({"options": {"width": "4"}}, r"\.config: timm's tiny cannot be built: TypeError"),
        ({"options": 5}, r"\.config: Field 'options' with value 5 doesn't match"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line(stand_in, wrong, said):
    with pytest.raises(UserError, match=rf"^model\.discriminative{said}") as caught:
        tiny(**wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [AttributeError, IndexError])
def test_what_a_package_raises_for_its_arguments_is_one_line(error):
    with pytest.raises(UserError, match=rf": it cannot be built: {error.__name__}\. Correct"), explain_arguments("it"):
        raise error("")


def test_an_encoder_of_fixed_size_takes_its_own_size_as_it_is(stand_in):
    """Which need be no multiple of its largest stride, as the 224 px of LeViT are none of 64."""
    segmenter = tiny(options={"only": 60})
    assert segmenter.logits(image(60, 60)).shape == (1, 6, 15, 15)
    with pytest.raises(UserError, match=r"encoder_name=tiny refuses 1 images of 44 x 60 px: The size of tensor a \(1\) "
                                        r"must match the size of tensor b \(2\); expected another"):  # fmt: skip
        segmenter.logits(image(44, 60))
    with pytest.raises(RuntimeError, match=r"^allocate$"), explain_images("tiny", image(44, 60)):
        raise RuntimeError("allocate")


def test_a_net_of_smp_is_one_graph_and_gives_what_its_head_sees(smp_stand_in):
    segmenter = tiny_smp("unet")
    model, pixels_B3HW = segmenter.net.model, image(64, 96)
    found = torch.compile(segmenter.outputs, backend="eager", fullgraph=True)(pixels_B3HW)
    assert torch.equal(found.logits_BChw, model(segmenter.normalised(pixels_B3HW)))
    assert torch.equal(model.segmentation_head(found.features_BDyx), found.logits_BChw)
    with torch.no_grad():
        found = segmenter.outputs(image(60, 80))  # the maps of 64 x 96, and of them what covers the image alone
    torch.testing.assert_close(model.segmentation_head(found.features_BDyx), found.logits_BChw)


@pytest.mark.parametrize(
    ("arch", "more", "expected"),
    [
        ("unet", {}, False),
        ("pspnet", {}, True),
        ("unet", {"options": {"encoder_depth": 3}}, True),
        ("unet", {"encoder_name": "efficientnet-b0"}, True),
        ("unet", {"encoder_name": "tu-tiny"}, False),
    ],
)
def test_ddp_looks_for_unread_weights_where_a_net_of_smp_has_some(smp_stand_in, arch, more, expected):
    assert tiny_smp(arch, **more).net.has_unread_weights == expected


def test_single_images_are_refused_before_the_start_where_a_net_pools_them(smp_stand_in, tmp_path):
    assert not pools_images(tiny_smp("unet").net)
    settings = training(
        tmp_path, "model.discriminative.family=segadapt_smp", "train.batch_size=2", "train.accumulate=2"
    )
    settings.model.discriminative.config = {"arch": "pooled", "encoder_name": "r18"}
    with pytest.raises(UserError, match=r"is one image a micro-batch; segadapt_smp pools whole images"):
        train.run(settings)
    assert not list(tmp_path.rglob("settings.json"))


def test_any_size_is_covered(stand_in):
    """Right and down a border of the mean colour, which the logits leave out."""
    segmenter = tiny(image_mean=[0.0, 0.0, 0.0], image_std=[1.0, 1.0, 1.0])
    with torch.no_grad():
        whole = segmenter.logits(image(64, 96))
        assert whole.shape == (1, 6, 16, 24)
        assert segmenter.logits(image(61, 90)).shape == (1, 6, 16, 24)
    net = segmenter.net
    ramp_BDhw = torch.arange(24.0).expand(1, 1, 16, 24)  # of 96 px, of which the image has 60: 15 whole values
    found = net.without_padding(ramp_BDhw, image(64, 96), image(64, 60))[0, 0, 0]
    torch.testing.assert_close(found[1:], ((torch.arange(24) + 0.5) * 15 / 24 - 0.5)[1:])
    assert torch.equal(net.without_padding(image(64, 96), image(64, 96), image(60, 80)), image(64, 96)[:, :, :60, :80])
    with pytest.raises(UserError, match=r"encoder_name=tiny refuses 1 images of 1000 x 64 px: .*doesn't match"):
        segmenter.logits(image(1000, 64))


def test_parts_are_encoder_and_head_and_the_top_is_the_last_stage(stand_in):
    segmenter = tiny()
    assert set(segmenter.head_parameters()) == {name for name in segmenter.parameters() if name.startswith("head.")}
    tops = {name for name in segmenter.norm_parameters() if name.startswith(("head.", "encoder.stages_1."))}
    assert set(segmenter.top_norm_parameters()) == tops
    assert len(tops) == 2 * 3 + 2


def test_encoder_starts_as_timm_has_it(stand_in):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        expected = Encoder().stages_1[0].weight
    assert torch.equal(tiny().net.encoder.stages_1[0].weight, expected)


def test_a_norm_with_activation_is_apart_and_every_method_finds_it(stand_in, compose_settings):
    """BN with none of the image's own statistics is the source; SyncBN takes the norm's place alone."""
    given = compose_settings("tta.method=bn-alpha", "tta.options.alpha=0", "data.workers=0")
    segmenter = make_segmenter("segadapt_timm", {"encoder_name": "tiny"}, len(CLASSES))
    disturbed(segmenter.net)
    plain = segmenter.net.encoder
    with torch.no_grad():
        expected = Encoder(width=4).eval()
        state = {name.replace(".norm.", "."): value for name, value in plain.state_dict().items()}
        expected.load_state_dict(state)
        for one, other in zip(plain(image(64, 64)), expected(image(64, 64)), strict=True):
            assert torch.equal(one, other)
        source = segmenter.logits(image(64, 64))
        build_method(given, segmenter, memory=None)
        torch.testing.assert_close(segmenter.logits(image(64, 64)), source, rtol=1e-4, atol=1e-5)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(tiny().net)
    assert isinstance(converted.encoder.stem[1].norm, nn.SyncBatchNorm)
    assert isinstance(converted.encoder.stem[1].act, nn.SiLU)


def test_a_file_of_the_whole_net_fills_the_encoder(stand_in, tmp_path):
    """Under timm's names, `stages.0`, and with a classifier, which is left out; nothing else may be missing or more."""
    segmenter, source = tiny(), Encoder()
    disturbed(source)
    file = {name.replace("stages_", "stages."): value for name, value in source.state_dict().items()}
    file["fc.weight"] = torch.zeros(3, 4)
    save_file(file, tmp_path / "timm.safetensors")
    said = load_backbone(segmenter, str(tmp_path / "timm.safetensors"), revision=None, allow_pickle=False)
    assert said.endswith("left out, as a head is made anew: fc.weight")
    got = segmenter.net.encoder.state_dict()
    assert all(torch.equal(got[name.replace(".1.", ".1.norm.")], value) for name, value in source.state_dict().items())
    del file["stem.0.weight"]
    save_file(file | {"stages.1.2.weight": torch.zeros(1)}, tmp_path / "timm.safetensors")
    with pytest.raises(UserError, match=r"stem\.0\.weight is missing; stages\.1\.2\.weight is unexpected"):
        load_backbone(segmenter, str(tmp_path / "timm.safetensors"), revision=None, allow_pickle=False)


def test_names_behind_model():
    """As in timm's ViT, and in smp's encoders around timm's."""
    inner = nn.ModuleDict({"blocks": nn.Linear(2, 2), "norm": nn.Identity()})
    encoder = nn.ModuleDict({"model": nn.ModuleDict({"model": inner})})
    state = {"blocks.weight": torch.ones(2, 2), "norm.weight": torch.ones(2), "blocks.more": torch.ones(1)}
    assert set(own_names(encoder)(state)) == {"model.model.blocks.weight", "blocks.more"}


def test_wrong_names_and_options(stand_in):
    with pytest.raises(UserError, match=r"encoder_name=tinny: timm 1\.0 has no such .*Did you mean tiny\?"):
        tiny(encoder_name="tinny")
    with pytest.raises(UserError, match=r"timm's tiny cannot be built: TypeError: .*'drop'.*Correct encoder_name or o"):
        tiny(options={"drop": 1})


def test_training_ends_in_a_folder_that_is_read(stand_in, tmp_path):
    settings = training(
        tmp_path, "model.discriminative.family=segadapt_timm", "train.iters=2", "train/losses=contrast",
        "train.losses.contrast.warmup_iters=0", "train.losses.contrast.min_views=2",
    )  # fmt: skip
    settings.model.discriminative.config = {"encoder_name": "tiny", "head_size": 8}
    results = train.run(settings)
    read = load_segmenter(f"{results['folder']}/model", num_classes=len(results["per_class"]), device="cpu")
    assert read.net.config.model_type == "segadapt_timm"
    assert read.outputs(image(48, 48)).features_BDyx.shape == (1, 8, 12, 12)


@pytest.mark.parametrize("says_so", [True, False])
def test_weights_that_nothing_reads_are_no_obstacle_to_ddp(tmp_path, says_so):
    """As smp's PSPNet has them; DDP would else refuse the second step, as it waits for their gradient."""
    net = nn.ModuleDict({"read": nn.Linear(2, 1), "unread": nn.Linear(2, 1)})
    net.has_unread_weights = says_so
    net.forward = lambda values: net["read"](values).sum()
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        together = spread(net, net, World("ddp"))
        together(torch.ones(1, 2)).backward()
        with nullcontext() if says_so else pytest.raises(RuntimeError, match="finished reduction"):
            together(torch.ones(1, 2)).backward()
    finally:
        dist.destroy_process_group()
    assert net["unread"].weight.grad is None


# With the packages: make test on a machine that has segadapt[smp]


@pytest.fixture(scope="module")
def timm():
    return importlib.import_module("timm") if has("timm") else pytest.skip("needs segadapt[timm]")


@pytest.fixture(scope="module")
def smp():
    name = "segmentation_models_pytorch"
    return importlib.import_module(name) if has(name) else pytest.skip("needs segadapt[smp]")


def has(name):
    """Installed, and with a torchvision that fits."""
    try:
        importlib.import_module(name)
    except (ImportError, RuntimeError):
        return False
    return True


SWIN = {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2], "strict_img_size": False}
ENCODERS = {  # name: options, indices of the maps, stride of the first of them
    "test_resnet": ({}, [1, 2, 3, 4], 4),
    "test_efficientnet": ({}, [1, 2, 3, 4], 4),
    "test_convnext": ({}, [0, 1, 2, 3], 4),
    "swin_tiny_patch4_window7_224": (SWIN, [0, 1, 2, 3], 4),
    "vit_tiny_patch16_224": ({"dynamic_img_size": True, "depth": 4, "embed_dim": 24}, [1, 2, 3], 16),
}


def of_timm(name, classes=6):
    options = ENCODERS[name][0]
    return make_segmenter("segadapt_timm", {"encoder_name": name, "options": options, "head_size": 8}, classes, seed=1)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_of_timm(timm, name, tmp_path):
    """Any size, saved and read, every weight with a gradient, and timm's own file of the whole net as backbone."""
    options, indices, stride = ENCODERS[name]
    segmenter = of_timm(name)
    assert segmenter.net.config.out_indices == indices
    assert segmenter.logits(image(64, 96)).shape == (1, 6, 64 // stride, 96 // stride)
    assert_comes_back(segmenter, tmp_path / "saved", (61, 90))
    segmenter.train().outputs(image(64, 96, images=2)).logits_BChw.square().mean().backward()
    assert all(parameter.grad is not None for parameter in segmenter.parameters().values())
    assert any(name.startswith("encoder.") for name in segmenter.top_norm_parameters())
    whole = disturbed(timm.create_model(name, **options))
    file = tmp_path / "timm.safetensors"
    save_file({key: value.contiguous() for key, value in whole.state_dict().items()}, file)
    load_backbone(segmenter, str(file), revision=None, allow_pickle=False)
    with torch.no_grad():
        expected = whole.eval().forward_intermediates(image(64, 96), intermediates_only=True)
        maps = segmenter.eval().net.encoder(image(64, 96))[-len(indices) :]
    is_last = str(getattr(segmenter.net.encoder, "output_fmt", "")).endswith("NHWC")
    for found, wanted in zip(maps, expected[-len(indices) :], strict=True):
        torch.testing.assert_close(found.movedim(3, 1) if is_last else found, wanted, rtol=1e-4, atol=1e-5)


def test_names_that_timm_does_not_have(timm):
    with pytest.raises(UserError, match=r"encoder_name=resnet5O: timm .*Did you mean resnet50\?"):
        make_segmenter("segadapt_timm", {"encoder_name": "resnet5O"}, 6)
    with pytest.raises(UserError, match=r"cannot be built: RuntimeError: .*none_such"):
        make_segmenter("segadapt_timm", {"encoder_name": "test_resnet.none_such"}, 6)
    with pytest.raises(UserError, match=r"refuses 1 images of 64 x 96 px: Input height \(64\) doesn't match"):
        make_segmenter(
            "segadapt_timm", {"encoder_name": "swin_tiny_patch4_window7_224", "options": {"embed_dim": 24}}, 6
        ).logits(image(64, 96))


NETS = [  # arch, encoder, options
    ("unet", "tu-test_resnet", {"decoder_channels": [8, 8, 8, 8, 8]}),
    ("fpn", "tu-test_efficientnet", {"decoder_pyramid_channels": 8, "decoder_segmentation_channels": 32}),
    ("fpn", "tu-test_resnet", {"decoder_segmentation_channels": 32, "upsampling": 1}),
    ("segformer", "mit_b0", {"decoder_segmentation_channels": 8}),
    ("deeplabv3plus", "resnet18", {"decoder_channels": 8}),
]


@pytest.mark.parametrize(("arch", "encoder", "options"), NETS)
def test_nets_of_smp(smp, arch, encoder, options, tmp_path):
    """Any size, saved and read, every weight with a gradient, and the same arithmetic as smp's."""
    segmenter = make_segmenter("segadapt_smp", {"arch": arch, "encoder_name": encoder, "options": options}, 6, seed=1)
    side = (16, 24) if "upsampling" in options else (64, 96)
    assert segmenter.logits(image(64, 96)).shape == (1, 6, *side)
    assert segmenter.logits(image(61, 90)).shape[2:] == (side if "upsampling" in options else (61, 90))
    assert_comes_back(segmenter, tmp_path, (61, 90))
    with torch.no_grad():
        raw = smp.create_model(arch, encoder, encoder_weights=None, classes=6, **options).eval()
        own = segmenter.net.model.state_dict()
        raw.load_state_dict(
            {name: own.get(name, own.get(".norm.".join(name.rsplit(".", 1)))) for name in raw.state_dict()}
        )
        torch.testing.assert_close(raw(segmenter.normalised(image(64, 96))), segmenter.logits(image(64, 96)))
    found = segmenter.train().outputs(image(64, 96, images=2))
    assert found.features_BDyx.ndim == 4
    found.logits_BChw.square().mean().backward()
    assert all(parameter.grad is not None for parameter in segmenter.parameters().values())
    heads = segmenter.head_parameters()
    assert {name.split(".")[1] for name in heads} == {"decoder", "segmentation_head"}
    assert {name for name in segmenter.norm_parameters() if name in heads} < set(segmenter.top_norm_parameters())


def test_names_and_options_that_smp_does_not_have(smp):
    for config, said in (
        ({"arch": "unett"}, r"arch=unett is no net of smp .*Did you mean unet\?"),
        ({"encoder_name": "resnet181"}, r"encoder_name=resnet181 is no encoder of smp .*One of timm has tu-"),
        ({"encoder_name": "tu-resnet5O"}, r"encoder_name=resnet5O: timm .*Did you mean resnet50\?"),
        (
            {"options": {"decoder_chanels": [1]}},
            r"decoder_chanels is not an option of smp's unet\. Did you mean decoder",
        ),
        ({"options": {"encoder_depth": 9}}, r"smp's unet on resnet34 cannot be built: ValueError"),
    ):
        with pytest.raises(UserError, match=said):
            make_segmenter("segadapt_smp", config, 6)


@pytest.mark.parametrize("name", ["bn", "rotta", "tent", "cotta", "sar"])
@pytest.mark.parametrize("family", ["segadapt_timm", "segadapt_smp"])
def test_methods_run_and_go_back(timm, smp, compose_settings, family, name):
    quick = {"rotta": ("tta.options.capacity=3", "tta.options.every=2"), "sar": ("tta.options.margin=1",)}
    given = compose_settings(f"tta.method={name}", "data.workers=0", "tta.optimizer.lr=1e-2", *quick.get(name, ()))
    config = {"arch": "unet", "encoder_name": "tu-test_efficientnet"}
    segmenter = (
        make_segmenter(family, config, len(CLASSES))
        if family == "segadapt_smp"
        else of_timm("test_efficientnet", len(CLASSES))
    )
    method = build_method(given, segmenter, memory=None)
    before = {key: value.clone() for key, value in segmenter.net.state_dict().items()}
    done = [method.step(random_noise(seed), task="t", key=str(seed)) for seed in range(3)]
    assert all(step.is_finite and step.is_step_finite for step in done)
    moved = any(not torch.equal(value, before[key]) for key, value in segmenter.net.state_dict().items())
    assert moved == bool(method.parameters())
    method.reset()
    assert all(torch.equal(value, before[key]) for key, value in segmenter.net.state_dict().items())


def test_training_with_smp(smp, tmp_path):
    settings = training(tmp_path, "model.discriminative.family=segadapt_smp", "train.iters=2")
    settings.model.discriminative.config = {"arch": "unet", "encoder_name": "tu-test_resnet"}
    results = train.run(settings)
    read = load_segmenter(f"{results['folder']}/model", num_classes=len(results["per_class"]), device="cpu")
    assert read.net.config.arch == "unet"


def test_single_images_are_no_batch_for_pooled_ones(smp):
    segmenter = make_segmenter("segadapt_smp", {"arch": "deeplabv3", "encoder_name": "resnet18"}, 6)
    with pytest.raises(UserError, match=r"resnet18 refuses 1 images of 64 x 96 px: .* or raise the batch size\.$"):
        segmenter.train().outputs(image(64, 96))
