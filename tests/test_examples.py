"""Segmenters and teachers of other families: the examples, and every method on nets that are no SegFormer."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from conftest import CLASSES
from test_methods import QUICK
from torch import nn

from segadapt.config_verbs import DiagnoseConfig
from segadapt.errors import UserError
from segadapt.methods import METHODS
from segadapt.methods.learner import Learner
from segadapt.models.build import build_models
from segadapt.models.combined import Combined
from segadapt.models.discriminative import Segmenter
from segadapt.models.discriminative.make import make_segmenter
from segadapt.models.generative import Teacher
from segadapt.models.set_up import fingerprint

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def example():
    """example(name): the module examples/NAME.py."""
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module
    sys.path.remove(str(EXAMPLES))


@pytest.fixture
def strided(example):
    """strided(stride): the example's segmenter around a tiny random net with logits at 1/stride."""

    def build(stride):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 2 * stride - 1, stride, stride - 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1),
            nn.GroupNorm(2, 8), nn.Conv2d(8, len(CLASSES), 1),
        )  # fmt: skip
        with torch.no_grad():
            net[-1].weight *= 10  # confident enough for methods that wait for that
        return example("own_segmenter").OwnSegmenter(net)

    return build


@pytest.mark.parametrize("name", ["own_segmenter", "own_teacher"])
def test_wrapper_takes_less_than_40_lines(name):
    lines = (EXAMPLES / f"{name}.py").read_text().split("\n")
    start = next(index for index, line in enumerate(lines) if line.startswith("class "))
    length = next(index for index, line in enumerate(lines[start + 1 :]) if line and not line.startswith(" "))
    assert length < 40


def test_own_segmenter_is_adapted_and_gains(example, tmp_path):
    results = example("own_segmenter").main(str(tmp_path), corruptions="fog", images=3)
    miou = {method: result["mean"]["miou"] for method, result in results.items()}
    assert miou["bn"] > miou["source"] + 0.05  # all its norms are BatchNorm, and fog moves their statistics
    assert miou["generative"] > miou["source"]
    assert len({result["weights_sha256"]["discriminative"] for result in results.values()}) == 1
    assert all("segmenter own-net;" in result["protocol"] for result in results.values())
    assert all(not task["predictions_not_finite"] for result in results.values() for task in result["tasks"])


def test_own_teacher_learns_with_the_segmenter(example):
    predictions = example("own_teacher").main(steps=6)
    losses = [prediction.loss for prediction in predictions]
    assert losses[-1] < 0.9 * losses[0]
    assert all(prediction.is_updated for prediction in predictions)


@pytest.mark.parametrize("stride", [1, 8])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_a_segmenter_of_any_stride(
    method, stride, strided, build_teacher, compose_settings, random_image
):
    rate = "tta.optimizer.lr_discriminative=0.01"
    settings = compose_settings(f"tta.method={method}", "data.workers=0", rate, *QUICK.get(method, ()))
    teacher = build_teacher() if METHODS[method].has_teacher else None
    built = build_models(settings, CLASSES, segmenter=strided(stride), teacher=teacher)
    own = built.method
    before = fingerprint(own.segmenter.net)
    assert built.fingerprints["discriminative"] == before
    moved = False
    for index in range(3):
        prediction = own.step(random_image(33, 47, seed=index), task="fog", key=str(index))
        assert prediction.logits_Chw.shape == (len(CLASSES), -(-33 // stride), -(-47 // stride))
        assert prediction.is_finite
        moved |= fingerprint(own.segmenter.net) != before
    assert moved == issubclass(METHODS[method], Learner | Combined)
    own.reset()
    assert fingerprint(own.segmenter.net) == before


@pytest.mark.parametrize("method", ["generative", "dusa-u"])
def test_own_teacher_moves_and_returns(method, example, build_segmenter, compose_settings, random_image):
    settings = compose_settings(f"tta.method={method}", "tta.optimizer.lr=0.01")
    teacher = example("own_teacher").ConvTeacher(len(CLASSES))
    built = build_models(settings, CLASSES, segmenter=build_segmenter(), teacher=teacher)
    built.assert_placed()
    assert built.fingerprints.keys() == {"discriminative", "generative"}
    before = [fingerprint(net) for net in (built.method.segmenter.net, teacher.net)]
    prediction = built.method.step(random_image(), task="fog", key="0")
    assert prediction.is_updated
    after = [fingerprint(net) for net in (built.method.segmenter.net, teacher.net)]
    assert all(one != other for one, other in zip(before, after, strict=True))
    built.method.reset()
    assert [fingerprint(net) for net in (built.method.segmenter.net, teacher.net)] == before


@pytest.mark.parametrize(
    "given",
    ["update.lora_rank=4", "update.prompt_offset=True", "generative.shuffle_classes=True",
     "generative.prompts.file=a.txt", "generative.gradient_checkpointing=True", "generative.placement=replicate"],
)  # fmt: skip
def test_what_is_made_for_sd3_is_refused_for_an_own_teacher(example, build_segmenter, compose_settings, given):
    settings, teacher = compose_settings(f"model.{given}"), example("own_teacher").ConvTeacher(len(CLASSES))
    with pytest.raises(UserError, match=f"model.{given} is made for SD3, but the teacher is a ConvTeacher. Set"):
        build_models(settings, CLASSES, segmenter=build_segmenter(), teacher=teacher)


def test_the_short_side_of_an_own_segmenter_is_that_of_the_settings(build_segmenter, compose_settings, random_image):
    segmenter = build_segmenter()
    for own, expected in (("16", 16), ("null", 32)):
        segmenter.short_side_px = 24  # whatever it had: the protocol line names the settings'
        settings = compose_settings("tta.method=source", f"model.discriminative.short_side_px={own}")
        built = build_models(settings, CLASSES, segmenter=segmenter)
        assert built.method.fit(random_image(32, 45)).shape[1] == expected


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["tta.method=tent"], "moves normalisation layers"),
        (["model.update.update_norm_only=true"], "moves normalisation layers"),
        (["tta.method=bn"], "has no BatchNorm"),
        (["tta.method=rotta"], "has no BatchNorm"),
    ],
)
def test_segmenters_without_norms_are_refused_where_norms_are_needed(
    example, build_teacher, compose_settings, overrides, said
):
    plain = example("own_segmenter").OwnSegmenter(torch.nn.Conv2d(3, len(CLASSES), 3, 4, 1))
    settings = compose_settings(*overrides)
    teacher = build_teacher() if METHODS[settings.tta.method].has_teacher else None
    with pytest.raises(UserError, match=said):
        build_models(settings, CLASSES, segmenter=plain, teacher=teacher)


def test_pairs_at_a_time_change_no_gradient_of_an_own_teacher(example, compose_settings, random_image):
    grads = []
    for pairs in (16, 1):
        settings = compose_settings(f"model.generative.max_pairs={pairs}")
        torch.manual_seed(0)
        teacher = example("own_teacher").ConvTeacher(len(CLASSES))
        teacher.net.double()
        segmenter = make_segmenter(
            "segformer", {"hidden_sizes": [8, 16, 20, 32], "depths": [1] * 4}, len(CLASSES), seed=1
        )
        segmenter.net.double()
        method = build_models(settings, CLASSES, segmenter=segmenter, teacher=teacher).method
        assert isinstance(method, Combined)
        image_3HW = random_image(dtype=torch.float64)
        noisy = method.sight.noise(image_3HW, task="fog", key="0")
        method.backward(image_3HW, method.logits(image_3HW), noisy, task="fog", key="0")
        grads.append([parameter.grad for parameter in method.parameters().values() if parameter.grad is not None])
    assert len(grads[0]) == len(grads[1])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_diagnose_asks_an_own_teacher(example, tmp_path):
    from segadapt.diagnose import run
    from segadapt.parse import from_overrides

    overrides = ["experiment=toytown_c", "runtime=cpu", "data.corruptions=[fog]", "data.limit=1", "data.workers=0",
                 "data.split=validation", f"logging.root={tmp_path}", "model.generative.checkpoint=own"]  # fmt: skip
    settings = from_overrides("diagnose", overrides, DiagnoseConfig)
    settings.diagnose.sigmas = [0.25]
    result = run(settings, teacher=example("own_teacher").ConvTeacher(12))
    assert "teacher own" in result["protocol"]
    assert all(0 <= row["levels"][0]["teacher"]["accuracy"] <= 1 for row in result["tasks"])


def test_the_shipped_families_have_the_members(build_segmenter, build_teacher):
    segmenter: Segmenter = build_segmenter()
    teacher: Teacher = build_teacher()
    for protocol, one in ((Segmenter, segmenter), (Teacher, teacher)):
        members = [name for name in vars(protocol) if not name.startswith("_")]
        assert members
        assert all(hasattr(one, name) for name in members)
