"""Progress lines and tables as a person, or a log, sees them."""

import io
import math

import pytest
from rich.console import Console

from segadapt.terminal import TaskProgress, comparison_table, copyable_line, percent, results_table


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


def test_terminal_shows_the_same_line_beside_a_bar():
    target = console(is_terminal=True)
    run(target, 20)
    assert "task 2/15 fog[5]: image 20/20, mIoU 2.00 %, 2.00 s/image, 0:00:00 left" in printed(target)
