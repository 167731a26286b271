"""What the W&B copy of a run shows: pictures with masks, a table of the tasks; and an offline run, read back."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from wandb_file import OfflineRun

from segadapt import adapt
from segadapt.datasets.toytown import CLASSES
from segadapt.metrics import predict_at_label_size
from segadapt.pictures import PICTURE_PX, picture_of
from segadapt.task_loop import MEANS

SOURCE = "tta.forward_mode=discriminative_only"
SLUGS = {"fog/5": "00_fog-5", "snow/5": "01_snow-5"}


@pytest.fixture(scope="module")
def settings_of(compose_settings, saved_models):
    """settings_of(root, *overrides): two tasks of three images."""
    models = saved_models(CLASSES)

    def build(root, *overrides):
        asked = compose_settings(*models, "data.corruptions=[fog,snow]", "data.limit=3", "data.workers=0",
                                    "logging.terminal=quiet", "logging.wandb.mode=offline",
                                    "logging.wandb.images=2", *overrides)  # fmt: skip
        asked.logging.root = str(root)
        return asked

    return build


def records_of(results):
    return [json.loads(line) for line in Path(results["folder"], "records.jsonl").read_text().splitlines()]


def pictures_of(mirror):
    """Those logged, by key of the metric and step."""
    return {(name, step): value for step, values in mirror.logged for name, value in values.items() if "/image" in name}


@settings(max_examples=25)
@given(st.integers(1, 900), st.integers(1, 900), st.booleans())
def test_a_picture_is_bounded_and_its_masks_fit(height, width, is_labelled):
    generator = torch.Generator().manual_seed(height * width)
    image_3HW = torch.rand(3, height, width, generator=generator)
    logits_Chw = torch.rand(5, 8, 8, generator=generator)
    label_HW = torch.tensor([0, 4, 255], dtype=torch.uint8)[torch.randint(3, (height, width), generator=generator)]
    picture = picture_of(image_3HW, logits_Chw, label_HW if is_labelled else None, classes="abcde", caption="x")
    size = picture.image_HW3.shape[:2]
    assert max(size) == min(PICTURE_PX, max(height, width))
    assert size[0] / size[1] == pytest.approx(height / width, rel=1 / min(size))
    assert picture.masks.keys() == ({"prediction", "label"} if is_labelled else {"prediction"})
    assert {(mask.shape, mask.dtype) for mask in picture.masks.values()} == {(size, np.dtype(np.uint8))}
    assert np.array_equal(picture.masks["prediction"], predict_at_label_size(logits_Chw, size).numpy())
    if is_labelled:
        assert set(np.unique(picture.masks["label"])) <= {0, 4, 255}
    if max(height, width) <= PICTURE_PX:
        assert np.array_equal(picture.image_HW3, (255 * image_3HW).round().permute(1, 2, 0).numpy())
        assert not is_labelled or np.array_equal(picture.masks["label"], label_HW.numpy())


def test_source_and_adapted_show_the_same_first_images_of_each_task(settings_of, tmp_path, mirror):
    shown = []
    for overrides in ((SOURCE,), ()):
        mirror.logged.clear()
        results = adapt.run(settings_of(tmp_path, *overrides))
        shown.append(pictures_of(mirror))
        keys = {(f"{SLUGS[record['task']]}/image", record["index"]): record["key"] for record in records_of(results)}
        assert {place: picture.caption for place, picture in shown[-1].items()} == {
            place: key for place, key in keys.items() if place[1] < 2
        }
    source, adapted = shown
    for place, picture in source.items():
        assert np.array_equal(picture.image_HW3, adapted[place].image_HW3)
        assert np.array_equal(picture.masks["label"], adapted[place].masks["label"])
        assert tuple(picture.classes) == CLASSES
    at_first, later = ("00_fog-5/image", 0), ("00_fog-5/image", 1)  # scored before the first update, and after it
    assert np.array_equal(source[at_first].masks["prediction"], adapted[at_first].masks["prediction"])
    assert later in source


@pytest.mark.parametrize("overrides", [("logging.wandb.images=0",), ("logging.wandb.mode=disabled",)])
def test_where_no_pictures_are_wanted_none_are_made(settings_of, tmp_path, mirror, monkeypatch, overrides):
    from segadapt import task_loop

    monkeypatch.setattr(task_loop, "picture_of", lambda *_, **__: pytest.fail("a picture was made"))
    adapt.run(settings_of(tmp_path, SOURCE, *overrides))
    assert mirror.logged
    assert not pictures_of(mirror)


def test_pictures_change_nothing_on_disk(settings_of, tmp_path, mirror):
    runs = [adapt.run(settings_of(tmp_path / images, f"logging.wandb.images={images}")) for images in "03"]
    without, with_pictures = (Path(run["folder"], "records.jsonl").read_bytes() for run in runs)
    assert without == with_pictures
    assert runs[0]["mean"] == runs[1]["mean"]


def test_the_table_is_the_tasks_of_the_results(settings_of, tmp_path, mirror):
    results = adapt.run(settings_of(tmp_path))
    columns = ["task", "images", *MEANS, "seconds"]
    assert mirror.tables == {"tasks": [{name: row[name] for name in columns} for row in results["tasks"]]}
    assert {f"mean/{name}": value for name, value in results["mean"].items()}.items() <= mirror.last.items()


@pytest.mark.slow
def test_an_offline_run_read_back_is_the_run(settings_of, tmp_path, monkeypatch, caplog):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", key := "0123456789" * 4)
    runs, labels = {}, {}
    for method in ("source", "bn"):
        asked = settings_of(tmp_path, f"tta.method={method}", "experiment.name=pair")
        results = adapt.run(asked)
        runs[method] = run = OfflineRun(Path(results["folder"]))
        records = records_of(results)

        assert run.is_whole
        name = f"{Path(results['folder']).name}-pair"
        assert run.start == {"name": name, "id": name, "group": "pair", "job_type": method}
        assert run.config["protocol"] == results["protocol"]
        assert run.config["data"]["corruptions"] == ["fog", "snow"]
        assert run.config["experiment"]["seed"] == results["seed"]

        *points, table = run.history
        for point, record in zip(points, records, strict=True):  # every image once, in order, on its task's own axis
            slug = SLUGS[record["task"]]
            assert point[f"{slug}/step"] == record["index"]
            assert point[f"{slug}/running_miou"] == record["running_miou"]
            assert (f"{slug}/image.path" in point) == (record["index"] < 2)
            assert point.get(f"{slug}/loss") == record.get("loss")

        for point, record in zip(points, records, strict=True):
            if record["index"] < 2:
                image = f"{SLUGS[record['task']]}/image"
                assert point[f"{image}.caption"] == record["key"]
                with Image.open(run.files / point[f"{image}.path"]) as picture:
                    assert (picture.format, picture.size[1]) == ("JPEG", point[f"{image}.height"])
                for mask in ("prediction", "label"):
                    with Image.open(run.files / point[f"{image}.masks.{mask}.path"]) as opened:
                        ids_HW = np.asarray(opened)
                    assert set(np.unique(ids_HW)) <= {*range(len(CLASSES)), 255}
                    labels.setdefault((method, mask), []).append(ids_HW)
                    named = run.config["_wandb"]["mask/class_labels"][f"{image}_wandb_delimeter_{mask}"]["value"]
                    assert named == {str(index): name for index, name in enumerate(CLASSES)} | {"255": "ignore"}

        rows = json.loads((run.files / table["tasks.path"]).read_text())
        assert rows["columns"] == ["task", "images", *MEANS, "seconds"]
        assert rows["data"] == [[row[name] for name in rows["columns"]] for row in results["tasks"]]
        assert run.summary["mean/miou"] == results["mean"]["miou"]
        assert run.summary["00_fog-5/miou"] == results["tasks"][0]["miou"]

        folder = run.files.parent
        assert not [path for path in folder.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]
        assert not list(folder.rglob("*.py"))
        assert sum(path.stat().st_size for path in run.files.rglob("media/**/*") if path.is_file()) < 200_000
    assert len(labels["source", "label"]) == 4
    for one, other in zip(labels["source", "label"], labels["bn", "label"], strict=True):
        assert np.array_equal(one, other)
    assert not [record for record in caplog.records if "W&B" in record.getMessage()]
