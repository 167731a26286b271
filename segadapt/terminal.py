"""What a person sees of a run: progress with the running mIoU, and tables of results. Scores are shown in percent."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

Cell = str | int | float | None


def percent(value: float | None, sign: str = "") -> str:
    """0.43214 -> '43.21', with sign '+' '+43.21'; NaN and None, an absent score, -> '-'."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:{sign}.2f}"


def copyable_line(values: Iterable[float | None], separator: str = " & ") -> str:
    """One line of percent numbers; the default separator is LaTeX's."""
    return separator.join(percent(value) for value in values)


def results_table(rows: Iterable[Sequence[Cell]], columns: Sequence[str], *, title: str | None = None) -> Table:
    """Build a table: text flush left, numbers flush right; a float is a fraction shown in percent, an int a count.

    Args:
        rows: one cell a column; NaN and None show as '-', never as 0.
        columns: headings, with the unit.
    Raises:
        ValueError: a row of another length.
    """
    lines = [list(row) for row in rows]
    for line in lines:
        if len(line) != len(columns):
            raise ValueError(f"row {line} has {len(line)} cells; expected {len(columns)}.")
    table = Table(title=title)
    for index, column in enumerate(columns):
        is_text = any(isinstance(line[index], str) for line in lines)
        table.add_column(column, justify="left" if is_text else "right", overflow="fold")
    for line in lines:
        table.add_row(*(escape(str(cell)) if isinstance(cell, str | int) else percent(cell) for cell in line))
    return table


def comparison_table(tasks: Iterable[Mapping[str, str | float]], mean: Mapping[str, float]) -> Table:
    """Build the table source against adapted.

    Args:
        tasks: each with 'task' (its name), 'source_miou' and 'adapted_miou' (fractions, may be NaN).
        mean: 'source_miou' and 'adapted_miou' over the tasks, for the last line.
    """
    table = Table()
    table.add_column("task")
    for column in ("source mIoU %", "adapted mIoU %", "gain, points"):
        table.add_column(column, justify="right")
    lines = [*tasks, {"task": "mean", **mean}]
    for line in lines:
        source, adapted = float(line["source_miou"]), float(line["adapted_miou"])
        gain = "-" if math.isnan(adapted - source) else f"{100 * (adapted - source):+.2f}"
        if line is lines[-1]:
            table.add_section()
        table.add_row(escape(str(line["task"])), percent(source), percent(adapted), gain)
    return table


class TaskProgress:
    """Progress of one task: a bar on a terminal, elsewhere one plain line every tenth of the images.

    with TaskProgress("fog/5", task_number=10, num_tasks=15, num_images=2000) as progress:
        for sample in samples:
            ...
            progress.advance(miou)
    """

    def __init__(
        self,
        task_name: str,
        *,
        task_number: int,
        num_tasks: int,
        num_images: int,
        num_done: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """task_number: 1..num_tasks; num_done: images of an earlier start; clock: seconds."""
        self._task = f"task {task_number}/{num_tasks} {task_name}"
        self._num_images, self._done, self._miou = num_images, num_done, math.nan
        self._num_before = num_done
        self._console, self._clock, self._start_s = console or Console(), clock, 0.0
        self._bar: Progress | None = None

    def __enter__(self) -> "TaskProgress":
        self._start_s = self._clock()
        if self._console.is_terminal:
            self._bar = Progress(TextColumn("{task.description}", markup=False), BarColumn(), console=self._console)
            self._bar.add_task(self._line(), total=self._num_images, completed=self._done)
            self._bar.start()
        return self

    def advance(self, miou: float) -> None:
        """Count one image; miou: the running mIoU of the task, a fraction or NaN."""
        tenth = 10 * self._done // self._num_images
        self._done, self._miou = self._done + 1, miou
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=self._done, description=self._line())
        elif 10 * self._done // self._num_images > tenth:
            self._console.print(self._line(), markup=False, highlight=False, soft_wrap=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._bar:
            self._bar.stop()

    def _line(self) -> str:
        """'task 10/15 fog/5: image 200/2000, mIoU 43.21 %, 0.51 s/image, 0:15:18 left'."""
        text = f"{self._task}: image {self._done}/{self._num_images}, mIoU {percent(self._miou)} %"
        if self._done == self._num_before:
            return text
        seconds = (self._clock() - self._start_s) / (self._done - self._num_before)
        left_s = round(seconds * (self._num_images - self._done))
        return f"{text}, {seconds:.2f} s/image, {left_s // 3600}:{left_s // 60 % 60:02}:{left_s % 60:02} left"
