"""Files that are whole or absent, run folders, and the W&B copy that may fail."""

import json
import logging
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from segadapt.datasets.labels import palette
from segadapt.errors import UserError
from segadapt.record import JsonLines, RunFolder, settings_id, write_bytes, write_json, write_png_palette
from segadapt.wandb_mirror import NoWandb, Wandb, open_mirror

SETTINGS = {"tta": {"method": "tent", "optimizer": {"lr": 1e-05}}, "seeds": [0, 1]}


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# Files


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_come_back_exactly(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "float.json"
    write_json(path, {"value": value, "numpy": np.float64(value)})
    assert json.loads(path.read_text()) == {"value": value, "numpy": value}


def test_json_keeps_the_order_of_keys_and_writes_absent_scores_as_null(tmp_path):
    path = tmp_path / "new/folder/results.json"
    write_json(path, {"z": math.nan, "a": np.array([0.5, np.nan]), "m": (np.int64(3), math.inf), "p": Path("x")})
    text = path.read_text()
    assert json.loads(text) == {"z": None, "a": [0.5, None], "m": [3, None], "p": "x"}
    assert list(json.loads(text)) == ["z", "a", "m", "p"]
    assert text.endswith("}\n")


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert files_in(tmp_path) == ["a.bin"]


def test_value_that_json_cannot_hold_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == "1\n"


@given(st.integers(1, 254), st.integers(0, 2**32))
def test_label_png_keeps_every_id_under_any_palette(tmp_path_factory, num_classes, seed):
    path = tmp_path_factory.getbasetemp() / "ids.png"
    ids_HW = np.random.default_rng(seed).integers(0, 256, (5, 7), np.uint8)
    write_png_palette(path, ids_HW, palette(num_classes))
    with Image.open(path) as image:
        assert image.mode == "P"
        assert np.array_equal(np.array(image), ids_HW)
        colours = np.vstack([palette(num_classes), np.zeros((256 - num_classes, 3), np.uint8)])
        assert np.array_equal(np.array(image.convert("RGB")), colours[ids_HW])


def test_lines_can_be_read_before_the_file_is_closed_and_a_new_start_forgets_them(tmp_path):
    path = tmp_path / "records.jsonl"
    with JsonLines(path) as lines:
        lines.append({"loss": math.nan, "key": "a"})
        lines.append([1])
        assert [json.loads(line) for line in path.read_text().splitlines()] == [{"loss": None, "key": "a"}, [1]]
    lines.close()
    JsonLines(path).close()
    assert path.read_text() == ""


def test_lines_of_an_earlier_start_are_kept_first_and_to_the_bit(tmp_path):
    path = tmp_path / "records.jsonl"
    with JsonLines(path) as lines:
        for value in ({"loss": 0.1 + 0.2, "k": "é"}, {"loss": math.nan}, {"loss": 1e-17}):
            lines.append(value)
    before = path.read_bytes()
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    with JsonLines(path, keep=kept[:2]) as lines:
        assert path.read_bytes() == b"".join(before.splitlines(keepends=True)[:2])
        lines.append(kept[2])
    assert path.read_bytes() == before


# Run folders


def test_id_follows_from_the_settings_and_not_from_their_order(tmp_path):
    run = RunFolder.open(tmp_path, "noise5", run_id=None, settings=SETTINGS)
    assert run.path == tmp_path / "noise5" / run.id
    assert len(run.id) == 10
    assert settings_id(dict(reversed(SETTINGS.items()))) == run.id
    assert settings_id({**SETTINGS, "seeds": [1, 0]}) != run.id
    assert json.loads((run.path / "settings.json").read_text()) == SETTINGS
    assert settings_id({"a": 1}) == "015abd7f5c"  # sha256 of '{"a":1}', as any tool gives it


def test_other_settings_are_refused_with_name_both_values_and_cure(tmp_path):
    RunFolder.open(tmp_path, "noise5", run_id="a3f9", settings=SETTINGS)
    other = {"tta": {"method": "tent", "optimizer": {"lr": 2e-05}}, "seeds": [5]}
    with pytest.raises(
        UserError,
        match=r"^Run folder .*noise5/a3f9 was started with tta\.optimizer\.lr=1e-05; now 2e-05\. .*experiment\.id, or",
    ):
        RunFolder.open(tmp_path, "noise5", run_id="a3f9", settings=other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [0, 2]}, r"seeds=\[0, 1\]; now \[0, 2\]"),
        ({"new": {"x": True}}, "no new.x; now true"),
        ({"tta": {}}, r"no tta; now \{\}"),
    ],
)
def test_added_emptied_and_listed_settings_differ_too(tmp_path, change, message):
    RunFolder.open(tmp_path, "n", run_id="i", settings=SETTINGS)
    with pytest.raises(UserError, match=message):
        RunFolder.open(tmp_path, "n", run_id="i", settings={**SETTINGS, **change})


def test_removed_setting_differs_too(tmp_path):
    RunFolder.open(tmp_path, "n", run_id="i", settings=SETTINGS)
    with pytest.raises(UserError, match=r"seeds=\[0, 1\]; now absent"):
        RunFolder.open(tmp_path, "n", run_id="i", settings={"tta": SETTINGS["tta"]})


def test_same_settings_start_over_without_the_earlier_results(tmp_path):
    run = RunFolder.open(tmp_path, "n", run_id=None, settings=SETTINGS)
    for name in ("results.json", "tasks/0.json", "predictions/0.png", "records.jsonl", "notes.txt"):
        write_bytes(run.path / name, b"{}")
    again = RunFolder.open(tmp_path, "n", run_id=None, settings=SETTINGS)
    assert again == run
    assert "results.json" in files_in(run.path)
    again.start_over({"seed": 0})
    assert files_in(run.path) == ["config.yaml", "notes.txt", "settings.json"]


def test_a_start_that_goes_on_removes_nothing_and_another_one_the_model_and_the_checkpoints_too(tmp_path):
    run = RunFolder.open(tmp_path, "n", run_id=None, settings=SETTINGS)
    left = ["checkpoint.safetensors", "checkpoints/00000001/state.json", "model/vae/config.json", "records.jsonl"]
    for name in left:
        write_bytes(run.path / name, b"{}")
    run.start_over({"seed": 0}, keep=True)
    assert files_in(run.path) == sorted(["config.yaml", "settings.json", *left])
    run.start_over({"seed": 0})
    assert files_in(run.path) == ["config.yaml", "settings.json"]


@pytest.mark.parametrize("bad", ["../x", "a/b", "", ".hidden", "..", "a b", "a\n", "na\u00efve", "/abs"])
def test_names_and_ids_that_are_no_plain_folder_name_are_refused(tmp_path, bad):
    with pytest.raises(UserError, match=r"^experiment\.name="):
        RunFolder.open(tmp_path, bad, run_id=None, settings={})
    with pytest.raises(UserError, match=r"^experiment\.id="):
        RunFolder.open(tmp_path, "n", run_id=bad, settings={})
    assert list(tmp_path.iterdir()) == []


def test_foreign_or_damaged_folder_is_not_touched(tmp_path):
    write_bytes(tmp_path / "n/i/results.json", b"precious")
    with pytest.raises(UserError, match="holds files but no settings"):
        RunFolder.open(tmp_path, "n", run_id="i", settings={})
    write_bytes(tmp_path / "n/i/settings.json", b"{")
    with pytest.raises(UserError, match="not JSON"):
        RunFolder.open(tmp_path, "n", run_id="i", settings={})
    write_bytes(tmp_path / "n/file", b"")
    with pytest.raises(UserError, match="is a file"):
        RunFolder.open(tmp_path, "n", run_id="file", settings={})
    assert (tmp_path / "n/i/results.json").read_bytes() == b"precious"


# The W&B copy


class FakeRun:
    """Stands for what wandb.init returns; fails from its n-th call on."""

    def __init__(self, *, fails_at: int | None = None):
        self.calls: list[tuple] = []
        self.fails_at = fails_at
        self.summary = self

    def _call(self, *call) -> None:
        self.calls.append(call)
        if self.fails_at is not None and len(self.calls) >= self.fails_at:
            raise ConnectionError("down:\nhttps://user:hunter2@host/x and SECRET-KEY")

    def define_metric(self, name: str, *, step_metric: str) -> None:
        self._call("define", name, step_metric)

    def log(self, values: dict) -> None:
        self._call("log", values)

    def update(self, values: dict) -> None:
        self._call("summary", values)

    def finish(self) -> None:
        self._call("finish")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What a person would see: our lines and wandb's own, from warnings up."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def opened(mode: str, folder: Path) -> Wandb | NoWandb:
    mirror = open_mirror(
        mode, entity=None, project="p", name="n", group="g", job_type="adapt", config=SETTINGS, folder=folder
    )
    assert isinstance(mirror, Wandb | NoWandb)
    return mirror


def test_every_prefix_has_its_own_step_axis_defined_once(tmp_path):
    run = FakeRun()
    mirror = Wandb(run, tmp_path / "noted.json", lambda: None)
    mirror.log({"a/fog/miou": 0.5, "loss": 1.0}, step=3)
    mirror.log({"a/fog/miou": 0.6}, step=4)
    mirror.summary({"miou": 0.6})
    mirror.finish()
    assert run.calls == [
        ("define", "a/fog/miou", "a/fog/step"),
        ("define", "loss", "step"),
        ("log", {"a/fog/miou": 0.5, "loss": 1.0, "a/fog/step": 3, "step": 3}),
        ("log", {"a/fog/miou": 0.6, "a/fog/step": 4}),
        ("summary", {"miou": 0.6}),
        ("finish",),
    ]


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4])
def test_failing_client_costs_one_warning_line_without_secrets(tmp_path, caplog, monkeypatch, fails_at):
    monkeypatch.setenv("WANDB_API_KEY", "SECRET-KEY")
    run = FakeRun(fails_at=fails_at)
    mirror = Wandb(run, tmp_path / "noted.json", lambda: None)
    mirror.log({"miou": 0.5}, step=0)
    mirror.summary({"miou": 0.5})
    mirror.log({"miou": 0.5}, step=1)
    mirror.finish()
    assert len(run.calls) == fails_at
    [line] = warnings(caplog)
    assert "ConnectionError" in line
    assert not [secret for secret in ("SECRET-KEY", "hunter2", "\n") if secret in line]


def test_disabled_mode_neither_imports_wandb_nor_writes(tmp_path):
    program = (
        "import pathlib, sys; from segadapt.wandb_mirror import open_mirror\n"
        "mirror = open_mirror('disabled', entity=None, project='p', name='n', group='g', job_type='j', config={},"
        " folder=pathlib.Path('run'))\n"
        "mirror.log({'a': 1}, step=0); mirror.summary({}); mirror.finish()\n"
        "sys.exit('wandb' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=60)
    assert files_in(tmp_path) == []


def test_unknown_mode_gets_the_nearest_name(tmp_path):
    with pytest.raises(UserError, match=r"logging\.wandb\.mode=on-line .*Did you mean online\?"):
        opened("on-line", tmp_path)


def test_missing_package_costs_one_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert isinstance(opened("offline", tmp_path), NoWandb)
    assert len(warnings(caplog)) == 1


@pytest.fixture
def _no_login(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.mark.usefixtures("_no_login")
@pytest.mark.parametrize(("mode", "num_warnings"), [("offline", 0), ("online", 1)])
def test_run_is_written_to_disk_where_there_is_no_login(tmp_path, caplog, mode, num_warnings):
    pytest.importorskip("wandb")
    mirror = opened(mode, tmp_path / "run")
    assert isinstance(mirror, Wandb)
    for step in range(3):
        mirror.log({"fog/miou": step / 10, "loss": math.nan}, step=step)
    mirror.summary({"miou": 0.2})
    mirror.finish()
    [written] = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    deadline_s = time.monotonic() + 20  # wandb writes the file from another process, at times after finish() returns
    while b"fog/miou" not in (content := written.read_bytes()) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert b"fog/miou" in content
    assert len(warnings(caplog)) == num_warnings
    assert not list((tmp_path / "run").rglob("*.py"))


@pytest.mark.usefixtures("_no_login")
@pytest.mark.parametrize(("host", "is_known"), [("api.wandb.ai", True), ("example.org", False)])
def test_login_is_found_in_netrc_for_the_right_host_only(tmp_path, monkeypatch, caplog, host, is_known):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/.netrc").write_text(f"machine {host}\n  login user\n  password {'0' * 40}\n")
    (tmp_path / "home/.netrc").chmod(0o600)
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert isinstance(opened("online", tmp_path / "run"), NoWandb)
    assert any("no login found" in line for line in warnings(caplog)) is not is_known


@pytest.mark.slow
def test_server_that_cannot_be_reached_costs_one_warning_and_a_bounded_wait(tmp_path):
    pytest.importorskip("wandb")
    program = (
        "import pathlib; from segadapt.wandb_mirror import NoWandb, open_mirror\n"
        "mirror = open_mirror('online', entity=None, project='p', name='n', group='g', job_type='j', config={},"
        " folder=pathlib.Path('run'))\n"
        "mirror.log({'a': 1}, step=0); mirror.finish(); assert isinstance(mirror, NoWandb)"
    )
    key = "0123456789" * 4
    environment = {**os.environ, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": key}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        check=True,
        timeout=90,
        capture_output=True,
        text=True,
    )
    assert len((done.stdout + done.stderr).splitlines()) == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]
    assert key not in done.stderr
