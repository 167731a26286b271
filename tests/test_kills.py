"""SIGKILL and SIGTERM at any line of a run: started again it ends as the run that nothing stopped, bit for bit."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import SETTINGS
from interrupted_runs import assert_equal_folders, count_lines, folder_of, in_a_fork, signal_at_line

from segadapt import adapt, checkpoint
from segadapt.datasets.toytown import CLASSES
from segadapt.record import JsonLines

pytestmark = pytest.mark.slow

LOOPS = ("adapt.py", "task_loop.py", "record.py", "checkpoint.py", "stream.py", "terminal.py", "metrics.py")
STREAMS = {
    "reset per task": ("tta.method=generative",),
    "continual": ("tta.method=cotta", "tta.options.scales=[1.0]", "tta.continual=true", "data.rounds=2"),
    "episodic": ("tta.method=memo", "tta.options.augmentations=2"),
    "mixed": ("tta.method=tent", "data.order=mixed", "data.rounds=2", "tta.optimizer.accumulate=2"),
    "gradual": (
        "tta.method=rotta", "tta.options.every=2", "tta.options.capacity=12", "data.order=gradual", "data.severity=2",
        "tta.continual=true",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def settings_of(compose_settings, saved_models, tmp_path_factory):
    """settings_of(stream, name): a run of some images in a folder of that name, with all that a run can write."""
    models, root = saved_models(CLASSES), tmp_path_factory.mktemp("runs")

    def build(stream, name):
        return compose_settings(
            *models, "data.corruptions=[fog,contrast]", "data.limit=3", "data.workers=0", "tta.optimizer.lr=0.01",
            "logging.predictions=all", "tta.save_adapted=true", "runtime.checkpoint_images=2", f"logging.root={root}",
            f"experiment.id={name}", *STREAMS[stream],
        )  # fmt: skip

    return build


@pytest.fixture(scope="module")
def whole(settings_of):
    """whole(stream): the folder of the run that nothing stopped, and how many lines of each module it took."""
    made = {}

    def run(stream):
        if stream not in made:
            settings = settings_of(stream, f"whole-{stream.replace(' ', '-')}")
            path = folder_of(settings).parent.parent / f"lines-{len(made)}"
            assert in_a_fork(settings, count_lines(LOOPS, path)) == 0
            made[stream] = folder_of(settings), json.loads(path.read_text())
        return made[stream]

    return run


def points(stream, count):
    """Places of a run between 0 and 1, the same in each test run."""
    dice = random.Random(stream)
    return [(stream, (place + dice.random()) / count) for place in range(count)]


@pytest.mark.parametrize(
    ("stream", "place"),
    [point for stream in STREAMS for point in points(stream, 12 if stream == "reset per task" else 4)],
    ids=lambda value: value if isinstance(value, str) else f"{value:.3f}",
)
def test_a_killed_run_ends_as_one_that_was_not(settings_of, whole, stream, place):
    folder, lines = whole(stream)
    settings = settings_of(stream, f"killed-{stream.replace(' ', '-')}-{place:.4f}")
    assert (
        in_a_fork(settings, signal_at_line(1 + int(sum(lines.values()) * place), signal.SIGKILL, LOOPS))
        == -signal.SIGKILL
    )
    assert in_a_fork(settings) == 0
    assert_equal_folders(folder_of(settings), folder)


def test_a_run_killed_again_and_again_ends_as_one_that_was_not(settings_of, whole):
    folder, lines = whole("reset per task")
    settings, kills, status = settings_of("reset per task", "killed-often"), 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        at = int(sum(lines.values()) * (0.4 + 0.2 * kills))  # also while it reads the checkpoint of the start before
        status = in_a_fork(settings, signal_at_line(at, signal.SIGKILL, LOOPS))
        kills += status != 0
    assert status == 0
    assert kills >= 2
    assert_equal_folders(folder_of(settings), folder)


def half_a_file(path, data):
    path.write_bytes(data[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)


def half_a_line(self, value):
    self._file.write(b'{"task": "fog/5", "ind')
    os.kill(os.getpid(), signal.SIGKILL)


def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("call", range(1, 7))
@pytest.mark.parametrize(
    ("owner", "name", "replacement"),
    [(checkpoint, "_write_file", half_a_file), (os, "replace", kill), (checkpoint, "fsync_folder", kill),
     (checkpoint.shutil, "rmtree", kill), (JsonLines, "append", half_a_line)],
    ids=["half a file", "rename", "renamed", "older ones removed", "half a line"],
)  # fmt: skip
def test_a_run_killed_while_it_writes_ends_as_one_that_was_not(settings_of, whole, owner, name, replacement, call):
    """At the n-th call of what writes a checkpoint, renames a file, or appends a line."""
    folder, _ = whole("reset per task")
    settings, calls, real = settings_of("reset per task", f"cut-{name}-{call}"), [], getattr(owner, name)

    def counted(*arguments, **more):
        calls.append(1)
        return (replacement if len(calls) == call else real)(*arguments, **more)

    assert in_a_fork(settings, lambda: setattr(owner, name, counted)) in (-signal.SIGKILL, 0)
    assert in_a_fork(settings) == 0
    assert_equal_folders(folder_of(settings), folder)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=lambda signum: signum.name)
@pytest.mark.parametrize("stream", STREAMS)
def test_a_run_asked_to_stop_goes_on_to_the_same_end(settings_of, whole, stream, signum):
    """Within one image: at most one more record than when the signal came, and a checkpoint that holds it."""
    folder, lines = whole(stream)
    settings = settings_of(stream, f"{signum.name}-{stream.replace(' ', '-')}")
    settings.runtime.checkpoint_images = None
    records = folder_of(settings) / "records.jsonl"
    seen = folder_of(settings).parent / f"{settings.experiment.id}-seen"

    def note_and_signal():
        ask = signal_at_line(lines["task_loop.py"] // 2, signum, ("task_loop.py",))
        real = os.kill

        def noted(*arguments):
            seen.write_text(str(records.read_text().count("\n")))
            real(*arguments)

        os.kill = noted
        ask()

    assert in_a_fork(settings, note_and_signal) == 128 + signum
    done = records.read_text().count("\n")
    assert 0 <= done - int(seen.read_text()) <= 1
    assert [path.name for path in (folder_of(settings) / "checkpoints").iterdir()] == [f"{done:08d}"]
    assert in_a_fork(settings) == 0
    assert_equal_folders(folder_of(settings), folder)


def test_a_second_signal_stops_at_once(settings_of, whole):
    folder, lines = whole("reset per task")
    settings = settings_of("reset per task", "impatient")

    def wait_long(*_):
        os.kill(os.getpid(), signal.SIGTERM)  # with the first one: the same request
        time.sleep(1.2)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    def ask_twice():
        checkpoint.Checkpoints.write = wait_long
        signal_at_line(lines["task_loop.py"] // 8, signal.SIGTERM, ("task_loop.py",))()

    began = time.monotonic()
    assert in_a_fork(settings, ask_twice) == -signal.SIGTERM
    assert time.monotonic() - began < 30
    assert in_a_fork(settings) == 0
    assert_equal_folders(folder_of(settings), folder)


def test_the_lock_of_a_killed_process_is_taken_over_and_said(settings_of, capsys):
    settings = settings_of("reset per task", "orphan")
    assert in_a_fork(settings, lambda: setattr(checkpoint.Checkpoints, "write", kill)) == -signal.SIGKILL
    lock = folder_of(settings) / ".lock"
    owner = lock.read_text()
    assert re.fullmatch(rf"process \d+ on {socket.gethostname()} since \S+ \S+", owner)
    adapt.run(settings)
    assert f"is taken over: {owner} is gone" in capsys.readouterr().out
    assert lock.read_text() == ""


# The command itself


@pytest.fixture(scope="module")
def command(saved_models):
    """command(root): `segadapt adapt` on many images, with a process that reads ahead."""
    models = saved_models(CLASSES)

    def build(root):
        return [sys.executable, "-m", "segadapt", "adapt", *SETTINGS, *models, "data.corruptions=[fog]",
                "data.limit=80", "data.workers=1", "experiment.id=one", f"logging.root={root}"]  # fmt: skip

    return build


def started(command, root):
    """The process, in a group of its own, once it has a record."""
    process = subprocess.Popen(command(root), start_new_session=True, stderr=subprocess.PIPE, text=True,
                               stdout=subprocess.DEVNULL)  # fmt: skip
    records, deadline_s = root / "adapt/one/records.jsonl", time.monotonic() + 60
    while not (records.exists() and records.stat().st_size) and time.monotonic() < deadline_s:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    return process


def test_a_sigterm_to_the_whole_group_saves_as_one_to_the_process(command, tmp_path):
    """As timeout, Slurm and systemd send it: what reads ahead must not die first."""
    process = started(command, tmp_path)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert re.fullmatch(r"segadapt adapt: SIGTERM after image \d+ of 80; the same command goes on from there\n", said)
    assert list((tmp_path / "adapt/one/checkpoints").glob("[0-9]*/state.json"))
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_the_command_stops_within_an_image_is_alone_on_its_folder_and_goes_on(command, tmp_path):
    """Ctrl-C reaches the whole group, also the process that reads ahead."""
    process = started(command, tmp_path)
    os.killpg(process.pid, signal.SIGSTOP)  # or it might end before the second one has begun
    second = subprocess.run(command(tmp_path), capture_output=True, text=True, check=False, timeout=60)
    os.killpg(process.pid, signal.SIGINT)
    os.killpg(process.pid, signal.SIGCONT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT
    assert re.fullmatch(r"segadapt adapt: SIGINT after image \d+ of 80; the same command goes on from there\n", said)
    assert second.returncode == 2
    assert f"process {process.pid} on " in second.stderr
    assert second.stderr.count("\n") == 1
    again = subprocess.run(command(tmp_path), capture_output=True, text=True, check=False, timeout=90)
    assert again.returncode == 0, again.stderr
    assert "goes on after image" in again.stdout
    lines = [json.loads(line) for line in (tmp_path / "adapt/one/records.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(80))
