"""`results table=subsets`: what trainings on 1/x of the images come to, as a table and a plot of mIoU against x.

Runs of `train` that differ in data.subset and in the seed alone make a curve.
"""

import io
import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segadapt.errors import UserError
from segadapt.finished import differing, flat, read_json
from segadapt.tables import titled
from segadapt.terminal import percent

X, SEED = "data.subset", "experiment.seed"
ELSEWHERE = (X, SEED, "data.data_root")  # a curve's runs may differ in these
COLUMNS = ("x", "images", "seeds", "mIoU of the last step", "mIoU of the best validation")
KINDS = (".svg", ".png")


@dataclass(frozen=True)
class Point:
    """The runs of one subset, by seed; scores are fractions of the validation images."""

    x: int
    images: int  # of training
    last: dict[int, float] = field(default_factory=dict)  # seed: mIoU
    best: dict[int, float] = field(default_factory=dict)  # chosen on the images that it is a score of


@dataclass(frozen=True)
class Curve:
    """Points of rising x."""

    data: str  # and what it is validated on
    conditions: dict[str, Any]  # settings that its runs share, dotted names
    points: list[Point]


def build(folders: Iterable[Path]) -> list[Curve]:
    """The curves of run folders of `train`. What has not finished is left out, and named on stderr.

    UserError: two runs of one subset and seed under the same settings, or of one subset with other numbers of images.
    """
    curves: dict[str, tuple[str, dict[str, Any], dict[int, Point]]] = {}
    unfinished = []
    for folder in folders:
        if not (folder / "results.json").is_file():
            unfinished.append(folder.name)
            continue
        results, settings = read_json(folder / "results.json"), flat(read_json(folder / "settings.json"))
        shared = {name: value for name, value in settings.items() if name not in ELSEWHERE}
        on = results["validated_on"]
        data = f"{settings['data.name']} {settings['data.split']}, scored on {on['images']} images of {on['split']}"
        _, _, points = curves.setdefault(json.dumps(shared, sort_keys=True), (data, shared, {}))
        x, seed, images = settings[X], settings[SEED], results["training"]["images"]
        point = points.setdefault(x, Point(x, images))
        if seed in point.last:
            raise UserError(f"{folder}: {X}={x} with {SEED}={seed} is there twice under the same settings; expected "
                            "each run once. Leave one out.")  # fmt: skip
        if images != point.images:
            raise UserError(f"{folder}: {images} training images at {X}={x}, another run has {point.images}; expected "
                            "one data set. Name the runs of one.")  # fmt: skip
        for name in ("last", "best"):
            score = results[name]["miou"]
            getattr(point, name)[seed] = math.nan if score is None else score
    if unfinished:
        sys.stderr.write(f"left out, not finished: {len(unfinished)} runs ({', '.join(unfinished)})\n")
    if not curves:
        raise UserError("runs: none of `train` has finished; expected one or more. Name other folders.")
    made = [Curve(data, shared, sorted(points.values(), key=lambda point: point.x))
            for data, shared, points in curves.values()]  # fmt: skip
    return sorted(made, key=lambda curve: json.dumps(curve.conditions, sort_keys=True))


def titles(curves: Sequence[Curve]) -> list[str]:
    """Data of each, and the settings in which they differ."""
    names = differing([curve.conditions for curve in curves])
    more = [", ".join(f"{name}={curve.conditions.get(name)}" for name in names) for curve in curves]
    return [curve.data + (f"; {text}" if text else "") for curve, text in zip(curves, more, strict=True)]


def _mean(scores: dict[int, float]) -> str:
    """'61.3', or with two seeds or more '61.3 +- 0.4', the standard deviation over them."""
    values = list(scores.values())
    if len(values) < 2:
        return percent(values[0])
    return f"{percent(statistics.fmean(values))} \N{PLUS-MINUS SIGN} {percent(statistics.stdev(values))}"


def _lines(curve: Curve) -> list[list[str]]:
    return [[str(point.x), str(point.images), str(len(point.last)), _mean(point.last), _mean(point.best)]
            for point in curve.points]  # fmt: skip


def render(curves: Sequence[Curve], kind: str) -> str:
    """A table each, headed by its data, see `titled`; json: fractions, seed by seed."""
    parts = [(title, _lines(curve)) for title, curve in zip(titles(curves), curves, strict=True)]
    note = "\nThe best validation was chosen on the images that it is a score of; the last step was not chosen.\n"
    return titled(kind, "data", COLUMNS, parts, curves) + (note if kind == "markdown" else "")


def plot(curves: Sequence[Curve], *, kind: str) -> bytes:
    """mIoU against x on an axis of powers of two: a colour a curve, last and best; bars are the range over seeds.

    Args:
        kind: svg or png.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(6.4, 4.4 + 0.3 * len(curves)), layout="constrained")
    axes = figure.subplots()
    for colour, (title, curve) in enumerate(zip(titles(curves), curves, strict=True)):
        for name, style in (("last", "o-"), ("best", "s:")):
            scores = [[100 * score for score in getattr(point, name).values()] for point in curve.points]
            means = [statistics.fmean(values) for values in scores]
            ends = [[max(0.0, mean - min(values)) for mean, values in zip(means, scores, strict=True)],
                    [max(0.0, max(values) - mean) for mean, values in zip(means, scores, strict=True)]]  # fmt: skip
            x = [point.x for point in curve.points]
            label = f"{title}: {name}"
            axes.errorbar(x, means, ends, fmt=style, color=f"C{colour}", markersize=4, capsize=2, label=label)
    ticks = sorted({point.x for curve in curves for point in curve.points})
    images = {point.x: point.images for curve in curves for point in curve.points}
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{'all' if x == 1 else f'1/{x}'}\n{images[x]}" for x in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="share of the training images, and their number", ylabel="validation mIoU, %")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize="x-small")
    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "segadapt"}):
        figure.savefig(out, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return out.getvalue()
