"""From settings to report.html: read the runs, draw, fill the page, write it into the first folder."""

from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from segadapt.config_verbs import ReportConfig
from segadapt.errors import UserError
from segadapt.finished import LEVEL, read_json
from segadapt.record import write_bytes
from segadapt.report import data
from segadapt.report.data import Pair, Report
from segadapt.results import run_folders
from segadapt.tables import mean_of, whole
from segadapt.terminal import percent

NAME = "report.html"


def run(settings: ReportConfig) -> None:
    """Write RUN/report.html, where RUN is the first of the folders.

    Raises:
        UserError: no run folder, or no packages to draw with; see `data.gather`.
    """
    try:
        import jinja2  # noqa: F401
        import plotly  # noqa: F401
    except ImportError as error:
        cure = "Run pip install 'segadapt[report]'."
        raise UserError(f"report needs {error.name}, which is not installed. {cure}") from error
    report = data.gather(run_folders(settings.runs), resamples=settings.resamples)
    first = Path(settings.runs[0]).expanduser()
    page = render(report, title=first.resolve().name).encode()
    write_bytes(first / NAME, page)
    Console().print(f"report {first / NAME} ({len(page) / 1e6:.1f} MB); open it in a browser", highlight=False,
                    soft_wrap=True, markup=False)  # fmt: skip


def render(report: Report, *, title: str) -> str:
    """The whole page; it asks for nothing else."""
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    from segadapt.report import figures, gallery

    files = resources.files("segadapt.report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters |= {"percent": percent, "signed": lambda value: figures.signed(100 * value)}
    pairs_of, alone_of = _pairs(report)
    pictures = gallery.build(report, pairs_of)
    drawn = _figures(report, pairs_of)
    return environment.from_string((files / "page.html").read_text(encoding="utf-8")).render(
        title=title,
        css=Markup((files / "page.css").read_text(encoding="utf-8")),
        js=Markup((files / "page.js").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs()),
        methods=[{"name": method.name, "colour": colour, "index": index}
                 for index, (method, colour) in enumerate(zip(report.methods, figures.colours(report), strict=True))],
        report=report,
        level=LEVEL,
        facts=_facts(report),
        table=_table(report),
        figures=drawn,
        diagnostics=figures.DIAGNOSTICS,
        most_classes=figures.MOST_CLASSES,
        pairs={index: _counted(pairs, alone_of[index]) for index, pairs in pairs_of.items()},
        gallery=pictures,
        speeds=[data.speed(method) for method in report.methods],
        runs=_runs(report),
    )  # fmt: skip


def _pairs(report: Report) -> tuple[dict[int, list[Pair]], dict[int, int]]:
    """Of each compared method, and how many of its images have no partner; without a source all images, alone."""
    pairs_of, alone_of = {}, {}
    for index in report.compared:
        method = report.methods[index]
        if report.source is None or index == report.source:
            pairs_of[index] = [
                Pair(task, key, seed, float("nan"), float(data.miou(counts_C3)))
                for seed, one in method.runs.items() for task in one.tasks
                for key, counts_C3 in data.image_counts(one, task).items()
            ]  # fmt: skip
            alone_of[index] = len(pairs_of[index])
        else:
            pairs_of[index], alone_of[index] = data.pairs(report.methods[report.source], method)
    return pairs_of, alone_of


def _counted(pairs: list[Pair], alone: int) -> dict[str, int]:
    gains = np.array([pair.adapted - pair.source for pair in pairs])
    return {"pairs": int((~np.isnan(gains)).sum()), "alone": alone, "better": int((gains > 0).sum()),
            "worse": int((gains < 0).sum())}  # fmt: skip


def _figures(report: Report, pairs_of: dict[int, list[Pair]]) -> dict[str, Any]:
    """Name -> figure; those of a method end in its number, those of a task in 'all' or the task's number."""
    from segadapt.report import figures

    drawn: dict[str, Any] = {
        f"running/{number}": figures.running(report, task) for number, task in enumerate(report.tasks)
    }
    for index, method in enumerate(report.methods):
        drawn[f"confusion/{index}"] = figures.confusion(report, method)
        for name in figures.DIAGNOSTICS:
            figure = figures.diagnostics(method, name)
            drawn |= {} if figure is None else {f"{name}/{index}": figure}
    for index, pairs in pairs_of.items():
        method = report.methods[index]
        drawn[f"classes/{index}/all"] = figures.class_changes(report, method, report.tasks)
        for number, task in enumerate(report.tasks):
            if any(task in one.tasks for one in method.runs.values()):
                drawn[f"classes/{index}/{number}"] = figures.class_changes(report, method, [task])
        known = [pair for pair in pairs if not np.isnan(pair.adapted - pair.source)]
        if known:
            drawn |= {f"scatter/{index}": figures.scatter(known), f"histogram/{index}": figures.histogram(known)}
    return drawn


def _facts(report: Report) -> dict[str, Any]:
    """What the head of the page says."""
    first = report.methods[-1].first
    images = {len(data.records(first, task)) for task in first.tasks}
    rows = report.table.rows
    means = [float(whole(row.miou_ST).mean()) if len(whole(row.miou_ST)) else float("nan") for row in rows]
    best = int(np.nanargmax(means)) if not np.isnan(means).all() else None
    return {"images": " to ".join(map(str, dict.fromkeys([min(images), max(images)]))),
            "data": first.settings.get("data.name", ""), "split": first.settings.get("data.split", ""),
            "segmenter": first.settings.get("model.discriminative.checkpoint", ""),
            "seeds": [seed[0] for seed in report.table.seeds], "means": means, "best": best,
            "best_row": None if best is None else rows[best]}  # fmt: skip


def _table(report: Report) -> list[dict[str, Any]]:
    """A line a task and one of means; each cell with value, spread and gain over the seeds, and whether it is best."""
    rows, lines = report.table.rows, []
    for number, task in [*enumerate(report.tasks), (None, "mean")]:
        cells = []
        for row in rows:
            values_S = whole(row.miou_ST) if number is None else _known(row.miou_ST[:, number])
            gains_S = np.zeros(0)
            if row.gain_ST is not None:
                gains_S = whole(row.gain_ST) if number is None else _known(row.gain_ST[:, number])
            cells.append({"value": _mean(values_S), "gain": _mean(gains_S),
                          "spread": float(values_S.std(ddof=1)) if len(values_S) > 1 else None})  # fmt: skip
        best = max((cell["value"] for cell in cells if cell["value"] is not None), default=None)
        for cell in cells:
            cell["is_best"] = cell["value"] is not None and cell["value"] == best and len(cells) > 1
        lines.append({"task": task, "cells": cells})
    return lines


def _known(values_S: np.ndarray) -> np.ndarray:
    return values_S[~np.isnan(values_S)]


def _mean(values_S: np.ndarray) -> float | None:
    return float(mean_of(values_S)) if len(values_S) else None


def _runs(report: Report) -> list[dict[str, Any]]:
    """Every run folder with its protocol line, its settings as it wrote them, and the versions it ran on."""
    return [
        {
            "method": method.name,
            "folder": f"{folder.parent.name}/{folder.name}",
            "results": read_json(folder / "results.json"),
            "config": _text(folder / "config.yaml"),
        }
        for method in report.methods
        for folder in method.folders
    ]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else f"{path.name} is missing"
