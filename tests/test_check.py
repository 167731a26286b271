"""`segadapt check`: counts against an oracle, all problems at once, and the models as adapt would load them."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from segadapt import check, config, stream
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
    def build(*overrides: str, images: int | None = None, load_models: bool = False) -> config.CheckConfig:
        adapt = compose_settings(
            "data=folder", f"data.data_root={folder}", f"data.classes={folder / 'names.txt'}", "data.workers=0",
            "data.label_path='{data_root}/labels/{key}.png'", *overrides,
        )  # fmt: skip
        return config.CheckConfig(**vars(adapt), check=config.CheckSettings(images, load_models))

    return build


def test_sizes_name_each_models_own_and_windows_are_the_teachers(settings_of):
    own = ("data.short_side_px=64", "model.discriminative.short_side_px=48", "model.generative.short_side_px=32")
    settings = settings_of(*own)
    dataset = build_dataset(settings.data)
    entries = stream.order(dataset, Task(0), seed=0, shuffle=False, limit=None)
    facts = [item for item in check.scan(dataset, entries, short_side_px=64, workers=0) if not isinstance(item, str)]
    table = check.sizes_table(facts, settings)
    columns = [list(column.cells) for column in table.columns]
    assert columns[1] == [
        "64 x 128, segmenter 48 x 96, teacher 32 x 64",
        "128 x 64, segmenter 96 x 48, teacher 64 x 32",
    ]
    assert columns[2] == ["3", "3"]
    settings.model.generative.windows = "entropy"
    assert list(check.sizes_table(facts, settings).columns[2].cells) == ["2-8 or 3"] * 2


def test_facts_are_those_of_the_files(settings_of, folder):
    settings = settings_of()
    dataset = build_dataset(settings.data)
    entries = stream.order(dataset, Task(0), seed=0, shuffle=False, limit=None)
    facts = [item for item in check.scan(dataset, entries, short_side_px=16, workers=0) if not isinstance(item, str)]
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
    alone, together = (list(check.scan(dataset, entries, short_side_px=16, workers=n)) for n in (0, 2))
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
    assert check.origin(settings_of(*overrides), Task(0, "fog", 5)) == said


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


def test_only_as_many_images_as_asked_for_are_read(settings_of, capsys):
    check.run(settings_of("data.corruptions=[fog,snow]", images=2))
    out = capsys.readouterr().out
    assert "fog/5: 2 of 2 images read" in out
    assert "snow/5: 2 of 2 images read" in out


def test_models_are_loaded_described_and_take_one_step(settings_of, saved_models, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    check.run(settings_of(*saved_models(CLASSES), load_models=True))
    out = capsys.readouterr().out
    assert "embeddings: learned, sequence (3, 7, 32), pooled (3, 24)" in out
    assert "latents: shift 0.0609, scale 1.5305" in out
    assert "placement: cpu: blocks 0-1" in out
    assert "host memory of the source state: 0.00 GiB" in out
    assert "one step on clean" in out
    assert "gradient norm" in out
    assert "no problem found" in out
    assert sorted(tmp_path.rglob("*")) == before  # nothing is written


def test_too_little_disk_for_checkpoints_is_a_problem(settings_of, saved_models, tmp_path, monkeypatch, capsys):
    free = [3 * 2**30]
    monkeypatch.setattr(check.shutil, "disk_usage", lambda _: SimpleNamespace(free=free[0]))
    assert check.check_disk(str(tmp_path / "new/folder"), 2**30) == (
        "checkpoints: 2 are kept while one is written, 3.00 GiB; free: 3.00 GiB", []
    )  # fmt: skip
    free[0] -= 1
    assert len(check.check_disk(str(tmp_path), 2**30)[1]) == 1
    free[0] = 0
    with pytest.raises(UserError, match=r"^problems found: 1"):
        check.run(settings_of(*saved_models(CLASSES), "logging.root=runs", load_models=True))
    assert "problem: logging.root=runs: checkpoints: 2 are kept" in capsys.readouterr().out


def test_disk_that_is_told_is_what_a_checkpoint_takes(settings_of, saved_models, tmp_path, monkeypatch):
    """Both models and their two moments, and some KB for the rest."""
    told, real = [], check.check_disk
    monkeypatch.setattr(check, "check_disk", lambda root, size: (told.append(size), real(root, size))[1])
    settings = settings_of(*saved_models(CLASSES), load_models=True)
    check.run(settings)
    method = check.build_models(settings, CLASSES).method
    method.step(torch.rand(3, 32, 64), task="t", key="k")
    Checkpoints(tmp_path / "run", seconds=None, images=None).write(1, method.state_dict())
    taken = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file())
    parameters = sum(parameter.numel() for parameter in method.parameters().values())
    assert 12 * parameters <= told[0] <= taken <= told[0] + 2**18


def test_a_model_that_cannot_be_loaded_is_a_problem(settings_of, capsys):
    with pytest.raises(UserError, match=r"^problems found: 1"):
        check.run(settings_of("model.discriminative.checkpoint=/no/such/folder", load_models=True))
    assert "problem: model.discriminative.checkpoint=/no/such/folder" in capsys.readouterr().out
