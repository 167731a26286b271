"""The cells of a grid: each is one `segadapt adapt` command, in a run folder that is named by what it computes."""

import copy
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra import compose

from segadapt.config import AdaptConfig
from segadapt.config_verbs import GridSettings
from segadapt.errors import UserError, did_you_mean
from segadapt.explain import explained
from segadapt.finished import flat
from segadapt.parse import methods_as_files, parse
from segadapt.record import plain, settings_id
from segadapt.results import is_one_stream

OURS = {  # settings of a run that the grid sets: where to say it
    "tta": "grid.methods",
    "tta.method": "grid.methods",
    "experiment.seed": "grid.seeds",
    "experiment.restart": "nothing: remove the folders of the cells that shall run again",
    "experiment.id": "nothing: a cell's folder is named by its settings",
    "runtime.threads": "grid.threads",
}


@dataclass(frozen=True)
class Cell:
    """One method on one stream with one seed."""

    method: str  # with overrides of its own, as grid.methods has it
    stream: str  # 'fog/5', or 'fog/5 .. snow/5' where they are one stream
    seed: int
    arguments: tuple[str, ...]  # of segadapt
    folder: Path  # of the run, absolute
    settings: dict[str, Any]  # the run's identity, nested JSON values
    tasks: tuple[str, ...]
    is_on_cpu: bool  # by its settings

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.method} {self.stream} seed {self.seed}"

    @property
    def is_done(self) -> bool:
        """The run writes its results last, and whole."""
        return (self.folder / "results.json").is_file()

    @property
    def log(self) -> Path:
        """What the command says; beside the run folder, as no file may be there before the run."""
        return self.folder.parent / "logs" / f"{self.folder.name}.log"


def plan(grid: GridSettings, options: Sequence[str]) -> list[Cell]:
    """All cells, a seed after the other; Hydra must be initialised.

    With a reset before each task, every task is a stream of its own; continual, gradual, mixed and rounds are one.

    Args:
        options: of the command line, that each cell's has too, as --config-dir.
    Raises:
        UserError: no method, an unknown one, or two that are the same run; an override that is the grid's to set; cells
            that a run would refuse; cells of two experiments.
    """
    from segadapt.methods import METHODS  # which imports torch

    for name in ("methods", "seeds"):
        if not getattr(grid, name) or len(set(getattr(grid, name))) < len(getattr(grid, name)):
            raise UserError(f"grid.{name}={getattr(grid, name)}: expected one or more, each once. Correct the list.")
    cells: dict[Path, Cell] = {}
    for stream in grid.streams or [""]:
        for method in grid.methods:
            name, *of_method = shlex.split(method) or [""]
            if name not in METHODS:
                raise UserError(f"grid.methods: {name} is not a method.{did_you_mean(name, METHODS)}")
            overrides = [*grid.overrides, *grid.given, *of_method, *shlex.split(stream)]
            for text in overrides:
                _refuse_ours(text)
            overrides += [f"tta.method={name}", f"runtime.threads={grid.threads}"]
            for cell in _cells_of(method, grid.seeds, methods_as_files(overrides), options):
                other = cells.setdefault(cell.folder, cell)
                if other.method != method:
                    raise UserError(
                        f"grid.methods: {other.name} and {cell.name} are the same run ({cell.folder.name}); expected "
                        "methods that differ. Name one of the two, and leave tta.forward_mode out."
                    )
    if len({folder.parent for folder in cells}) > 1:
        both = " and ".join(str(folder) for folder in sorted({folder.parent for folder in cells})[:2])
        raise UserError(f"grid: cells below {both}; expected one logging.root and experiment.name. Leave both out of "
                        "grid.methods and grid.streams.")  # fmt: skip
    return sorted(cells.values(), key=lambda cell: grid.seeds.index(cell.seed))


def _key(override: str) -> str:
    """Name of the setting or group that an override sets."""
    return override.split("=", 1)[0].lstrip("+~").replace("/", ".")


def _refuse_ours(override: str) -> None:
    if (where := OURS.get(_key(override))) is not None:
        raise UserError(f"{override}: the grid sets {_key(override)} itself, by {where}. Leave it out here.")


def _cells_of(method: str, seeds: Sequence[int], words: list[str], options: Sequence[str]) -> list[Cell]:
    """The cells of one method, with these overrides: of one stream, or of tasks that are a stream each."""
    from segadapt.datasets.build import build_tasks  # which import torch
    from segadapt.protocol import identity

    with explained(AdaptConfig, words):
        settings = parse(compose("adapt", words), AdaptConfig)
    cells = []
    for corruptions in _streams(settings):
        for seed in seeds:
            own = copy.deepcopy(settings)
            own.experiment.seed, own.data.corruptions = seed, corruptions
            values = plain(identity(own))
            tasks = tuple(task.name for task in build_tasks(own.data))
            last = [f"experiment.seed={seed}"]
            last += [f"data.corruptions=[{','.join(map(_quoted, corruptions))}]"] if corruptions else []
            cells.append(Cell(
                method, tasks[0] if len(tasks) == 1 else f"{tasks[0]} .. {tasks[-1]}", seed,
                ("adapt", *options, *words, *last),
                Path(own.logging.root, own.experiment.name, settings_id(values)).expanduser().absolute(),
                values, tasks, own.runtime.device == "cpu",
            ))  # fmt: skip
    return cells


def _streams(settings: AdaptConfig) -> list[list[str]]:
    """The corruptions of each stream."""
    names = settings.data.corruptions
    is_one = not names or is_one_stream(flat(asdict(settings)))
    return [names] if is_one else [[name] for name in names]


def _quoted(name: str) -> str:
    """As Hydra reads it back as text."""
    return name if re.fullmatch(r"[A-Za-z_]\w*", name) else "'" + name.replace("'", "\\'") + "'"
