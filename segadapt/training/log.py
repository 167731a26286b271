"""What a training in the loop says: records.jsonl, timings.jsonl, the W&B copy, and the terminal with its bar."""

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from segadapt.record import JsonLines
from segadapt.terminal import Terminal, percent
from segadapt.wandb_mirror import Mirror

LOG_EVERY = 50  # steps between two lines of the record: each waits for the GPU


class Log:
    """Of the first process.

    Args:
        path: the run folder.
        keep: holds what `state_dict` gave, of the checkpoint that this start goes on from; None: from the first step.
        step: of that checkpoint.
        score: name of the one that is shown, and how it is written.
    """

    def __init__(
        self,
        path: Path,
        mirror: Mirror,
        terminal: Terminal,
        *,
        iters: int,
        batch_size: int,
        keep: Mapping[str, Any] | None = None,
        step: int = 0,
        score: tuple[str, str] = ("miou", "mIoU"),
    ):
        sizes = {name: keep[name] if keep else 0 for name in ("records", "timings")}
        self._lines = {name: JsonLines(path / f"{name}.jsonl", keep_bytes=size) for name, size in sizes.items()}
        self._mirror, self._terminal, self._iters, self._batch_size = mirror, terminal, iters, batch_size
        self._step, self._since, self._score = step, time.perf_counter(), score
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
                   TimeRemainingColumn())  # fmt: skip
        console = terminal.console
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task, self._shown = self._bar.add_task("training", total=iters, completed=step), ""

    def begin(self, **values: Any) -> None:
        """A line of timings for this start: what is done, which version; the clock of the speed begins."""
        self._lines["timings"].append(values)
        self._bar.start()
        self._since = time.perf_counter()

    def step(self, step: int, line: Mapping[str, Any]) -> None:
        """Losses, weights, rates and gradient of a step.

        line: `loss`, `terms`, `weights`, `lr` by group, `grad_norm`.
        """
        now = time.perf_counter()
        speed = (step - self._step) * self._batch_size / (now - self._since)
        self._step, self._since = step, now
        self._lines["records"].append({"step": step, **line})
        self._lines["timings"].append({"step": step, "images_per_second": round(speed, 3)})
        of_terms = {f"train/{name}": value for name, value in line["terms"].items()}
        rates = {f"train/lr_{name.replace(' ', '_')}": value for name, value in line["lr"].items()}
        numbers = {"train/loss": line["loss"], "train/grad_norm": line["grad_norm"], "train/images_per_second": speed}
        self._mirror.log({**numbers, **of_terms, **rates}, step=step)
        said = f"loss {line['loss']:.4f}{self._shown}, {speed:.1f} images/s"
        self._bar.update(self._task, completed=step, description=said)
        self._terminal.event("step", step=step, iters=self._iters, images_per_second=speed, **line)

    def validation(self, line: Mapping[str, Any], loss: float) -> None:
        """Scores after a step; the loss is that step's."""
        brief = {name: value for name, value in line.items() if name != "iou"}
        self._lines["records"].append(brief)
        self._mirror.log({f"validation/{name}": value for name, value in brief.items() if name != "step"},
                         step=line["step"])  # fmt: skip
        name, written = self._score
        self._shown = f", {written} {percent(line[name])} %"
        said = f"step {line['step']}/{self._iters}: loss {loss:.4f}, validation {written} {percent(line[name])} %"
        self._terminal.console.print(said, highlight=False)
        self._terminal.event("validation", **brief)
        self._since = time.perf_counter()  # a validation is no training

    def summary(self, numbers: Mapping[str, float]) -> None:
        """What the run has come to, for the W&B copy alone."""
        self._mirror.summary(numbers)

    def state_dict(self) -> dict[str, int]:
        """Bytes of both files, which are on the disk then."""
        return {name: lines.sync() for name, lines in self._lines.items()}

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._bar.stop()
        for lines in self._lines.values():
            lines.close()
