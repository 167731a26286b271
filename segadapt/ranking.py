"""`results table=ranked`: a row a run, the best first; one table for each data set and rule of scoring.

Scores of the same weights under two rules differ by up to a point of mIoU, so they never share a table.
"""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from segadapt.errors import UserError
from segadapt.finished import differing, load, read_json
from segadapt.record import plain
from segadapt.tables import markdown, tabular
from segadapt.terminal import percent

ELSEWHERE = ("data.data_root", "data.corruption_seed")  # the same data in another folder, noise of another seed
COLUMNS = ("model", "method", "mIoU", "mAcc", "aAcc", "images", "run")


@dataclass(frozen=True)
class Row:
    """One run; scores are means over its tasks, fractions."""

    model: str
    method: str
    miou: float
    macc: float
    aacc: float
    images: int
    run: str  # its folder


@dataclass(frozen=True)
class Ranked:
    """Runs that may be ranked."""

    data: str
    rule: str
    conditions: dict[str, Any]  # settings that they share, dotted names
    rows: list[Row]  # the best first


def build(folders: Iterable[Path]) -> list[Ranked]:
    """One table for each set of images and rule. Runs that have not finished are left out, and named on stderr.

    UserError: a run without labels, or of a version that recorded no rule.
    """
    tables: dict[str, Ranked] = {}
    unfinished = []
    for folder in folders:
        if not (folder / "results.json").is_file():
            unfinished.append(folder.name)
            continue
        settings, results = load(folder).settings, read_json(folder / "results.json")
        if "rule" not in results:
            raise UserError(f"{folder}: results.json without the column rule, by which runs are told apart; expected a "
                            "run of this version. Run it again with experiment.restart=true.")  # fmt: skip
        shared = {name: value for name, value in settings.items() if _is_condition(name)}
        data = f"{settings['data.name']} {settings['data.split']}"
        table = tables.setdefault(json.dumps(shared, sort_keys=True), Ranked(data, results["rule"], shared, []))
        scores = (results["mean"][name] for name in ("miou", "macc", "aacc"))
        images = sum(task["images"] for task in results["tasks"])
        checkpoint = settings["model.discriminative.checkpoint"]
        table.rows.append(Row(checkpoint, results["method"], *scores, images, folder.name))
    if unfinished:
        sys.stderr.write(f"left out, {len(unfinished)} runs that have not finished: {', '.join(unfinished)}\n")
    for table in tables.values():
        table.rows.sort(key=lambda row: (-row.miou, row.model, row.method, row.run))
    return [tables[key] for key in sorted(tables)]


def _is_condition(name: str) -> bool:
    """Of the images, or of the sizes at which they are seen and scored."""
    is_rule = name.startswith("evaluate.") or name == "model.discriminative.short_side_px"
    return (name.startswith("data.") or is_rule) and name not in ELSEWHERE


def _titles(tables: Sequence[Ranked]) -> list[str]:
    """Data and rule of each, and other settings of the data in which they differ."""
    said = ("data.name", "data.split")
    names = [name for name in differing([one.conditions for one in tables])
             if name.startswith("data.") and name not in said]  # fmt: skip
    more = [", ".join(f"{name}={one.conditions[name]}" for name in names if name in one.conditions) for one in tables]
    return [f"{one.data}; {one.rule}" + (f"; {text}" if text else "") for one, text in zip(tables, more, strict=True)]


def _lines(table: Ranked) -> list[list[str]]:
    return [[row.model, row.method, *map(percent, (row.miou, row.macc, row.aacc)), str(row.images), row.run]
            for row in table.rows]  # fmt: skip


def as_markdown(tables: Sequence[Ranked]) -> str:
    """A table each, headed by its data and rule."""
    parts = [f"{title}\n\n{markdown(COLUMNS, _lines(one))}"
             for title, one in zip(_titles(tables), tables, strict=True)]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def as_csv(tables: Sequence[Ranked]) -> str:
    """The same lines with data and rule in front; each table with a header of its own, and an empty line between."""
    parts = []
    for title, one in zip(_titles(tables), tables, strict=True):
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["data and rule", *COLUMNS])
        writer.writerows([title, *line] for line in _lines(one))
        parts.append(text.getvalue())
    return "\n".join(parts)


def as_latex(tables: Sequence[Ranked]) -> str:
    """A tabular each, for the package booktabs; data and rule as a comment."""
    parts = [f"% {title}\n{tabular(COLUMNS, _lines(one))}" for title, one in zip(_titles(tables), tables, strict=True)]
    return "\n\n".join(parts) + "\n"


def as_json(tables: Sequence[Ranked]) -> str:
    """All numbers as fractions."""
    return json.dumps(plain([asdict(one) for one in tables]), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


FORMATS: dict[str, Callable[[Sequence[Ranked]], str]] = {
    "markdown": as_markdown,
    "csv": as_csv,
    "latex": as_latex,
    "json": as_json,
}
