"""The scripts that make the tables: scores from pixel counts, paired gains and their interval, searches, job lists."""

import importlib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from quick_settings import quick_settings

from segadapt import metrics
from segadapt.__main__ import VERBS
from segadapt.errors import UserError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TASKS = ("fog/5", "contrast/5")
BASH_STUB = """#!/bin/bash
case $1 in
  *sweep.py) cat >>"$JOBS" ;;
  *search.py) # --most-loss POINTS [--best] SOURCE CANDIDATE...: the first candidate
    echo "${@:2}" >>"$JOBS.searches"
    shift 3
    if [[ $1 == --best ]]; then shift; fi
    echo "$2" ;;
  *) echo "$@" >>"$TABLES" ;;
esac
"""
SEGADAPT_STUB = """import json, os, pathlib, sys, time
given = dict(part.split("=", 1) for part in sys.argv[2:])
with open("begun.txt", "a") as file:
    file.write(given["experiment.id"] + "\\n")
time.sleep(float(given.get("seconds", 0)))
if "fail" in given:
    sys.exit("the cause is " + given["fail"])
folder = pathlib.Path(given["logging.root"], given["experiment.name"], given["experiment.id"])
folder.mkdir(parents=True, exist_ok=True)
(folder / "results.json").write_text(json.dumps([os.environ["CUDA_VISIBLE_DEVICES"], sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def script():
    """script(name): the module benchmarks/NAME.py, as running it would find its neighbours."""
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module
    sys.path.remove(str(BENCHMARKS))


def confusions(rng: np.random.Generator, images: int, *, right: float, num_classes: int = 4) -> np.ndarray:
    """[n, C, C] of random images of 60 px; the last class is never there, and seldom predicted."""
    out = np.zeros((images, num_classes, num_classes), np.int64)
    for image_CC in out:
        label = rng.choice(rng.integers(0, num_classes - 1, 2), 60)
        guess = rng.choice(num_classes, 60, p=[0.4, 0.3, 0.29, 0.01])
        np.add.at(image_CC, (label, np.where(rng.random(60) < right, label, guess)), 1)
    return out


def columns(image_CC: np.ndarray) -> dict[str, list[int]]:
    """As records.jsonl holds an image's counts: the classes that are there or predicted."""
    label_C, predicted_C = image_CC.sum(axis=1), image_CC.sum(axis=0)
    return {str(c): [int(image_CC[c, c]), int(label_C[c]), int(predicted_C[c])]
            for c in range(len(image_CC)) if label_C[c] + predicted_C[c]}  # fmt: skip


def write_run(
    folder: Path,
    of_task: dict[str, np.ndarray],
    *,
    seed: int = 0,
    keys: list[str] | None = None,
    segmenter: str = "first",
    method: str = "generative",
    lr: float = 1e-5,
    data: str = "",
    more: dict[str, dict[str, object]] | None = None,
) -> Path:
    """A run folder with these confusion matrices, [n, C, C] a task; more: sections of its settings."""
    folder.mkdir(parents=True)
    tasks, records = [], []
    for task, confusion_nCC in of_task.items():
        names = keys or [f"{index:03d}" for index in range(len(confusion_nCC))]
        records += [{"task": task, "key": key, "classes": columns(image_CC)}
                    for key, image_CC in zip(names, confusion_nCC, strict=True)]  # fmt: skip
        score = metrics.scores(confusion_nCC.sum(axis=0)).miou
        tasks.append({"task": task, "miou": score, "per_class": dict.fromkeys("abcd")})
    results = {"tasks": tasks, "order_sha256": f"order{seed}{data}", "data_sha256": f"data{seed}{data}",
               "mean": {"miou": float(np.mean([task["miou"] for task in tasks]))},
               "weights_sha256": {"discriminative": segmenter}}  # fmt: skip
    settings = {"experiment": {"seed": seed}, "method": method}
    settings |= {} if method == "source" else {"tta": {"optimizer": {"lr": lr}}}
    settings |= more or {}
    timings = [{"started": "now"}, {"seconds": 0.1}, {"seconds": 0.2}, {"seconds": 0.9}]
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    (folder / "timings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in timings))
    return folder


def write_pairs(root: Path, seeds: int = 2, images: int = 12) -> None:
    """source/s0 ... and adapted/s0 ...: the adapted ones are right more often."""
    rng = np.random.default_rng(5)
    for seed in range(seeds):
        source = {task: confusions(rng, images, right=0.4) for task in TASKS}
        write_run(root / f"source/s{seed}", source, seed=seed, method="source")
        write_run(root / f"adapted/s{seed}", {t: confusions(rng, images, right=0.6) for t in TASKS}, seed=seed)


# Results


def test_scores_from_the_counts_of_images_are_those_of_the_confusion_matrix(script, tmp_path):
    results, rng = script("results"), np.random.default_rng(1)
    confusion = {task: confusions(rng, 9, right=right) for task, right in zip(TASKS, (0.3, 0.9), strict=True)}
    run = results.load(write_run(tmp_path / "run", confusion))
    for task, counts_nC3 in enumerate(run.counts):
        assert float(results.miou(counts_nC3.sum(axis=0))) == pytest.approx(run.miou_T[task], abs=1e-12)
        one_by_one = [metrics.scores(image_CC).miou for image_CC in confusion[TASKS[task]]]
        assert results.miou(counts_nC3) == pytest.approx(np.array(one_by_one), abs=1e-12)


def test_records_that_disagree_with_the_results_stop_the_table(script, tmp_path):
    folder = write_run(tmp_path / "run", {"fog/5": confusions(np.random.default_rng(1), 9, right=0.5)})
    lines = (folder / "records.jsonl").read_text().splitlines(keepends=True)
    (folder / "records.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(AssertionError, match=r"fog/5: records\.jsonl and results\.json differ"):
        script("results").load(folder)


def test_table_shows_means_over_seeds_and_gains_of_pairs(script, tmp_path):
    results = script("results")
    write_pairs(tmp_path, seeds=3)
    rows = ["--source", f"{tmp_path}/source/s*", "--row", f"ours={tmp_path}/adapted/s*"]
    text = results.main([*rows, "--json", f"{tmp_path}/out.json"])
    header, _, source, ours, gain = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert header == ["", "fog", "contr", "mean", "95 % interval", "worst", "s/image"]
    scores = {}
    for name in ("source", "adapted"):
        folders = [tmp_path / name / f"s{seed}" for seed in range(3)]
        scores[name] = np.array([results.load(folder).miou_T for folder in folders]) * 100
    difference = scores["adapted"] - scores["source"]
    means, spread = difference.mean(axis=0), difference.mean(axis=1).std(ddof=1)
    assert source[1:3] == [f"{value:.2f}" for value in scores["source"].mean(axis=0)]
    assert [ours[0], ours[-1]] == ["ours", "0.200"]
    assert gain[1:3] == [f"{value:+.2f}" for value in means]
    assert gain[3] == f"{means.mean():+.2f} \N{PLUS-MINUS SIGN} {spread:.2f}"
    assert gain[5] == f"{means.min():+.2f} {header[1 + int(means.argmin())]}"
    low, high = map(float, gain[4].split(" to "))
    assert low < means.mean() < high
    stored = json.loads((tmp_path / "out.json").read_text())["rows"][1]
    assert np.array(stored["gain"]) * 100 == pytest.approx(difference)
    assert np.array(stored["interval"]) * 100 == pytest.approx([low, high], abs=0.006)


def test_interval_equals_a_plain_loop_over_drawn_images(script, tmp_path, monkeypatch):
    results, rng = script("results"), np.random.default_rng(2)
    monkeypatch.setattr(results, "RESAMPLES", 30)
    keys = [["a", "b", "c", "d", "e", "f"], ["d", "c", "e", "f", "g", "h"]]
    confusion = {}
    for seed in range(2):
        for name, right in (("source", 0.4), ("adapted", 0.6)):
            confusion[name, seed] = {task: confusions(rng, 6, right=right) for task in TASKS}
            write_run(tmp_path / f"{name}/s{seed}", confusion[name, seed], seed=seed, keys=keys[seed])
    pairs = [tuple(results.load(tmp_path / f"{name}/s{seed}") for name in ("adapted", "source")) for seed in range(2)]
    got = results.bootstrap(pairs)
    draws_RU = results.numpy_generator(0, "bootstrap").multinomial(8, [1 / 8] * 8, 30)
    gains = []
    for draw_U in draws_RU:
        times = dict(zip("abcdefgh", draw_U, strict=True))
        score = {}
        for (name, seed), of_task in confusion.items():
            repeated = [
                metrics.scores(
                    sum(times[key] * image_CC for key, image_CC in zip(keys[seed], task_nCC, strict=True))
                ).miou
                for task_nCC in of_task.values()
            ]
            score[name, seed] = np.mean(repeated)
        gains.append(np.mean([score["adapted", seed] - score["source", seed] for seed in range(2)]))
    assert got == pytest.approx(np.percentile(gains, [2.5, 97.5]), abs=1e-12)


def test_interval_is_a_point_where_images_are_alike_and_zero_where_methods_are(script, tmp_path):
    results, rng = script("results"), np.random.default_rng(3)
    one_CC, better_CC = confusions(rng, 2, right=0.5)[0], confusions(rng, 1, right=0.9)[0]
    alike = results.load(write_run(tmp_path / "source", {"fog/5": np.stack([one_CC] * 9)}))
    better = results.load(write_run(tmp_path / "adapted", {"fog/5": np.stack([better_CC] * 9)}))
    gain = float(better.miou_T[0] - alike.miou_T[0])
    assert results.bootstrap([(better, alike)]) == pytest.approx((gain, gain), abs=1e-12)
    varied = results.load(write_run(tmp_path / "varied", {"fog/5": confusions(rng, 9, right=0.5)}))
    assert results.bootstrap([(varied, varied)]) == pytest.approx((0, 0), abs=1e-12)


def test_interval_contains_the_truth_about_as_often_as_it_says(script, tmp_path):
    results, rng = script("results"), np.random.default_rng(4)
    source_nCC, adapted_nCC = (confusions(rng, 3000, right=right) for right in (0.5, 0.6))
    total = [metrics.scores(all_nCC.sum(axis=0)[:3, :3]).miou for all_nCC in (adapted_nCC, source_nCC)]
    truth, hits, widths, gains = total[0] - total[1], 0, [], []
    for trial in range(100):
        drawn = rng.choice(3000, 40, replace=False)
        runs = [results.load(write_run(tmp_path / f"{trial}{name}", {"fog/5": all_nCC[drawn][:, :3, :3]}))
                for name, all_nCC in (("adapted", adapted_nCC), ("source", source_nCC))]  # fmt: skip
        low, high = results.bootstrap([tuple(runs)])
        hits += low <= truth <= high
        widths.append(high - low)
        gains.append(runs[0].miou_T[0] - runs[1].miou_T[0])
    assert 87 <= hits <= 100
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std(gains), rel=0.2)


def test_too_few_images_have_no_interval(script, tmp_path):
    results, rng = script("results"), np.random.default_rng(6)
    pairs = []
    for key in "ab":  # half of all draws leave out one of the two
        folders = [
            write_run(tmp_path / key / name, {"fog/5": confusions(rng, 1, right=0.5)}, keys=[key]) for name in "xy"
        ]
        pairs.append(tuple(map(results.load, folders)))
    assert results.bootstrap(pairs) is None


def test_runs_that_cannot_be_compared_are_refused(script, tmp_path):
    results, rng = script("results"), np.random.default_rng(7)
    write_pairs(tmp_path)

    def other(name: str, **options) -> str:
        write_run(tmp_path / name / "s0", {task: confusions(rng, 3, right=0.5) for task in TASKS}, **options)
        return f"{name}={tmp_path / name}/s*"

    source = ["--source", f"{tmp_path}/source/s*"]
    with pytest.raises(UserError, match="no source run has the same data and segmenter"):
        results.main([*source, "--row", other("data", data="other")])
    with pytest.raises(UserError, match="no source run has the same data and segmenter"):
        results.main([*source, "--row", other("model", segmenter="other")])
    with pytest.raises(UserError, match="no source run has the same data;"):
        results.main([*source, "--control", other("control", data="other")])
    write_run(tmp_path / "adapted/s9", {t: confusions(rng, 3, right=0.5) for t in TASKS}, seed=9, lr=1e-3)
    with pytest.raises(UserError, match=r"s9 and .*s0 differ in tta\.optimizer\.lr"):
        results.main([*source, "--row", f"mixed={tmp_path}/adapted/s*"])
    write_run(tmp_path / "source/s0again", {t: confusions(rng, 3, right=0.5) for t in TASKS}, method="source")
    with pytest.raises(UserError, match="two runs of the same data and segmenter"):
        results.main(source)
    with pytest.raises(UserError, match="no folder"):
        results.main(["--source", f"{tmp_path}/nothing*"])


DATA, RUNTIME = {"short_side_px": 512, "data_root": "/here"}, {"precision": "fp32", "devices": None}


def write_two(root: Path, *, data: dict[str, object], runtime: dict[str, object]) -> None:
    """source/s0 of DATA and RUNTIME, and adapted/s0 of the same images with other settings."""
    of_task = {task: confusions(np.random.default_rng(5), 12, right=0.5) for task in TASKS}
    write_run(root / "source/s0", of_task, method="source", more={"data": DATA, "runtime": RUNTIME})
    write_run(root / "adapted/s0", of_task, more={"data": DATA | data, "runtime": RUNTIME | runtime})


@pytest.mark.parametrize("option", ["--row", "--control"])
@pytest.mark.parametrize(
    ("section", "name", "value"),
    [("data", "short_side_px", 1024), ("data", "limit", 7), ("runtime", "precision", "bf16")],  # limit: one has none
)
def test_a_gain_across_two_protocols_is_refused_in_one_line(script, tmp_path, option, section, name, value):
    """The same images at another size or precision: part of the difference would not be the method's."""
    changed: dict[str, dict[str, object]] = {"data": {"data_root": "/there"}, "runtime": {"devices": [1]}}
    changed[section][name] = value
    write_two(tmp_path, **changed)
    said = f"{tmp_path}/adapted/s0 and {tmp_path}/source/s0 differ in {section}.{name}; expected one protocol. "
    with pytest.raises(UserError, match=rf"^{re.escape(said)}[^\n]*$"):
        script("results").main(["--source", f"{tmp_path}/source/s*", option, f"ours={tmp_path}/adapted/s*"])


def test_the_data_may_lie_elsewhere_and_run_on_other_devices(script, tmp_path):
    write_two(tmp_path, data={"data_root": "/there"}, runtime={"devices": [1]})
    text = script("results").main(["--source", f"{tmp_path}/source/s*", "--row", f"ours={tmp_path}/adapted/s*"])
    assert "| gain | +0.00 | +0.00 | +0.00 |" in text


def test_control_of_another_segmenter_is_paired_by_its_data(script, tmp_path):
    results = script("results")
    write_pairs(tmp_path)
    for seed in range(2):
        path = tmp_path / f"adapted/s{seed}/results.json"
        path.write_text(path.read_text().replace('"first"', '"other"'))
    text = results.main(["--source", f"{tmp_path}/source/s*", "--control", f"wide={tmp_path}/adapted/s*"])
    gain = np.mean([results.load(tmp_path / f"adapted/s{s}").miou_T - results.load(tmp_path / f"source/s{s}").miou_T
                    for s in range(2)])  # fmt: skip
    assert f"{100 * gain:+.2f} " in text.splitlines()[-1]
    rng = np.random.default_rng(5)
    for name in ("second", "third"):
        write_run(tmp_path / f"{name}/s7", {t: confusions(rng, 3, right=0.5) for t in TASKS}, seed=7)
    groups = ["--source", f"{tmp_path}/source/s*", "--source", f"second={tmp_path}/second/s*"]
    assert "third" in results.main([*groups, "--row", f"third={tmp_path}/third/s*"])
    with pytest.raises(UserError, match="no source run has the same data;"):  # controls: in the first group alone
        results.main([*groups, "--control", f"third={tmp_path}/third/s*"])


def test_runs_without_counts_or_results_are_refused(script, tmp_path):
    results = script("results")
    old = write_run(tmp_path / "old", {"fog/5": confusions(np.random.default_rng(8), 3, right=0.5)})
    (old / "records.jsonl").write_text('{"task": "fog/5", "key": "000"}\n')
    with pytest.raises(UserError, match="records without the column classes"):
        results.load(old)
    with pytest.raises(UserError, match=r"results\.json is missing"):
        results.load(tmp_path / "unfinished")


def test_diagnosis_is_shown_at_the_noise_level_of_the_run(script, tmp_path):
    results = script("results")
    levels = [{"sigma": sigma, "candidates": {"accuracy": sigma}, "teacher": {"accuracy": 0.5, "miou": 0.25},
               "cosine": cosine} for sigma, cosine in ((0.1, 0.3), (0.25, None), (0.5, 0.1))]  # fmt: skip
    rows = [{"task": task, "segmenter": {"accuracy": 0.75}, "levels": levels} for task in ("clean", *TASKS)]
    (tmp_path / "diagnosis.json").write_text(json.dumps({"tasks": rows}))
    (tmp_path / "settings.json").write_text(json.dumps({"model": {"generative": {"sigma": 0.3}}}))
    lines = results.diagnosis_lines(f"teacher={tmp_path}/diagnosis.json", TASKS)
    assert [line[1:4] for line in lines] == [["75.00"] * 3, ["25.00"] * 3, ["50.00"] * 3, ["25.00"] * 3, ["-"] * 3]
    assert lines[1][0] == "teacher, sigma 0.25: pixel accuracy among the candidates"
    with pytest.raises(UserError, match="lacks snow/5"):
        results.diagnosis_lines(f"teacher={tmp_path}/diagnosis.json", ("snow/5",))


# Search


def write_tried(folder: Path, of_task: dict[str, float], *, lr: float | None = None, data: str = "") -> str:
    """A run folder with what a search reads: mIoU of each task, points. Without a rate it is the source."""
    folder.mkdir(parents=True)
    tasks = [{"task": task, "miou": points / 100} for task, points in of_task.items()]
    weights = {"discriminative": "first"} | ({} if lr is None else {"generative": "second"})
    results = {"tasks": tasks, "weights_sha256": weights, "data_sha256": f"{list(of_task)}{data}"}
    settings = {"method": "source"} if lr is None else {"method": "generative", "tta": {"optimizer": {"lr": lr}}}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "settings.json").write_text(json.dumps(settings))
    return str(folder)


TRIED = {  # mIoU of both tasks; their mean and the worst gain over the source
    "source": (50.0, 30.0),
    "gentle": (50.2, 31.0),  # 40.6, +0.2
    "good": (49.6, 35.0),  # 42.3, -0.4
    "bold": (47.0, 45.0),  # 46.0, -3.0
    "harmful": (44.0, 44.0),  # 44.0, -6.0
}


@pytest.fixture
def tried_folders(tmp_path) -> dict[str, str]:
    """The runs of TRIED, the source in their midst."""
    rates = {"gentle": 1e-6, "good": 1e-5, "source": None, "bold": 1e-4, "harmful": 1e-3}
    return {name: write_tried(tmp_path / name, dict(zip(TASKS, TRIED[name], strict=True)), lr=lr)
            for name, lr in rates.items()}  # fmt: skip


@pytest.mark.parametrize(
    ("most_loss", "given", "expected"),
    [
        (0.5, "gentle good bold harmful", "good gentle bold harmful"),  # the best mean of those that lose little
        (0.3, "gentle good bold harmful", "gentle good bold harmful"),
        (0, "gentle good bold harmful", "gentle good bold harmful"),
        (5, "gentle good bold harmful", "bold good gentle harmful"),
        (10, "gentle good bold harmful", "bold harmful good gentle"),  # all are allowed: the mean alone
        (0.3, "good bold harmful", "good bold harmful"),  # none is: the one that loses least, whatever its mean
        (0.5, "bold harmful", "bold harmful"),
    ],
)
def test_a_search_chooses_the_best_mean_of_those_that_lose_little_on_every_task(
    script, tried_folders, most_loss, given, expected
):
    for order in (1, -1):
        folders = [tried_folders[name] for name in ["source", *given.split()][::order]]
        ranked = script("search").ranked(folders, most_loss, 0.5)
        assert [Path(one.folder).name for one in ranked] == ["source", *expected.split()]


@pytest.mark.parametrize(
    ("equal", "expected"),
    [
        (0, "fast slow quick slowest wild"),  # the mean alone
        (0.5, "slow fast quick slowest wild"),  # 45.8 and 46.0 are equal
        (1, "slow quick fast slowest wild"),  # 45.0 too, at a higher rate than slow
        (3, "slowest slow quick fast wild"),  # 43.0 too
    ],
)
def test_of_means_that_are_about_equal_a_search_takes_the_smallest_rate(script, tmp_path, equal, expected):
    tried = {"slowest": (1e-6, 43.0), "slow": (1e-5, 45.8), "quick": (5e-5, 45.0), "fast": (1e-4, 46.0)}
    folders = [write_tried(tmp_path / name, {"fog/5": points}, lr=lr) for name, (lr, points) in tried.items()]
    source = write_tried(tmp_path / "source", {"fog/5": 40.0})
    wild = write_tried(tmp_path / "wild", {"fog/5": 39.0}, lr=1e-7)  # not safe: neither chosen nor what others equal
    ranked = script("search").ranked([wild, *folders, source], 0.5, equal)
    assert [Path(one.folder).name for one in ranked] == ["source", *expected.split()]


def test_table_of_a_search_shows_the_worst_gain_of_each_candidate(script, tried_folders):
    search = script("search")
    text = search.table(search.ranked(list(tried_folders.values()), 0.5, 0.5))
    header, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert header == ["tta.optimizer.lr", "fog", "contr", "mean", "worst gain"]
    assert lines == [
        ["source", "50.00", "30.00", "40.00", ""],
        ["1e-05", "49.60", "35.00", "42.30", "-0.40"],
        ["1e-06", "50.20", "31.00", "40.60", "+0.20"],
        ["0.0001", "47.00", "45.00", "46.00", "-3.00"],
        ["0.001", "44.00", "44.00", "44.00", "-6.00"],
    ]


def test_a_search_needs_one_source_and_candidates_of_the_same_images(script, tried_folders, tmp_path):
    ranked = script("search").ranked
    source, *candidates = (tried_folders[name] for name in ("source", "good", "bold"))
    second = write_tried(tmp_path / "second", dict.fromkeys(TASKS, 50.0))
    other = write_tried(tmp_path / "other", dict.fromkeys(TASKS, 50.0), lr=1e-5, data="of another seed")
    with pytest.raises(UserError, match=r"0 source runs .*forward_mode=discriminative_only\) and 2 adapted"):
        ranked(candidates, 0.5, 0.5)
    with pytest.raises(UserError, match=r"2 source runs .* and 2 adapted ones; expected one, and one or more"):
        ranked([source, *candidates, second], 0.5, 0.5)
    with pytest.raises(UserError, match=r"1 source runs .* and 0 adapted ones"):
        ranked([source], 0.5, 0.5)
    with pytest.raises(UserError, match=r"other and .*source are not of the same images"):
        ranked([source, *candidates, other], 0.5, 0.5)


def test_joined_runs_are_one_candidate_that_may_lose_on_none_of_all_their_tasks(script, tmp_path):
    def joined(name: str, fog: float, rain: float, snow: float, lr: float | None = None) -> str:
        severe = write_tried(tmp_path / f"{name}-5", {"fog/5": fog, "rain/5": rain}, lr=lr)
        return f"{severe},{write_tried(tmp_path / f'{name}-1', {'snow/1': snow}, lr=lr)}"

    ranked = script("search").ranked
    source = joined("source", 40, 30, 65)
    harmful, careful = joined("harmful", 50, 42, 64, lr=1e-4), joined("careful", 44, 33, 65, lr=1e-5)
    for most_loss, expected in ((0.5, [source, careful, harmful]), (1.5, [source, harmful, careful])):
        assert [one.folder for one in ranked([harmful, careful, source], most_loss, 0.5)] == expected
    first = ranked([source, careful], 0.5, 0.5)[1].results
    assert first["mean"]["miou"] == pytest.approx((0.44 + 0.33 + 0.65) / 3, abs=1e-12)
    assert [task["task"] for task in first["tasks"]] == ["fog/5", "rain/5", "snow/1"]
    with pytest.raises(UserError, match="are not of the same images"):
        ranked([source, harmful, careful.split(",")[0]], 0.5, 0.5)


def test_search_prints_the_chosen_argument_or_what_is_wrong(script, tried_folders, monkeypatch, capsys):
    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["search.py", *arguments])
        runpy.run_path(str(BENCHMARKS / "search.py"), run_name="__main__")
        return capsys.readouterr().out

    folders = list(tried_folders.values())
    assert run("--most-loss", "0.5", "--best", *folders) == f"{tried_folders['good']}\n"
    assert run("--best", *folders) == f"{tried_folders['gentle']}\n"  # 0.2 points
    assert run("--most-loss", "10", "--equal", "2", "--best", *folders) == f"{tried_folders['bold']}\n"
    assert run("--most-loss", "10", "--equal", "9", "--best", *folders) == f"{tried_folders['gentle']}\n"
    assert run("--most-loss", "5", "--best", *folders) == f"{tried_folders['bold']}\n"
    assert run(*folders).startswith("| tta.optimizer.lr |")
    with pytest.raises(SystemExit, match="2"):
        run("--best", tried_folders["good"])
    assert capsys.readouterr().err.startswith("search.py: 0 source runs")


# Sweep


@pytest.fixture
def sweep(script, tmp_path, monkeypatch):
    """sweep(lines, ...): run jobs of a package that stands in for segadapt, on two GPUs by name."""
    module = script("sweep")
    (tmp_path / "segadapt").mkdir()
    (tmp_path / "segadapt/__main__.py").write_text(SEGADAPT_STUB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "visible_gpus", lambda: ["3", "5"])

    def run(*jobs: str, jobs_per_gpu: int = 1, seconds_limit: float = 60) -> bool:
        lines = [f"adapt logging.root=out experiment.name=a experiment.id={job}" for job in jobs]
        return module.run(lines, Path("logs"), jobs_per_gpu=jobs_per_gpu, seconds_limit=seconds_limit, common="x=1")

    return run


def begun() -> list[str]:
    return sorted(Path("begun.txt").read_text().split())


def test_sweep_runs_every_job_once_on_one_gpu_each(sweep):
    assert sweep("j0 seconds=0.3", "j1 seconds=0.3", "j2 y='a b'")
    stored = [json.loads(Path(f"out/a/j{job}/results.json").read_text()) for job in range(3)]
    assert {gpu for gpu, _ in stored} == {"3", "5"}
    assert stored[2][1][-2:] == ["y=a b", "x=1"]
    assert sweep("j0 seconds=0.3", "j1 seconds=0.3", "j2 y='a b'")
    assert begun() == ["j0", "j1", "j2"]


def test_sweep_runs_again_what_has_changed_or_not_finished(sweep):
    assert sweep("j0", "j1", "j2")
    Path("out/a/j1/results.json").unlink()
    assert sweep("j0", "j1", "j2 y=2")
    assert begun() == ["j0", "j1", "j1", "j2", "j2"]


def test_sweep_takes_no_results_for_those_of_a_line_that_failed(sweep):
    assert sweep("j0")
    assert not sweep("j0 fail=rain")
    assert Path("out/a/j0/results.json").is_file()
    assert not sweep("j0 fail=rain")


def test_sweep_stops_after_a_failure_and_shows_its_cause(sweep, capsys):
    assert not sweep("j0 fail=rain", "j1 seconds=0.5", "j2", "j3")
    assert "the cause is rain" in capsys.readouterr().out
    assert begun() == ["j0", "j1"]
    assert Path("out/a/j1/results.json").is_file()
    assert not sweep("j0 fail=rain", "j1 seconds=0.5")
    assert begun() == ["j0", "j0", "j1"]


def test_sweep_ends_its_jobs_at_the_limit(sweep, capsys):
    start = time.monotonic()
    assert not sweep("j0 seconds=30", "j1", "j2 seconds=30", seconds_limit=0.8)
    assert time.monotonic() - start < 10
    assert "2 jobs ended, 0 not begun" in capsys.readouterr().out
    assert not Path("out/a/j0").exists()


@pytest.mark.parametrize(
    ("visible", "count", "expected"), [("", 0, [""]), (None, 2, ["0", "1"]), ("4,6", 2, ["4", "6"])]
)
def test_visible_gpus_keep_their_names(script, monkeypatch, visible, count, expected):
    sweep = script("sweep")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda: count)
    assert sweep.visible_gpus() == expected


# The jobs of a world


OPTION = "model.loss.temperature=2 model.trust.max_agreement=0.7 model.trust.restore=0.1"


@pytest.fixture(scope="module", params=["toytown", "camvid"])
def scripted(request, tmp_path_factory):
    """All jobs of a world's script, as {NAME/ID: settings}, and the arguments of its searches.

    A stub in place of python3 collects them.
    """
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "python3").write_text(BASH_STUB)
    (folder / "python3").chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "JOBS": str(folder / "jobs"), "SEEDS": "0 1",
                   "TABLES": str(folder / "tables"), "CAMVID": str(folder), "TAESD3": str(folder), "LIMIT": "7",
                   "LR_DISCRIMINATIVE": "1e-5 2e-5", "LR_GENERATIVE": "3e-5", "MOST_LOSS": "1.5",
                   "OPTIONS": OPTION}  # fmt: skip
    command = ["bash", str(BENCHMARKS / f"{request.param}.sh"), str(folder / "out")]
    (folder / "out" / f"{request.param}-search-source").mkdir(parents=True)  # the tables of a search need one
    subprocess.run([*command, "all"], env=environment, check=True, capture_output=True)
    assert subprocess.run([*command, "al"], env=environment, capture_output=True).returncode == 2
    out = {}
    for line in (folder / "jobs").read_text().splitlines():
        verb, *overrides = shlex.split(line)
        primary, schema, *_ = VERBS[verb]
        settings = quick_settings(primary, overrides, schema)
        name = f"{settings.experiment.name.removeprefix(request.param + '-')}/{settings.experiment.id}"
        assert name not in out
        out[name] = settings
    return out, [line.split() for line in (folder / "jobs.searches").read_text().splitlines()]


@pytest.fixture(scope="module")
def jobs_of(scripted):
    return scripted[0]


def test_nothing_is_run_on_the_test_split_where_the_choice_fails(tmp_path):
    (tmp_path / "python3").write_text(BASH_STUB.replace("case $1", "[[ $1 == *search.py ]] && exit 1\ncase $1"))
    (tmp_path / "python3").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JOBS": str(tmp_path / "jobs")}
    command = ["bash", str(BENCHMARKS / "toytown.sh"), str(tmp_path / "out"), "run"]
    assert subprocess.run(command, env=environment, capture_output=True).returncode != 0
    assert not (tmp_path / "jobs").exists()


def test_settings_are_chosen_on_validation_under_the_extra_corruptions(jobs_of):
    searched = {name: job for name, job in jobs_of.items() if name.startswith("search")}
    assert len(searched) == 3 * (1 + 2 * 4)  # 3 severities; source; each teacher: 2 rates, 1 rate, 2 bundles
    assert sorted(job.data.severity for job in searched.values()) == [1] * 9 + [3] * 9 + [5] * 9
    extra = ["speckle_noise", "gaussian_blur", "spatter", "saturate"]
    for job in searched.values():
        assert (job.data.split, job.data.corruptions) == ("validation", extra)
    temperatures = [job.model.loss.temperature for name, job in searched.items() if "broad" in name]
    assert sorted(temperatures) == [1] * 6 + [2] * 6
    for name, job in jobs_of.items():
        if name.startswith(("segmenter", "teacher")):
            assert (job.data.split, job.data.corruptions, job.train.validation_split) == ("training", [], "validation")
        elif name not in searched:
            assert job.data.split == "test"


def test_searches_compare_all_that_was_tried_with_the_source(scripted):
    jobs, searches = scripted
    chosen, shown = [line for line in searches if "--best" in line], [line for line in searches if "--best" not in line]
    assert (len(chosen), len(shown)) == (3, 2)  # broad, narrow and plain; the tables of broad and narrow
    tried = []
    for option, points, *folders in [[part for part in line if part != "--best"] for line in searches]:
        assert (option, points) == ("--most-loss", "1.5")
        joined = [[Path(part) for part in folder.split(",")] for folder in folders]
        of_search = [[f"{part.parent.name.partition('-')[2]}/{part.name}" for part in parts] for parts in joined]
        for names in of_search:
            assert [jobs[name].data.severity for name in names] == [5, 3, 1]
        assert [[jobs[name].tta.forward_mode for name in names] for names in of_search] == [
            ["discriminative_only"] * 3, *[["tta"] * 3] * (len(of_search) - 1)
        ]  # fmt: skip
        tried.append([names[0] for names in of_search[1:]])
    broad, narrow, plain, *both = tried
    assert both == [broad, narrow]
    for names, kind in ((broad, "broad"), (narrow, "narrow")):
        assert set(names) == {name for name in jobs if name.startswith(f"search-{kind}/") and name.endswith("-5")}
    assert set(plain) == {name for name in broad if jobs[name].model.loss.temperature == 1}
    assert [jobs[name].model.trust.restore for name in sorted(set(broad) - set(plain))] == [0.1] * 2
    for names, kind in ((broad, "broad"), (narrow, "narrow"), (plain, "plain")):  # the stub chooses the first
        run, searched = jobs[f"{kind}/s0"], jobs[names[0]]
        assert (run.model.loss, run.model.trust) == (searched.model.loss, searched.model.trust)
        assert run.tta.optimizer == searched.tta.optimizer


def test_rows_of_the_test_differ_in_what_they_say(jobs_of):
    names = ("source", "broad", "narrow", "plain", "shuffled", "source-wide")
    for seed in (0, 1):
        test = {name: jobs_of[f"{name}/s{seed}"] for name in names}
        for job in test.values():
            assert (job.experiment.seed, job.data.corruption_seed, job.data.limit) == (seed, seed, 7)
            assert len(job.data.corruptions) == 15
            assert job.data.severity == 5
        assert test["source"].tta.forward_mode == test["source-wide"].tta.forward_mode == "discriminative_only"
        assert [name for name, job in test.items() if job.model.generative.shuffle_classes] == ["shuffled"]
        assert test["broad"].tta.optimizer == test["shuffled"].tta.optimizer
        assert test["broad"].tta.optimizer.lr_discriminative == 1e-5  # the first of the grid: what the stub chose
        assert test["broad"].tta.optimizer.lr_generative == 3e-5
        checkpoints = {name: job.model.generative.checkpoint.split("/")[-3] for name, job in test.items()}
        assert checkpoints["narrow"].endswith("teacher-narrow")
        assert checkpoints["broad"] == checkpoints["shuffled"] == checkpoints["plain"]
        assert checkpoints["broad"].endswith("teacher-broad")
        trust, loss = test["plain"].model.trust, test["plain"].model.loss
        assert (loss.temperature, trust.max_agreement, trust.restore) == (1, 1, 0)
        assert test["broad"].model.trust == test["shuffled"].model.trust
        second = jobs_of[f"broad-second/s{seed}"].model
        for part in (second.discriminative, second.generative):
            assert Path(part.checkpoint).parent.name == "s1"
    assert {jobs_of[f"diagnose/{kind}"].data.limit for kind in ("broad", "narrow")} == {20}


def test_narrow_teacher_sees_the_segmenters_images_and_the_control_what_the_broad_one_does(jobs_of):
    def seen(name: str) -> tuple:
        data = jobs_of[name].data
        drawn = (data.weather, data.count, data.world_seed) if data.kind == "toytown" else None  # files have neither
        return data.name, data.split, drawn, jobs_of[name].train.broad

    assert jobs_of["segmenter/s0"].train.broad.probability == 0
    assert seen("teacher-narrow/s0") == seen("segmenter/s0") == seen("segmenter/s1")
    assert jobs_of["teacher-broad/s0"].train.broad.probability > 0
    assert seen("teacher-broad/s0") == seen("segmenter-wide/s0") == seen("teacher-broad/s1")
    assert [jobs_of[f"{name}/s1"].experiment.seed for name in ("segmenter", "teacher-broad")] == [1, 1]
