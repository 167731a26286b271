"""What every convolutional family owes: sizes, outputs, start, saving, training, and all methods of adaptation."""

import json
import shutil

import pytest
import torch
from conftest import CLASSES
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from steps import random_noise
from tiny_networks import BRANCHES, TINY, disturbed, make
from torch import nn
from torch.nn import functional as F
from training_runs import training

from segadapt import train
from segadapt.errors import UserError
from segadapt.losses import ClassWeights
from segadapt.methods import METHODS
from segadapt.methods.build import build_method
from segadapt.models.discriminative.convolutional import Classifier
from segadapt.models.discriminative.load import load_segmenter
from segadapt.models.discriminative.make import make_segmenter
from segadapt.parse import options_of

STRIDE = {"segadapt_deeplabv3": 8, "segadapt_hrnet": 4, "segadapt_hrnet_ocr": 4}
EVERY = pytest.mark.parametrize("family", TINY)


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


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("training", [False, True])
def test_a_net_is_one_graph_to_the_compiler(family, training):
    segmenter = make(family)
    net = segmenter.net.train(training)
    for module in net.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    image_B3HW = torch.rand(2, 3, 64, 80, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(lambda pixels: net(pixel_values=pixels).logits, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(image_B3HW), net(pixel_values=image_B3HW).logits, rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize(("losses", "learns"), [("default", False), ("auxiliary", True)])
def test_an_auxiliary_head_learns_by_its_loss_alone(tmp_path, losses, learns):
    """Without it, it is in no group: DDP would wait for its gradient for ever."""
    settings = training(
        tmp_path, "model.discriminative.family=segadapt_deeplabv3", "train.iters=2", f"train/losses={losses}"
    )
    settings.model.discriminative.config = TINY["segadapt_deeplabv3"]
    classes = tuple("abcdef")
    first = train.build(settings, classes, torch.device("cpu"))
    objective = train.build_objective(settings, first, ClassWeights(None, None))
    assert all(parameter.requires_grad == learns for parameter in first.net.auxiliary_head.parameters())
    terms = objective(first.train().outputs(torch.rand(2, 3, 64, 64)), torch.zeros(2, 64, 64, dtype=torch.long), step=1)
    terms.total.backward()
    assert all((parameter.grad is not None) == learns for parameter in first.net.auxiliary_head.parameters())


@pytest.mark.parametrize(
    ("family", "wrong", "said"),
    [
        ("segadapt_deeplabv3", {"output_stride": 4}, r"config: output_stride=4: expected 8 or 16\."),
        ("segadapt_deeplabv3", {"rates": []}, r"config: rates=\[\]: expected one number or more, each 1 or more\."),
        ("segadapt_deeplabv3", {"rates": [6, 0]}, r"config: rates=\[6, 0\]: expected one number or more"),
        ("segadapt_deeplabv3", {"head_size": 0}, r"config: head_size=0: expected 1 or more\."),
        ("segadapt_deeplabv3", {"dropout": 1.0}, r"config: dropout=1\.0: expected at least 0 and less than 1\."),
        ("segadapt_hrnet", {"blocks": 0}, r"config: blocks=0: expected 1 or more\."),
        ("segadapt_hrnet", {"id2label": 5}, r"config\.id2label: the data set names the classes; expected none here"),
        ("segadapt_hrnet_ocr", {"key_size": -1}, r"config: key_size=-1: expected 1 or more\."),
        ("segadapt_hrnet_ocr", {"stem_size": 0}, r"config: stem_size=0: expected 1 or more\."),
        ("segadapt_deeplabv3", {"stem_sizes": [4, 4]}, r"config: stem_sizes=\[4, 4\]: expected 1 or 3 numbers"),
        ("segadapt_deeplabv3", {"depths": [1, 0, 2, 2]}, r"config: depths=\[1, 0, 2, 2\]: expected 4 numbers of 1 or"),
        ("segadapt_deeplabv3", {"head_sise": 4}, r"config\.head_sise is not a setting .*Did you mean head_size\?"),
        ("segadapt_hrnet", {"modules": [1, 2]}, r"config: modules=\[1, 2\]: expected 3 numbers"),
        ("segadapt_hrnet", {"blocks": "many"}, r"config: Field 'blocks' expected int, got str"),
        ("segadapt_hrnet_ocr", {"ocr_sizes": 4}, r"config\.ocr_sizes is not a setting .*Did you mean ocr_size\?"),
    ],
)
def test_a_wrong_config_is_refused_in_one_line(family, wrong, said):
    with pytest.raises(UserError, match=r"^model\.discriminative\." + said) as caught:
        make(family, **wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "wrong", "said"),
    [
        ("segadapt_deeplabv3", {"rates": [0]}, r"rates=\[0\]: expected one number or more, each 1 or more\. Fetch"),
        ("segadapt_hrnet", {"blocks": "many"}, r"Field 'blocks' expected int, got str"),
        ("segadapt_hrnet_ocr", {"dropout": -1}, r"dropout=-1: expected at least 0 and less than 1\. Fetch"),
        ("segadapt_hrnet", {"id2label": 5}, r"id2label=5: expected numbers with the names"),
    ],
)
def test_a_folder_with_a_wrong_config_is_refused_in_one_line(family, wrong, said, tmp_path):
    make(family).save(tmp_path / "net")
    path = tmp_path / "net" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **wrong}))
    with pytest.raises(UserError, match=r"^model\.discriminative\.checkpoint=.*/net: config\.json: " + said) as caught:
        load_segmenter(str(tmp_path / "net"), num_classes=6, device="cpu")
    assert "\n" not in str(caught.value)


def test_recompute_that_a_net_does_not_have_is_refused():
    with pytest.raises(
        UserError, match=r"^model\.discriminative\.gradient_checkpointing=true: .*segadapt_hrnet cannot"
    ):
        make_segmenter("segadapt_hrnet", BRANCHES, 6, gradient_checkpointing=True)
