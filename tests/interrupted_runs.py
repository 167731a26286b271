"""Runs that are cut off: in this process by an exception, or in a forked one by a signal; and what a run leaves."""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
from rich.console import Console

from segadapt import adapt
from segadapt.signals import Stopped
from segadapt.task_loop import TaskLoop

OF_THE_CLOCK = ("seconds", "started", "peak_memory_gib")
QUIET = Console(quiet=True)


class Cut(Exception):
    """The machine goes down."""


def left_by(folder: Path | str) -> dict[str, Any]:
    """Every file of a run by its path, without what the clock says; of the timings their images; of config.yaml, which
    holds the run's id and how often it saves, that it is there."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name == "timings.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [(line["task"], line["key"]) for line in lines if "task" in line]
        elif name.startswith("tasks/") or name == "results.json":
            found[name] = without_times(json.loads(path.read_text()))
        else:
            found[name] = None if name == "config.yaml" else path.read_bytes()
    return found


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in OF_THE_CLOCK}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def assert_equal_folders(one: Path | str, other: Path | str) -> None:
    """Names first, so that a difference is told by its file."""
    mine, theirs = left_by(one), left_by(other)
    assert sorted(mine) == sorted(theirs)
    assert [name for name in mine if mine[name] != theirs[name]] == []


def folder_of(settings: Any) -> Path:
    """The run folder of settings with an id."""
    return Path(settings.logging.root, settings.experiment.name, settings.experiment.id)


def cut_after(monkeypatch, settings: Any, images: int) -> Path:
    """Start a run that ends when the record of image `images` + 1 is due; gives its folder."""
    real, done = TaskLoop._record, []

    def record(*arguments):
        if len(done) == images:
            raise Cut
        done.append(1)
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TaskLoop, "_record", record)
        try:
            adapt.run(settings, console=QUIET)
        except Cut:
            return folder_of(settings)
    raise AssertionError(f"the run has no more than {len(done)} images")


def in_a_fork(settings: Any, before: Callable[[], None] = lambda: None) -> int:
    """adapt.run in a process of its own; its exit status as subprocess gives it: -n where signal n ended it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        signal.alarm(120)  # a child that hangs ends too
        cv2.setNumThreads(0)
        before()
        adapt.run(settings, console=QUIET)
        status = 0
    except Stopped as stopped:
        status = 128 + stopped.signum
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def signal_at_line(count: int, signum: int, files: tuple[str, ...]) -> Callable[[], None]:
    """For `in_a_fork`: the process gets a signal at the count-th line that it executes in one of these modules."""
    left = [count]

    def line(_: str) -> None:
        left[0] -= 1
        if not left[0]:
            sys.settrace(None)
            os.kill(os.getpid(), signum)

    return _each_line(line, files)


def count_lines(files: tuple[str, ...], path: Path) -> Callable[[], None]:
    """For `in_a_fork`: write to a JSON file how many lines it executes in each of these modules."""
    seen = dict.fromkeys(files, 0)

    def line(file: str) -> None:
        seen[file] += 1
        if sum(seen.values()) % 16 == 0:
            path.write_text(json.dumps(seen))

    return _each_line(line, files)


def _each_line(told: Callable[[str], None], files: tuple[str, ...]) -> Callable[[], None]:
    package = str(Path(adapt.__file__).parent)

    def line(frame, event, _):
        if event == "line":
            told(Path(frame.f_code.co_filename).name)
        return line

    def call(frame, *_):
        path = frame.f_code.co_filename
        return line if path.startswith(package) and path.endswith(files) else None

    return lambda: sys.settrace(call)
