"""What the machine does to a run: one line that says what to do, what was written stays, the same command goes on."""

import errno
import json
import multiprocessing
import os
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from faults.said import assert_says
from segadapt import adapt, machine, stream
from segadapt.corrupt import write_set
from segadapt.datasets import Sample, Source, Task
from segadapt.datasets.files import Files
from segadapt.errors import UserError
from segadapt.methods.tent import Tent
from segadapt.models.combined import Combined
from segadapt.record import JsonLines, write_bytes, write_json

TENT = ("tta.method=tent", "data.shuffle=false", "experiment.id=one")


@contextmanager
def disk_of(most_bytes: int):
    """No file of this process may grow beyond this: the system itself refuses, in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# -- a full disk ------------------------------------------------------------------------------------------------------


@given(data=st.binary(min_size=1, max_size=300), share=st.floats(0, 1, exclude_max=True))
def test_a_file_that_does_not_fit_leaves_the_old_one(tmp_path_factory, data, share):
    path = tmp_path_factory.mktemp("full") / "file"
    write_bytes(path, b"old")
    with disk_of(int(share * len(data))), pytest.raises(OSError, match="File too large") as caught:
        write_bytes(path, data)
    assert caught.value.filename
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


@given(room=st.integers(0, 30))
def test_a_line_that_does_not_fit_leaves_no_part_of_it(tmp_path_factory, room):
    path = tmp_path_factory.mktemp("full") / "lines.jsonl"
    with JsonLines(path) as lines:
        lines.append({"first": 1})
        whole = path.read_bytes()
        with disk_of(len(whole) + room), pytest.raises(OSError, match="File too large") as caught:
            lines.append({"second": "x" * 30})
    assert caught.value.filename == str(path)
    assert path.read_bytes() == whole


@pytest.fixture
def full_at(monkeypatch):
    """full_at(what): the disk is full as soon as a run comes to its second image's record, prediction, or results."""

    def build(what):
        with pytest.MonkeyPatch.context() as patch:
            if what == "results":
                own_json = write_json

                def full(path, value):
                    with disk_of(500):
                        own_json(path, value)

                patch.setattr(adapt, "write_json", full)
            else:
                own, kept = JsonLines.append, write_bytes

                def append(self, value):
                    size = Path(self._file.name).stat().st_size
                    with disk_of(size + 20 if what == "record" and value.get("index") == 1 else 2**40):
                        own(self, value)

                def image(path, data):
                    with disk_of(500 if path.name == "b.png" else 2**40):
                        kept(path, data)

                patch.setattr(JsonLines, "append", append)
                if what == "prediction":
                    patch.setattr("segadapt.record.write_bytes", image)
            yield

    return contextmanager(build)


@pytest.mark.parametrize(
    ("what", "name", "rows"), [("record", "records.jsonl", 1), ("prediction", "b.png", 1), ("results", "results", 3)]
)
def test_a_full_disk_is_one_line_and_the_same_command_ends_as_if_nothing_had_been(
    segadapt, root, overrides_of, full_at, what, name, rows
):
    command = ("adapt", *overrides_of(*TENT, "logging.predictions=all"))
    with full_at(what):
        status, _, stderr = segadapt(*command)
    assert status == 2
    assert_says(stderr, where=name, got="File too large", expected="expected free space", cure="Make room")
    folder = root.parent / "runs/adapt/one"
    lines = (folder / "records.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["a", "b", "c"][:rows]
    assert not (folder / "results.json").exists()
    assert not list(folder.rglob("*.tmp"))
    assert segadapt(*command)[0] == 0
    again = [json.loads(line)["loss"] for line in (folder / "records.jsonl").read_text().splitlines()]
    assert again[:rows] == [json.loads(line)["loss"] for line in lines]
    assert len(again) == 3


def test_safetensors_says_a_full_disk_in_its_own_way(tmp_path):
    with disk_of(1000), pytest.raises(Exception, match="os error 27") as caught:
        save_file({"weight": torch.zeros(1000)}, tmp_path / "weights.safetensors")
    said = machine.fault_of(caught.value)
    assert said is not None
    assert_says(said, where="a file of the run", got="File too large", expected="expected free space", cure="Make room")


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOENT, "no"), RuntimeError("shape"), PermissionError(errno.EACCES, "no"), ValueError("DataLoader")],
)
def test_other_errors_keep_their_traceback(error):
    assert machine.fault_of(error) is None


# -- processes that die -----------------------------------------------------------------------------------------------


def die_at_b(key: str) -> None:
    if key == "b" and multiprocessing.parent_process() is not None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("verb", ["adapt", "check"])
def test_a_killed_reader_is_one_line_and_no_hang(segadapt, overrides_of, monkeypatch, verb):
    own = Files.load

    def load(self, task, key):
        die_at_b(key)
        return own(self, task, key)

    monkeypatch.setattr(Files, "load", load)
    status, _, stderr = segadapt(verb, *overrides_of(*TENT, "data.workers=1"))
    assert status == 2
    assert_says(stderr, where="a process that reads images", got="DataLoader worker (pid",
                expected="expected all of data.workers to live", cure="lower data.workers")  # fmt: skip


class Dying:
    """A data set whose second image kills the process that draws it."""

    classes = ("sky", "road")
    palette_C3 = np.zeros((2, 3), np.uint8)

    def keys(self, task: Task) -> list[str]:
        return ["a", "b"]

    def load(self, task: Task, key: str) -> Sample:
        die_at_b(key)
        return Sample(key, np.zeros((40, 40, 3), np.uint8), None)

    def source(self, task: Task, key: str) -> Source:
        return Source(key, None)

    def verify(self, task: Task, key: str, *, label: bool) -> None:
        pass


@pytest.mark.slow
def test_a_killed_process_of_corrupt_is_explained_and_what_it_wrote_is_kept(tmp_path):
    with pytest.raises(RuntimeError) as caught:
        write_set(Dying(), [Task(0, "fog", 1)], tmp_path / "set", seed=0, workers=2, progress=False)
    said = machine.fault_of(caught.value)
    assert said is not None
    assert_says(said, where="a process that reads images", got="terminated abruptly", expected="to live",
                cure="lower data.workers")  # fmt: skip
    assert not list((tmp_path / "set").rglob("*.tmp"))


# -- memory -----------------------------------------------------------------------------------------------------------

CUDA = "CUDA out of memory. Tried to allocate 2 GiB. GPU 1 has a total capacity of 79 GiB of which 1 GiB is free. See"


@pytest.mark.parametrize("where", ["forward", "backward", "host"])
def test_out_of_memory_names_image_size_windows_and_cure_and_less_goes_through(
    segadapt, overrides_of, monkeypatch, where
):
    own = Combined.backward

    def backward(self, image_3HW, logits_BChw, *rest, key, **names):
        if key == "b" and self.window.max_pairs > 4:
            if where == "forward":
                raise torch.OutOfMemoryError(CUDA)
            if where == "host":
                torch.empty(10**15)

            def refuse(_):
                raise torch.OutOfMemoryError(CUDA)

            logits_BChw.register_hook(refuse)
        return own(self, image_3HW, logits_BChw, *rest, key=key, **names)

    monkeypatch.setattr(Combined, "backward", backward)
    status, _, stderr = segadapt("adapt", *overrides_of("data.shuffle=false"))
    assert status == 2
    got = "allocate memory: you tried to allocate" if where == "host" else "CUDA out of memory. Tried to allocate 2 GiB"
    assert_says(stderr, where="b of clean (32 x 38 px on cpu, 2 windows with up to 20 candidate classes each)",
                got=got, expected="To need less", cure="lower model.generative.max_pairs=16")  # fmt: skip
    assert segadapt("adapt", *overrides_of("data.shuffle=false", "model.generative.max_pairs=4"))[0] == 0


def test_other_errors_of_a_step_are_bugs(segadapt, overrides_of, monkeypatch):
    def step(*_, **__):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Tent, "step", step)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        segadapt("adapt", *overrides_of(*TENT))


# -- versions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "installed", "supported"),
    [
        ("torch", "2.5.1+cu121", "torch>=2.11"),
        ("transformers", "4.57.0", "transformers>=5.17"),
        ("omegaconf", "2.4.0", "omegaconf<2.4,>=2.3"),
        ("diffusers", None, "diffusers>=0.37"),
    ],
)
def test_a_library_out_of_its_range_is_one_line(segadapt, overrides_of, monkeypatch, name, installed, supported):
    own = machine.version

    def version(asked):
        if asked == name and installed is None:
            raise machine.PackageNotFoundError(asked)
        return installed if asked == name else own(asked)

    monkeypatch.setattr(machine, "version", version)
    status, _, stderr = segadapt("adapt", *overrides_of())
    assert status == 2
    assert_says(stderr, where=name, got=installed or "not installed", expected=supported, cure="pip install")


@pytest.mark.parametrize("python", ["3.10.14", "3.14.0", "3.15.0a1"])
def test_another_python_is_one_line(segadapt, overrides_of, monkeypatch, python):
    monkeypatch.setattr("platform.python_version", lambda: python)
    status, _, stderr = segadapt("adapt", *overrides_of())
    assert status == 2
    assert_says(stderr, where=f"Python {python}", got=python, expected="<3.14,>=3.11", cure="such an environment")


@pytest.mark.parametrize("python", ["3.11.0", "3.12.7", "3.13.1"])
def test_supported_versions_pass(python):
    machine.check_versions(python)


def test_readers_that_live_are_not_blamed(overrides_of, compose_settings):
    """An error of ours in a process that reads ahead is not taken for a killed one."""
    with pytest.raises(ZeroDivisionError) as caught:
        list(stream.ahead(lambda item: 1 // item, [1, 0], workers=1))
    assert machine.fault_of(caught.value) is None
    with pytest.raises(UserError, match="mine"):
        list(stream.ahead(refuse, [1, 0], workers=1))


def refuse(item: int) -> int:
    raise UserError("mine")
