"""`segadapt check`: counts against an oracle, all problems at once, and the models as adapt would load them."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from segadapt import check, check_images, check_models, check_samples, config_verbs, stream
from segadapt.checkpoint import Checkpoints
from segadapt.datasets import Task
from segadapt.datasets.build import build_dataset
from segadapt.errors import UserError

CLASSES = ("sky", "road", "car")


def draw(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three images of two sizes; class 2 is never seen, one label is ignored throughout."""
    rng = np.random.default_rng(0)
    for key, (height, width) in {"a": (32, 64), "b": (64, 32), "c": (32, 64)}.items():
        draw(tmp_path / "images" / f"{key}.png", rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        label_HW = np.zeros((height, width), np.uint8)
        label_HW[: height // 4] = 1
        draw(tmp_path / "labels" / f"{key}.png", np.full_like(label_HW, 255) if key == "c" else label_HW)
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    return tmp_path


@pytest.fixture
def settings_of(compose_settings, folder):
    def build(
        *overrides: str,
        images: int | None = None,
        samples: int = 0,
        load_models: bool = False,
        splits: tuple[str, ...] = (),
    ) -> config_verbs.CheckConfig:
        adapt = compose_settings(
            "data=folder", f"data.data_root={folder}", f"data.classes={folder / 'names.txt'}", "data.workers=0",
            "data.label_path='{data_root}/labels/{key}.png'", f"logging.root={folder / 'out'}", *overrides,
        )  # fmt: skip
        return config_verbs.CheckConfig(
            **vars(adapt), check=config_verbs.CheckSettings([*splits], images, samples, "inverse_sqrt", load_models)
        )

    return build


@pytest.fixture
def facts_of():
    """facts_of(settings): of the images in sorted order."""

    def read(settings) -> list[check_images.ImageFacts]:
        dataset = build_dataset(settings.data)
        entries = stream.order(dataset, Task(0), seed=0, shuffle=False, limit=None)
        found = check_images.scan(dataset, entries, short_side_px=settings.data.short_side_px, workers=0)
        return [item for item in found if isinstance(item, check_images.ImageFacts)]

    return read


@pytest.fixture
def written(folder):
    """written(): what the last check left in its JSON file."""
    return lambda: json.loads((folder / "out" / "adapt" / "check" / "check.json").read_text())


def test_sizes_name_each_models_own_and_windows_are_the_teachers(settings_of, facts_of):
    own = ("data.short_side_px=64", "model.discriminative.short_side_px=48", "model.generative.short_side_px=32")
    settings = settings_of(*own)
    facts = facts_of(settings)
    sizes = check_images.sizes(facts, settings)
    assert [
        (row["size_px"], row["segmenter_px"], row["teacher_px"], row["windows"], row["images"]) for row in sizes
    ] == [
        ((32, 64), (48, 96), (32, 64), 3, 2),
        ((64, 32), (96, 48), (64, 32), 3, 1),
    ]
    table = check.sizes_table({"sizes": sizes, "portrait": 1, "read": 3})
    assert list(table.columns[1].cells) == [
        "64 x 128, segmenter 48 x 96, teacher 32 x 64",
        "128 x 64, segmenter 96 x 48, teacher 64 x 32",
    ]
    settings.model.generative.windows = "entropy"
    assert [row["windows"] for row in check_images.sizes(facts, settings)] == ["2-8 or 3"] * 2
    settings.tta.method = "tent"
    assert [row["windows"] for row in check_images.sizes(facts, settings)] == [0, 0]


def test_facts_are_those_of_the_files(settings_of, facts_of):
    settings = settings_of()
    settings.data.short_side_px = 16
    facts = facts_of(settings)
    assert [item.entry.key for item in facts] == ["a", "b", "c"]
    assert [item.size_px for item in facts] == [(32, 64), (64, 32), (32, 64)]
    assert [item.resized_px for item in facts] == [(16, 32), (32, 16), (16, 32)]
    assert [item.pixels_C.tolist() for item in facts if item.pixels_C is not None] == [
        [24 * 64, 8 * 64, 0], [48 * 32, 16 * 32, 0], [0, 0, 0]
    ]  # fmt: skip
    assert len({item.digest for item in facts}) == 3


def test_the_number_of_workers_changes_nothing(settings_of):
    dataset = build_dataset(settings_of().data)
    entries = stream.order(dataset, Task(0), seed=0, shuffle=False, limit=None)
    alone, together = (list(check_images.scan(dataset, entries, short_side_px=16, workers=n)) for n in (0, 2))
    for one, other in zip(alone, together, strict=True):
        assert not isinstance(one, str)
        assert not isinstance(other, str)
        assert (one.entry, one.digest) == (other.entry, other.digest)
        assert np.array_equal(one.pixels_C, other.pixels_C)  # pyright: ignore[reportArgumentType]


def test_a_sound_folder_is_described(settings_of, capsys):
    check.run(settings_of())
    out = capsys.readouterr().out
    assert "clean: 3 of 3 images read, as they are on disk" in out
    assert "1 portrait, 2 landscape or square" in out
    assert "1 labels are ignored throughout (first: c)" in out
    assert "33.3 % of the label pixels are ignored" in out
    assert "1 of 3 classes are in no label: car; they have no score" in out
    assert "no problem found" in out
    rows = {row.split("\u2502")[1].strip(): row.split("\u2502")[2:4] for row in out.splitlines() if "\u2502" in row}
    assert [[cell.strip() for cell in rows[name]] for name in CLASSES] == [
        ["75.00", "2"],
        ["25.00", "2"],
        ["0.00", "0"],
    ]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.corruptions=[fog]"], "corrupted on the fly"),
        (["data.corruptions=[fog]", "data.image_path='{data_root}/{corruption}/{key}.png'"], "as they are on disk"),
        (["data=toytown_c", "data.classes=toytown", "data.corruptions=[fog]"], "drawn on the fly"),
    ],
)
def test_it_is_said_where_the_pixels_come_from(settings_of, overrides, said):
    assert check_images.origin(settings_of(*overrides), Task(0, "fog", 5)) == said


def test_windows_are_counted_for_each_size(settings_of, capsys):
    check.run(settings_of("model.generative.stride_px=16"))
    rows = [[cell.strip() for cell in line.split("\u2502")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert ["32 x 64", "32 x 64", "3", "2"] in rows
    assert ["64 x 32", "64 x 32", "3", "1"] in rows


def test_all_problems_are_listed_before_the_one_error(settings_of, folder, capsys):
    (folder / "images" / "a.png").write_bytes(b"no image")
    draw(folder / "labels" / "b.png", np.full((64, 32), 7, np.uint8))
    draw(folder / "labels" / "c.png", np.zeros((8, 8), np.uint8))
    with pytest.raises(
        UserError, match=r"^problems found: 3, shown: 3; expected none\. Correct them and check again\.$"
    ):
        check.run(settings_of("data.shuffle=false"))
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem: clean: ")]
    assert len(problems) == 3
    for line, part in zip(problems, ("images/a.png", "label id 7", "8 x 8 px"), strict=True):
        assert part in line


def test_twenty_problems_are_shown_and_all_are_counted(settings_of, folder, capsys):
    for index in range(25):
        draw(folder / "labels" / f"{index}.png", np.zeros((32, 32), np.uint8))
        (folder / "images" / f"{index}.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^problems found: 25, shown: 20"):
        check.run(settings_of())
    assert capsys.readouterr().out.count("problem: ") == 20


def test_images_without_labels_are_a_problem_and_labels_without_images_a_note(settings_of, folder, capsys):
    (folder / "images" / "a.png").unlink()
    check.run(settings_of())
    assert "1 labels have no image (first: a)" in capsys.readouterr().out
    (folder / "labels" / "b.png").unlink()
    with pytest.raises(UserError, match=r"^problems found: 1"):
        check.run(settings_of())
    assert "no label for 1 of 2 images (b)" in capsys.readouterr().out


def test_images_with_equal_pixels_are_named(settings_of, folder, capsys):
    (folder / "images" / "c.png").write_bytes((folder / "images" / "a.png").read_bytes())
    check.run(settings_of("data.shuffle=false"))
    assert "1 images repeat the pixels of another: c = a" in capsys.readouterr().out


def test_a_corruption_that_changes_nothing_is_named(settings_of, folder, capsys):
    for key in "abc":
        for name in ("fog", "snow"):
            path = folder / name / f"{key}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes((folder / "images" / f"{key}.png").read_bytes())
    of_disk = "data.image_path='{data_root}/{corruption}/{key}.png'"
    check.run(settings_of("data.shuffle=false", "data.corruptions=[fog,snow]", of_disk))
    out = capsys.readouterr().out
    assert "3 images repeat the pixels of another: a of snow = a of fog, b of snow = b of fog" in out
    assert out.count("classes: as of fog") == out.count("sizes: as of fog") == 1  # said once


@pytest.mark.parametrize("turn", range(2, 9))
def test_images_that_their_exif_turns_are_named(settings_of, folder, written, capsys, turn):
    exif = Image.Exif()
    exif[0x0112] = turn  # orientation; from 5 on, height and width are swapped
    size = (64, 32) if turn < 5 else (32, 64)
    Image.new("RGB", size).save(folder / "images" / "a.png", exif=exif)
    check.run(settings_of("data.shuffle=false"))
    assert "1 images are turned as their EXIF says (first: a)" in capsys.readouterr().out
    assert written()["tasks"][0]["turned"] == ["a"]


def test_the_file_says_what_the_terminal_says(settings_of, written, capsys):
    check.run(settings_of("data.corruptions=[fog,snow]", "data.shuffle=false"))
    found, out = written(), capsys.readouterr().out
    assert [(task["task"], task["images"], task["read"], task["portrait"]) for task in found["tasks"]] == [
        ("fog/5", 3, 3, 1),
        ("snow/5", 3, 3, 1),
    ]
    assert found["tasks"][0]["classes"] == [
        {"class": "sky", "pixels": 3072, "images": 2},
        {"class": "road", "pixels": 1024, "images": 2},
        {"class": "car", "pixels": 0, "images": 0},
    ]
    assert found["tasks"][0]["ignored_pixels"] == 2048
    assert found["class_weights"]["inverse_sqrt"] == pytest.approx([2 / (1 + 3**0.5), 2 / (1 + 3**-0.5), None])
    assert "hardly needed, the commonest class has 3 times the pixels of the rarest" in out
    assert "inverse_sqrt (1 / sqrt(f_c), mean 1): [0.7321, 1.268, -]" in out
    assert found["stream_images"] == 6
    assert "step" not in found  # no model was loaded


def test_problems_are_in_the_file_too(settings_of, folder, written):
    (folder / "images" / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="problems found: 1"):
        check.run(settings_of())
    assert "images/a.png" in written()["problems"][0]
    assert written()["tasks"][0]["read"] == 2


def test_a_condition_that_comes_again_is_read_once(settings_of, written):
    settings = settings_of("data.corruptions=[fog]", "data.rounds=5", "tta.continual=true")
    check.run(settings)
    assert [task["task"] for task in written()["tasks"]] == ["fog/5"]
    assert written()["stream_images"] == 15


def test_only_as_many_images_as_asked_for_are_read(settings_of, capsys):
    check.run(settings_of("data.corruptions=[fog,snow]", images=2))
    out = capsys.readouterr().out
    assert "fog/5: 2 of 2 images read" in out
    assert "snow/5: 2 of 2 images read" in out


def test_models_are_loaded_described_and_take_one_step(settings_of, saved_models, tmp_path, capsys):
    before = set(tmp_path.rglob("*"))
    check.run(settings_of(*saved_models(CLASSES), load_models=True))
    out = capsys.readouterr().out
    assert "embeddings: learned, sequence (3, 7, 32), pooled (3, 24)" in out
    assert "latents: shift 0.0609, scale 1.5305" in out
    assert "placement: cpu: blocks 0-1" in out
    assert "host memory of the source state: 0.00 GiB" in out
    assert "one step on clean" in out
    assert "gradient norm" in out
    found = json.loads((tmp_path / "out" / "adapt" / "check" / "check.json").read_text())
    step = found["step"]
    assert step["key"] in "ac"  # of the commonest size
    assert found["estimated_s"] == step["first_step_s"] + 2 * max(step["step_s"], found["read_s"])
    assert 0 < step["step_s"] < 60
    assert 0.05 < step["host_gib"] < 64
    assert "the whole run: about 0:00:0" in out
    assert "no problem found" in out
    assert [path.name for path in set(tmp_path.rglob("*")) - before if path.is_file()] == ["check.json"]


def test_too_little_disk_for_checkpoints_is_a_problem(settings_of, saved_models, tmp_path, monkeypatch, capsys):
    free = [3 * 2**30]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free[0]))
    assert check_models.check_disk(str(tmp_path / "new/folder"), 2**30) == (
        "checkpoints: 2 are kept while one is written, 3.00 GiB; free: 3.00 GiB", []
    )  # fmt: skip
    free[0] -= 1
    assert len(check_models.check_disk(str(tmp_path), 2**30)[1]) == 1
    free[0] = 0
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^problems found: 1"):
        check.run(settings_of(*saved_models(CLASSES), f"logging.root={tmp_path / 'runs'}", load_models=True))
    assert f"problem: logging.root={tmp_path / 'runs'}: checkpoints: 2 are kept" in capsys.readouterr().out


def test_disk_that_is_told_is_what_a_checkpoint_takes(settings_of, saved_models, tmp_path, monkeypatch):
    """Both models and their two moments, and some KB for the rest."""
    told, real = [], check_models.check_disk
    monkeypatch.setattr(check_models, "check_disk", lambda root, size: (told.append(size), real(root, size))[1])
    settings = settings_of(*saved_models(CLASSES), load_models=True)
    check.run(settings)
    method = check_models.build_models(settings, CLASSES).method
    method.step(torch.rand(3, 32, 64), task="t", key="k")
    Checkpoints(tmp_path / "run", seconds=None, images=None).write(1, method.state_dict())
    taken = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file())
    parameters = sum(parameter.numel() for parameter in method.parameters().values())
    assert 12 * parameters <= told[0] <= taken <= told[0] + 2**18


def test_a_model_that_cannot_be_loaded_is_a_problem(settings_of, capsys):
    with pytest.raises(UserError, match=r"^problems found: 1"):
        check.run(settings_of("model.discriminative.checkpoint=/no/such/folder", load_models=True))
    assert "problem: model.discriminative.checkpoint=/no/such/folder" in capsys.readouterr().out


def test_all_steps_start_from_the_source_and_nothing_of_them_stays(settings_of, saved_models, monkeypatch):
    """The third step, which is timed, would else be another method's: of moved weights."""
    settings = settings_of(*saved_models(CLASSES), "tta.optimizer.lr=1e-2", load_models=True)
    losses, real = [], check_models._timed_step
    monkeypatch.setattr(check_models, "_timed_step", lambda *a: (losses.append((out := real(*a))[0].loss), out)[1])
    dataset = build_dataset(settings.data)
    check_models.check_models(settings, dataset, stream.Entry(Task(0), "a"))
    assert len(losses) == check_models.STEPS
    assert len(set(losses)) == 1


def test_the_estimate_counts_the_slower_of_step_and_reading():
    found = {"first_step_s": 60.0, "step_s": 0.5}
    assert check_models.estimated_s(found, images=101, read_s=0.1) == 110
    assert check_models.estimated_s(found, images=101, read_s=1.0) == 160
    assert check_models.estimated_s(found, images=1, read_s=1.0) == 60


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_samples_show_image_label_and_windows(settings_of, folder, written):
    check.run(settings_of("data.shuffle=false", "model.generative.stride_px=32", samples=2))
    pictures = sorted((folder / "out" / "adapt" / "check" / "samples").rglob("*.png"))
    assert [path.relative_to(folder / "out").as_posix() for path in pictures] == [
        "adapt/check/samples/00_clean/a.png",
        "adapt/check/samples/00_clean/b.png",
    ]
    assert sorted(written()["samples"]) == [str(path) for path in pictures]
    shown_HW3, image_HW3 = pixels_of(pictures[0]), pixels_of(folder / "images" / "a.png")
    for top, left in ((0, 0), (0, 32)):  # two windows of 32 px side by side, in both panels
        for panel in (0, 64):
            rows, columns = slice(top + 8, top + 24), slice(panel + left + 8, panel + left + 24)
            inside_HW3 = shown_HW3[rows, columns]
            original_HW3 = image_HW3[rows, left + 8 : left + 24]
            if not panel:
                assert np.array_equal(inside_HW3, original_HW3)
            else:
                colour = build_dataset(settings_of().data).palette_C3[0]  # row 8 and on is sky
                assert np.abs(inside_HW3 - (original_HW3 * 0.5 + colour * 0.5)).max() <= 0.5
    assert tuple(shown_HW3[16, 0]) == check_samples.OUTLINES[0]
    assert tuple(shown_HW3[16, 35]) == check_samples.OUTLINES[1]
    assert shown_HW3.shape[0] > 32  # the legend


def test_a_method_without_teacher_has_no_windows_and_ignored_pixels_are_plain(settings_of, folder):
    check.run(settings_of("data.shuffle=false", "tta.method=tent", samples=3))
    shown_HW3 = pixels_of(folder / "out" / "adapt" / "check" / "samples" / "00_clean" / "c.png")
    image_HW3 = pixels_of(folder / "images" / "c.png")
    assert np.array_equal(shown_HW3, np.concatenate([image_HW3, image_HW3], axis=1))


# Training


@pytest.fixture
def two_splits(folder) -> tuple[str, ...]:
    """The layout of the notes, train/{image,label} and val/{image,label}: the car in train alone, the road in val."""
    for split, shown in (("train", (0, 2)), ("val", (0, 1))):
        for number in range(4):
            label_HW = np.full((32, 32), shown[0], np.uint8)
            label_HW[:8] = shown[1]
            brightness = 40 * number + (split == "val")
            draw(folder / f"set/{split}/image/{number}.png", np.full((32, 32, 3), brightness, np.uint8))
            draw(folder / f"set/{split}/label/{number}.png", label_HW)
    labels = "data.label_path='{data_root}/{split}/label/{key}.png'"  # of data=own_folder; the fixture has another
    return "data=own_folder", f"data.data_root={folder / 'set'}", labels, "data.split=train", "data.shuffle=false"


def test_classes_of_one_split_alone_are_named(settings_of, two_splits, written, capsys):
    check.run(settings_of(*two_splits, splits=("val",)))
    out, found = capsys.readouterr().out, written()
    assert "1 classes are in labels of train, but in none of val: car; they have no score there" in out
    assert "1 classes are in labels of val, but in none of train: road; nothing can learn them" in out
    assert len(found["split_notes"]) == 2
    assert [(row["task"], row["split"], row["read"]) for row in found["tasks"]] == [
        ("train",) * 2 + (4,),
        ("val",) * 2 + (4,),
    ]
    assert [line["pixels"] for line in found["tasks"][0]["classes"]] == [4 * 32 * 24, 0, 4 * 32 * 8]
    assert found["class_weights"]["max_over_count"] == [1.0, None, 3.0]  # of train alone
    assert found["stream_images"] == 4


def test_an_image_of_both_splits_is_named(settings_of, two_splits, folder, capsys):
    (folder / "set/val/image/3.png").write_bytes((folder / "set/train/image/0.png").read_bytes())
    check.run(settings_of(*two_splits, splits=("val",)))
    assert "1 images repeat the pixels of another: 3 of val = 0 of train" in capsys.readouterr().out


def test_class_weights_are_never_those_of_another_split(settings_of, two_splits, folder, written, capsys):
    """Of the validation split they were once printed where the training split could not be read."""
    for path in (folder / "set/train/image").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^problems found: 4"):
        check.run(settings_of(*two_splits, splits=("val",)))
    assert "class weights: none, as no labelled image of train could be read\n" in capsys.readouterr().out
    assert written()["class_weights"] == {}


def test_a_subset_thins_the_split_to_train_on_alone(settings_of, two_splits, written):
    check.run(settings_of(*two_splits, "data.subset=2", splits=("val",)))
    assert [row["read"] for row in written()["tasks"]] == [2, 4]


def test_the_same_split_twice_is_refused(settings_of, two_splits):
    with pytest.raises(UserError, match=r"check\.splits=\['train'\] beside data\.split=train: expected other splits"):
        check.run(settings_of(*two_splits, splits=("train",)))


def relabel(shape: tuple[int, ...], value: int = 0):
    return lambda val: draw(val / "label/2.png", np.full(shape, value, np.uint8))


FAULTS = {
    "missing label": (lambda val: (val / "label/2.png").unlink(), "no label for 1 of 4 images (2)"),
    "size mismatch": (relabel((32, 31)), "label of 31 x 32 px, but its image"),
    "stray id": (relabel((32, 32), 74), "label id 74 at row 0, column 0"),
    "images for image": (lambda val: (val / "image").rename(val / "images"), "val holds images, label."),
    "photos for labels": (relabel((32, 32, 3)), "correct data.label_path if it leads to images"),
    "swapped folders": (
        lambda val: swap(val / "image", val / "label"),
        "correct data.label_path if it leads to images",
    ),
}


def swap(one: Path, other: Path) -> None:
    spare = one.rename(one.with_name("spare"))
    other.rename(one)
    spare.rename(other)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_other_split_are_problems(settings_of, two_splits, folder, capsys, fault):
    harm, said = FAULTS[fault]
    harm(folder / "set/val")
    with pytest.raises(UserError, match=r"^problems found: "):
        check.run(settings_of(*two_splits, splits=("val",)))
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem: ")]
    assert len(problems) == (4 if fault == "swapped folders" else 1)
    assert all(line.startswith("problem: val: ") and said in line for line in problems)
