"""A run that goes on: from which checkpoint, to the same bits, and what is refused. Kills are in test_kills.py."""

import dataclasses
import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from interrupted_runs import QUIET, assert_equal_folders, cut_after, folder_of
from PIL import Image

from segadapt import adapt, checkpoint, config, resume, wandb_mirror
from segadapt.datasets.toytown import CLASSES
from segadapt.errors import UserError
from segadapt.models.combined import Combined
from segadapt.protocol import FREE, identity
from segadapt.record import JsonLines, RunFolder
from segadapt.task_loop import MEANS

EVERY = "runtime.checkpoint_images=1"
STREAMS = {
    "reset per task": (),
    "continual": ("tta.continual=true", "data.rounds=2", "tta.method=eata", "tta.options.fisher_images=2"),
    "mixed": ("data.order=mixed", "tta.method=sar"),
    "accumulating": ("tta.optimizer.accumulate=2", "tta.continual=true"),
    "episodic": ("tta.episodic=true", "tta.method=deyo"),
    "adapters": (
        "tta.continual=true",
        "model.update.lora_rank=2",
        "model.update.prompt_offset=true",
        "tta.optimizer.warmup=4",
        "tta.optimizer.name=sgd",
        "tta.optimizer.momentum=0.9",
    ),
    "source": ("tta.method=source",),
}


@pytest.fixture(scope="module")
def settings_of(compose_settings, saved_models, tmp_path_factory):
    """settings_of(root, *overrides): two tasks of three images, all that a run can write."""
    models = saved_models(CLASSES)

    def build(root, *overrides):
        return compose_settings(
            *models, "data.corruptions=[fog,contrast]", "data.limit=3", "data.workers=0", "tta.optimizer.lr=0.01",
            "logging.predictions=all", "tta.save_adapted=true", f"logging.root={root}", "experiment.id=one",
            *overrides,
        )  # fmt: skip

    return build


@pytest.fixture(scope="module")
def whole(settings_of, tmp_path_factory):
    """whole(*overrides): the folder of a run that nothing stopped and that made no checkpoint; made once."""
    made = {}

    def run(*overrides):
        if overrides not in made:
            settings = settings_of(tmp_path_factory.mktemp("whole"), *overrides, "runtime.checkpoint_seconds=null")
            made[overrides] = Path(adapt.run(settings, console=QUIET)["folder"])
        return made[overrides]

    return run


def checkpoints_of(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("stream", "images"),
    [(stream, images) for stream in STREAMS for images in (range(6) if stream == "reset per task" else (2, 3))],
)
def test_a_run_goes_on_after_any_image_to_the_same_end(settings_of, whole, tmp_path, monkeypatch, stream, images):
    """The third image is the last of the first task: what follows it is not done when its checkpoint is made."""
    settings, expected = settings_of(tmp_path, EVERY, *STREAMS[stream]), whole(*STREAMS[stream])
    folder = cut_after(monkeypatch, settings, images)
    assert not images or checkpoints_of(folder)[-1] == f"{images:08d}"
    settings.data.workers = images % 2
    steps, real = [], type(adapt.build_models(settings, CLASSES).method).step

    def step(self, image_3HW, **names):
        steps.append(names)
        return real(self, image_3HW, **names)

    monkeypatch.setattr(sys.modules[real.__module__].__dict__[real.__qualname__.split(".")[0]], "step", step)
    adapt.run(settings, console=QUIET)
    assert_equal_folders(folder, expected)
    assert len(steps) == (12 if stream == "continual" else 6) - images


def test_draws_belong_to_the_image_wherever_a_process_begins(settings_of, whole, tmp_path, monkeypatch):
    """Learning rate 0: each image's loss depends on its pixels and draws alone."""
    still = ("tta.optimizer.lr=0",)
    folder = cut_after(monkeypatch, settings_of(tmp_path, EVERY, *still), 4)
    adapt.run(settings_of(tmp_path, "data.workers=2", *still), console=QUIET)
    assert (folder / "records.jsonl").read_bytes() == (whole(*still) / "records.jsonl").read_bytes()


# What an earlier start left


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(settings_of, whole, tmp_path, monkeypatch, caplog):
    settings = settings_of(tmp_path, EVERY)
    folder = cut_after(monkeypatch, settings, 5)
    assert checkpoints_of(folder) == ["00000004", "00000005"]
    (folder / "checkpoints/00000005/state.json").write_bytes(b"")
    adapt.run(settings, console=QUIET)
    assert [record.message.count("00000005 is damaged and passed over") for record in caplog.records] == [1]
    assert_equal_folders(folder, whole())


def test_where_none_is_whole_a_run_starts_anew_and_says_so(settings_of, whole, tmp_path, monkeypatch, caplog, capsys):
    settings = settings_of(tmp_path, EVERY)
    folder = cut_after(monkeypatch, settings, 5)
    for path in folder.glob("checkpoints/*/*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    adapt.run(settings)
    assert len(caplog.records) == 2
    assert "an earlier start left no checkpoint: from the first image" in capsys.readouterr().out
    assert_equal_folders(folder, whole())


def test_a_line_cut_at_any_byte_is_repaired(tmp_path):
    path = tmp_path / "lines.jsonl"
    with JsonLines(path) as lines:
        lines.append({"index": 0})
        kept = lines.sync()
        lines.append({"index": 1, "\u00e9": 1.5})
    data = path.read_bytes()
    for length in range(kept, len(data) + 1):
        path.write_bytes(data[:length])
        with JsonLines(path, keep_bytes=kept) as lines:
            assert lines.sync() == kept
            lines.append({"index": 1, "\u00e9": 1.5})
        assert path.read_bytes() == data


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("lost", [0, 1])
def test_records_cut_in_their_last_line_are_repaired(settings_of, whole, tmp_path, monkeypatch, caplog, lost, share):
    """lost=0: the line of an image after the last checkpoint; 1: of one before, so that an earlier one counts."""
    settings = settings_of(tmp_path, "runtime.checkpoint_images=2")
    folder = cut_after(monkeypatch, settings, 5)
    *before, last = (folder / "records.jsonl").read_bytes().splitlines(keepends=True)[: 5 - lost]
    (folder / "records.jsonl").write_bytes(b"".join(before) + last[: int(len(last) * share)])
    adapt.run(settings, console=QUIET)
    assert len(caplog.records) == (lost and share < 1)
    assert all("records.jsonl has" in record.message for record in caplog.records)
    assert_equal_folders(folder, whole())


def test_a_finished_run_is_left_as_it_is(settings_of, tmp_path, monkeypatch, capsys):
    settings = settings_of(tmp_path)
    first = adapt.run(settings, console=QUIET)
    folder = Path(first["folder"])
    (folder / "checkpoints").mkdir()  # of a process that was killed between its results and its end
    with monkeypatch.context() as patch:
        patch.setattr(Combined, "step", None)
        before = {path: path.stat() for path in folder.rglob("*") if path.name not in (".lock", "checkpoints")}
        again = adapt.run(settings)
        after = {path: path.stat() for path in folder.rglob("*") if path.name != ".lock"}
        assert {path: (s.st_mtime_ns, s.st_ino) for path, s in before.items()} == {
            path: (s.st_mtime_ns, s.st_ino) for path, s in after.items()
        }
    assert again == json.loads(json.dumps(first))
    out = capsys.readouterr().out
    assert "is finished; experiment.restart=true would start anew" in out
    assert f"{100 * first['mean']['miou']:.2f}" in out
    settings.experiment.restart = True
    anew = adapt.run(settings, console=QUIET)
    assert anew["tasks"][0]["miou"] == first["tasks"][0]["miou"]
    assert (folder / "results.json").stat().st_mtime_ns > before[folder / "results.json"].st_mtime_ns


def test_restart_starts_anew(settings_of, whole, tmp_path, monkeypatch):
    settings = settings_of(tmp_path, EVERY)
    folder = cut_after(monkeypatch, settings, 4)
    settings.experiment.restart = True
    assert cut_after(monkeypatch, settings, 1) == folder
    assert checkpoints_of(folder) == ["00000001"]
    assert len((folder / "records.jsonl").read_text().splitlines()) == 1
    settings.experiment.restart = False
    adapt.run(settings, console=QUIET)
    assert_equal_folders(folder, whole())


# What is refused


def other_weights(settings, monkeypatch):
    real = adapt.build_models

    def build(*arguments, **names):
        models = real(*arguments, **names)
        return dataclasses.replace(models, fingerprints=models.fingerprints | {"generative": "0" * 64})

    monkeypatch.setattr(adapt, "build_models", build)
    return r"weights_sha256\.generative=[0-9a-f]{64}; now 0{64}"


def other_order(settings, monkeypatch):
    monkeypatch.setattr(adapt.stream, "order_hash", lambda _: "1" * 64)
    return r"order_sha256=[0-9a-f]{64}; now 1{64}"


def other_data(settings, monkeypatch):
    monkeypatch.setattr(adapt.stream, "manifest_hash", lambda *_: "2" * 64)
    return r"manifest_sha256=[0-9a-f]{64}; now 2{64}"


def other_version(settings, monkeypatch):
    for module in (adapt, resume):
        monkeypatch.setattr(module, "__version__", "9.9.9")
    return r"segadapt=\d+\.\d+\.\d+; now 9\.9\.9.*experiment\.any_version=true"


@pytest.mark.parametrize("images", [3, 6])
@pytest.mark.parametrize("change", [other_weights, other_order, other_data, other_version])
def test_other_weights_images_or_version_are_refused(settings_of, tmp_path, monkeypatch, change, images):
    """Where a run goes on, and, but for the version, where it is finished."""
    settings = settings_of(tmp_path, EVERY)
    if images == 6:
        adapt.run(settings, console=QUIET)
    folder = folder_of(settings) if images == 6 else cut_after(monkeypatch, settings, images)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    said = change(settings, monkeypatch)
    monkeypatch.setattr(Combined, "step", None)
    if images == 6 and change is other_version:
        adapt.run(settings, console=QUIET)
        return
    with pytest.raises(UserError, match=said) as caught:
        adapt.run(settings, console=QUIET)
    assert "\n" not in str(caught.value)
    assert "experiment.restart=true" in str(caught.value)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_another_version_goes_on_where_that_is_asked(settings_of, whole, tmp_path, monkeypatch):
    settings = settings_of(tmp_path, EVERY)
    folder = cut_after(monkeypatch, settings, 4)
    other_version(settings, monkeypatch)
    settings.experiment.any_version = True
    adapt.run(settings, console=QUIET)
    assert (folder / "records.jsonl").read_bytes() == (whole() / "records.jsonl").read_bytes()
    starts = [json.loads(line) for line in (folder / "timings.jsonl").read_text().splitlines() if "started" in line]
    assert [(start["images"], start["segadapt"] == "9.9.9") for start in starts] == [(0, False), (4, True)]


def test_the_manifest_follows_keys_and_sizes_of_files(tmp_path, compose_settings):
    for key in "ab":
        for part in ("images", "labels"):
            (tmp_path / part).mkdir(exist_ok=True)
            Image.fromarray(np.zeros((32, 32, 3)[: 3 if part == "images" else 2], np.uint8)).save(
                tmp_path / part / f"{key}.png"
            )
    (tmp_path / "names.txt").write_text("sky\nroad")

    def manifest():
        data = compose_settings(
            "data=folder", f"data.data_root={tmp_path}", f"data.classes={tmp_path / 'names.txt'}",
            "data.label_path='{data_root}/labels/{key}.png'", "data.corruptions=[fog,snow]",
        ).data  # fmt: skip
        dataset, tasks = adapt.build_dataset(data), adapt.build_tasks(data)
        entries = [e for t in tasks for e in adapt.stream.order(dataset, t, seed=0, shuffle=True, limit=None)]
        return adapt.stream.manifest_hash(dataset, entries)

    seen = [manifest()]
    os.utime(tmp_path / "images/a.png", (0, 0))
    assert manifest() == seen[0]  # copied files are the same data
    for path in ("images/a.png", "labels/b.png"):
        (tmp_path / path).write_bytes((tmp_path / path).read_bytes() + b"\0")
        seen.append(manifest())
    os.rename(tmp_path / "images/b.png", tmp_path / "images/c.png")
    os.rename(tmp_path / "labels/b.png", tmp_path / "labels/c.png")
    seen.append(manifest())
    assert len(set(seen)) == 4


def leaves(settings, prefix=""):
    for item in dataclasses.fields(settings):
        value = getattr(settings, item.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", settings, item.name, value


def another(value):
    match value:
        case bool():
            return not value
        case None:
            return 7
        case int() | float():
            return value + 1
        case str():
            return f"{value}x"
        case list():
            return [*value, "x"]
    return value | {"x": 1}


NAMES = sorted(config.fields_of(config.AdaptConfig))


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_compared_or_listed_as_free(settings_of, tmp_path, name):
    """As given by its old and its new value; the free ones cannot change results."""
    settings = settings_of(tmp_path)
    RunFolder.open(tmp_path, "n", run_id="i", settings=identity(settings))
    ((section, field, value),) = [leaf[1:] for leaf in leaves(settings) if leaf[0] == name]
    if name == "tta.forward_mode":
        setattr(section, field, "discriminative_only")
    elif name == "tta.method":
        setattr(section, field, "dusa-u")
    else:
        setattr(section, field, another(value))
    is_free = any(name == free or name.startswith(f"{free}.") for free in FREE)
    if is_free:
        RunFolder.open(tmp_path, "n", run_id="i", settings=identity(settings))
        return
    told = "method" if name in ("tta.forward_mode", "tta.method") else name
    with pytest.raises(UserError, match=rf"was started with (no )?{told.replace('.', '[.]')}\b.*; now ") as caught:
        RunFolder.open(tmp_path, "n", run_id="i", settings=identity(settings))
    assert "experiment.id" in str(caught.value)


def test_settings_that_are_free_go_on_to_the_same_end(settings_of, whole, tmp_path, monkeypatch):
    settings = settings_of(tmp_path, EVERY)
    folder = cut_after(monkeypatch, settings, 3)
    settings.runtime.threads, settings.data.workers, settings.data.max_pixels = 1, 1, 10**6
    settings.runtime.checkpoint_images, settings.runtime.checkpoint_seconds = None, 0.0
    adapt.run(settings, console=QUIET)
    assert_equal_folders(folder, whole())


def test_a_folder_that_cannot_be_locked_costs_one_warning(settings_of, whole, tmp_path, monkeypatch, caplog):
    def no_locks(_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("segadapt.record._lock", no_locks)
    folder = adapt.run(settings_of(tmp_path), console=QUIET)["folder"]
    assert [r.message for r in caplog.records] == [
        f"{folder} cannot be locked (Function not implemented): start no second process on it"
    ]
    assert_equal_folders(folder, whole())


def test_two_at_once_are_refused_by_one_line_that_names_the_owner(settings_of, tmp_path):
    settings = settings_of(tmp_path)
    run = RunFolder.open(tmp_path, "adapt", run_id="one", settings=identity(settings))
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        with run.locked():
            os.write(ready[1], b"x")
            os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        with pytest.raises(UserError, match=rf"is at work: process {child} on \S+ since .*experiment\.id") as caught:
            adapt.run(settings, console=QUIET)
        assert "\n" not in str(caught.value)
    finally:
        os.write(done[1], b"x")
        os.waitpid(child, 0)
    with run.locked() as gone:
        assert gone is None


# The copy


class Wandb(types.ModuleType):
    """Stands for the package: what its runs are given, over all starts."""

    Settings = staticmethod(lambda **_: None)
    setup = staticmethod(lambda _: None)
    teardown = staticmethod(lambda: None)
    Image = staticmethod(lambda *_, caption, **__: caption)
    Table = staticmethod(lambda **given: given["data"])

    def __init__(self):
        super().__init__("wandb")
        self.starts, self.points, self.summary = [], [], {}

    def init(self, **given):
        self.starts.append((given["id"], given["resume"]))
        if given["resume"] is None:  # a run of that id is replaced
            self.points.clear()
        return self

    def define_metric(self, *_, **__):
        pass

    def log(self, values):
        self.points.append(values)

    def finish(self):
        pass


@pytest.mark.parametrize("cuts", [(4,), (3, 1), (3, 3), (1, 1, 1)], ids=str)
def test_the_copy_has_every_step_once_under_one_id(settings_of, tmp_path, monkeypatch, cuts):
    """3, 1: cut after 3 images, gone on from 2, and cut before what was copied has all been done again."""
    client = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", client)
    monkeypatch.setattr(wandb_mirror, "_has_login", lambda: True)
    settings = settings_of(tmp_path, "runtime.checkpoint_images=2", "logging.wandb.mode=online")
    for images in cuts:
        cut_after(monkeypatch, settings, images)
    results = adapt.run(settings, console=QUIET)
    for task in ("00_fog-5", "01_contrast-5"):
        for name in ("step", "loss", "running_miou"):
            steps = [point[f"{task}/step"] for point in client.points if f"{task}/{name}" in point]
            assert steps == [0, 1, 2]
        records = [json.loads(line) for line in Path(results["folder"], "records.jsonl").read_text().splitlines()]
        keys = [record["key"] for record in records if record["task"] == task[3:].replace("-", "/")]
        assert [point[f"{task}/image"] for point in client.points if f"{task}/image" in point] == keys
    assert [point["tasks"] for point in client.points if "tasks" in point] == [
        [[row[name] for name in ("task", "images", *MEANS, "seconds")] for row in results["tasks"]]
    ]
    assert client.starts[0] == ("one-adapt", None)
    assert set(client.starts[1:]) <= {("one-adapt", "allow"), ("one-adapt", None)}
    assert client.starts[-1] == ("one-adapt", "allow") or cuts == (1, 1, 1)
    assert client.summary["mean/miou"] is not None
    settings.experiment.restart = True
    adapt.run(settings, console=QUIET)
    assert client.starts[-1] == ("one-adapt", None)  # in place of the first
    assert len(client.points) == 6 + 1  # the table


def test_a_torn_note_of_what_was_copied_costs_one_warning(settings_of, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    settings = settings_of(tmp_path, "runtime.checkpoint_images=2", "logging.wandb.mode=offline")
    cut_after(monkeypatch, settings, 3)
    (note,) = tmp_path.rglob(wandb_mirror.NOTED)
    note.write_text("")
    assert adapt.run(settings, console=QUIET)["mean"]["miou"] is not None
    assert [record.message for record in caplog.records if "is torn" in record.message] == [
        f"W&B: {note} is torn, so points may be copied twice"
    ]


def test_the_time_is_all_that_checkpoints_change(settings_of, whole, tmp_path):
    settings = settings_of(tmp_path, "runtime.checkpoint_seconds=0")
    writes, real = [], checkpoint.Checkpoints.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "write", lambda self, *state: (writes.append(1), real(self, *state)))
        folder = adapt.run(settings, console=QUIET)["folder"]
    assert writes
    assert_equal_folders(folder, whole())
