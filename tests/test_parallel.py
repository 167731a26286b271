"""Parts and copies of the transformer: the same losses, gradients and weights as one transformer in one piece."""

import copy
from dataclasses import replace

import pytest
import torch
from sd3_folder import build_transformer

from segadapt import config
from segadapt.errors import UserError
from segadapt.models.build import build_models
from segadapt.models.combined import Combined
from segadapt.models.generative.parallel import Lane, Parallel, count_parts
from segadapt.models.generative.placement import (
    MOST_PAIRS,
    PAIRS,
    comparison,
    copies_fit,
    copy_bytes,
    plan_split,
    replicate,
    share_out,
)
from segadapt.models.generative.plan import Cost
from segadapt.models.generative.sd3 import NoisyLatent, Sd3

CPU = torch.device("cpu")
COST = {"trained": True, "pairs": 2, "tokens": 23}
PLAIN = ("model.generative.max_pairs=100",)


@pytest.fixture
def build(compose_settings, build_segmenter, build_teacher):
    """build(*overrides, copies, parts): the tiny models in float64, the transformer in so many copies."""

    def build(*overrides: str, copies: int = 1, parts: int = 1) -> Combined:
        settings: config.AdaptConfig = compose_settings(*overrides)
        one = build_teacher(dtype=torch.float64)
        transformers = [one.transformer, *(copy.deepcopy(one.transformer) for _ in range(copies - 1))]
        parallel = Parallel(transformers, [CPU] * copies, parts=max(parts, copies))
        teacher = Sd3(one.transformer, one.autoencoder, one.embeddings, device=CPU, precision="fp32", parallel=parallel)
        segmenter = build_segmenter(dtype=torch.float64)
        return Combined(segmenter, teacher, settings.model, settings.tta.optimizer, seed=0, precision="fp32")

    return build


def backward(combined, image_3HW):
    names = {"task": "task", "key": "image"}
    logits_BChw = combined.segmenter.logits(image_3HW[None])
    taught, candidates = combined.backward(image_3HW, logits_BChw, combined.sight.noise(image_3HW, **names), **names)
    grads = {name: p.grad for name, p in combined.parameters().items() if p.grad is not None}
    return taught.loss, grads, sum(candidates.counts)


def assert_copies_are_equal(combined):
    first, *others = (dict(t.named_parameters()) for t in combined.parallel.transformers)
    for other in others:
        assert all(torch.equal(value, first[name]) for name, value in other.items())


@pytest.mark.parametrize("max_pairs", [100, 2])
@pytest.mark.parametrize(("copies", "parts"), [(1, 2), (1, 3), (1, 50), (2, 2), (3, 3), (2, 6)])
def test_loss_and_gradients_equal_those_in_one_piece(build, random_image, copies, parts, max_pairs):
    image_3HW = random_image(dtype=torch.float64)
    expected, wanted, pairs = backward(build(*PLAIN), image_3HW)
    assert pairs >= 6, "too few pairs to share out"
    combined = build(f"model.generative.max_pairs={max_pairs}", copies=copies, parts=parts)
    loss, grads, _ = backward(combined, image_3HW)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert grads.keys() == wanted.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-9, atol=1e-14, msg=name)
    held = [p for t in combined.parallel.transformers for p in t.parameters() if p.grad is not None]
    assert len(held) == sum(name.startswith("generative") for name in grads), "gradients left in a copy"


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.update.discriminative=false",),
        ("model.update.generative=false",),
        ("tta.optimizer.accumulate=2",),
        ("model.trust.max_agreement=0.99", "model.trust.restore=0.5"),
        ("tta.optimizer.name=sgd", "tta.optimizer.clip_norm=0.1"),
    ],
)
def test_steps_and_reset_equal_those_of_one_transformer(build, random_image, overrides):
    one, several = build(*PLAIN, *overrides), build(*PLAIN, *overrides, copies=3)
    source = {name: value.detach().clone() for name, value in one.parameters().items()}
    for key in "abc":
        image_3HW = random_image(seed=ord(key), dtype=torch.float64)
        predicted, expected = (c.step(image_3HW, task="t", key=key) for c in (several, one))
        assert predicted.loss == pytest.approx(expected.loss, rel=1e-9)
        assert predicted.is_updated == expected.is_updated
        assert_copies_are_equal(several)
    for combined in (one, several):
        combined.flush()
    assert_copies_are_equal(several)
    moved = one.parameters()
    assert any(not torch.equal(value, source[name]) for name, value in moved.items()), "nothing was learned"
    for name, value in several.parameters().items():
        torch.testing.assert_close(value, moved[name], rtol=1e-6, atol=1e-9, msg=name)
    several.reset()
    assert_copies_are_equal(several)
    assert all(torch.equal(value, source[name]) for name, value in several.parameters().items())


def test_every_parameter_has_one_owner_and_owners_share_the_optimizer_state(build):
    combined = build(copies=3)
    first, *others = (dict(t.named_parameters()) for t in combined.parallel.transformers)
    owned = combined.groups["generative"]
    assert owned.keys() == first.keys()
    share = [sum(p.numel() for name, p in owned.items() if p is parameters[name]) for parameters in (first, *others)]
    assert sum(share) == sum(p.numel() for p in first.values())
    assert max(share) <= 1.1 * min(share)


def test_adapters_are_copied_and_owned(saved_models, compose_settings, monkeypatch, random_image):
    from segadapt.models import build as building

    models = saved_models(("sky", "road", "tree"))
    monkeypatch.setattr(building, "devices_of", lambda runtime: ["cpu", "cpu"])
    settings = compose_settings(*models, "model.update.lora_rank=2", "model.generative.placement=replicate")
    built = build_models(settings, ("sky", "road", "tree"))
    assert [line.split(",")[0] for line in built.map_lines] == [
        "cpu: whole copy", "cpu: whole copy", "32 (window", built.map_lines[3].split(",")[0]]  # fmt: skip
    assert built.map_lines[3].startswith("model.generative.placement=replicate is faster")
    combined = built.method
    assert len(combined.parallel.transformers) == 2
    before = {name: value.detach().clone() for name, value in combined.parameters().items()}
    assert combined.step(random_image(), task="t", key="k").is_updated
    changed = {name for name, value in combined.parameters().items() if not torch.equal(value, before[name])}
    assert any(".lora_B." in name for name in changed)
    assert_copies_are_equal(combined)
    built.assert_placed()


@pytest.mark.parametrize(
    ("placement", "parts", "expected"),
    [("dispatch", 1, 1), ("dispatch", 3, 3), ("dispatch", "null", 4), ("replicate", 1, 2), ("replicate", 5, 6)],
)
def test_parts_of_two_devices(saved_models, compose_settings, monkeypatch, placement, parts, expected):
    from segadapt.models import build as building

    models = saved_models(("sky", "road", "tree"))
    monkeypatch.setattr(building, "devices_of", lambda runtime: ["cpu", "cpu"])
    overrides = (f"model.generative.placement={placement}", f"model.generative.parts={parts}")
    built = build_models(compose_settings(*models, *overrides), ("sky", "road", "tree"), force_hooks=True)
    assert built.method.parallel.parts == expected
    assert built.map_lines[-1].startswith("model.generative.placement=replicate is faster: a whole copy on each device")
    assert built.map_lines[-1].endswith("pairs at work, and none waits for another")


def test_a_copy_gets_its_inputs_where_it_lives(build_teacher):
    """A copy on another device: forward there, and the velocities back; from `meta` nothing comes back."""
    one = build_teacher()
    far = copy.deepcopy(one.transformer).to("meta")
    parallel = Parallel([one.transformer, far], [CPU, torch.device("meta")], parts=2)
    teacher = Sd3(one.transformer, one.autoencoder, one.embeddings, device=CPU, precision="fp32", parallel=parallel)
    noisy = NoisyLatent(torch.zeros(1, 16, 4, 4), torch.zeros(1, 16, 4, 4), torch.tensor([0.25]))
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        teacher.velocity(noisy, torch.tensor([0, 0]), torch.tensor([0, 1]))


def test_the_plan_counts_what_overlapping_parts_keep():
    transformer = build_transformer(num_layers=2)
    numbers = sum(parameter.numel() for parameter in transformer.parameters())
    one, four = (Cost(**COST, bf16=True, parts=parts).weight_bytes(transformer) for parts in (1, 4))
    assert four - one == 3 * 2 * numbers + 4 * numbers  # bf16 copies, and gradients that wait
    alone, shared = (copy_bytes(transformer, Cost(**COST, bf16=True, parts=parts), copies=2)[1] for parts in (2, 4))
    assert shared - alone == 2 * numbers + 4 * numbers
    recorded = Cost(**COST, bf16=True, parts=8, recorded=True).weight_bytes(transformer)
    assert recorded == Cost(**COST, bf16=True, parts=1).weight_bytes(transformer)  # all parts share both
    one, other, last = copy_bytes(transformer, Cost(**COST, fixed_main_bytes=5, fixed_last_bytes=3), copies=3)
    assert (one - other, last - other) == (5, 3)


@pytest.mark.parametrize(
    ("asked", "devices", "copies", "expected"),
    [
        (1, 1, 1, 1),
        (8, 1, 1, 1),
        (1, 2, 1, 1),
        (8, 2, 1, 8),
        (1, 4, 4, 4),
        (5, 4, 4, 8),
        (8, 4, 4, 8),
        (None, 1, 1, 1),
        (None, 4, 1, 4),
        (None, 4, 4, 4),
    ],
)
def test_parts_are_none_on_one_device_and_as_many_for_each_copy(asked, devices, copies, expected):
    asked_for = {"devices": devices, "copies": copies}
    assert count_parts(asked, **asked_for, recorded=False) == expected
    doubled = asked is None and copies == 1 and devices > 1
    assert count_parts(asked, **asked_for, recorded=True) == expected * (2 if doubled else 1)


def test_one_device_cuts_nothing_up(saved_models, compose_settings):
    models = saved_models(("sky", "road", "tree"))
    built = build_models(compose_settings(*models, "model.generative.parts=4"), ("sky", "road", "tree"))
    assert built.method.parallel.parts == 1


def test_as_many_pairs_as_fit_are_at_work_on_each_device():
    """Against the placing itself: what is chosen can be placed, the next larger choice can't."""
    transformer, cost = build_transformer(num_layers=4), Cost(trained=True, pairs=0, tokens=230, bf16=True)
    found = {}
    for copied in (False, True):
        for capacity in (1, 2, 4, 8, 16, 32, 10**6):
            capacities = [capacity * 10**6] * 2
            asked = {"copied": copied, "capacities": capacities}
            shared = share_out(transformer, ["cpu"] * 2, cost, max_pairs=None, parts=None, **asked)
            pairs = found[copied, capacity] = shared.pairs // 2
            fits = copies_fit if copied else plan_split
            larger = [each for each in PAIRS if pairs < each <= MOST_PAIRS // 2][-1:]
            for each in larger:
                more = share_out(transformer, ["cpu"] * 2, cost, max_pairs=each, parts=shared.parts, **asked)
                with pytest.raises(UserError):
                    fits(transformer, ["cpu"] * 2, more, capacities)
            if shared.parts > (2 if copied else 1):
                fits(transformer, ["cpu"] * 2, shared, capacities)
    assert found[False, 10**6] == found[True, 10**6] == MOST_PAIRS // 2
    assert len(set(found.values())) > 4, "capacities too alike to test anything"


def test_fewer_parts_are_taken_where_more_do_not_fit():
    transformer, cost = build_transformer(num_layers=4), Cost(trained=True, pairs=0, tokens=23, bf16=True)
    one, four = (
        plan_split(transformer, ["cpu"] * 2, replace(cost, pairs=2, parts=parts), [10**9] * 2).loads for parts in (1, 4)
    )
    between = [(max(one) + max(four)) // 2] * 2
    asked = {"copied": False, "max_pairs": None, "capacities": between}
    shared = share_out(transformer, ["cpu"] * 2, cost, parts=None, **asked)
    assert (shared.parts, shared.pairs >= 2) == (1, True)
    shared = share_out(transformer, ["cpu"] * 2, cost, parts=4, **asked)
    with pytest.raises(UserError):
        plan_split(transformer, ["cpu"] * 2, shared, between)


def test_without_a_number_the_run_takes_what_fits(saved_models, compose_settings):
    models, classes = saved_models(("sky", "road", "tree")), ("sky", "road", "tree")
    built = build_models(compose_settings(*models, "model.generative.max_pairs=null"), classes)
    assert built.method.pairs_at_once == PAIRS[0]
    assert f"{PAIRS[0]} (window, class) pairs at work at a time" in "\n".join(built.map_lines)


def test_copies_that_do_not_fit_are_refused_and_the_comparison_says_so():
    transformer = build_transformer(num_layers=2)
    with pytest.raises(UserError, match=r"placement=replicate: a copy .* on cpu; it has 0\.0\. Lower .*dispatch"):
        replicate(transformer, ["cpu"] * 2, Cost(**COST), capacities=[10**6] * 2)
    asked = {"max_pairs": 2, "parts": None}
    line = comparison(transformer, ["cpu"] * 2, Cost(**COST), capacities=[10**6] * 2, **asked)
    assert "is no choice" in line
    assert line.endswith("does not fit into 0.0 GiB")
    # a split in many parts says nothing of copies, which take one each
    loads = copy_bytes(transformer, Cost(trained=True, pairs=4, tokens=23, bf16=True, parts=2), copies=2)
    split = Cost(trained=True, pairs=4, tokens=23, bf16=True, parts=16)
    assert "fits with 4 pairs" in comparison(transformer, ["cpu"] * 2, split, capacities=loads, **asked)


@pytest.mark.parametrize("copies", [2, 3])
def test_values_on_their_way_are_waited_for_before_anyone_reads_or_writes_them(
    build, random_image, monkeypatch, copies
):
    """Lanes that only tell what is asked of them."""
    told: list[str] = []
    combined = build(*PLAIN, copies=copies)
    parallel = combined.parallel
    under_way = [*parallel._carriers, parallel._updating]
    monkeypatch.setattr(Lane, "join", lambda lane, *_: told.append("join") if lane in under_way else None)

    def noted(name, work):
        return lambda *args, **names: told.append(name) or work(*args, **names)

    for each in combined.parallel.transformers:
        monkeypatch.setattr(each, "forward", noted("forward", each.forward))
    for name in ("_new_updates", "_backward_chunks", "_segment"):
        monkeypatch.setattr(combined, name, noted(name, getattr(combined, name)))
    combined.step(random_image(dtype=torch.float64), task="t", key="a")
    lanes = len(parallel._arriving)
    assert lanes == 2 * copies + 1, "nothing is on its way"
    told.clear()
    combined.step(random_image(dtype=torch.float64), task="t", key="b")
    assert told[: lanes + 4] == ["join", "_segment", *["join"] * lanes, "_backward_chunks", "forward"]
    assert set(parallel._arriving) == set(under_way)
    told.clear()
    combined.parameters()
    assert told == ["join"] * lanes
    combined.step(random_image(dtype=torch.float64), task="t", key="c")
    told.clear()
    combined.reset()
    assert told[:lanes] == ["join"] * lanes
    assert told.index("_new_updates") > lanes - 1


def test_a_lane_on_the_cpu_is_nothing():
    lane = Lane([CPU])
    lane.fork()
    with lane():
        total = torch.ones(3).sum()
    lane.join()
    assert total == 3


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    ("placement", "compiled", "stages"),
    [
        ("dispatch", False, 1),
        ("dispatch", True, 1),
        ("dispatch", True, 2),
        ("replicate", False, 1),
        ("replicate", True, 1),
    ],
)
def test_overlapping_parts_on_gpus_equal_one_gpu(
    saved_models, compose_settings, monkeypatch, random_image, placement, compiled, stages
):
    from segadapt.models import build as building

    classes = ("sky", "road", "tree", "car", "person", "sign")
    models, found, weights = saved_models(classes, num_layers=4), [], []
    for gpus in ([0], list(range(torch.cuda.device_count()))):
        monkeypatch.setattr(building, "devices_of", lambda runtime, gpus=gpus: gpus)
        overrides = [*models, "runtime=default", "model.generative.parts=4", "runtime.precision=fp32"]
        overrides += [f"model.generative.placement={placement}", f"runtime.compile={compiled and len(gpus) > 1}"]
        overrides.append(f"model.generative.virtual_stages={stages}")
        combined = build_models(compose_settings(*overrides), classes).method
        for key in "abcde":  # streams race where they do not wait
            loss, grads, _ = backward(combined, random_image(seed=ord(key)).cuda())
            found.append((loss.cpu(), {name: grad.cpu() for name, grad in grads.items()}))
            for transformer in combined.parallel.transformers:
                transformer.zero_grad()
            combined.segmenter.net.zero_grad()
        combined.reset()
        for key in "fgh":  # what is sent to the copies must be there in time
            combined.step(random_image(seed=ord(key)), task="t", key=key)
        combined.flush()
        weights.append({name: value.detach().cpu() for name, value in combined.parameters().items()})
        combined.parallel.arrive()
        for device in combined.parallel.devices:
            torch.cuda.synchronize(device)
        first, *others = ([p.detach().cpu() for p in t.parameters()] for t in combined.parallel.transformers)
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    assert all((value - weights[0][name]).abs().max() < 1e-4 for name, value in weights[1].items())
    for (expected, wanted), (loss, grads) in zip(found[:5], found[5:], strict=True):
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        assert grads.keys() == wanted.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, wanted[name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("placement", ["dispatch", "replicate"])
@pytest.mark.parametrize(
    "overrides",
    [
        ("model.update.prompt_offset=true",),
        ("model.generative.windows=entropy", "model.loss.window_weights=entropy"),
        ("tta.method=generative-bn",),
        ("tta.method=dusa-u",),
        (
            "model.loss.select=area",
            "model.loss.topk=1",
            "model.loss.area_threshold=2",
            "model.loss.ignored_classes=[sky]",
        ),
    ],
)
def test_options_compiled_on_all_gpus_step_like_the_plain_form_on_one(
    saved_models, compose_settings, monkeypatch, random_image, overrides, placement
):
    from segadapt.models import build as building

    classes = ("sky", "road", "tree", "car", "person", "sign")
    models, steps = saved_models(classes, num_layers=4), []
    every = list(range(torch.cuda.device_count()))
    for gpus, how in (([0], "runtime.compile=false"), (every, "runtime.compile=true")):
        monkeypatch.setattr(building, "devices_of", lambda runtime, gpus=gpus: gpus)
        given = [*models, "runtime=default", "runtime.precision=fp32", f"model.generative.placement={placement}", how]
        combined = build_models(compose_settings(*given, *overrides), classes).method
        steps.append([combined.step(random_image(seed=n % 3).cuda(), task="t", key=str(n)) for n in range(6)])
        combined.flush()
        offset_D = getattr(combined.generative, "offset_D", None)
        assert offset_D is None or offset_D.abs().max() > 0
    assert any(step.is_updated for step in steps[0])
    for plain, found in zip(*steps, strict=True):
        assert (found.candidates, found.is_guided) == (plain.candidates, plain.is_guided)
        torch.testing.assert_close(found.logits_Chw, plain.logits_Chw, rtol=1e-3, atol=1e-3)
        assert found.loss == pytest.approx(plain.loss, rel=1e-3)
        assert found.grad_norm == pytest.approx(plain.grad_norm, rel=1e-2, abs=1e-6)
