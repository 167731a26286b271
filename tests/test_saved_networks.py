"""What networks of several families owe alike: saved they read back, trained they are read, they adapt to an image."""

import pytest
import torch
from conftest import CLASSES
from test_knet import CONFIG as KNET
from test_t2t import CONFIG as T2T
from test_transformer_networks import VIT
from tiny_networks import MASK2FORMER, TINY
from training_runs import training

from segadapt import train
from segadapt.errors import UserError
from segadapt.models.build import build_models
from segadapt.models.discriminative.load import load_segmenter
from segadapt.models.discriminative.make import make_segmenter
from segadapt.models.set_up import fingerprint

CONFIGS = {
    "segadapt_dinov2": {"backbone_config": {"model_type": "dinov2", **VIT}},
    "segadapt_hrnet_ocr": TINY["segadapt_hrnet_ocr"],
    "segadapt_knet": KNET,
    "segadapt_t2t": T2T,
    "mask2former": MASK2FORMER,
}
REGISTERS = {"backbone_config": {"model_type": "dinov2_with_registers", **VIT}}


def assert_has(net, config):
    """The net's own config says what was chosen, beside its encoder's, which is a config of its own."""
    chosen = {name: value for name, value in config.items() if name != "backbone_config"}
    assert {name: getattr(net.config, name) for name in chosen} == chosen


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("segadapt_dinov2", {"layers": 4, "frozen": False}),
        ("segadapt_dinov2", REGISTERS | {"layers": 4, "frozen": False}),
        ("segadapt_knet", {}),
        ("segadapt_t2t", {"token_attention": "performer"}),
        ("segadapt_t2t", {"token_attention": "transformer"}),
    ],
)
def test_a_saved_net_reads_back_bit_equal(family, more, tmp_path):
    """With T2T-ViT's random features and table of positions, which no seed gives again."""
    config = CONFIGS[family] | more
    first = make_segmenter(family, config, 5, seed=1)
    with torch.no_grad():
        for tensor in first.net.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1.5)
    first.save(tmp_path / "folder")
    second = load_segmenter(str(tmp_path / "folder"), num_classes=5, device="cpu")
    assert fingerprint(second.net) == fingerprint(first.net)
    assert_has(second.net, config)
    image_B3HW = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(second.logits(image_B3HW), first.logits(image_B3HW))


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("segadapt_hrnet_ocr", ("train.transforms.crop_px=64",)),
        ("segadapt_knet", ("train/losses=knet",)),
        ("segadapt_t2t", ()),
    ],
)
def test_training_ends_in_a_folder_that_is_read(family, overrides, tmp_path):
    settings = training(tmp_path, f"model.discriminative.family={family}", "train.iters=2", *overrides)
    settings.model.discriminative.config = CONFIGS[family]
    results = train.run(settings)
    net = load_segmenter(f"{results['folder']}/model", num_classes=len(results["per_class"]), device="cpu").net
    assert (net.config.model_type, net.config.loss_reduction) == (family, settings.train.losses.reduction)
    assert_has(net, CONFIGS[family])
    with pytest.raises(UserError, match=r"is the folder of a run; expected the model in it\. Give .*/model\.$"):
        load_segmenter(results["folder"], num_classes=None, device="cpu")


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("segadapt_dinov2", "tent"),
        ("segadapt_dinov2", "generative"),
        ("mask2former", "tent"),
        ("mask2former", "generative"),
        ("segadapt_knet", "generative"),
        ("segadapt_t2t", "generative"),
    ],
)
def test_one_image_is_adapted_to(family, method, compose_settings, build_teacher, random_image):
    settings = compose_settings(f"tta.method={method}", "tta.optimizer.lr=0.001", "runtime.precision=fp32")
    segmenter = make_segmenter(family, CONFIGS[family], len(CLASSES), seed=1)
    before = fingerprint(segmenter.net)
    teacher = build_teacher() if method == "generative" else None
    built = build_models(settings, CLASSES, segmenter=segmenter, teacher=teacher)
    prediction = built.method.step(random_image(), task="fog/5", key="0")
    assert prediction.logits_Chw.isfinite().all()
    assert fingerprint(segmenter.net) != before
