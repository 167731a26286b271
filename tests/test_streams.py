"""Streams: tasks one after the other, severities up and down, all interleaved, rounds; resets by task, image, never."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segadapt import adapt
from segadapt.config import AdaptConfig
from segadapt.datasets.build import build_dataset, build_tasks
from segadapt.datasets.toytown import CLASSES
from segadapt.errors import UserError
from segadapt.parse import from_overrides
from segadapt.stream import order
from segadapt.task_loop import TaskLoop

TWO = "data.corruptions=[fog,contrast]"


@pytest.fixture(scope="module")
def settings_of(compose_settings, saved_models):
    """settings_of(root, *overrides): two tasks of three small images."""
    models = saved_models(CLASSES)

    def build(root, *overrides):
        return compose_settings(
            *models, TWO, "data.limit=3", "data.workers=0", "tta.optimizer.lr=0.01", f"logging.root={root}", *overrides
        )

    return build


def run(settings):
    """Records and results."""
    folder = Path(adapt.run(settings)["folder"])
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return lines, json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def two_rounds(settings_of, tmp_path_factory):
    """Settings, records and results of a run of two rounds that keeps what it learns."""
    settings = settings_of(tmp_path_factory.mktemp("rounds"), "data.rounds=2", "tta.continual=true")
    return settings, *run(settings)


def by_image(lines, *names):
    """What was recorded of each (task, image), whatever the order."""
    return {(line["task"], line["key"]): [line[name] for name in names] for line in lines}


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ((), ["fog/5", "contrast/5"]),
        (("data.rounds=2",), ["fog/5", "contrast/5", "fog/5@2", "contrast/5@2"]),
        (("data.corruptions=[]", "data.rounds=2"), ["clean", "clean@2"]),
        (
            ("data.order=gradual", "data.corruptions=[fog]", "data.severity=3"),
            ["fog/1", "fog/2", "fog/3", "fog/2@2", "fog/1@2"],
        ),
        (
            ("data.order=gradual", "data.severity=1", "data.rounds=2"),
            ["fog/1", "contrast/1", "fog/1@2", "contrast/1@2"],
        ),
    ],
)
def test_tasks_of_a_stream(settings_of, tmp_path, overrides, names):
    tasks = build_tasks(settings_of(tmp_path, *overrides).data)
    assert [task.name for task in tasks] == names
    assert [task.index for task in tasks] == list(range(len(names)))


def test_gradual_needs_something_that_has_a_severity(settings_of, tmp_path):
    with pytest.raises(UserError, match=r"data\.order=gradual, but data\.corruptions is empty"):
        build_tasks(settings_of(tmp_path, "data.order=gradual", "data.corruptions=[]").data)


def test_all_and_nothing_cannot_both_be_kept(settings_of, tmp_path):
    with pytest.raises(UserError, match=r"tta\.continual=true and tta\.episodic=true"):
        settings_of(tmp_path, "tta.continual=true", "tta.episodic=true")


def test_every_round_shows_the_same_pixels_in_the_same_order_and_draws_anew(two_rounds):
    settings, lines, results = two_rounds
    dataset = build_dataset(settings.data)
    fog, _, again, _ = build_tasks(settings.data)
    keys, other = ([e.key for e in order(dataset, t, seed=0, shuffle=True, limit=3)] for t in (fog, again))
    assert keys == other
    assert [line["key"] for line in lines[:3]] == [line["key"] for line in lines[6:9]] == keys
    assert [line["data"] for line in lines[:3]] == [line["data"] for line in lines[6:9]]
    assert all(one["loss"] != two["loss"] for one, two in zip(lines[:3], lines[6:9], strict=True))
    assert [row["task"] for row in results["tasks"]] == ["fog/5", "contrast/5", "fog/5@2", "contrast/5@2"]
    assert "2 rounds" in results["protocol"]
    assert "continual" in results["protocol"]


def test_first_round_of_several_is_the_run_of_one(settings_of, tmp_path, two_rounds):
    _, several, _ = two_rounds
    one, _ = run(settings_of(tmp_path, "tta.continual=true"))
    assert len(several) > len(one)
    assert several[: len(one)] == one


def test_interleaved_tasks_keep_their_own_scores(settings_of, tmp_path):
    """With nothing learned, each task scores as it does alone, whatever comes between."""
    still = ("tta.method=source",)
    apart, expected = run(settings_of(tmp_path / "apart", *still))
    mixed, found = run(settings_of(tmp_path / "mixed", "data.order=mixed", *still))
    assert [line["task"] for line in mixed] != [line["task"] for line in apart]
    assert sorted(line["task"] for line in mixed) == sorted(line["task"] for line in apart)
    assert by_image(mixed, "data", "classes") == by_image(apart, "data", "classes")
    for one, other in zip(found["tasks"], expected["tasks"], strict=True):
        assert (one["task"], one["images"], one["miou"]) == (other["task"], other["images"], other["miou"])
    assert found["order_sha256"] != expected["order_sha256"]
    assert "mixed" in found["protocol"]


def test_interleaving_follows_the_seed_and_each_round_is_its_own(settings_of, tmp_path):
    still = ("tta.method=source", "data.order=mixed", "data.rounds=2")
    lines, again, other = (
        [
            (line["task"], line["key"])
            for line in run(settings_of(tmp_path / name, *still, f"experiment.seed={seed}"))[0]
        ]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert lines == again != other
    first, second = lines[:6], [(task.removesuffix("@2"), key) for task, key in lines[6:]]
    assert all(not task.endswith("@2") for task, _ in first)
    assert sorted(first) == sorted(second)
    assert first != second


def test_episodic_images_know_nothing_of_each_other(settings_of, tmp_path):
    """So that order and company do not matter; and each is what the first image of a task is."""
    names = ("loss", "grad_norm", "classes")
    alone, results = run(settings_of(tmp_path / "a", "tta.episodic=true"))
    mixed, _ = run(settings_of(tmp_path / "b", "tta.episodic=true", "data.order=mixed"))
    task, _ = run(settings_of(tmp_path / "c"))
    assert by_image(alone, *names) == by_image(mixed, *names)
    assert alone[0] == task[0]
    assert alone[1]["loss"] != task[1]["loss"]
    assert "reset before each image" in results["protocol"]


@pytest.mark.parametrize(
    ("overrides", "resets"),
    [
        ((), 2),
        (("tta.continual=true",), 0),
        (("tta.episodic=true",), 2 + 6),
        (("data.order=mixed",), 1),
        (("data.order=mixed", "data.rounds=2"), 2),
        (("data.rounds=2",), 4),
    ],
)
def test_when_a_method_is_reset(settings_of, tmp_path, monkeypatch, overrides, resets):
    count, loop = [], TaskLoop.run

    def counted(self):
        method = self.shared.models.method
        monkeypatch.setattr(method, "reset", lambda: count.append(1))
        return loop(self)

    monkeypatch.setattr(TaskLoop, "run", counted)
    run(settings_of(tmp_path, "tta.method=tent", *overrides))
    assert len(count) == resets


def test_conditions_on_disk_need_no_severity(tmp_path):
    acdc = from_overrides("adapt", ["data=acdc", f"data.data_root={tmp_path}", "tta.method=source"], AdaptConfig).data
    assert [task.name for task in build_tasks(acdc)] == ["fog", "night", "rain", "snow"]
    with pytest.raises(UserError, match=r"data\.order=gradual, but data\.image_path=.* has no \{severity\}"):
        build_tasks(replace(acdc, order="gradual"))
    rounds = from_overrides("adapt", ["data=acdc_rounds", "data.data_root=x", "tta.method=source"], AdaptConfig).data
    assert [task.name for task in build_tasks(rounds)][3:6] == ["snow", "fog@2", "night@2"]
    assert len(build_tasks(rounds)) == 40


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.mark.parametrize(
    ("data", "corruption", "image", "label", "ids", "expected"),
    [
        ("cityscapes", None, "leftImg8bit/val/ulm/a_leftImg8bit.png", "gtFine/val/ulm/a_gtFine_labelIds.png",
         [7, 33, 0, 16], [0, 18, 255, 255]),
        ("cityscapes_c", "fog", "Cityscapes-C/fog/5/val/ulm/a_leftImg8bit.png", "gtFine/val/ulm/a_gtFine_labelIds.png",
         [26, 24, 5, 255], [13, 11, 255, 255]),
        ("acdc", "night", "rgb_anon/night/val/GOPR1/a_rgb_anon.png", "gt/night/val/GOPR1/a_gt_labelTrainIds.png",
         [0, 18, 255, 9], [0, 18, 255, 9]),
    ],
)  # fmt: skip
def test_published_layouts_are_read(tmp_path, data, corruption, image, label, ids, expected):
    write(tmp_path / image, np.full((2, 2, 3), 7, np.uint8))
    write(tmp_path / label, np.array(ids, np.uint8).reshape(2, 2))
    chosen = [f"data.corruptions=[{corruption}]"] if corruption else []
    overrides = [f"data={data}", f"data.data_root={tmp_path}", "tta.method=source", *chosen]
    settings = from_overrides("adapt", overrides, AdaptConfig).data
    dataset, (task,) = build_dataset(settings), build_tasks(settings)
    (key,) = dataset.keys(task)
    sample = dataset.load(task, key)
    assert key.endswith("/a")
    assert sample.label_HW is not None
    assert sample.label_HW.flatten().tolist() == expected
    assert len(dataset.classes) == len(dataset.palette_C3) == 19
    assert dataset.classes[0] == "road"
    assert dataset.palette_C3[0].tolist() == [128, 64, 128]


def test_label_ids_of_cityscapes_are_for_its_classes(tmp_path):
    write(tmp_path / "leftImg8bit/val/a_leftImg8bit.png", np.zeros((2, 2, 3), np.uint8))
    overrides = ["data=cityscapes", f"data.data_root={tmp_path}", "tta.method=source", "data.classes=camvid"]
    with pytest.raises(UserError, match=r"cityscapes_label_ids is for the 19 classes.*has 11"):
        build_dataset(from_overrides("adapt", overrides, AdaptConfig).data)
