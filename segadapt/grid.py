"""The verb `grid`: plan the cells, run those that are not finished, and gather a table while they run."""

import math
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import FrameType, TracebackType

from hydra.core.hydra_config import HydraConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from segadapt.cells import Cell, plan
from segadapt.config_verbs import GridConfig
from segadapt.engines import ENGINES, Outcome
from segadapt.errors import UserError
from segadapt.finished import Run, flat, load, read_json
from segadapt.record import write_bytes
from segadapt.results import build_tables, unfinished
from segadapt.tables import as_markdown
from segadapt.terminal import percent


def run(settings: GridConfig) -> None:
    """Run what is not finished; the table is {logging.root}/{experiment.name}/table.md.

    Raises:
        SystemExit: 1, some cells failed; 128 + signal, after the cells have ended.
        UserError: see plan, and the engines.
    """
    grid, sources = settings.grid, HydraConfig.get().runtime.config_sources
    folders = [source.path for source in sources if source.provider == "command-line"]
    cells = plan(grid, [word for folder in folders for word in ("--config-dir", folder)])
    missing = [cell for cell in cells if not cell.is_done]
    if grid.engine == "print":
        sys.stdout.write("".join(f"{shlex.join(['segadapt', *cell.arguments])}\n" for cell in missing))
        return
    console, gathered = Console(), cells[0].folder.parent
    signal.signal(signal.SIGTERM, _stop)
    with Board(console, len(cells), len(cells) - len(missing), grid.log_lines) as board:
        gather(cells)
        if missing:
            with closing(ENGINES[grid.engine](missing, grid)) as events:
                for cell, outcome in events:
                    board.tell(cell, outcome)
                    if outcome is not None and outcome.status == 0:
                        gather(cells)
    console.print((gathered / "table.md").read_text(), highlight=False, soft_wrap=True, markup=False)
    console.print(f"intervals, other formats: segadapt results {shlex.quote(str(gathered))}", highlight=False,
                  soft_wrap=True, markup=False)  # fmt: skip
    if board.failed:
        console.print(f"{board.failed} of {len(cells)} cells failed; the same command runs what is missing")
        raise SystemExit(1)


def _stop(number: int, _: FrameType | None) -> None:
    """Through every `finally`, so that the cells end first."""
    raise SystemExit(128 + number)


def gather(cells: Sequence[Cell]) -> None:
    """Write table.md of what is finished, without intervals; where there can be none, why."""
    try:
        text = as_markdown(build_tables(map(_run_of, cells), against="source", resamples=0, is_timed=False))
    except UserError as error:
        text = f"no table: {error}\n"
    write_bytes(cells[0].folder.parent / "table.md", text.encode())


def _run_of(cell: Cell) -> Run:
    """With its scores as soon as it has some."""
    return load(cell.folder) if cell.is_done else unfinished(cell.folder, flat(cell.settings), cell.tasks)


class Board:
    """How many cells are done, running, failed: a bar on a terminal, elsewhere a line for each that ends."""

    def __init__(self, console: Console, num_cells: int, done: int, log_lines: int):
        """done: cells that were finished before; log_lines: shown of a cell that fails."""
        self.done, self.running, self.failed = done, 0, 0
        self._begun: set[Path] = set()
        self._num_cells, self._console, self._log_lines = num_cells, console, log_lines
        self._bar: Progress | None = None

    def __enter__(self) -> "Board":
        self._say(f"{self._num_cells} cells, {self.done} finished before")
        if self._console.is_terminal:
            columns = MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}", markup=False)
            self._bar = Progress(*columns, console=self._console)
            self._bar.add_task("", total=self._num_cells, completed=self.done)
            self._bar.start()
        return self

    def tell(self, cell: Cell, outcome: Outcome | None) -> None:
        """A cell has begun, or ended."""
        if outcome is None:
            self._begun.add(cell.folder)
        else:
            self._begun.discard(cell.folder)
            self.done += outcome.status == 0
            self.failed += outcome.status != 0
        self.running = len(self._begun)
        counts = f"{self.done}/{self._num_cells} done, {self.running} running, {self.failed} failed"
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=self.done, description=counts)
        if outcome is not None:
            self._say(f"{counts}: {cell.name}, {_ending(cell, outcome)}")
        if outcome is not None and outcome.status:
            self._say("\n".join(f"  {line}" for line in outcome.log.splitlines()[-self._log_lines :]))

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._bar:
            self._bar.stop()


def _ending(cell: Cell, outcome: Outcome) -> str:
    if outcome.status == 0:
        score = read_json(cell.folder / "results.json")["mean"]["miou"]
        return f"mIoU {percent(math.nan if score is None else score)} %"
    how = f"killed by signal {-outcome.status}" if outcome.status < 0 else f"exit status {outcome.status}"
    return f"failed with {how}; its log is {cell.log}"
