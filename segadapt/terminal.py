"""What is seen of a run: progress with the running mIoU, tables, rows to copy, events. Scores are shown in percent."""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from segadapt.corruptions import COMMON
from segadapt.record import plain

Cell = str | int | float | None


def percent(value: float | None, sign: str = "") -> str:
    """0.43214 -> '43.21', with sign '+' '+43.21'; NaN and None, an absent score, -> '-'."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:{sign}.2f}"


def copyable_line(values: Iterable[float | None], separator: str = " & ") -> str:
    """One line of percent numbers; the default separator is LaTeX's."""
    return separator.join(percent(value) for value in values)


def paper_values(tasks: Sequence[str], values: Sequence[float | None]) -> list[float | None]:
    """Scores in the order of published tables: the 15 corruptions, and their mean.

    A corruption that was not run is None, and so is then the mean, as it could not be compared. Tasks that are not
    corruptions of one severity, or not of the 15, keep their order.

    Args:
        tasks: as 'fog/5'.
        values: a fraction each.
    """
    of_task = dict(zip(tasks, values, strict=True))
    _, slash, severity = tasks[0].partition("/")
    columns = [f"{name}{slash}{severity}" for name in COMMON]
    if not of_task.keys() <= set(columns):
        columns = list(tasks)
    row = [of_task.get(column) for column in columns]
    known = [value for value in row if value is not None and not math.isnan(value)]
    return [*row, sum(known) / len(known) if len(known) == len(row) else None]


def latex_row(name: str, values: Iterable[float | None]) -> str:
    r"""'bn & 43.21 & - \\'."""
    return rf"{name} & {copyable_line(values)} \\"


def markdown_row(name: str, values: Iterable[float | None]) -> str:
    """'| bn | 43.21 | - |'."""
    return f"| {name} | {copyable_line(values, ' | ')} |"


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


@dataclass(frozen=True)
class Terminal:
    """Where a run speaks, see `open_terminal`.

    Attributes:
        console: text for a person.
        warnings: what may be wrong, a line each.
        events: JSON objects for a program; None: nobody reads them.
        results: the result line of a run; None: nobody waits for that alone.
    """

    console: Console
    warnings: Console
    events: IO[str] | None = None
    results: IO[str] | None = None

    def event(self, name: str, **values: Any) -> None:
        """One line of JSON; NaN is null."""
        if self.events is not None:
            text = json.dumps({"event": name, **plain(values)}, allow_nan=False, ensure_ascii=False)
            print(text, file=self.events, flush=True)

    def result(self, line: str) -> None:
        """What a script takes from a run."""
        if self.results is not None:
            print(line, file=self.results, flush=True)


def open_terminal(mode: str, console: Console | None = None) -> Terminal:
    """The terminal of logging.terminal.

    Args:
        mode: auto: text, with a live display where stdout is a terminal; rich, plain: always, never; quiet: result
            lines; json: events. With the last two, warnings are on stderr and nothing else is on stdout.
        console: in place of stdout, for text or whatever `mode` asks for.
    """
    console = console or Console(force_terminal={"rich": True, "plain": False}.get(mode))
    if mode not in ("quiet", "json"):
        return Terminal(console, console)
    warnings = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    out = {"quiet": "results", "json": "events"}[mode]
    return Terminal(Console(quiet=True), warnings, **{out: console.file})


class TaskProgress:
    """Progress of one task: bars on a terminal, elsewhere one plain line every tenth of the images.

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
        num_earlier: int = 0,
        num_later: int = 0,
        console: Console | None = None,
        memory: Callable[[], str] = str,
        clock: Callable[[], float] = time.monotonic,
    ):
        """A task, and the run that it is a part of.

        Args:
            task_number: 1..num_tasks.
            num_done: images of an earlier start.
            num_earlier, num_later: images of the run's other tasks.
            memory: what is in use at most, in words; '' says nothing.
            clock: seconds.
        """
        self._name, self._place = task_name, f"{task_number}/{num_tasks}"
        self._num_images, self._done, self._miou = num_images, num_done, math.nan
        self._num_before, self._earlier, self._later = num_done, num_earlier, num_later
        self._console, self._memory, self._clock, self._start_s = console or Console(), memory, clock, 0.0
        self._bar: Progress | None = None

    def __enter__(self) -> "TaskProgress":
        self._start_s = self._clock()
        if self._console.is_terminal:
            texts = [TextColumn(f"{{task.fields[{name}]}}", justify="right", markup=False)
                     for name in ("images", "miou", "speed", "left")]  # fmt: skip
            name = TextColumn("{task.description}", markup=False)
            self._bar = Progress(name, BarColumn(bar_width=None), *texts, console=self._console, expand=True)
            self._task = self._bar.add_task(f"{self._place} {self._name}", total=self._num_images, **self._fields())
            total = self._earlier + self._num_images + self._later
            self._run = self._bar.add_task("run", total=total, visible=total > self._num_images, **self._fields())
            self._update(self._bar)
            self._bar.start()
        return self

    def advance(self, miou: float) -> None:
        """Count one image; miou: the running mIoU of the task, a fraction or NaN."""
        tenth = 10 * self._done // self._num_images
        self._done, self._miou = self._done + 1, miou
        if self._bar:
            self._update(self._bar)
        elif 10 * self._done // self._num_images > tenth:
            self._console.print(self._line(), markup=False, highlight=False, soft_wrap=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._bar:
            self._bar.update(self._run, visible=False)  # the next task shows it again
            self._bar.stop()

    def _seconds(self) -> float | None:
        """Of an image, on average since this start; None: not known yet."""
        count = self._done - self._num_before
        return (self._clock() - self._start_s) / count if count else None

    def _fields(self, *, of_run: bool = False) -> dict[str, Any]:
        """The numbers of a bar."""
        earlier, later = (self._earlier, self._later) if of_run else (0, 0)
        seconds = self._seconds()
        left = "" if seconds is None else f"{_clock_time(seconds * (self._num_images - self._done + later))} left"
        speed = "" if seconds is None else f"{seconds:.2f} s/image"
        return {
            "images": f"{earlier + self._done}/{earlier + self._num_images + later}",
            "miou": "" if of_run else f"mIoU {percent(self._miou)} %",
            "speed": self._memory() if of_run else speed,
            "left": left,
        }

    def _update(self, bar: Progress) -> None:
        bar.update(self._task, completed=self._done, **self._fields())
        bar.update(self._run, completed=self._earlier + self._done, **self._fields(of_run=True))

    def _line(self) -> str:
        """'task 10/15 fog/5: image 200/2000, mIoU 43.21 %, 0.51 s/image, 0:15:18 left, run 3:12:00, GPU 61.7 GiB'."""
        task, run = self._fields(), self._fields(of_run=True)
        parts = [f"task {self._place} {self._name}: image {task['images']}", task["miou"], task["speed"], task["left"],
                 f"run {run['left']}" if self._later and run["left"] else "", run["speed"]]  # fmt: skip
        return ", ".join(part for part in parts if part)


def _clock_time(seconds: float) -> str:
    """3600.4 -> '1:00:00'."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
