"""Run folders to one Markdown table: mIoU of each task, gains paired by seed, their bootstrap interval over images.

python benchmarks/results.py --source 'OUT/source/s*' --row 'adapted=OUT/adapted/s*' --control 'other model=OUT/x/s*'

The folders of a glob are the seeds of one method. A row's runs are paired with the source runs of the same data and the
same segmenter, a control's (another segmenter, say) with those of the same data in the first source group.

T tasks   n images of a task   C classes   3 correct, label, predicted px   S runs of a row   U images in all
R resamples
"""

import argparse
import glob
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from segadapt.errors import UserError
from segadapt.record import write_json
from segadapt.seeds import numpy_generator

SHORT = {"gaussian_noise": "gauss", "shot_noise": "shot", "impulse_noise": "impul", "defocus_blur": "defoc",
         "glass_blur": "glass", "motion_blur": "motion", "zoom_blur": "zoom", "snow": "snow", "frost": "frost",
         "fog": "fog", "brightness": "brit", "contrast": "contr", "elastic_transform": "elast", "pixelate": "pixel",
         "jpeg_compression": "jpeg"}  # fmt: skip
SEEDS = ("experiment.seed", "data.corruption_seed")
VARIED = (*SEEDS, "model.discriminative.checkpoint", "model.generative.checkpoint")  # within a row: training seeds too
RESAMPLES = 2000
LEVEL = 95  # %, of the interval


@dataclass(frozen=True)
class Run:
    """One finished run."""

    folder: Path
    settings: dict[str, Any]  # dotted names
    tasks: tuple[str, ...]
    miou_T: np.ndarray
    keys: list[list[str]]  # T, n
    counts: list[np.ndarray]  # T, float64 [n, C, 3]
    data: tuple[str, str]  # order_sha256, data_sha256
    segmenter: str  # SHA-256 of its source weights
    seconds: list[float]  # an image


@dataclass(frozen=True)
class Row:
    """One method over its seeds; fractions."""

    name: str
    miou_ST: np.ndarray
    seconds: float  # an image, median
    gain_ST: np.ndarray | None = None  # None: a source row
    interval: tuple[float, float] | None = None  # of the gain in mean mIoU; None: too few images


# --- runs ---


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} to {'a.b': 1}."""
    if not isinstance(value, dict):
        return {prefix: value}
    items = [(f"{prefix}.{key}" if prefix else key, item) for key, item in value.items()]
    return {name: leaf for key, item in items for name, leaf in flat(item, key).items()}


def read_json(path: Path) -> Any:
    """UserError: the run has not finished."""
    if not path.is_file():
        raise UserError(f"{path} is missing; expected the folder of a finished run. Run it, or correct the glob.")
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def miou(counts_C3: np.ndarray) -> np.ndarray:
    """[..., C, 3] to [...]: mean IoU of the classes present or predicted, as metrics.scores; NaN without any."""
    correct_C, label_C, predicted_C = np.moveaxis(counts_C3, -1, 0)
    union_C = label_C + predicted_C - correct_C
    is_defined_C = union_C > 0
    iou_C = np.divide(correct_C, union_C, out=np.zeros_like(union_C), where=is_defined_C)
    num_defined = is_defined_C.sum(axis=-1).astype(float)
    return np.divide(iou_C.sum(axis=-1), num_defined, out=np.full(num_defined.shape, np.nan), where=num_defined > 0)


@cache
def load(folder: Path) -> Run:
    """Read a run; its images' counts must give its mIoU. UserError: unfinished, unlabelled or without counts."""
    results, settings = read_json(folder / "results.json"), flat(read_json(folder / "settings.json"))
    tasks, records = results["tasks"], read_lines(folder / "records.jsonl")
    if any("classes" not in record for record in records) or any(task["miou"] is None for task in tasks):
        raise UserError(f"{folder}: records without the column classes (pixel counts); expected labelled images and a "
                        "run of this version. Run it again.")  # fmt: skip
    keys, counts = [], []
    for task in tasks:
        own = [record for record in records if record["task"] == task["task"]]
        counts_nC3 = np.zeros((len(own), len(task["per_class"]), 3))
        for index, record in enumerate(own):
            for number, counts_3 in record["classes"].items():
                counts_nC3[index, int(number)] = counts_3
        error = abs(float(miou(counts_nC3.sum(axis=0))) - task["miou"])
        assert error < 1e-9, f"{folder}, {task['task']}: records.jsonl and results.json differ by {error} in mIoU"
        keys.append([record["key"] for record in own])
        counts.append(counts_nC3)
    seconds = [line["seconds"] for line in read_lines(folder / "timings.jsonl") if "seconds" in line]
    names, values = tuple(task["task"] for task in tasks), np.array([task["miou"] for task in tasks])
    data = results["order_sha256"], results["data_sha256"]
    weights = results["weights_sha256"]["discriminative"]
    return Run(folder, settings, names, values, keys, counts, data, weights, seconds)


def load_group(pattern: str) -> list[Run]:
    """The runs of one method, which differ in nothing but seeds. UserError: none, or a difference."""
    runs = [load(Path(folder)) for folder in sorted(glob.glob(pattern))]
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


def differing(settings: list[dict[str, Any]]) -> list[str]:
    """Names of the settings in which they are not all equal."""
    names = dict.fromkeys(name for one in settings for name in one)
    return [name for name in names if any(one.get(name) != settings[0].get(name) for one in settings)]


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
    names = differing([run.settings, source.settings])
    return [n for n in names if n == "runtime.precision" or (n.startswith("data.") and n != "data.data_root")]


def bootstrap(pairs: list[tuple[Run, Run]]) -> tuple[float, float] | None:
    """Percentile interval of the gain in mean mIoU, over images drawn with replacement (paired bootstrap, Efron 1979).

    One draw of images serves both runs of a pair, all tasks and all seeds, as the same image may be in several of them.
    None: too few images, some resample left a task empty.
    """
    images = sorted({key for run, _ in pairs for keys in run.keys for key in keys})
    column_of = {key: column for column, key in enumerate(images)}
    draws_RU = numpy_generator(0, "bootstrap").multinomial(
        len(images), np.full(len(images), 1 / len(images)), RESAMPLES
    )
    gain_R = np.zeros(RESAMPLES)
    for run, source in pairs:
        for task, keys in enumerate(run.keys):
            assert keys == source.keys[task], (run.folder, source.folder)
            weights_Rn = draws_RU[:, [column_of[key] for key in keys]].astype(float)
            for sign, counts_nC3 in ((1, run.counts[task]), (-1, source.counts[task])):
                resampled_RC3 = (weights_Rn @ counts_nC3.reshape(len(keys), -1)).reshape(RESAMPLES, -1, 3)
                gain_R += sign * miou(resampled_RC3) / len(run.tasks) / len(pairs)
    if np.isnan(gain_R).any():
        return None
    low, high = np.percentile(gain_R, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(low), float(high)


def row_of(name: str, runs: list[Run], sources: list[Run] | None, *, is_control: bool = False) -> Row:
    """Scores of all runs; with sources also the gains."""
    miou_ST = np.array([run.miou_T for run in runs])
    seconds = float(np.median([seconds for run in runs for seconds in run.seconds]))
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


def short(task: str) -> str:
    """'gaussian_noise/5' to 'gauss'; any other task keeps its name."""
    name, _, severity = task.partition("/")
    return SHORT.get(name, task) if severity == "5" else task


def percent(value: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.2f}"


def spread(values_S: np.ndarray, sign: str = "") -> str:
    """Mean, and over several runs their standard deviation (n - 1)."""
    deviation = f" \N{PLUS-MINUS SIGN} {percent(values_S.std(ddof=1))}" if len(values_S) > 1 else ""
    return percent(values_S.mean(), sign) + deviation


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *map(list, rows)]
    assert len({len(line) for line in lines}) == 1, lines
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def results_table(tasks: tuple[str, ...], rows: list[Row], diagnoses: list[str]) -> str:
    """Each method's row, and below it its gain; then the diagnoses (texts `NAME=FILE`)."""
    lines = []
    for row in rows:
        values = [percent(value) for value in row.miou_ST.mean(axis=0)]
        lines.append([row.name, *values, spread(row.miou_ST.mean(axis=1)), "", "", f"{row.seconds:.3f}"])
        if row.gain_ST is not None:
            gain_T = row.gain_ST.mean(axis=0)
            interval = " to ".join(percent(end, "+") for end in row.interval) if row.interval else "too few images"
            worst = int(gain_T.argmin())
            lines.append(["gain", *(percent(gain, "+") for gain in gain_T), spread(row.gain_ST.mean(axis=1), "+"),
                          interval,
                          f"{percent(gain_T[worst], '+')} {short(tasks[worst])}", ""])  # fmt: skip
    for text in diagnoses:
        lines += [line for line in diagnosis_lines(text, tasks) if line not in lines]  # the segmenter's only once
    return markdown(["", *map(short, tasks), "mean", f"{LEVEL} % interval", "worst", "s/image"], lines)


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
    lines = {
        "segmenter, pixel accuracy on the latent grid": [row["segmenter"]["accuracy"] for row in rows],
        f"{at}pixel accuracy among the candidates": [level["candidates"]["accuracy"] for level in levels],
        f"{at}pixel accuracy among all classes": [level["teacher"]["accuracy"] for level in levels],
        f"{at}mIoU among all classes": [level["teacher"]["miou"] for level in levels],
        f"{at}gradient cosine": [level["cosine"] for level in levels],
    }
    out = []
    for label, values in lines.items():
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
