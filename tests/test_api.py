"""segadapt from Python: the same bits as a run, states that go on, arguments that are refused, and its page."""

import copy
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import segadapt
from segadapt import adapt
from segadapt.api import Adapter, _prepared
from segadapt.config import AdaptConfig
from segadapt.corruptions import corrupt
from segadapt.datasets.toytown import CLASSES, render
from segadapt.errors import UserError
from segadapt.methods import METHODS
from segadapt.models.source import Source
from segadapt.parse import from_overrides

ROOT = Path(__file__).parents[1]
NAMES = ("sky", "road", "car")
TENT = ["tta.method=tent", "runtime=cpu", "data.short_side_px=32", "tta.optimizer.lr=0.01"]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 7, 4, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, len(NAMES), 1))


@pytest.fixture
def photo():
    """photo(seed): uint8 [24, 40, 3]."""
    return lambda seed=0: np.random.default_rng(seed).integers(0, 256, (24, 40, 3), np.uint8)


def weights(adapter):
    return copy.deepcopy(adapter.method.segmenter.net.state_dict())


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_package_is_light_until_something_of_it_is_used():
    code = (
        "import segadapt, sys; sys.exit('torch' in sys.modules or 'hydra' in sys.modules or not segadapt.__version__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert segadapt.Adapter is Adapter
    with pytest.raises(AttributeError, match="module 'segadapt' has no attribute 'lod'"):
        segadapt.lod  # noqa: B018


def test_steps_are_those_of_a_run_bit_for_bit(tmp_path, monkeypatch):
    overrides = ["experiment=toytown_c", "runtime=cpu", "data.corruptions=[fog]", "data.limit=2", "data.workers=0",
                 "data.shuffle=false", f"logging.root={tmp_path}"]  # fmt: skip
    logits, step = [], METHODS["generative"].step

    def noted(self, image_3HW, *, task, key):
        prediction = step(self, image_3HW, task=task, key=key)
        logits.append(prediction.logits_Chw)
        return prediction

    monkeypatch.setattr(METHODS["generative"], "step", noted)
    results = adapt.run(from_overrides("adapt", overrides, AdaptConfig))
    records = [json.loads(line) for line in Path(results["folder"], "records.jsonl").read_text().splitlines()]
    adapter = segadapt.load(overrides)
    for record in records:
        image = corrupt(render("test", int(record["key"])).image_HW3, "fog", severity=5, seed=0, key=record["key"])
        labelled = adapter.step(image, task="fog/5", key=record["key"])
        assert labelled.prediction.loss == record["loss"]
        assert labelled.ids_HW.shape == image.shape[:2]
    assert len(logits) == 4
    assert all(torch.equal(of_run, here) for of_run, here in zip(logits[:2], logits[2:], strict=True))


def test_every_kind_of_image_is_the_same_image(photo):
    image = photo()
    whole = torch.from_numpy(image)
    kinds = [image, whole, whole.permute(2, 0, 1), Image.fromarray(image), image / np.float32(255),
             whole.permute(2, 0, 1) / 255, (whole / 255).double()]  # fmt: skip
    prepared = [_prepared(kind, 32) for kind in kinds]
    for image_3HW, size_px in prepared:
        assert size_px == (24, 40)
        assert (image_3HW.dtype, tuple(image_3HW.shape)) == (torch.float32, (3, 32, 53))
        torch.testing.assert_close(image_3HW, prepared[0][0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((24, 40), np.uint8), r"shape \(24, 40\); expected one RGB image"),
        (np.zeros((24, 40, 4), np.uint8), r"shape \(24, 40, 4\).*\.convert\('RGB'\)"),
        (np.zeros((1, 3, 24, 40), np.float32), r"shape \(1, 3, 24, 40\)"),
        (np.zeros((3, 40, 3), np.float32), r"shape \(3, 40, 3\)"),
        (np.zeros((24, 40, 3), np.int64), r"torch\.int64; expected uint8, or floats"),
        ("photo.png", "a str; expected an array, a tensor or a PIL image"),
        (np.full((24, 40, 3), 255.0), r"floats from 255 to 255; expected 0\.\.1.*Divide by 255"),
        (np.full((24, 40, 3), np.nan), r"floats from nan to nan; expected 0\.\.1"),
    ],
)
def test_what_is_no_image_is_refused_before_the_step(net, image, said):
    adapter = segadapt.load(TENT, segmenter=net, classes=NAMES)
    before = weights(adapter)
    with pytest.raises(UserError, match=f"^image: {said}"):
        adapter.step(image)
    assert_equal(weights(adapter), before)
    assert adapter.count == 0


@pytest.mark.parametrize(
    ("method", "failing"), [("tent", 1), ("roid", 1), ("sar", 2), ("cotta", 1), ("memo", 2), ("generative", 3)]
)
def test_an_image_that_an_error_broke_off_leaves_no_trace(
    method, failing, net, photo, monkeypatch, build_segmenter, build_teacher
):
    """It fails once its gradients are there: at the end of that backward."""
    adapters = []
    for _ in range(2):
        if method == "generative":
            given = {"segmenter": build_segmenter(), "teacher": build_teacher(), "classes": conftest.CLASSES}
            own = [*conftest.SETTINGS, "tta.optimizer.lr=1e-3"]
        else:
            given = {"segmenter": copy.deepcopy(net), "classes": NAMES}
            options = {"sar": ["tta.options.margin=1", "tta.options.reset_below=0", "tta.options.skip_top=false"]}
            own = [*TENT[1:], *options.get(method, [])]
        adapters.append(segadapt.load([f"tta.method={method}", *own], **given))
    one, other = adapters
    real, calls = torch.Tensor.backward, []

    def backward(self, *given, **named):
        real(self, *given, **named)
        calls.append(1)
        if len(calls) == failing:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", backward)
        with pytest.raises(UserError):
            one.step(photo(1), key="1")
    assert_equal(weights(one), weights(other))
    results = [adapter.step(photo(2), key="2").prediction for adapter in adapters]
    assert results[0].grad_norm == results[1].grad_norm
    assert results[0].is_updated
    assert_equal(weights(one), weights(other))


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.has_teacher])
def test_a_state_goes_on_and_a_reset_begins_again(method, net, photo, tmp_path):
    options = {"eata": ["tta.options.fisher_alpha=0"], "rotta": ["tta.options.every=2"]}.get(method, [])
    overrides = [f"tta.method={method}", *TENT[1:3], *options]
    first, second = (segadapt.load(overrides, segmenter=copy.deepcopy(net), classes=NAMES) for _ in range(2))
    source, at_first = weights(first), first.step(photo(1)).prediction
    first.step(photo(2))
    first.save(tmp_path / "deep" / "state")
    second.restore(tmp_path / "deep" / "state")
    assert second.count == 2
    for seed in (3, 4):
        one, other = first.step(photo(seed)), second.step(photo(seed))
        assert torch.equal(one.prediction.logits_Chw, other.prediction.logits_Chw)
        assert np.array_equal(one.ids_HW, other.ids_HW)
    assert_equal(weights(first), weights(second))
    first.reset()
    assert_equal(weights(first), source)
    assert torch.equal(first.step(photo(1)).prediction.logits_Chw, at_first.logits_Chw)


def test_a_state_of_something_else_is_refused(net, photo, tmp_path):
    adapter = segadapt.load(TENT, segmenter=copy.deepcopy(net), classes=NAMES)
    adapter.step(photo())
    adapter.save(tmp_path / "state")
    with pytest.raises(UserError, match="is there already; expected a new folder"):
        adapter.save(tmp_path / "state")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"cannot be written \(.*\)"):
        adapter.save(tmp_path / "file" / "state")
    other_weights = copy.deepcopy(net)
    with torch.no_grad():
        other_weights[3].bias += 1
    for overrides, given, names, said in (
        ([*TENT, "tta.optimizer.lr=0.1"], net, NAMES, r"tta\.optimizer\.lr=0\.01; now 0\.1"),
        (TENT, net, ("sky", "road", "bus"), "classes="),
        (TENT, other_weights, NAMES, r"weights_sha256\.discriminative="),
    ):
        other = segadapt.load(overrides, segmenter=copy.deepcopy(given), classes=names)
        with pytest.raises(UserError, match=rf"^The state {tmp_path}/state was started with {said}"):
            other.restore(tmp_path / "state")
    fresh = segadapt.load(TENT, segmenter=copy.deepcopy(net), classes=NAMES)
    with pytest.raises(UserError, match="not a state that an adapter has saved, or damaged"):
        fresh.restore(tmp_path / "nowhere")
    data = next((tmp_path / "state").glob("*.safetensors"))
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"damaged .*has another SHA-256"):
        fresh.restore(tmp_path / "state")
    assert fresh.count == 0


class Named(nn.Module):
    """Returns what transformers and torchvision return."""

    def __init__(self, net, kind):
        super().__init__()
        self.net, self.kind = net, kind

    def forward(self, x):
        return self.kind(self.net(x))


def test_a_module_may_return_logits_as_the_common_libraries_do(net, photo):
    found = []
    for kind in (lambda y: y, lambda y: SimpleNamespace(logits=y), lambda y: {"out": y, "aux": None}):
        adapter = segadapt.load(TENT, segmenter=Named(copy.deepcopy(net), kind), classes=NAMES)
        found.append(adapter.step(photo()).prediction.logits_Chw)
    assert all(torch.equal(logits_Chw, found[0]) for logits_Chw in found)


def test_a_module_sees_its_own_preprocessing_in_eval_mode(photo):
    seen = []

    class Looks(nn.Conv2d):
        def forward(self, input):
            seen.append((input, self.training))
            return super().forward(input)

    adapter = segadapt.load(["tta.method=source", *TENT[1:3]], segmenter=Looks(3, 3, 1), classes=NAMES,
                            mean=(0.5, 0.25, 0), std=(0.5, 1, 2))  # fmt: skip
    assert isinstance(adapter.method, Source)
    adapter.step(photo())
    [(image_13HW, is_training)] = seen
    expected = _prepared(photo(), 32)[0].sub(torch.tensor([0.5, 0.25, 0])[:, None, None])
    torch.testing.assert_close(image_13HW[0], expected / torch.tensor([0.5, 1, 2])[:, None, None])
    assert not is_training


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"classes": ("a", "b")}, r"returned shape \(1, 3, 8, 14\); expected logits \[images, 2 classes"),
        ({"classes": ("a", "a", "b")}, "classes: 3 names, 2 different"),
        ({"classes": ()}, "classes: 0 names"),
        ({"mean": (0.5,)}, r"mean=\(0\.5,\), std=.*expected three numbers each"),
        ({"std": (1, 0, 1)}, "the deviations above 0"),
        ({"segmenter": nn.ReLU()}, "the ReLU has no parameters"),
        ({"segmenter": object()}, "a object without net, logits, .*expected a torch module"),
        ({"segmenter": None, "mean": (0, 0, 0)}, "no segmenter is given"),
        ({"segmenter": Named(nn.Conv2d(3, 3, 1), lambda y: (y,)), "overrides": ["tta.method=source"]},
         "module returned a tuple; expected logits"),
        ({"overrides": ["tta.method=tennt"]}, "tta=tennt is not a choice. Did you mean tent"),
        ({"overrides": ["tta.optimiser.lr=1"]}, "tta.optimiser.lr is not a setting. Did you mean tta.optimizer.lr"),
        ({"overrides": ["a b"]}, "a b cannot be read; expected key=value"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(net, photo, given, said):
    overrides = [*TENT, *given.get("overrides", ())]
    with pytest.raises(UserError, match=said) as caught:
        segadapt.load(**({"segmenter": net, "classes": NAMES} | given | {"overrides": overrides})).step(photo())
    assert "\n" not in str(caught.value)


def test_a_segmenter_that_normalises_itself_takes_no_mean(build_segmenter):
    with pytest.raises(UserError, match="the NetSegmenter is a segmenter that normalises images itself"):
        segadapt.load(TENT, segmenter=build_segmenter(3), classes=NAMES, mean=(0, 0, 0))
    adapter = segadapt.load(TENT, segmenter=build_segmenter(3), classes=NAMES)
    assert adapter.step(np.zeros((32, 32, 3), np.uint8)).ids_HW.shape == (32, 32)


def test_episodic_steps_and_steps_that_wait(net, photo):
    alone = segadapt.load([*TENT, "tta.episodic=true"], segmenter=copy.deepcopy(net), classes=NAMES)
    first, other = alone.step(photo(), key="0"), alone.step(photo(1), key="1")
    again = alone.step(photo(), key="0")
    assert torch.equal(first.prediction.logits_Chw, again.prediction.logits_Chw)
    assert not torch.equal(first.prediction.logits_Chw, other.prediction.logits_Chw)
    waits = segadapt.load([*TENT, "tta.optimizer.accumulate=2"], segmenter=copy.deepcopy(net), classes=NAMES)
    before = weights(waits)
    waits.step(photo())
    assert_equal(weights(waits), before)
    waits.flush()
    with pytest.raises(AssertionError):
        assert_equal(weights(waits), before)


def test_a_program_with_a_hydra_of_its_own_keeps_it():
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    with initialize_config_module("segadapt.conf", version_base="1.3"):
        own = GlobalHydra.instance().hydra
        assert from_overrides("adapt", ["experiment=toytown_c"], AdaptConfig).data.kind == "toytown"
        with pytest.raises(UserError):
            from_overrides("adapt", ["experiment=none_of_mine"], AdaptConfig)
        assert GlobalHydra.instance().hydra is own
        assert compose("adapt").data.kind == "files"


def test_the_lines_of_the_page(net, photo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/api.md").read_text(), flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 10
    source = copy.deepcopy(net.state_dict())
    images = [(f"photo {seed}", photo(seed)) for seed in range(2)]
    told = {"net": net, "names": NAMES, "images": images, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    exec(compile(code, "docs/api.md", "exec"), told)
    assert capsys.readouterr().out.splitlines()[0].startswith("photo 0 (24, 40) torch.Size([3, 128, 214]) 1.0")
    assert_equal(weights(told["adapter"]), source)
    assert (tmp_path / "states/tonight/state.json").is_file()
    assert (tmp_path / "adapted/model.safetensors").is_file()


def test_the_notebook_runs_and_shows_a_gain(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = runpy.run_path(str(ROOT / "examples/own_images.py"))
    shares = {method: share for method, (share, _) in cells["found"].items()}
    assert shares["bn"] > shares["source"] + 0.1
    assert shares["generative-bn"] > shares["source"] + 0.1
    assert cells["same"]
    assert set(cells["CLASSES"]) == set(CLASSES)
    with Image.open("outputs/own-images/predictions.png") as picture:
        assert picture.size[0] > 500


@pytest.mark.parametrize("policy", ["stop", "reset"])
def test_numbers_that_are_not_finite_are_met_as_in_a_run(net, photo, policy):
    adapter = segadapt.load([*TENT, f"tta.non_finite={policy}"], segmenter=net, classes=NAMES)
    source = weights(adapter)
    adapter.step(photo())
    with torch.no_grad():
        net[3].bias[0] = float("inf")
    if policy == "stop":
        with pytest.raises(UserError, match=r"1 of images: loss .*tta\.non_finite=stop"):
            adapter.step(photo())
        return
    adapter.step(photo())
    assert_equal({name: value for name, value in weights(adapter).items() if not name.startswith("3.")},
                 {name: value for name, value in source.items() if not name.startswith("3.")})  # fmt: skip


def test_a_method_leaves_no_batchnorm_changed_for_the_next_adapter_nor_for_a_copy(net, photo):
    def ids(method, module):
        adapter = segadapt.load([f"tta.method={method}", *TENT[1:3]], segmenter=module, classes=NAMES)
        return adapter.step(photo()).prediction.logits_Chw

    plain = ids("source", copy.deepcopy(net))
    other = ids("bn", net)
    assert not torch.equal(plain, other)
    assert torch.equal(ids("source", copy.deepcopy(net)), plain)
    assert torch.equal(ids("source", net), plain)


def test_half_weights_are_refused(net):
    with pytest.raises(UserError, match=r"weights of torch\.float16; expected float32"):
        segadapt.load(TENT, segmenter=net.half(), classes=NAMES)
