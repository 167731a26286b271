"""The loop over tasks and images, end to end on tiny models: what is recorded, repeated, reset and saved."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from quick_settings import quick_settings
from transformers import SegformerForSemanticSegmentation

from segadapt import adapt, config, config_data, corrupt, stream
from segadapt.datasets.build import build_dataset, build_tasks
from segadapt.errors import UserError
from segadapt.models.build import build_models
from segadapt.models.combined import Combined
from segadapt.models.set_up import fingerprint
from segadapt.models.source import Source

CLASSES = ("sky", "road", "car")
SIZES = ((48, 64), (64, 48), (40, 40), (32, 70))  # H, W px: landscape, portrait, square, wide
TASKS = "data.corruptions=[gaussian_noise,contrast]"


def draw(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four images with labels of three classes and a strip of 255, and the list of names."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for index, (height, width) in enumerate(SIZES):
        label_HW = (np.arange(height)[:, None] * 3 // height + np.zeros(width, int)[None]).astype(np.uint8)
        colours_C3 = np.array([(90, 150, 230), (110, 110, 110), (200, 40, 30)])
        image_HW3 = (colours_C3[label_HW] + rng.integers(-20, 20, (height, width, 3))).astype(np.uint8)
        label_HW[:, :3] = 255
        draw(root / "images" / f"{index}.png", image_HW3)
        draw(root / "labels" / f"{index}.png", label_HW)
    (root / "names.txt").write_text("\n".join(CLASSES))
    return root


@pytest.fixture(scope="module")
def settings_of(compose_settings, saved_models, folder):
    """settings_of(root, *overrides): a run on the folder with tiny models, records below root."""
    models = saved_models(CLASSES)

    def build(root: Path, *overrides: str) -> config.AdaptConfig:
        return compose_settings(
            "data=folder", f"data.data_root={folder}", f"data.classes={folder / 'names.txt'}", "data.workers=0",
            "data.label_path='{data_root}/labels/{key}.png'", "data.short_side_px=32", TASKS,
            *models, "tta.optimizer.lr=0.01", f"logging.root={root}", *overrides,
        )  # fmt: skip

    return build


@pytest.fixture(scope="module")
def adapted(settings_of, tmp_path_factory) -> Path:
    """The folder of one finished run, with adapted models and sample predictions."""
    settings = settings_of(
        tmp_path_factory.mktemp("run"), "tta.save_adapted=true", "logging.predictions=sample", "logging.sample_images=1"
    )
    return Path(adapt.run(settings)["folder"])


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "records.jsonl").read_text().splitlines()]


def without_times(path: Path) -> dict:
    return {name: value for name, value in json.loads(path.read_text()).items() if name != "seconds"}


def losses(path: Path) -> list[float]:
    return [line["loss"] for line in records(path)]


def test_results_say_what_was_measured(adapted):
    results = json.loads((adapted / "results.json").read_text())
    assert {"protocol", "tasks", "mean", "versions"} <= set(results)
    assert [task["task"] for task in results["tasks"]] == ["gaussian_noise/5", "contrast/5"]
    for task in results["tasks"]:
        assert {"task", "images", "miou", "macc", "aacc", "per_class", "seconds"} <= set(task)
        assert task["images"] == len(SIZES)
        assert list(task["per_class"]) == list(CLASSES)
        assert 0 <= task["miou"] <= task["macc"] <= 1
        assert task["miou"] == pytest.approx(np.mean(list(task["per_class"].values())), abs=1e-12)
    for name in ("miou", "macc", "aacc"):
        assert results["mean"][name] == pytest.approx(np.mean([task[name] for task in results["tasks"]]), abs=1e-12)
    assert {"python", "torch", "transformers", "diffusers", "device"} <= set(results["versions"])
    assert "method generative" in results["protocol"]
    assert "reset before each task" in results["protocol"]
    assert "scored before the update" in results["protocol"]


def test_scores_are_those_of_the_confusion_matrix(adapted):
    for path in sorted((adapted / "tasks").glob("*.json")):
        task = json.loads(path.read_text())
        counts_CC = np.array(task["confusion_matrix"])
        assert counts_CC.sum() == sum(height * (width - 3) for height, width in SIZES)  # no ignored pixel
        hits_C = np.diag(counts_CC)
        iou_C = hits_C / (counts_CC.sum(0) + counts_CC.sum(1) - hits_C)
        assert task["miou"] == pytest.approx(iou_C.mean(), abs=1e-12)
        assert task["aacc"] == pytest.approx(hits_C.sum() / counts_CC.sum(), abs=1e-12)


def test_scores_of_a_task_derive_from_the_counts_of_its_images(adapted):
    for path in sorted((adapted / "tasks").glob("*.json")):
        task, sums = json.loads(path.read_text()), np.zeros((len(CLASSES), 3), dtype=int)
        for line in records(adapted):
            if line["task"] == task["task"]:
                height, width = SIZES[int(line["key"])]
                assert sum(label for _, label, _ in line["classes"].values()) == height * (width - 3)
                assert all(label + predicted > 0 for _, label, predicted in line["classes"].values())
                for index, counts in line["classes"].items():
                    sums[int(index)] += counts
        counts_CC = np.array(task["confusion_matrix"])
        assert np.array_equal(sums, np.stack([np.diag(counts_CC), counts_CC.sum(1), counts_CC.sum(0)], axis=1))
        correct_C, label_C, predicted_C = sums.T
        assert task["miou"] == np.mean(correct_C / (label_C + predicted_C - correct_C))


def test_images_that_trust_refuses_are_counted_apart_from_faults(settings_of, tmp_path, capsys):
    results = adapt.run(settings_of(tmp_path, "model.trust.max_agreement=0"))
    lines, out = records(Path(results["folder"])), " ".join(capsys.readouterr().out.split())
    for task in results["tasks"]:
        mine = [line for line in lines if line["task"] == task["task"]]
        refused = sum(line["teacher_agrees"] > 0 for line in mine)
        assert refused
        assert refused == task["steps_refused"] == sum(line["is_refused"] for line in mine)
        assert task["steps_skipped"] == 0
        assert all(line["is_updated"] != line["is_refused"] for line in mine)
        assert f"{task['task']}: {refused} steps refused" in out
    assert {line["agreement"] for line in lines} == {None}


def test_the_rest_of_a_task_is_flushed_at_its_end(settings_of, tmp_path):
    """Four images, a step every three: the last one moves what is saved, and where the next task starts."""

    def run(name, *overrides):
        settings = settings_of(tmp_path / name, "tta.save_adapted=true", "tta.continual=true", *overrides)
        return Path(adapt.run(settings)["folder"])

    still, three, ten = run("0", "tta.optimizer.lr=0"), *(run(n, f"tta.optimizer.accumulate={n}") for n in ("3", "10"))
    assert losses(still)[:3] == losses(three)[:3] == losses(ten)[:3]
    assert losses(three)[3] != losses(still)[3] == losses(ten)[3]
    saved = [
        fingerprint(SegformerForSemanticSegmentation.from_pretrained(path / "adapted" / "00_gaussian_noise-5"))
        for path in (still, three, ten)
    ]
    assert len(set(saved)) == 3
    assert losses(ten)[4] != losses(still)[4]


def test_two_equal_runs_leave_the_same_bytes(settings_of, tmp_path):
    first, second = (Path(adapt.run(settings_of(tmp_path / name))["folder"]) for name in ("a", "b"))
    assert (first / "records.jsonl").read_bytes() == (second / "records.jsonl").read_bytes()
    for path in sorted((first / "tasks").glob("*.json")):
        assert without_times(path) == without_times(second / "tasks" / path.name)
    assert first.name == second.name  # the id is a hash of the settings, the folder of the records is not one of them


def test_every_step_moves_the_model_and_each_task_starts_from_the_source(settings_of, tmp_path):
    def run(name: str, *overrides: str) -> Path:
        return Path(adapt.run(settings_of(tmp_path / name, *overrides))["folder"])

    reset, continual = run("reset"), run("continual", "tta.continual=true")
    alone, still = run("alone", "data.corruptions=[contrast]"), run("still", "tta.optimizer.lr=0")
    n = len(SIZES)
    assert losses(reset)[n:] == losses(alone)  # as in a process that saw the second task alone
    assert losses(continual)[:n] == losses(reset)[:n]
    assert all(a != b for a, b in zip(losses(continual)[n:], losses(reset)[n:], strict=True))
    assert losses(still)[0] == losses(reset)[0]
    assert all(a != b for a, b in zip(losses(still)[1:n], losses(reset)[1:n], strict=True))
    assert all(line["is_updated"] for line in records(reset))


def test_both_forward_modes_see_the_same_images_in_the_same_order(settings_of, adapted, tmp_path):
    source = Path(adapt.run(settings_of(tmp_path, "tta.forward_mode=discriminative_only"))["folder"])
    seen = [[(line["task"], line["key"], line["data"]) for line in records(path)] for path in (source, adapted)]
    assert seen[0] == seen[1]
    assert [key for _, key, _ in seen[0][:4]] != sorted(key for _, key, _ in seen[0][:4])  # shuffled
    first = [json.loads((path / "results.json").read_text()) for path in (source, adapted)]
    assert first[0]["order_sha256"] == first[1]["order_sha256"]
    assert first[0]["data_sha256"] == first[1]["data_sha256"]


def test_without_adaptation_no_weight_moves_and_no_teacher_is_read(settings_of, tmp_path):
    settings = settings_of(
        tmp_path, "tta.forward_mode=discriminative_only", "tta.save_adapted=true",
        "model.generative.checkpoint=/no/such/folder",
    )  # fmt: skip
    results = adapt.run(settings)
    source = SegformerForSemanticSegmentation.from_pretrained(settings.model.discriminative.checkpoint)
    for name in ("00_gaussian_noise-5", "01_contrast-5"):
        kept = SegformerForSemanticSegmentation.from_pretrained(Path(results["folder"], "adapted", name))
        assert fingerprint(kept) == fingerprint(source) == results["weights_sha256"]["discriminative"]
    assert "generative" not in results["weights_sha256"]
    assert [line for line in records(Path(results["folder"])) if "loss" in line] == []


def test_evaluate_scores_like_adapt_without_adaptation(settings_of, tmp_path):
    settings = settings_of(tmp_path, "tta.forward_mode=discriminative_only")
    evaluated = adapt.run(
        config.EvaluateConfig(
            experiment=settings.experiment,
            data=settings.data,
            model=config.EvaluatedModelSettings(settings.model.discriminative, {}),
            logging=settings.logging,
            runtime=settings.runtime,
            evaluate=quick_settings("evaluate", ["data=toytown"], config.EvaluateConfig).evaluate,
        )
    )
    predicted = adapt.run(settings)
    assert evaluated["protocol"] == predicted["protocol"]
    assert [task | {"seconds": 0} for task in evaluated["tasks"]] == [t | {"seconds": 0} for t in predicted["tasks"]]


def test_the_saved_model_has_the_weights_after_the_last_step(settings_of, adapted, tmp_path):
    settings = settings_of(tmp_path)
    dataset, task = build_dataset(settings.data), build_tasks(settings.data)[1]
    combined = build_models(settings, dataset.classes).method
    source = fingerprint(combined.segmenter.net)
    for sample in stream.read(
        dataset, stream.order(dataset, task, seed=0, shuffle=True, limit=None), short_side_px=32, workers=0
    ):
        combined.step(sample.image_3HW, task=task.name, key=sample.entry.key)
    saved = SegformerForSemanticSegmentation.from_pretrained(adapted / "adapted" / "01_contrast-5")
    assert fingerprint(saved) == fingerprint(combined.segmenter.net) != source


def test_agreement_of_draws_and_adapters_are_recorded(settings_of, tmp_path):
    options = ("model.generative.draws=2", "model.update.lora_rank=2", "model.trust.mode=weight", "data.limit=2")
    results = adapt.run(settings_of(tmp_path, *options))
    for line in records(Path(results["folder"])):
        assert 0.5 <= line["agreement"] <= 1
        assert 0 <= line["teacher_agrees"] <= 1
        assert line["is_updated"]
    assert "peft" in results["versions"]
    assert "2 draws" in results["protocol"]


def test_unlabelled_images_give_predictions_at_their_own_size(settings_of, folder, tmp_path):
    results = adapt.run(settings_of(tmp_path, "data.label_path=null", "logging.predictions=all"))
    assert [task["miou"] for task in results["tasks"]] == [None, None]
    assert results["mean"]["miou"] is None
    for index, (height, width) in enumerate(SIZES):
        for task in ("00_gaussian_noise-5", "01_contrast-5"):
            with Image.open(Path(results["folder"], "predictions", task, f"{index}.png")) as image:
                assert image.size == (width, height)
                assert image.mode == "P"
                assert np.asarray(image).max() < len(CLASSES)


def test_a_run_that_would_leave_nothing_is_refused(settings_of, tmp_path):
    with pytest.raises(UserError, match=r"logging\.predictions=all"):
        adapt.run(settings_of(tmp_path, "data.label_path=null"))
    assert list(tmp_path.iterdir()) == []


def test_sample_predictions_are_the_first_of_each_task(adapted):
    first = [records(adapted)[0], records(adapted)[len(SIZES)]]
    written = sorted(path.relative_to(adapted / "predictions") for path in (adapted / "predictions").rglob("*.png"))
    assert [path.as_posix() for path in written] == [
        f"00_gaussian_noise-5/{first[0]['key']}.png",
        f"01_contrast-5/{first[1]['key']}.png",
    ]


def test_limit_takes_the_head_of_the_shuffled_order(settings_of, adapted, tmp_path):
    results = adapt.run(settings_of(tmp_path, "data.limit=2"))
    whole, part = records(adapted), records(Path(results["folder"]))
    assert [line["key"] for line in part] == [line["key"] for line in (*whole[:2], *whole[4:6])]
    assert losses(Path(results["folder"]))[:2] == losses(adapted)[:2]


def test_a_run_folder_of_other_settings_is_refused(settings_of, tmp_path):
    source = "tta.forward_mode=discriminative_only"
    adapt.run(settings_of(tmp_path, "experiment.id=one", source))
    with pytest.raises(UserError, match=r"experiment\.seed=0; now 1"):
        adapt.run(settings_of(tmp_path, "experiment.id=one", "experiment.seed=1", source))


def test_labels_without_images_are_told_once_a_task(settings_of, folder, tmp_path, capsys):
    part = tmp_path / "part"
    (part / "images").mkdir(parents=True)
    (part / "images" / "0.png").write_bytes((folder / "images" / "0.png").read_bytes())
    (part / "labels").symlink_to(folder / "labels")
    overrides = (f"data.data_root={part}", "data.corruptions=[]", "tta.forward_mode=discriminative_only")
    results = adapt.run(settings_of(tmp_path, *overrides))
    assert results["tasks"][0]["images"] == 1
    assert capsys.readouterr().out.count("clean: 3 labels have no image (first: 1)") == 1


def test_a_head_of_another_size_is_refused(settings_of, folder, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\n".join((*CLASSES, "tree")))
    with pytest.raises(UserError, match=r"model\.discriminative\.checkpoint"):
        adapt.run(settings_of(tmp_path, f"data.classes={names}"))


def test_corrupted_files_give_the_pixels_that_are_made_on_the_fly(settings_of, adapted, folder, tmp_path):
    settings = settings_of(tmp_path)
    settings.data.workers = 1
    corrupt.run(config_data.CorruptConfig(settings.data, config_data.CorruptSettings(str(tmp_path / "set"), "png", 75)))
    from_disk = settings_of(
        tmp_path, f"data.image_path='{tmp_path}/set/{{corruption}}/{{severity}}/{{key}}.png'"
    )  # fmt: skip
    results = adapt.run(from_disk)
    assert results["data_sha256"] == json.loads((adapted / "results.json").read_text())["data_sha256"]
    assert losses(Path(results["folder"])) == losses(adapted)


def test_an_unreadable_image_stops_the_run_with_its_name(settings_of, folder, tmp_path):
    for part in ("images", "labels"):
        for path in (folder / part).iterdir():
            (tmp_path / "data" / part).mkdir(parents=True, exist_ok=True)
            (tmp_path / "data" / part / path.name).write_bytes(path.read_bytes())
    (tmp_path / "data" / "images" / "2.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"images/2\.png"):
        adapt.run(settings_of(tmp_path, f"data.data_root={tmp_path / 'data'}", "tta.forward_mode=discriminative_only"))


SAID = "CUDA out of memory. Tried to allocate 2 GiB. GPU 1 has a total capacity of 79 GiB of which 1 GiB is free. See"


@pytest.mark.parametrize(
    ("overrides", "cures"),
    [
        ((), "lower model.generative.max_pairs=16, or set model.generative.gradient_checkpointing=true, or train "
             r"adapters alone \(model.update.lora_rank=8\), or make another GPU visible"),
        (("model.generative.max_pairs=1", "model.update.generative=false"), "make another GPU visible"),
        (("model.generative.gradient_checkpointing=true", "model.update.lora_rank=2"),
         "lower model.generative.max_pairs=16, or make another GPU visible"),
        (("tta.forward_mode=discriminative_only",), r"lower data.short_side_px\."),
    ],
)  # fmt: skip
def test_too_little_memory_names_the_image_and_what_to_lower(settings_of, tmp_path, monkeypatch, overrides, cures):
    def step(*_, **__):
        raise torch.OutOfMemoryError(SAID)

    for method in (Combined, Source):
        monkeypatch.setattr(method, "step", step)
    at_work = r"of gaussian_noise/5 \(\d+ x \d+ px on cpu[^)]*\)"
    said = at_work + r": CUDA out of memory\. Tried .* GPU 1 .* is free\. To need less: "
    with pytest.raises(UserError, match=rf"^\w+ {said}{cures}"):
        adapt.run(settings_of(tmp_path, *overrides))


def test_the_wandb_copy_is_kept_offline_under_the_names_of_the_tasks(settings_of, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    logged: list[str] = []
    from segadapt import wandb_mirror

    log = wandb_mirror.Wandb.log

    def noted(self, values, step):
        logged.extend(values)
        log(self, values, step)

    monkeypatch.setattr(wandb_mirror.Wandb, "log", noted)
    results = adapt.run(settings_of(tmp_path, "logging.wandb.mode=offline", "data.limit=1"))
    assert {"00_gaussian_noise-5/running_miou", "00_gaussian_noise-5/loss", "01_contrast-5/loss"} <= set(logged)
    assert list(Path(results["folder"], "wandb").glob("offline-run-*"))
