"""What a diagnosis means: whether the teacher can teach, in words, as a table and as a plot. Only numbers in.

A row is one task: {"task", "images", "pixels", "segmenter", "best_sigma", "levels"}; a level is a `Tally.summary()` of
one noise level with its "sigma".
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

CLEAN = "clean"  # name of the task of unshifted images
MOST_NAMED = 5  # tasks that the verdict lists
PANEL_INCHES = 2.6

Row = Mapping[str, Any]


def best_sigma(levels: Sequence[Row]) -> float:
    """The noise level at which the teacher, asked about the candidates, is most often right."""
    return max(levels, key=lambda level: _or_least(level["candidates"]["accuracy"]))["sigma"]


def _or_least(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _mean(values: Sequence[float]) -> float:
    """Of those that are numbers; NaN if none is."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _level(row: Row, sigma: float) -> Row:
    return next(level for level in row["levels"] if level["sigma"] == sigma)


def verdict_of(rows: Sequence[Row]) -> dict[str, Any]:
    """Where adaptation can gain: where the teacher, asked about the candidates, beats the segmenter in accuracy.

    The noise level is the one with the highest mean accuracy over the shifted tasks (over all where none is shifted).
    """
    judged = [row for row in rows if row["task"] != CLEAN] or list(rows)
    means = {
        level["sigma"]: _mean([_level(row, level["sigma"])["candidates"]["accuracy"] for row in judged])
        for level in rows[0]["levels"]
    }
    sigma = max(means, key=lambda level: _or_least(means[level]))
    pairs = [
        {
            "task": row["task"],
            "teacher": _level(row, sigma)["candidates"]["accuracy"],
            "segmenter": row["segmenter"]["accuracy"],
        }
        for row in judged
    ]
    return {
        "sigma": sigma,
        "tasks": len(pairs),
        "better": [pair for pair in pairs if pair["teacher"] > pair["segmenter"]],
        "worse": sorted(
            (pair for pair in pairs if pair["teacher"] < pair["segmenter"]),
            key=lambda pair: pair["teacher"] - pair["segmenter"],
        ),
        "accuracy_teacher": means[sigma],
        "accuracy_segmenter": _mean([pair["segmenter"] for pair in pairs]),
        "cosine": _mean([_level(row, sigma)["cosine"] for row in judged]),
    }


def sentences(verdict: Row) -> list[str]:
    """The verdict in words."""
    better, worse, cosine = verdict["better"], verdict["worse"], verdict["cosine"]
    hope = "gains are likely there" if better else "expect no gain"
    lines = [f"The teacher is better than the segmenter on {len(better)} of {verdict['tasks']} tasks (accuracy among "
             f"the candidates, sigma {verdict['sigma']:g}; mean {verdict['accuracy_teacher']:.2f} against "
             f"{verdict['accuracy_segmenter']:.2f}); {hope}{_named(better[:MOST_NAMED], len(better))}."]  # fmt: skip
    if worse:
        lines.append(f"Harm is possible where it is worse{_named(worse[:MOST_NAMED], len(worse))}.")
    if math.isnan(cosine):
        meaning = "no image had two gradients to compare"
    elif cosine > 0:
        meaning = "a small step lowers the cross-entropy on average"
    else:
        meaning = "a small step does not lower the cross-entropy on average"
    lines.append(f"Best sigma {verdict['sigma']:g}; mean gradient cosine {cosine:+.2f}: {meaning}.")
    return [*lines, "This used labels: never choose settings by it on a test split."]


def _named(pairs: Sequence[Row], total: int) -> str:
    """': fog/5 (0.63 against 0.51), ... and 3 more', the teacher first; nothing without tasks."""
    names = ", ".join(f"{pair['task']} ({pair['teacher']:.2f} against {pair['segmenter']:.2f})" for pair in pairs)
    return (f": {names}" if names else "") + (f" and {total - len(pairs)} more" if total > len(pairs) else "")


def table_of(rows: Sequence[Row]) -> Table:
    """A line a task: the segmenter, and the teacher at the level where it is most often right among the candidates."""
    table = Table(
        title="latent grid, %; teach: among the candidates, all: all classes\n"
        "cos: of the gradients; entr: of the class weights, 100: uniform",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    table.add_column("task", vertical="bottom")
    for column in ("segm\nacc", "segm\nmIoU", "best\nsigma", "teach\nacc", "teach\nmIoU", "all\nmIoU", "agree", "cos",
                   "entr", "mask"):  # fmt: skip
        table.add_column(column, justify="right", vertical="bottom")
    for row in rows:
        level, segmenter = _level(row, row["best_sigma"]), row["segmenter"]
        candidates, teacher = level["candidates"], level["teacher"]
        shares = (candidates["accuracy"], candidates["miou"], teacher["miou"], candidates["agreement"])
        table.add_row(
            escape(row["task"]),
            *(_shown(100 * segmenter[name], ".1f") for name in ("accuracy", "miou")),
            f"{row['best_sigma']:g}",
            *(_shown(100 * share, ".1f") for share in shares),
            _shown(level["cosine"], "+.2f"),
            *(_shown(100 * level[name], ".1f") for name in ("entropy_share", "masked")),
        )
    return table


def _shown(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def images_of(rows: Sequence[Row]) -> str:
    """'20', or '14 to 20' where the tasks differ."""
    counts = {row["images"] for row in rows}
    return " to ".join(map(str, sorted({min(counts), max(counts)})))


def plot(rows: Sequence[Row], *, title: str, kind: str) -> bytes:
    """mIoU against sigma, a panel for each task: the teacher as classifier, and the segmenter as a level."""
    import matplotlib
    from matplotlib.figure import Figure

    columns = min(len(rows), 4)
    lines = -(-len(rows) // columns)
    size = (max(5.0, PANEL_INCHES * columns), PANEL_INCHES * lines + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
    for panel, row in zip(axes, rows, strict=False):
        levels = sorted(row["levels"], key=lambda level: level["sigma"])
        sigmas = [level["sigma"] for level in levels]
        for judge, label, style in (("candidates", "teacher, candidates", "o-"), ("teacher", "teacher, all", "s:")):
            panel.plot(sigmas, [100 * level[judge]["miou"] for level in levels], style, markersize=4, label=label)
        panel.axhline(100 * row["segmenter"]["miou"], linestyle="--", color="black", linewidth=1, label="segmenter")
        panel.set_title(row["task"], fontsize="medium", fontweight="bold" if row["task"] == CLEAN else "normal")
        panel.grid(alpha=0.3)
    panels = list(figure.axes)
    for unused in panels[len(rows) :]:
        unused.remove()
    for panel in panels[max(0, len(rows) - columns) : len(rows)]:
        panel.set_xlabel("sigma (1: pure noise)")
        panel.tick_params(labelbottom=True)
    panels[0].set(xlim=(0, 1), ylim=(0, None))
    figure.supylabel("mIoU on the latent grid, %")
    figure.suptitle(title, fontsize="medium")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "segadapt"}):
        figure.savefig(out, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return out.getvalue()
