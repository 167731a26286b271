"""What a run keeps to be looked at: which images, which files, and that nothing else changes by it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from interrupted_runs import QUIET
from PIL import Image

from segadapt import adapt, samples
from segadapt.datasets import Task
from segadapt.datasets.toytown import CLASSES, PALETTE_C3
from segadapt.models.generative.witness import NOT_ASKED, Maps, Witness
from segadapt.stream import Entry, Prepared

FOG, SNOW = Task(0, "fog", 5), Task(1, "snow", 5)


def entries(task, keys):
    return [Entry(task, key) for key in keys]


@given(keys=st.lists(st.text(min_size=1), unique=True, max_size=12), seed=st.integers(0, 9), count=st.integers(0, 5))
def test_choice_depends_on_seed_task_and_key_alone(keys, seed, count):
    both = entries(FOG, keys) + entries(SNOW, keys)
    chosen = samples.choose(both, seed=seed, count=count)
    assert chosen == samples.choose(reversed(both), seed=seed, count=count)
    assert chosen == {
        entry for task in (FOG, SNOW) for entry in samples.choose(entries(task, keys), seed=seed, count=count)
    }
    assert sorted(entry.task.name for entry in chosen) == [name for name in ("fog/5", "snow/5")
                                                           for _ in range(min(count, len(keys)))]  # fmt: skip


def test_choice_among_fewer_images_keeps_those_that_are_left():
    keys = [f"{number}" for number in range(40)]
    chosen = samples.choose(entries(FOG, keys), seed=0, count=4)
    left = [entry for entry in entries(FOG, keys) if entry.key > "2" or entry in chosen]
    assert samples.choose(left, seed=0, count=4) == chosen
    assert samples.choose(entries(FOG, keys), seed=1, count=4) != chosen


def test_large_images_are_kept_small_and_ids_stay_ids(tmp_path):
    label_HW = torch.randint(0, 12, (700, 1100), dtype=torch.uint8)
    label_HW[:10] = 255
    sample = Prepared(Entry(FOG, "a/b"), torch.rand(3, 600, 943), label_HW, (700, 1100), "")
    samples.write(tmp_path / samples.FOLDER / "00_fog-5", sample, label_HW.clamp(max=11), PALETTE_C3)
    ((key, kept),) = samples.kept(tmp_path, "00_fog-5").items()
    assert key == "a/b"
    assert kept.image.size == kept.ids("label").size == (512, 326)
    assert set(np.unique(kept.ids("label"))) == {*range(12), 255}
    palette = np.reshape(kept.ids("prediction").getpalette(), (-1, 3))
    assert palette[: len(PALETTE_C3)].tolist() == PALETTE_C3.tolist()
    assert kept.maps() is None


def test_small_images_are_not_enlarged(tmp_path):
    image_3HW = torch.rand(3, 20, 30)
    sample = Prepared(Entry(FOG, "a"), image_3HW, None, (20, 30), "")
    samples.write(tmp_path, sample, torch.zeros(20, 30, dtype=torch.uint8), PALETTE_C3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.image.jpg", "a.prediction.png"]
    assert Image.open(tmp_path / "a.image.jpg").size == (30, 20)


# --- what the teacher said ---


@pytest.fixture
def witnessed(build_combined, random_image):
    """witnessed(*overrides): maps of one step, and its prediction."""

    def step(*overrides, height=32, width=32):
        combined = build_combined("model.loss.topk=6", *overrides)
        combined.witness = Witness(draws=combined.window.draws)
        prediction = combined.step(random_image(height, width), task="fog/5", key="a")
        return combined.witness.maps(), prediction

    return step


@pytest.mark.parametrize("draws", [1, 3])
def test_error_map_of_one_window_averages_to_the_loss(witnessed, draws):
    maps, prediction = witnessed(f"model.generative.draws={draws}")
    assert maps.error_YX.shape == (4, 4)
    assert float(maps.error_YX.float().mean()) == pytest.approx(prediction.loss, rel=1e-3)


@pytest.mark.parametrize("overrides", [(), ("model.generative.max_pairs=2",), ("model.loss.topk=1",)])
def test_weights_of_all_windows_sum_to_one_at_each_pixel(witnessed, overrides):
    maps, prediction = witnessed(*overrides, height=32, width=45)
    assert len(prediction.candidates) == 2
    assert maps.weight_NYX.shape == (len(maps.classes_N), 4, 6)
    np.testing.assert_allclose(maps.weight_NYX.float().sum(dim=0), 1, atol=2e-3)
    assert set(maps.decision_YX.unique().tolist()) <= set(maps.classes_N.tolist())


def test_a_witness_sees_what_each_window_says_at_its_place():
    """Two windows of 2 x 2 that overlap by half: the mean where both are, each one's own elsewhere."""
    witness = Witness(draws=1)
    witness.place(torch.tensor([[0, 0, 16], [0, 8, 16]]), (16, 30))
    weights_RCyx = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.0, 0.5]])[:, :, None, None].expand(2, 3, 2, 2)
    error_RCyx = torch.tensor([[1.0, torch.inf, torch.inf], [3.0, torch.inf, 2.5]])[:, :, None, None].expand(2, 3, 2, 2)
    squared_Ryx = torch.tensor([2.0, 4.0])[:, None, None].expand(2, 2, 2)
    witness.see(slice(0, 1), weights_RCyx[:1], error_RCyx[:1], squared_Ryx[:1])
    witness.see(slice(1, 2), weights_RCyx[1:], error_RCyx[1:], squared_Ryx[1:])
    maps = witness.maps()
    assert maps is not None
    assert maps.classes_N.tolist() == [0, 2]
    np.testing.assert_array_equal(maps.error_YX, [[2, 3, 4, np.nan]] * 2)
    np.testing.assert_array_equal(maps.weight_NYX[1], [[0, 0.25, 0.5, np.nan]] * 2)
    np.testing.assert_array_equal(maps.decision_YX, [[0, 0, 2, NOT_ASKED]] * 2)


def test_answers_that_are_not_finite_give_no_maps():
    witness = Witness(draws=1)
    witness.place(torch.tensor([[0, 0, 16]]), (16, 16))
    nothing = torch.full((1, 3, 2, 2), torch.nan)
    witness.see(slice(0, 1), nothing, nothing, nothing[:, 0])
    assert witness.maps() is None


def test_maps_come_back_as_they_were(tmp_path):
    maps = Maps(torch.tensor([1, 4], dtype=torch.uint8), torch.rand(3, 4).half(), torch.rand(2, 3, 4).half(),
                torch.zeros(3, 4, dtype=torch.uint8))  # fmt: skip
    label_HW = torch.zeros(24, 32, dtype=torch.uint8)
    sample = Prepared(Entry(FOG, "k"), torch.rand(3, 24, 32), label_HW, (24, 32), "")
    for name in ("00_a", "01_b"):
        samples.write(tmp_path / samples.FOLDER / name, sample, label_HW, PALETTE_C3, maps)
    back = samples.kept(tmp_path, "00_a")["k"].maps()
    assert back is not None
    assert all(torch.equal(getattr(back, name), value) for name, value in vars(maps).items())
    first, second = (
        sorted((path.name, path.read_bytes()) for path in (tmp_path / samples.FOLDER / name).iterdir())
        for name in ("00_a", "01_b")
    )
    assert first == second


# --- a whole run ---


@pytest.fixture(scope="module")
def runs(compose_settings, saved_models, tmp_path_factory):
    """Of two methods with samples, and one of them without: name -> folder of the run."""
    models, made = saved_models(CLASSES), {}
    for name, more in {"generative": (), "source": ("tta.method=source",), "none": ("logging.samples=0",)}.items():
        root = tmp_path_factory.mktemp(name)
        settings = compose_settings(*models, "data.corruptions=[fog,contrast]", "data.limit=4", "data.workers=0",
                                    "logging.samples=2", f"logging.root={root}", *more)  # fmt: skip
        made[name] = adapt.run(settings, console=QUIET)["folder"]
    return {name: type(root)(folder) for name, folder in made.items()}


def test_results_do_not_depend_on_samples(runs):
    for name in ("records.jsonl", "settings.json"):
        assert (runs["generative"] / name).read_bytes() == (runs["none"] / name).read_bytes()
    assert runs["generative"].name == runs["none"].name
    assert not (runs["none"] / samples.FOLDER).exists()


def test_all_methods_keep_the_same_images(runs):
    def kept(name):
        folder = runs[name] / samples.FOLDER
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    source, generative = kept("source"), kept("generative")
    assert len(source) == 3 * 2 * 2
    assert len(generative) == 4 * 2 * 2
    shared = [path for path in source if not path.name.endswith(".prediction.png")]
    assert [source[path] for path in shared] == [generative[path] for path in shared]
