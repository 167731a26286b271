"""The charts of a report as Plotly figures. Colours and fonts of axes come from the page, which knows light and dark.

n images   C classes
"""

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from segadapt.report import data
from segadapt.report.data import Method, Pair, Report

GREY = "#8a8f98"  # the source
COLOURS = (
    "#2f80c8",
    "#e08a00",
    "#1f9e7a",
    "#c05a9d",
    "#7d6bd6",
    "#a8761c",
    "#3aa6b9",
)  # told apart by the colour-blind
BETTER, WORSE = "#2f80c8", "#d9661f"
BLUES = [[0, "rgba(47,128,200,0)"], [0.02, "rgba(47,128,200,0.10)"], [1, "rgba(47,128,200,1)"]]
MOST_POINTS = 400  # of a line
MOST_DOTS = 1500  # of a scatter
MOST_CLASSES = 40  # of a confusion matrix, and of the changes: half of them the largest gains, half the losses


def colours(report: Report) -> list[str]:
    """One a method."""
    others = [index for index in range(len(report.methods)) if index != report.source]
    return [GREY if index == report.source else COLOURS[others.index(index) % len(COLOURS)]
            for index in range(len(report.methods))]  # fmt: skip


def plain(figure: go.Figure) -> dict[str, Any]:
    """As the page draws it."""
    text = figure.to_json()
    assert text is not None
    values = json.loads(text)
    values["layout"].pop("template", None)
    return {"data": values["data"], "layout": values["layout"]}


def _figure(traces: Sequence[Any], *, height: int, **layout: Any) -> dict[str, Any]:
    figure = go.Figure(list(traces))
    figure.update_layout(
        height=height, showlegend=False, dragmode=False, margin={"l": 36, "r": 12, "t": 8, "b": 36}, bargap=0.25,
        hoverlabel={"align": "left"}, **layout,
    )  # fmt: skip
    figure.update_xaxes(fixedrange=True, automargin=True)
    figure.update_yaxes(fixedrange=True, automargin=True, title_standoff=8)
    return plain(figure)


def signed(points: float, digits: int = 2) -> str:
    """With a sign as wide as a digit, so that columns stand straight."""
    return f"{points:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _rounded(values: Iterable[float], digits: int = 2) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), digits) for value in values]


def thinned(values_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MOST_POINTS of them with their places from 1; the last one is always there."""
    places = np.unique(np.linspace(0, len(values_n) - 1, min(len(values_n), MOST_POINTS)).round().astype(int))
    return places + 1, values_n[places]


def running(report: Report, task: str) -> dict[str, Any]:
    """Running mIoU over the stream of a task, a line a method."""
    traces = []
    for method, colour in zip(report.methods, colours(report), strict=True):
        values_n = data.running(method, task)
        if len(values_n):
            places, values = thinned(100 * values_n)
            line = {"color": colour, "width": 2, "dash": "dot" if colour == GREY else "solid"}
            traces.append(go.Scatter(x=places.tolist(), y=_rounded(values, 3), mode="lines", line=line,
                                     name=html.escape(method.name), hovertemplate="%{y:.1f} %"))  # fmt: skip
    return _figure(traces, height=190, hovermode="x unified", xaxis={"title": {"text": "image", "standoff": 4}},
                   yaxis={"rangemode": "tozero", "nticks": 5})  # fmt: skip


def class_changes(report: Report, method: Method, tasks: Sequence[str]) -> dict[str, Any]:
    """Change of each class's IoU against the source, the largest on top; without a source the IoU itself."""
    source = method if report.source is None or not report.is_compared else report.methods[report.source]
    own_C = 100 * data.class_ious(method, tasks, beside=source)
    other_C = np.full_like(own_C, np.nan)
    if source is not method:
        other_C = 100 * data.class_ious(source, tasks, beside=method)
    shown_C = own_C if not report.is_compared else own_C - other_C
    order = [c for c in np.argsort(np.nan_to_num(shown_C), kind="stable") if not np.isnan(shown_C[c])]
    if len(order) > MOST_CLASSES:
        order = order[: MOST_CLASSES // 2] + order[-MOST_CLASSES // 2 :]
    names = [html.escape(report.classes[c]) for c in order]
    colour = [BETTER if shown_C[c] >= 0 else WORSE for c in order]
    unit = "IoU, %" if not report.is_compared else "change of IoU, points"
    text = [f"{shown_C[c]:.1f}" if not report.is_compared else signed(float(shown_C[c]), 1) for c in order]
    hover = [f"{name}: {own_C[c]:.1f} %" if not report.is_compared else f"{name}: {other_C[c]:.1f} to {own_C[c]:.1f} %"
             for name, c in zip(names, order, strict=True)]  # fmt: skip
    bars = go.Bar(x=_rounded(shown_C[order]), y=list(range(len(order))), orientation="h", marker={"color": colour},
                  text=text, textposition="outside", cliponaxis=False, hovertext=hover, hoverinfo="text")  # fmt: skip
    low, high = (float(edge) for edge in (min(0, *shown_C[order]), max(0, *shown_C[order])))
    room = 0.14 * (high - low or 1)
    ticks = {"tickvals": list(range(len(order))), "ticktext": names, "showgrid": False}
    span = [low - room * (low < 0), high + room * (high > 0)]
    return _figure([bars], height=64 + 24 * len(order), xaxis={"title": {"text": unit}, "range": span}, yaxis=ticks)


def confusion(report: Report, method: Method) -> dict[str, Any]:
    """Share of each label's pixels by prediction; of many classes those with the most labelled pixels."""
    counts_CC = data.confusion(method)
    shown = np.sort(np.argsort(-counts_CC.sum(axis=1), kind="stable")[:MOST_CLASSES])
    label_C1 = counts_CC.sum(axis=1, keepdims=True)
    share_CC = np.divide(100 * counts_CC, label_C1, out=np.zeros(counts_CC.shape), where=label_C1 > 0)
    share_CC = share_CC[np.ix_(shown, shown)]
    names = [html.escape(report.classes[c]) for c in shown]
    place = {"tickvals": list(range(len(shown))), "ticktext": names, "showgrid": False,
             "zeroline": False}  # fmt: skip
    hover = [[f"{label}: {share:.1f} % as {name}" for name, share in zip(names, row, strict=True)]
             for label, row in zip(names, share_CC, strict=True)]  # fmt: skip
    text = [[f"{share:.0f}" if share >= 10 else "" for share in row] for row in share_CC]
    heat = go.Heatmap(z=[_rounded(row, 1) for row in share_CC], zmin=0, zmax=100, colorscale=BLUES, showscale=False,
                      xgap=1, ygap=1, hovertext=hover, hoverinfo="text",
                      text=text, texttemplate="%{text}" if len(shown) <= 20 else None)  # fmt: skip
    return _figure([heat], height=110 + max(11, 26 - len(shown) // 3) * len(shown),
                   xaxis=place | {"title": {"text": "prediction"}, "tickangle": -60},
                   yaxis=place | {"title": {"text": "label"}, "autorange": "reversed"})  # fmt: skip


def scatter(pairs: Sequence[Pair]) -> dict[str, Any]:
    """mIoU of each image under the source and adapted; of very many evenly chosen ones."""
    step = -(-len(pairs) // MOST_DOTS)
    some = pairs[::step]
    hover = [f"{html.escape(pair.task)}, {html.escape(pair.key)}: {100 * pair.source:.1f} to {100 * pair.adapted:.1f} %"
             for pair in some]  # fmt: skip
    colour = [BETTER if pair.adapted >= pair.source else WORSE for pair in some]
    dots = go.Scatter(x=_rounded(100 * pair.source for pair in some), y=_rounded(100 * pair.adapted for pair in some),
                      mode="markers", marker={"color": colour, "size": 6, "opacity": 0.65}, hovertext=hover,
                      hoverinfo="text")  # fmt: skip
    top = 5 + 100 * max(max(pair.source, pair.adapted) for pair in some)
    equal = go.Scatter(x=[0, top], y=[0, top], mode="lines", line={"color": GREY, "width": 1, "dash": "dot"},
                       hoverinfo="skip")  # fmt: skip
    return _figure([equal, dots], height=320, xaxis={"title": {"text": "source, %"}, "range": [0, top]},
                   yaxis={"title": {"text": "adapted, %"}, "range": [0, top]})  # fmt: skip


def histogram(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Images by the change of their own mIoU."""
    gains = np.array([100 * (pair.adapted - pair.source) for pair in pairs])
    width = max(1.0, float(np.ceil((gains.max() - gains.min()) / 30)))
    edges = np.arange(width * np.floor(gains.min() / width), gains.max() + 2 * width, width)
    counts, _ = np.histogram(gains, edges)
    middle = edges[:-1] + width / 2
    bars = go.Bar(x=_rounded(middle), y=counts.tolist(), width=0.9 * width,
                  marker={"color": [BETTER if value > 0 else WORSE for value in middle]},
                  hovertemplate="%{y} images<extra></extra>")  # fmt: skip
    return _figure([bars], height=320, xaxis={"title": {"text": "change, points"}}, yaxis={"title": {"text": "images"}})


DIAGNOSTICS = {
    "loss": "Loss",
    "candidates": "Candidate classes a window",
    "masked": "Masked share of the latent pixels, %",
}


def diagnostics(method: Method, name: str) -> dict[str, Any] | None:
    """One of DIAGNOSTICS over the whole stream of the first seed, with the tasks' borders; None: not recorded."""
    tasks = [html.escape(task) for task in method.first.tasks]
    values = [[_diagnostic(record, name) for record in data.records(method.first, task)] for task in method.first.tasks]
    ends = np.cumsum([len(of_task) for of_task in values]).tolist()
    series = np.array([value for of_task in values for value in of_task], float)
    if np.isnan(series).all():
        return None
    size = -(-len(series) // MOST_POINTS)
    means = [float(np.mean(part[~np.isnan(part)])) if (~np.isnan(part)).any() else np.nan
             for part in np.split(series, range(size, len(series), size))]  # fmt: skip
    places = [1 + size * index + (size - 1) / 2 for index in range(len(means))]
    line = go.Scatter(x=places, y=_rounded(means, 4), mode="lines", line={"color": COLOURS[0], "width": 1.5},
                      hovertemplate="image %{x}: %{y}<extra></extra>")  # fmt: skip
    shapes = [{"type": "line", "xref": "x", "yref": "paper", "x0": at + 0.5, "x1": at + 0.5, "y0": 0, "y1": 1,
               "line": {"color": GREY, "width": 1, "dash": "dot"}} for at in ends[:-1]]  # fmt: skip
    middles = [(begin + end + 1) / 2 for begin, end in zip([0, *ends], ends, strict=False)]
    span = {"range": [0, 100]} if name == "masked" else {"rangemode": "tozero"}
    return _figure([line], height=200, shapes=shapes, yaxis=span | {"nticks": 5},
                   xaxis={"tickvals": middles, "ticktext": tasks, "showgrid": False})  # fmt: skip


def _diagnostic(record: dict[str, Any], name: str) -> float:
    """NaN where the record has none."""
    if name == "candidates":
        return float(np.mean(record["candidates"])) if record.get("candidates") else np.nan
    value = record.get("kept" if name == "masked" else name)
    if value is None:
        return np.nan
    return 100 * (1 - value) if name == "masked" else value
