"""A table of results, and its text: rows of methods, columns of tasks, gains below the methods. Scores in percent.

T tasks   S seeds
"""

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from segadapt.finished import LEVEL, differing
from segadapt.record import plain
from segadapt.terminal import percent

SHORT = {"gaussian_noise": "gauss", "shot_noise": "shot", "impulse_noise": "impul", "defocus_blur": "defoc",
         "glass_blur": "glass", "motion_blur": "motion", "zoom_blur": "zoom", "snow": "snow", "frost": "frost",
         "fog": "fog", "brightness": "brit", "contrast": "contr", "elastic_transform": "elast", "pixelate": "pixel",
         "jpeg_compression": "jpeg"}  # fmt: skip
MOST_MISSING = 10  # named; all are counted


@dataclass(frozen=True)
class Row:
    """One method over its seeds; fractions, NaN where a cell is missing."""

    name: str
    miou_ST: np.ndarray
    seconds: float  # an image, median; NaN: not known
    gain_ST: np.ndarray | None = None  # None: nothing to compare with
    interval: tuple[float, float] | None = None  # of the gain in mean mIoU; None: too few images; NaN: not asked for


@dataclass(frozen=True)
class Table:
    """Runs under one protocol."""

    protocol: dict[str, Any]  # settings, dotted names
    tasks: tuple[str, ...]
    seeds: tuple[tuple[Any, ...], ...]  # S; seed of the run, seed of its corruptions
    rows: list[Row]

    @property
    def missing(self) -> list[str]:
        """'bn fog/5 seed 1' for each cell that is not there."""
        return [f"{row.name} {self.tasks[t]} seed {self.seeds[s][0]}"
                for row in self.rows for s, t in np.argwhere(np.isnan(row.miou_ST))]  # fmt: skip


def short(task: str) -> str:
    """'gaussian_noise/5' to 'gauss'; any other task keeps its name."""
    name, _, severity = task.partition("/")
    return SHORT.get(name, task) if severity == "5" else task


def mean_of(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is not NaN; NaN where all is."""
    is_there = ~np.isnan(values)
    count = is_there.sum(axis=0)
    return np.divide(
        np.where(is_there, values, 0).sum(axis=0), count, out=np.full(count.shape, np.nan), where=count > 0
    )


def whole(values_ST: np.ndarray) -> np.ndarray:
    """Means over the tasks of the seeds that have them all; a mean over fewer could not be compared."""
    return values_ST[~np.isnan(values_ST).any(axis=1)].mean(axis=1)


def spread(values_S: np.ndarray, sign: str = "") -> str:
    """Mean, and over several runs their standard deviation (n - 1); '-' of none."""
    if not len(values_S):
        return "-"
    deviation = f" \N{PLUS-MINUS SIGN} {percent(values_S.std(ddof=1))}" if len(values_S) > 1 else ""
    return percent(values_S.mean(), sign) + deviation


def header(tasks: Sequence[str]) -> list[str]:
    """Of `lines`."""
    return ["", *map(short, tasks), "mean", f"{LEVEL} % interval", "worst", "s/image"]


def lines(tasks: Sequence[str], rows: Iterable[Row]) -> list[list[str]]:
    """Each method's line, and below it its gain; a task's value is the mean over the seeds that have it."""
    out = []
    for row in rows:
        values = [percent(value) for value in mean_of(row.miou_ST)]
        seconds = "" if math.isnan(row.seconds) else f"{row.seconds:.3f}"
        out.append([row.name, *values, spread(whole(row.miou_ST)), "", "", seconds])
        if row.gain_ST is not None:
            gain_T = mean_of(row.gain_ST)
            gains = [percent(gain, "+") for gain in gain_T]
            worst = (
                "-" if np.isnan(gain_T).any() else f"{percent(gain_T.min(), '+')} {short(tasks[int(gain_T.argmin())])}"
            )
            out.append(["gain", *gains, spread(whole(row.gain_ST), "+"), _ends(row.interval), worst, ""])
    return out


def _ends(interval: tuple[float, float] | None) -> str:
    if interval is None:
        return "too few images"
    return "" if math.isnan(interval[0]) else " to ".join(percent(end, "+") for end in interval)


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *map(list, rows)]
    assert len({len(line) for line in lines}) == 1, lines
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def titles(tables: Sequence[Table]) -> list[str]:
    """Of each table the settings in which its protocol differs from the others'; '' for a single one."""
    names = differing([table.protocol for table in tables])
    return [", ".join(f"{name}={table.protocol[name]}" for name in names if name in table.protocol)
            for table in tables]  # fmt: skip


def as_markdown(tables: Sequence[Table]) -> str:
    """A table each, with what is missing below it."""
    parts = []
    for title, table in zip(titles(tables), tables, strict=True):
        missing = table.missing
        parts += [title] if title else []
        parts.append(markdown(header(table.tasks), lines(table.tasks, table.rows)))
        if missing:
            more = f" and {len(missing) - MOST_MISSING} more" if len(missing) > MOST_MISSING else ""
            parts.append(f"{len(missing)} cells are missing (-): {', '.join(missing[:MOST_MISSING])}{more}")
    return "\n\n".join(parts) + "\n"


def as_csv(tables: Sequence[Table]) -> str:
    """The same lines with the protocol in front; each table with a header of its own, and an empty line between."""
    parts = [
        comma_separated(["protocol", "row", *header(table.tasks)[1:]],
                        ([title, *line] for line in lines(table.tasks, table.rows)))
        for title, table in zip(titles(tables), tables, strict=True)
    ]  # fmt: skip
    return "\n".join(parts)


def comma_separated(header: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    """A table, quoted where need be; each line ends with a newline alone."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def as_latex(tables: Sequence[Table]) -> str:
    """A tabular each, for the package booktabs; the protocol and what is missing as comments."""
    parts = []
    for title, table in zip(titles(tables), tables, strict=True):
        comments = [*([title] if title else []), *(f"missing: {cell}" for cell in table.missing)]
        parts.append("\n".join([*(f"% {comment}" for comment in comments),
                                tabular(header(table.tasks), lines(table.tasks, table.rows))]))  # fmt: skip
    return "\n\n".join(parts) + "\n"


def tabular(header: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in LaTeX, with rules of booktabs; the first column flush left, the others right."""
    head, *body = (" & ".join(map(_latex, line)) + r" \\" for line in (header, *rows))
    return "\n".join([rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\toprule", head, r"\midrule", *body,
                      r"\bottomrule", r"\end{tabular}"])  # fmt: skip


def _latex(text: str) -> str:
    for character in "&%$#_":
        text = text.replace(character, f"\\{character}")
    return text.replace(" \N{PLUS-MINUS SIGN} ", r" $\pm$ ")


def as_json(tables: Sequence[Table]) -> str:
    """All numbers as fractions, seed by seed; null where a cell is missing."""
    whole = [asdict(table) | {"missing": table.missing} for table in tables]
    return json.dumps(plain(whole), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


FORMATS: dict[str, Callable[[Sequence[Table]], str]] = {
    "markdown": as_markdown,
    "csv": as_csv,
    "latex": as_latex,
    "json": as_json,
}


def titled(
    kind: str, head: str, columns: Sequence[str], parts: Sequence[tuple[str, list[list[str]]]], items: Sequence[Any]
) -> str:
    """Tables of the same columns, each under a title.

    Args:
        kind: markdown; csv: the title in a column in front, an empty line between tables; latex: titles as comments;
            json: all numbers of the items as they are.
        head: of that column.
        parts: title and lines of each table.
        items: dataclasses, one a table.
    """
    if kind == "json":
        numbers = plain([asdict(item) for item in items])
        return json.dumps(numbers, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    if kind == "csv":
        return "\n".join(
            comma_separated([head, *columns], ([title, *line] for line in lines)) for title, lines in parts
        )
    if kind == "latex":
        return "\n\n".join(f"% {title}\n{tabular(columns, lines)}" for title, lines in parts) + "\n"
    assert kind == "markdown", kind
    return "\n\n".join(f"{title}\n\n{markdown(columns, lines)}" for title, lines in parts) + "\n"
