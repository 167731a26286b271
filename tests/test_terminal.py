"""Progress, tables and rows as a person, a log, a script or a program sees them."""

import dataclasses
import io
import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from segadapt import adapt, protocol
from segadapt.corruptions import COMMON
from segadapt.datasets.toytown import CLASSES
from segadapt.models.combined import Combined
from segadapt.terminal import (
    TaskProgress,
    comparison_table,
    copyable_line,
    latex_row,
    markdown_row,
    open_terminal,
    paper_values,
    percent,
    results_table,
)


def console(*, is_terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=120)


def printed(target: Console) -> str:
    assert isinstance(target.file, io.StringIO)
    return target.file.getvalue()


def cells(target: Console) -> list[list[str]]:
    """The body of a printed table."""
    bar = "\u2502"
    rows = [line.strip(bar).split(bar) for line in printed(target).splitlines() if line.startswith(bar)]
    return [[cell.strip() for cell in row] for row in rows]


class Clock:
    """A clock that is set by hand."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def run(target: Console, num_images: int, *, stop_at: int | None = None) -> None:
    clock = Clock()
    with TaskProgress(
        "fog[5]", task_number=2, num_tasks=15, num_images=num_images, console=target, clock=clock
    ) as progress:
        for number in range(1, (stop_at or num_images) + 1):
            clock.now_s += 2.0
            progress.advance(math.nan if number == 1 else number / 1000)


def test_percent_has_two_decimals_and_absent_is_a_dash():
    assert [percent(value) for value in (0.43214, 1.0, 0.0, math.nan, None)] == ["43.21", "100.00", "0.00", "-", "-"]


def test_copyable_line_is_latex_unless_asked_otherwise():
    assert copyable_line([0.5, math.nan, 0.25]) == "50.00 & - & 25.00"
    assert copyable_line([0.5, 0.25], separator=" ") == "50.00 25.00"


def test_table_shows_fractions_in_percent_counts_as_they_are_and_absent_as_a_dash():
    target = console()
    target.print(
        results_table([["fog", 0.4321, 20], ["snow", math.nan, 7], ["[b]", None, 0]], ["task", "mIoU %", "images"])
    )
    assert cells(target) == [["fog", "43.21", "20"], ["snow", "-", "7"], ["[b]", "-", "0"]]


def test_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="has 1 cells; expected 2"):
        results_table([["a", 1], ["b"]], ["x", "y"])


def test_comparison_shows_gain_in_points_and_the_mean_last():
    target = console()
    tasks = [
        {"task": "fog[5]", "source_miou": 0.40, "adapted_miou": 0.4525},
        {"task": "snow/5", "source_miou": 0.30, "adapted_miou": 0.29},
        {"task": "frost/5", "source_miou": math.nan, "adapted_miou": 0.29},
    ]
    target.print(comparison_table(tasks, {"source_miou": 0.35, "adapted_miou": 0.3713}))
    assert cells(target) == [
        ["fog[5]", "40.00", "45.25", "+5.25"],
        ["snow/5", "30.00", "29.00", "-1.00"],
        ["frost/5", "-", "29.00", "-"],
        ["mean", "35.00", "37.13", "+2.13"],
    ]


def test_log_gets_one_plain_line_every_tenth_with_speed_and_time_left():
    target = console()
    run(target, 2000, stop_at=400)
    assert printed(target).splitlines() == [
        "task 2/15 fog[5]: image 200/2000, mIoU 20.00 %, 2.00 s/image, 1:00:00 left",
        "task 2/15 fog[5]: image 400/2000, mIoU 40.00 %, 2.00 s/image, 0:53:20 left",
    ]


@pytest.mark.parametrize(("num_images", "num_lines"), [(1, 1), (3, 3), (10, 10), (101, 10), (997, 10)])
def test_log_of_any_length_has_at_most_ten_lines_and_ends_with_the_last_image(num_images, num_lines):
    target = console()
    run(target, num_images)
    lines = printed(target).splitlines()
    assert len(lines) == num_lines
    assert f"image {num_images}/{num_images}" in lines[-1]
    assert lines[-1].endswith("0:00:00 left")


def frames(target: Console) -> list[str]:
    """What a live display has drawn, line by line, with single spaces and without control sequences."""
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", printed(target).replace("\r", "\n"))
    return [" ".join(line.split()) for line in drawn.splitlines() if line.strip()]


def test_terminal_shows_the_same_numbers_beside_a_bar():
    target = console(is_terminal=True)
    run(target, 20)
    assert re.fullmatch(r"2/15 fog\[5\] \u2501+ 20/20 mIoU 2\.00 % 2\.00 s/image 0:00:00 left", frames(target)[-1])
    assert not any(line.startswith("run") for line in frames(target))  # a task that is all there is


def in_a_run(target: Console, *, num_earlier: int = 30, num_later: int = 50) -> None:
    """10 of 20 images, 5 of which an earlier start has done; 2 s an image."""
    clock = Clock()
    with TaskProgress(
        "fog/5", task_number=2, num_tasks=3, num_images=20, num_done=5, num_earlier=num_earlier, num_later=num_later,
        console=target, memory=lambda: "GPU 61.7 GiB", clock=clock,
    ) as progress:  # fmt: skip
        for _ in range(5):
            clock.now_s += 2.0
            progress.advance(0.5)


def test_log_tells_the_time_left_of_the_run_and_the_memory():
    target = console()
    in_a_run(target)
    ends = "mIoU 50.00 %, 2.00 s/image, 0:00:20 left, run 0:02:00 left, GPU 61.7 GiB"
    assert printed(target).splitlines()[-1] == f"task 2/3 fog/5: image 10/20, {ends}"
    last = console()
    in_a_run(last, num_later=0)
    assert printed(last).splitlines()[-1].endswith("0:00:20 left, GPU 61.7 GiB")


@pytest.mark.parametrize("width", [80, 120])
def test_terminal_shows_the_whole_run_below_the_task_until_the_task_ends(width):
    target = Console(file=io.StringIO(), force_terminal=True, width=width)
    in_a_run(target)
    drawn = frames(target)
    shown = [line for line in drawn if line.startswith("run")]
    assert re.fullmatch(r"run .* 35/100 GPU 61\.7 GiB", shown[0])
    assert all(len(line) <= width for line in drawn)
    assert re.fullmatch(
        r"2/3 fog/5 .* 10/20 mIoU 50\.00 % 2\.00 s/image 0:00:20 left", drawn[-1]
    )  # the run's bar is gone


# Rows of published tables


@given(st.permutations(COMMON), st.integers(1, 15), st.integers(1, 5))
def test_published_columns_are_the_15_corruptions_in_their_order_whatever_ran(names, count, severity):
    ran = names[:count]
    values = [0.1 + 0.01 * COMMON.index(name) for name in ran]
    *row, mean = paper_values([f"{name}/{severity}" for name in ran], values)
    assert row == [0.1 + 0.01 * index if name in ran else None for index, name in enumerate(COMMON)]
    assert mean == (pytest.approx(0.17) if count == 15 else None)


@pytest.mark.parametrize(
    "tasks",
    [["clean"], ["night", "fog"], ["fog/1", "fog/2"], ["fog/5", "fog/5@2"], ["fog/5", "spatter/5"], ["snow", "fog"]],
)
def test_other_tasks_keep_their_order(tasks):
    values = [0.1 * number for number in range(1, len(tasks) + 1)]
    if tasks == ["snow", "fog"]:  # the corruptions of a set on disk without severities
        assert paper_values(tasks, values)[7:10] == [0.1, None, 0.2]
    elif tasks == ["night", "fog"]:
        assert paper_values(tasks, values) == [0.1, 0.2, pytest.approx(0.15)]
    else:
        assert paper_values(tasks, values) == [*values, pytest.approx(sum(values) / len(values))]


def test_an_undefined_score_makes_the_mean_undefined():
    assert paper_values(["clean", "night"], [0.5, math.nan])[-1] is None


def test_rows_to_copy():
    assert latex_row("bn", [0.5, None, 0.25]) == r"bn & 50.00 & - & 25.00 \\"
    assert markdown_row("bn", [0.5, None, 0.25]) == "| bn | 50.00 | - | 25.00 |"


# logging.terminal


@pytest.fixture(scope="module")
def run_in(compose_settings, saved_models, tmp_path_factory):
    """run_in(mode, *overrides): the results of two tasks of two images under logging.terminal=mode."""
    models, root = saved_models(CLASSES), tmp_path_factory.mktemp("runs")

    def started(mode, *overrides):
        settings = compose_settings(*models, "data.corruptions=[fog,snow]", "data.limit=2", "data.workers=0",
                                    f"logging.terminal={mode}", *overrides)  # fmt: skip
        settings.logging.root = str(root / mode)
        return adapt.run(settings)

    return started


def test_json_is_one_object_a_line_and_nothing_else(run_in, capsys):
    results = run_in("json")
    out, err = capsys.readouterr()
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["event"] for event in events] == ["start", *["image", "image", "task"] * 2, "result"]
    assert err == ""
    start, image, result = events[0], events[1], events[-1]
    assert (start["images"], start["done"], start["tasks"]) == (4, 0, ["fog/5", "snow/5"])
    assert start["folder"] == result["folder"] == results["folder"]
    records = [json.loads(line) for line in Path(results["folder"], "records.jsonl").read_text().splitlines()]
    images = [event for event in events if event["event"] == "image"]
    for event, record in zip(images, records, strict=True):
        assert all(event[name] == record[name] for name in ("task", "index", "key", "running_miou", "loss"))
    assert image["seconds"] > 0
    of_tasks = [event for event in events if event["event"] == "task"]
    assert [event["miou"] for event in of_tasks] == [row["miou"] for row in results["tasks"]]
    assert result["mean"] == results["mean"]
    assert result["tasks"] == [{name: row[name] for name in ("task", "images", "miou")} for row in results["tasks"]]
    run_in("json")  # a finished run has its result alone
    assert [json.loads(line)["event"] for line in capsys.readouterr().out.splitlines()] == ["result"]


def test_quiet_is_the_result_line(run_in, capsys):
    results = run_in("quiet")
    values = [row["miou"] for row in results["tasks"]] + [results["mean"]["miou"]]
    assert capsys.readouterr() == (f"{results['folder']}: mIoU %: {copyable_line(values)}\n", "")


@pytest.mark.parametrize("mode", ["auto", "plain"])
def test_a_log_has_no_control_sequences_and_ends_with_the_rows(run_in, capsys, monkeypatch, mode):
    monkeypatch.setenv("FORCE_COLOR", "1") if mode == "plain" else monkeypatch.delenv("FORCE_COLOR", raising=False)
    results = run_in(mode)
    out, err = capsys.readouterr()
    assert "\x1b" not in out
    assert err == ""
    lines = out.splitlines()
    assert "task 1/2 fog/5: image 2/2" in out
    fog, snow = (percent(row["miou"]) for row in results["tasks"])
    assert lines[-3] == f"mIoU %: {fog} & {snow} & {percent(results['mean']['miou'])}"
    missing = ["-"] * 16
    missing[7], missing[9] = snow, fog
    assert lines[-2] == rf"generative & {' & '.join(missing)} \\"
    assert lines[-1] == f"| generative | {' | '.join(missing)} |"


def test_rich_draws_bars_where_stdout_is_no_terminal(run_in, capsys):
    run_in("rich")
    assert "\x1b[" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["quiet", "json"])
def test_warnings_are_on_stderr(run_in, capsys, monkeypatch, mode):
    step = Combined.step

    def broken(self, image_3HW, **names):
        return dataclasses.replace(step(self, image_3HW, **names), loss=math.nan)

    monkeypatch.setattr(Combined, "step", broken)
    run_in(mode, "experiment.restart=true")
    out, err = capsys.readouterr()
    assert [line.split(" steps")[0] for line in err.splitlines()] == ["fog/5: 2", "snow/5: 2"]
    assert "steps skipped" not in out
    assert mode == "quiet" or json.loads(out.splitlines()[1])["loss"] is None


def test_unlabelled_images_have_a_result_line_too(capsys, tmp_path):
    results = {"tasks": [{"task": "clean", "images": 3, "miou": None}], "mean": {"miou": None}, "method": "bn",
               "protocol": "p", "seed": 0, "peak_memory_gib": []}  # fmt: skip
    for mode in ("quiet", "plain", "json"):
        adapt._print_results(open_terminal(mode), results, tmp_path)
    quiet, plain, event = capsys.readouterr().out.splitlines()
    assert quiet == f"{tmp_path}: 3 unlabelled images: predictions only"
    assert plain == "3 unlabelled images: predictions only"
    assert json.loads(event)["tasks"] == [{"task": "clean", "images": 3, "miou": None}]


def test_what_a_run_prints_is_not_part_of_what_it_is(compose_settings):
    quiet, auto = (protocol.identity(compose_settings(f"logging.terminal={mode}")) for mode in ("quiet", "auto"))
    assert quiet == auto


def test_memory_is_of_the_fullest_gpu_or_of_the_process(monkeypatch):
    assert re.fullmatch(r"RSS \d+\.\d GiB", protocol.peak_memory())
    monkeypatch.setattr(protocol, "peak_memory_gib", lambda: [55.31, 61.72])
    assert protocol.peak_memory() == "GPU 61.7 GiB"
