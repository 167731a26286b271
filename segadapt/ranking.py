"""`results table=ranked`: a row a run, the best first; one table for each data set and rule of scoring.

Scores of the same weights under two rules differ by up to a point of mIoU, so they never share a table.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segadapt.errors import UserError
from segadapt.finished import differing, load, read_json
from segadapt.tables import titled
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
    """One table for each set of images and rule. Runs without a score are left out, and named on stderr.

    UserError: a run of a version that recorded no rule.
    """
    tables: dict[str, Ranked] = {}
    without_score = []
    for folder in folders:
        results = read_json(folder / "results.json") if (folder / "results.json").is_file() else {}
        if results.get("mean", {}).get("miou") is None:
            without_score.append(folder.name)
            continue
        settings = load(folder).settings
        if "rule" not in results:
            raise UserError(f"{folder}: results.json without the column rule, by which runs are told apart; expected a "
                            "run of this version. Run it again with experiment.restart=true.")  # fmt: skip
        shared = {name: value for name, value in settings.items() if _is_condition(name)}
        data, rule = f"{settings['data.name']} {settings['data.split']}", results["rule"]
        table = tables.setdefault(json.dumps([shared, rule], sort_keys=True), Ranked(data, rule, shared, []))
        model, mean = settings["model.discriminative.checkpoint"], results["mean"]
        images = sum(task["images"] for task in results["tasks"])
        scores = {name: mean[name] for name in ("miou", "macc", "aacc")}
        table.rows.append(Row(model, results["method"], **scores, images=images, run=folder.name))
    if without_score:
        names = ", ".join(without_score)
        sys.stderr.write(f"left out, not finished or without labels: {len(without_score)} runs ({names})\n")
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


def render(tables: Sequence[Ranked], kind: str) -> str:
    """A table each, headed by its data and rule, see `titled`; json: fractions."""
    parts = [(title, _lines(one)) for title, one in zip(_titles(tables), tables, strict=True)]
    return titled(kind, "data and rule", COLUMNS, parts, tables)
