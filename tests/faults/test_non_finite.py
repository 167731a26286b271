"""Numbers that are not finite: no method takes a step with them, and tta.non_finite says what the run does."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from steps import random_noise, steps
from test_methods import QUICK, RATE, equal, tensors

from faults.said import assert_says
from segadapt import adapt
from segadapt.errors import UserError
from segadapt.methods import METHODS
from segadapt.methods.build import build_method
from segadapt.methods.learner import Learner
from segadapt.models.combined import Combined
from segadapt.models.non_finite import react
from segadapt.models.source import Prediction

NAMES = [name for name, method in METHODS.items() if issubclass(method, Learner | Combined)]
UPDATE = Learner.update
VALUES = [float("nan"), float("inf")]


@pytest.fixture
def build(compose_settings, build_segmenter, build_combined):
    def build(name, *overrides):
        if METHODS[name].has_teacher:
            return build_combined(f"tta.method={name}", RATE, *overrides, kind=METHODS[name])
        settings = compose_settings(f"tta.method={name}", "data.workers=0", RATE, *QUICK.get(name, ()), *overrides)
        return build_method(settings, build_segmenter(), memory=None)

    return build


def poison_logits(method, value):
    """One number of the segmenter's output."""
    own = method.segmenter.logits

    def logits(image_B3HW):
        logits_BChw = own(image_B3HW)
        poison_BChw = torch.ones_like(logits_BChw)
        poison_BChw[0, 1, 2, 3] = value
        return logits_BChw * poison_BChw

    method.segmenter.logits = logits
    return lambda: delattr(method.segmenter, "logits")


def poison_gradient(method, value):
    """Of one parameter; the loss stays finite."""
    name = next(iter(method.parameters()))
    return method.parameters()[name].register_hook(lambda gradient: gradient * value).remove


def poison_loss(method, value):
    """The whole of it; of a taught segmenter, one window's velocities."""
    if isinstance(method, Combined):
        velocity = method.generative.velocity

        def poisoned(noisy, pair_window_P, pair_class_P):
            weight_P111 = torch.where(pair_window_P == 0, value, 1.0)[:, None, None, None]
            return weight_P111 * velocity(noisy, pair_window_P, pair_class_P)

        method.generative.velocity = poisoned
        return lambda: setattr(method.generative, "velocity", velocity)
    own = method.update
    method.update = lambda loss, *rest, **names: own(loss * value, *rest, **names)
    return lambda: delattr(method, "update")


def states(method):
    return {"tensors": tensors(method), "state": method.state_dict()}


CASES = [(name, poison) for name in NAMES for poison in (poison_logits, poison_gradient, poison_loss)]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(("name", "poison"), [case for case in CASES if case != ("memo", poison_loss)])  # it has none
def test_a_bad_image_leaves_no_trace(build, name, poison, value):
    """Weights, optimizer and the method's own state go on as if it had not come."""
    method, spared = build(name), build(name)
    for each in (method, spared):
        assert any(prediction.is_updated for prediction in steps(each, "abab"))
    before = tensors(method)
    cure = poison(method, value)
    bad = method.step(random_noise(9), task="t", key="bad")
    while bad.loss is None:  # rotta looks at several images before each step
        bad = method.step(random_noise(9), task="t", key="bad")
    cure()
    assert not (bad.is_finite and bad.is_step_finite)
    assert not bad.is_updated
    if name != "memo":
        assert equal(before, tensors(method))
    if name not in ("rotta", "rdumb", "memo"):  # which count images, or begin anew with each
        assert equal(states(method), states(spared))
    after = steps(method, "cdcd")
    assert all(prediction.is_finite and prediction.is_step_finite for prediction in after)
    assert any(prediction.is_updated for prediction in after)


def test_no_step_where_only_the_scored_prediction_is_not_finite(build):
    """CoTTA scores its averaging teacher: decisions of NaN are labels of class 0, and the loss is a number."""
    method = build("cotta")
    steps(method, "ab")
    before, own = states(method), method.again
    method.again = lambda image_B3HW: [float("nan") * logits_BChw for logits_BChw in own(image_B3HW)]
    bad = method.step(random_noise(9), task="t", key="bad")
    method.again = own
    assert bad.is_step_finite
    assert (bad.is_finite, bad.is_updated) == (False, False)
    assert equal(before, states(method))


@pytest.mark.parametrize("name", NAMES)
def test_reset_is_the_source_state(build, name):
    method, fresh = build(name), build(name)
    steps(method, "abab")
    cure = poison_gradient(method, float("nan"))
    bad = method.step(random_noise(9), task="t", key="bad")
    while bad.loss is None:
        bad = method.step(random_noise(9), task="t", key="bad")
    cure()
    assert react("reset", method, bad, what="bad of t") is True
    assert equal(states(method), states(fresh))


@pytest.mark.parametrize("policy", ["skip", "stop", "reset"])
def test_a_good_image_and_one_without_loss_need_no_reaction(build, random_image, policy):
    method = build("tent")
    steps(method, "ab")
    before = states(method)
    logits_Chw = random_image()
    nothing = Prediction(logits_Chw, is_finite=False)
    good = Prediction(logits_Chw, is_finite=True, loss=1.0, grad_norm=0.0)
    assert [react(policy, method, each, what="a") for each in (nothing, good)] == [False, False]
    assert equal(before, states(method))


# -- a whole run ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(compose_settings, overrides_of, monkeypatch):
    """run(*overrides): every second image of tent has a gradient that is not finite; results and what was printed."""

    def run(*overrides, is_bad=lambda count: count % 2 == 1):
        count = [0]

        def update(self, loss, scored_Chw, *, task, key):
            count[0] += 1
            if is_bad(count[0] - 1):
                next(p.grad for p in self.moving.values() if p.grad is not None).mul_(float("nan"))
            return UPDATE(self, loss, scored_Chw, task=task, key=key)

        monkeypatch.setattr(Learner, "update", update)
        console = Console(record=True, width=200, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
        with console.file:
            results = adapt.run(
                compose_settings(*overrides_of("tta.method=tent", "tta.optimizer.lr=0.01", *overrides)), console=console
            )
        return results, console.export_text()

    return run


def lines(results):
    return [json.loads(line) for line in Path(results["folder"], "records.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("policy", "resets"), [("skip", 0), ("reset", 1)])
def test_counts_are_in_the_results_and_in_the_table(run, policy, resets):
    results, said = run(f"tta.non_finite={policy}")
    [task] = results["tasks"]
    assert (task["steps_skipped"], task["resets"], task["predictions_not_finite"]) == (1, resets, 0)
    assert [line["is_updated"] for line in lines(results)] == [True, False, True]
    heading = next(line for line in said.splitlines() if "mIoU" in line and "mAcc" in line)
    assert "skipped" in heading
    assert ("resets" in heading) == bool(resets)
    assert "not finite" not in heading
    assert ("reset also where a loss is not finite" in results["protocol"]) == bool(resets)


def test_a_reset_changes_what_follows_and_a_skip_only_leaves_out(run):
    losses = {}
    for policy in ("skip", "reset"):
        results, _ = run(f"tta.non_finite={policy}", "data.shuffle=false")
        losses[policy] = [line["loss"] for line in lines(results)]
    alone, _ = run("tta.non_finite=skip", "data.shuffle=false", "experiment.name=alone", is_bad=lambda count: count < 2)
    assert losses["skip"][:2] == losses["reset"][:2]
    assert losses["skip"][2] != losses["reset"][2]
    assert losses["reset"][2] == [line["loss"] for line in lines(alone)][2]  # of weights that never moved


def test_stop_ends_the_run_before_the_image_is_recorded(run, root):
    with pytest.raises(UserError) as caught:
        run("tta.non_finite=stop", "data.shuffle=false")
    assert_says(str(caught.value), where="b of clean", got="gradient norm nan", expected="expected finite numbers",
                cure="Lower tta.optimizer.lr")  # fmt: skip
    [folder] = (root.parent / "runs").glob("*/*")
    assert len((folder / "records.jsonl").read_text().splitlines()) == 1
    assert not (folder / "results.json").exists()


def test_the_policy_has_no_part_in_the_id_until_it_is_set(run):
    usual, said = run(is_bad=lambda _: False)
    assert [json.loads(Path(usual["folder"], "settings.json").read_text())["tta"].get("non_finite")] == [None]
    assert "skipped" not in said
    other, _ = run("tta.non_finite=reset", is_bad=lambda _: False)
    assert other["folder"] != usual["folder"]
    assert [line["loss"] for line in lines(other)] == [line["loss"] for line in lines(usual)]
