"""The verb `results`: any set of run folders to tables, a row a method, a column a task; one table a protocol.

With table=ranked a row a run instead, see ranking.py; with table=subsets a row a part of the training images, see
subsets.py.

T tasks   S seeds
"""

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segadapt import ranking, subsets
from segadapt.config_verbs import ResultsConfig
from segadapt.corruptions import COMMON, EXTRA
from segadapt.errors import UserError, did_you_mean
from segadapt.finished import Run, bootstrap, differing, flat, join, load, read_json
from segadapt.methods import METHODS
from segadapt.record import write_bytes
from segadapt.tables import FORMATS, Row, Table

SEEDS = ("experiment.seed", "data.corruption_seed")
ANYWHERE = ("data.data_root", "data.corruptions", *SEEDS)  # the same data elsewhere; its tasks in other folders
RULE = "evaluate."  # settings of the rule by which a run scores; none: that of `adapt`
OF_TRAIN = "train.losses."  # which only `train` has
OTHER_VERBS = ("train.", "diagnose.")  # their run folders are passed over


def run(settings: ResultsConfig) -> None:
    """Print the tables, or write them to a file.

    Raises:
        UserError: no run folder; the same cell twice with other scores; other images or weights under one protocol.
    """
    if settings.against not in METHODS:
        raise UserError(f"against={settings.against} is not a method.{did_you_mean(settings.against, METHODS)}")
    plot = None if settings.plot is None else Path(settings.plot).expanduser()
    if plot is not None and (settings.table != "subsets" or plot.suffix not in subsets.KINDS):
        cure = "Set table=subsets" if settings.table != "subsets" else "Correct the name"
        raise UserError(f"plot={plot} with table={settings.table}: expected a file {' or '.join(subsets.KINDS)} with "
                        f"table=subsets. {cure}, or leave it out.")  # fmt: skip
    folders = run_folders(settings.runs, trained=settings.table == "subsets")
    if settings.table == "subsets":
        curves = subsets.build(folders)
        text = subsets.render(curves, settings.format)
        if plot is not None:
            write_bytes(plot, subsets.plot(curves, kind=plot.suffix[1:]))
    elif settings.table == "ranked":
        text = ranking.render(ranking.build(folders), settings.format)
    else:
        runs = [read(folder) for folder in folders]
        made = build_tables(runs, against=settings.against, resamples=settings.resamples, is_timed=True)
        text = FORMATS[settings.format](made)
    if settings.output is None:
        sys.stdout.write(text)
    else:
        write_bytes(Path(settings.output).expanduser(), text.encode())


# --- runs ---


def run_folders(given: Iterable[str], *, trained: bool = False) -> list[Path]:
    """The run folders of adapt and evaluate among these folders and below them, or of `train` if trained.

    UserError: none, or no folder.
    """
    found = []
    for text in given:
        top = Path(text).expanduser()
        if not top.is_dir():
            raise UserError(f"{text} is no folder; expected a run folder, or a folder of run folders. Correct it.")
        before = len(found)
        for folder, below, files in os.walk(top):
            if "settings.json" in files:
                found.append(Path(folder))
                below.clear()
            below.sort()
        if len(found) == before:
            raise UserError(f"{text} holds no run folder (none with settings.json). Name the folder of the runs.")
    unique = list(dict.fromkeys(folder.resolve() for folder in found))
    kept = [folder for folder in unique if _is_wanted(_settings(folder), trained=trained)]
    if not kept:
        verbs = "train" if trained else "adapt or evaluate"
        raise UserError(f"{unique[0]}: a run of another verb; expected one of {verbs}. Name other folders.")
    if len(kept) < len(unique):
        others = ", ".join(folder.name for folder in unique if folder not in kept)
        hint = "" if trained else "; a trained model is scored by `segadapt evaluate`"
        sys.stderr.write(f"left out, of other verbs: {len(unique) - len(kept)} runs ({others}){hint}\n")
    return kept


def _is_wanted(settings: dict[str, Any], *, trained: bool) -> bool:
    if trained:
        return any(name.startswith(OF_TRAIN) for name in settings)
    return not any(name.startswith(OTHER_VERBS) for name in settings)


def _settings(folder: Path) -> dict[str, Any]:
    return flat(read_json(folder / "settings.json"))


def read(folder: Path) -> Run:
    """A run; without scores where it has not finished. UserError: see load."""
    return load(folder) if (folder / "results.json").is_file() else unfinished(folder, _settings(folder), ())


def unfinished(folder: Path, settings: dict[str, Any], tasks: Sequence[str]) -> Run:
    """A run of which only the settings are known, and perhaps the names of its tasks."""
    return Run(settings, tuple(tasks), (folder,) * len(tasks), np.full(len(tasks), np.nan), ("",) * len(tasks), "")


# --- protocols ---


def is_one_stream(settings: dict[str, Any]) -> bool:
    """Its tasks depend on each other, so that they are one cell; where each begins with a reset, each is a cell."""
    has_order = settings.get("data.order", "tasks") != "tasks" or settings.get("data.rounds", 1) > 1
    return has_order or bool(settings.get("tta.continual"))


def protocol_of(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings beside the method's that all runs of a table share; a run that never learns has no reset rule."""
    sections = ("data.", "model.discriminative.", RULE)
    names = [name for name in settings if name.startswith(sections) and name not in ANYWHERE]
    names += [name for name in ("runtime.precision", "tta.continual", "tta.episodic") if name in settings]
    names += ["data.corruptions"] if is_one_stream(settings) else []
    rule = {} if any(name.startswith(RULE) for name in names) else {"evaluate": "as adapt"}  # in no table with another
    return {name: settings[name] for name in names if name in settings} | rule


def _learns(one: Run) -> bool:
    return any(name.startswith("tta.") for name in one.settings)


def by_protocol(runs: Iterable[Run]) -> list[tuple[dict[str, Any], list[Run]]]:
    """Groups of runs that may be compared; a run that never learns is in every group that it fits."""
    groups: list[tuple[dict[str, Any], list[Run]]] = []
    for one in sorted(runs, key=lambda one: not _learns(one)):
        protocol = protocol_of(one.settings)
        fitting = [of_group for other, of_group in groups
                   if (protocol == other if _learns(one) else protocol.items() <= other.items())]  # fmt: skip
        for of_group in fitting:
            of_group.append(one)
        if not fitting:
            groups.append((protocol, [one]))
    return groups


# --- tables ---


def build_tables(runs: Iterable[Run], *, against: str, resamples: int, is_timed: bool) -> list[Table]:
    """One table a protocol.

    Args:
        runs: finished or not; the cells of one method and seed are joined.
        against: method whose row the gains of the others are taken against, seed by seed.
        resamples: of the bootstrap; 0: no intervals, and no records are read.
        is_timed: read the seconds an image too.
    Raises:
        UserError: the same cell twice with other scores; other images or weights under one protocol; two rows of
            `against` in one table.
    """
    groups = sorted(by_protocol(runs), key=lambda group: json.dumps(group[0], sort_keys=True))
    return [_table(protocol, group, against, resamples, is_timed) for protocol, group in groups]


def _table(protocol: dict[str, Any], runs: list[Run], against: str, resamples: int, is_timed: bool) -> Table:
    _refuse_other_weights(runs)
    tasks = columns([one for one in runs if _learns(one)] or runs)
    seeds = tuple(sorted({_seed(one) for one in runs}, key=str))
    order = rows_of(protocol, runs, tasks, against=against)
    others = [by_seed for name, by_seed in order if _method(name) == against]
    if len(others) > 1:
        two = " and ".join(name for name, _ in order if _method(name) == against)
        raise UserError(f"against={against}: {two} are under one protocol; expected one row to compare with. Name the "
                        "folders of one of them.")  # fmt: skip
    rows = []
    for name, by_seed in order:
        other = others[0] if others and by_seed is not others[0] else None
        rows.append(_row(name, by_seed, other, tasks, seeds, resamples, is_timed))
    return Table(protocol, tasks, seeds, rows)


def rows_of(
    protocol: dict[str, Any], runs: Iterable[Run], tasks: tuple[str, ...], *, against: str
) -> list[tuple[str, dict[tuple[Any, ...], Run]]]:
    """Name and runs by seed of each row: the cells of one method and seed joined; the row of `against` first.

    UserError: the same cell twice with other scores.
    """
    of_row: dict[str, dict[tuple[Any, ...], list[Run]]] = {}
    for one in runs:
        own = {name: value for name, value in one.settings.items() if name not in (*protocol, *ANYWHERE)}
        of_row.setdefault(json.dumps(own, sort_keys=True), {}).setdefault(_seed(one), []).append(one)
    joined = {row: {seed: _joined(parts, tasks) for seed, parts in by_seed.items()} for row, by_seed in of_row.items()}
    names = _names([json.loads(row) for row in joined])
    return sorted(zip(names, joined.values(), strict=True), key=lambda row: _rank(row[0], against))


def columns(runs: Sequence[Run]) -> tuple[str, ...]:
    """Names of all tasks in the paper's order; those of one long stream in its own."""
    longest = max(runs, key=lambda one: len(one.tasks))
    names = dict.fromkeys([*longest.tasks, *(task for one in runs for task in one.tasks)])
    if is_one_stream(longest.settings):
        return tuple(names)
    paper = {name: place for place, name in enumerate((*COMMON, *EXTRA))}
    return tuple(sorted(names, key=lambda task: paper.get(task.partition("/")[0], len(paper))))


def _seed(one: Run) -> tuple[Any, ...]:
    return tuple(one.settings.get(name) for name in SEEDS)


def _method(name: str) -> str:
    return name.partition(" (")[0]


def _rank(name: str, against: str) -> tuple[bool, int, str]:
    """The method that the others are compared with first, then as METHODS has them."""
    order = list(METHODS)
    return _method(name) != against, order.index(_method(name)) if _method(name) in order else len(order), name


def _names(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The method; where it has several rows, with the settings in which they differ."""
    names = []
    for row in rows:
        alike = [other for other in rows if other["method"] == row["method"]]
        shown = [f"{name}={row.get(name)}" for name in differing(alike)]
        names.append(row["method"] + (f" ({', '.join(shown)})" if shown else ""))
    return names


def _refuse_other_weights(runs: Sequence[Run]) -> None:
    """UserError: two segmenters of one name."""
    first, *more = [one for one in runs if one.segmenter] or [None]
    for one in more:
        if first and one and one.segmenter != first.segmenter:
            raise UserError(f"{one.folder} and {first.folder} name the same segmenter, but its weights differ "
                            f"({one.segmenter[:12]}, {first.segmenter[:12]}); expected one. Name the folders of one "
                            "of them.")  # fmt: skip


def _joined(parts: list[Run], tasks: tuple[str, ...]) -> Run:
    """The cells of one method and seed as one run. UserError: a task twice, and not alike."""
    seen: dict[str, tuple[Run, float, str]] = {}
    done = sorted(parts, key=lambda one: bool(np.isnan(one.miou_T).any()))
    for one in done:
        for task, score, digest in zip(one.tasks, one.miou_T, one.data, strict=True):
            other, *scored = seen.setdefault(task, (one, score, digest))
            if not np.isnan(score) and [score, digest] != scored:
                raise UserError(f"{one.folder} and {other.folder} hold {task} of the same settings and seed, with "
                                "other scores or images; expected each cell once. Leave one out.")  # fmt: skip
    return join(done, tasks)


def _row(
    name: str, by_seed: dict[tuple[Any, ...], Run], other: dict[tuple[Any, ...], Run] | None, tasks: tuple[str, ...],
    seeds: tuple[tuple[Any, ...], ...], resamples: int, is_timed: bool,
) -> Row:  # fmt: skip
    miou_ST = np.stack([_scores(by_seed.get(seed), tasks) for seed in seeds])
    seconds = [value for one in by_seed.values() if is_timed for value in _finished(one).seconds_an_image()]
    typical = float(np.median(seconds)) if seconds else float("nan")
    if other is None:
        return Row(name, miou_ST, typical)
    gain_ST = miou_ST - np.stack([_scores(other.get(seed), tasks) for seed in seeds])
    for seed in by_seed.keys() & other.keys():
        _refuse_other_images(by_seed[seed], other[seed])
    whole = [seed for seed, gain_T in zip(seeds, gain_ST, strict=True) if not np.isnan(gain_T).any()]
    pairs = [(by_seed[seed], other[seed]) for seed in whole]
    interval = bootstrap(pairs, resamples=resamples) if pairs and resamples else (float("nan"), float("nan"))
    return Row(name, miou_ST, typical, gain_ST, interval)


def _scores(one: Run | None, tasks: tuple[str, ...]) -> np.ndarray:
    """float64 [T], NaN where a task is missing."""
    scores = dict(zip(one.tasks, one.miou_T, strict=True)) if one else {}
    return np.array([scores.get(task, np.nan) for task in tasks])


def _finished(one: Run) -> Run:
    return join([one], [task for task, score in zip(one.tasks, one.miou_T, strict=True) if not np.isnan(score)])


def _refuse_other_images(one: Run, other: Run) -> None:
    """UserError: the same task and seed, but other pixels, labels or order."""
    digests = {task: digest for task, digest in zip(other.tasks, other.data, strict=True) if digest}
    for task, digest in zip(one.tasks, one.data, strict=True):
        if digest and digests.get(task, digest) != digest:
            raise UserError(f"{one.folder} and {other.folder}: other images or labels of {task}, under one protocol; "
                            "expected the same data. Name the runs of one data set.")  # fmt: skip
