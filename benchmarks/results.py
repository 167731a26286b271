"""Run folders to one Markdown table: mIoU of each task, gains paired by seed, their bootstrap interval over images.

python benchmarks/results.py --source 'OUT/source/s*' --row 'adapted=OUT/adapted/s*' --control 'other model=OUT/x/s*'

The folders of a glob are the seeds of one method; those that differ in data.corruptions alone are parts of one run. A
row's runs are paired with the source runs of the same data and the same segmenter, a control's (another segmenter, say)
with those of the same data in the first source group.

T tasks   S runs of a row
"""

import argparse
import glob
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from segadapt.errors import UserError
from segadapt.finished import Run, bootstrap, differing, flat, join, load, read_json
from segadapt.record import write_json
from segadapt.results import SEEDS, columns, is_one_stream
from segadapt.tables import Row, header, lines, markdown
from segadapt.terminal import percent

TASKS = "data.corruptions"  # compared by name and image instead: a run may be in parts
VARIED = (*SEEDS, TASKS, "model.discriminative.checkpoint", "model.generative.checkpoint")  # training seeds too


# --- runs ---


def load_group(pattern: str) -> list[Run]:
    """The runs of one method, which differ in nothing but seeds. UserError: none, or a difference."""
    runs = whole([load(Path(folder)) for folder in sorted(glob.glob(pattern))])
    if not runs:
        raise UserError(f"{pattern}: no folder; expected the run folders of one method. Correct the glob.")
    for run in runs:
        changed = [name for name in differing([runs[0].settings, run.settings]) if name not in VARIED]
        if changed or run.tasks != runs[0].tasks:
            raise UserError(f"{run.folder} and {runs[0].folder} differ in {(changed or ['their tasks'])[0]}; expected "
                            "runs that differ in seeds alone. Give them rows of their own.")  # fmt: skip
    if len({(run.data, run.segmenter) for run in runs}) < len(runs):
        raise UserError(f"{pattern}: two runs of the same data and segmenter; expected one a seed. Narrow the glob.")
    return runs


def whole(parts: list[Run]) -> list[Run]:
    """Runs of the same settings that hold other tasks, each begun anew, as one; all others as they are."""
    groups: dict[str, list[Run]] = {}
    for part in parts:
        shared = {name: value for name, value in part.settings.items() if name != TASKS}
        key = str(part.folder) if is_one_stream(part.settings) else json.dumps([part.segmenter, shared], sort_keys=True)
        groups.setdefault(key, []).append(part)
    runs = []
    for group in groups.values():
        names = [task for part in group for task in part.tasks]
        has_each_once = len(group) > 1 and len(set(names)) == len(names)
        runs += [join(group, columns(group))] if has_each_once else group
    return runs


# --- rows ---


def pair(run: Run, sources: list[Run], *, is_control: bool) -> tuple[Run, Run]:
    """(run, its source run).

    UserError: there is none of the same data and, unless a control, of the same segmenter; or another protocol.
    """
    same = [source for source in sources if source.data == run.data]
    if not is_control:
        same = [source for source in same if source.segmenter == run.segmenter]
    if not same:
        what = "data" if is_control else "data and segmenter"
        raise UserError(f"{run.folder}: no source run has the same {what}; expected one a seed to pair it with. Run "
                        "tta.forward_mode=discriminative_only with the same seeds and data.limit.")  # fmt: skip
    unlike = {source.folder: protocol_differences(run, source) for source in same}
    same = [source for source in same if not unlike[source.folder]] or same
    if unlike[same[0].folder]:
        raise UserError(f"{run.folder} and {same[0].folder} differ in {unlike[same[0].folder][0]}; expected one "
                        "protocol. Run both with the same data settings and precision.")  # fmt: skip
    return run, same[0]


def protocol_differences(run: Run, source: Run) -> list[str]:
    """Settings beside the method's that both must share; the same data may lie elsewhere."""
    names = [name for name in differing([run.settings, source.settings]) if name not in ("data.data_root", TASKS)]
    return [name for name in names if name == "runtime.precision" or name.startswith("data.")]


def row_of(name: str, runs: list[Run], sources: list[Run] | None, *, is_control: bool = False) -> Row:
    """Scores of all runs; with sources also the gains."""
    miou_ST = np.array([run.miou_T for run in runs])
    seconds = float(np.median([seconds for run in runs for seconds in run.seconds_an_image()]))
    if sources is None:
        return Row(name, miou_ST, seconds)
    pairs = [pair(run, sources, is_control=is_control) for run in runs]
    return Row(name, miou_ST, seconds, miou_ST - np.array([source.miou_T for _, source in pairs]), bootstrap(pairs))


def build(sources: list[str], rows: list[tuple[str, bool]]) -> tuple[tuple[str, ...], list[Row]]:
    """Tasks and rows from `NAME=GLOB` texts. UserError: see load, load_group, pair."""
    named = [named_glob(text) for text in sources]
    groups = [load_group(pattern) for _, pattern in named]
    pool = [run for group in groups for run in group]
    out = [row_of(name, group, None) for (name, _), group in zip(named, groups, strict=True)]
    for text, is_control in rows:
        name, pattern = named_glob(text)
        runs = load_group(pattern)
        out.append(row_of(name, runs, groups[0] if is_control else pool, is_control=is_control))
        if runs[0].tasks != pool[0].tasks:
            raise UserError(f"{runs[0].folder}: other tasks than {pool[0].folder}. Make a table of its own.")
    return pool[0].tasks, out


def named_glob(text: str) -> tuple[str, str]:
    """'NAME=GLOB'; 'GLOB' is named source."""
    name, equals, pattern = text.partition("=")
    return (name, pattern) if equals else ("source", text)


# --- tables ---


def results_table(tasks: tuple[str, ...], rows: list[Row], diagnoses: list[str]) -> str:
    """Each method's row, and below it its gain; then the diagnoses (texts `NAME=FILE`)."""
    out = lines(tasks, rows)
    for text in diagnoses:
        out += [line for line in diagnosis_lines(text, tasks) if line not in out]  # the segmenter's only once
    return markdown(header(tasks), out)


def diagnosis_lines(text: str, tasks: tuple[str, ...]) -> list[list[str]]:
    """Of `NAME=FILE` (a diagnosis.json): both models' accuracy on the latent grid, and the cosine of the gradients.

    At the noise level nearest to that of the run's settings; the lines name it. UserError: a task is missing.
    """
    name, _, path = text.rpartition("=")
    diagnosed = {row["task"]: row for row in read_json(Path(path))["tasks"]}
    if missing := [task for task in tasks if task not in diagnosed]:
        raise UserError(f"{path} lacks {missing[0]}; expected every task of the table. Diagnose the same corruptions.")
    sigma = flat(read_json(Path(path).with_name("settings.json")))["model.generative.sigma"]
    rows = [diagnosed[task] for task in tasks]
    levels = [min(row["levels"], key=lambda level: abs(level["sigma"] - sigma)) for row in rows]
    at = f"{name or 'teacher'}, sigma {levels[0]['sigma']:g}: "
    values_of = {
        "segmenter, pixel accuracy on the latent grid": [row["segmenter"]["accuracy"] for row in rows],
        f"{at}pixel accuracy among the candidates": [level["candidates"]["accuracy"] for level in levels],
        f"{at}pixel accuracy among all classes": [level["teacher"]["accuracy"] for level in levels],
        f"{at}mIoU among all classes": [level["teacher"]["miou"] for level in levels],
        f"{at}gradient cosine": [level["cosine"] for level in levels],
    }
    out = []
    for label, values in values_of.items():
        show = "{:+.3f}".format if label.endswith("cosine") else percent
        known = [value for value in values if value is not None]
        mean = show(sum(known) / len(known)) if len(known) == len(values) else "-"
        out.append([label, *("-" if value is None else show(value) for value in values), mean, "", "", ""])
    return out


def as_json(tasks: tuple[str, ...], rows: list[Row]) -> dict[str, Any]:
    """All numbers as fractions, run by run."""
    return {"tasks": tasks, "rows": [{"name": row.name, "miou": row.miou_ST, "gain": row.gain_ST,
            "interval": row.interval, "seconds_an_image": row.seconds} for row in rows]}  # fmt: skip


def main(arguments: list[str]) -> str:
    """What is printed. UserError: see build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", action="append", required=True, metavar="[NAME=]GLOB")
    parser.add_argument("--row", action="append", dest="rows", type=lambda text: (text, False), metavar="NAME=GLOB")
    parser.add_argument("--control", action="append", dest="rows", type=lambda text: (text, True), metavar="NAME=GLOB")
    parser.add_argument("--diagnosis", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(arguments)
    tasks, rows = build(given.source, given.rows or [])
    if given.json:
        write_json(given.json, as_json(tasks, rows))
    return results_table(tasks, rows, given.diagnosis)


if __name__ == "__main__":
    try:
        print(main(sys.argv[1:]))
    except UserError as error:
        sys.stderr.write(f"results.py: {error}\n")
        sys.exit(2)
