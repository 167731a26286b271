"""Tables: scores from pixel counts, paired gains and their interval, the diagnosis beside them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from run_folders import TASKS, confusions, write_pairs, write_run

from segadapt import finished, metrics
from segadapt.errors import UserError
from segadapt.seeds import numpy_generator

# Results


def test_scores_from_the_counts_of_images_are_those_of_the_confusion_matrix(tmp_path):
    rng = np.random.default_rng(1)
    confusion = {task: confusions(rng, 9, right=right) for task, right in zip(TASKS, (0.3, 0.9), strict=True)}
    run = finished.load(write_run(tmp_path / "run", confusion))
    for index, task in enumerate(TASKS):
        counts_nC3 = run.images(task)[1]
        assert float(finished.miou(counts_nC3.sum(axis=0))) == pytest.approx(run.miou_T[index], abs=1e-12)
        one_by_one = [metrics.scores(image_CC).miou for image_CC in confusion[task]]
        assert finished.miou(counts_nC3) == pytest.approx(np.array(one_by_one), abs=1e-12)


def test_records_that_disagree_with_the_results_stop_the_table(tmp_path):
    folder = write_run(tmp_path / "run", {"fog/5": confusions(np.random.default_rng(1), 9, right=0.5)})
    lines = (folder / "records.jsonl").read_text().splitlines(keepends=True)
    (folder / "records.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(AssertionError, match=r"fog/5: records\.jsonl and results\.json differ"):
        finished.pixel_counts(folder)


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
        scores[name] = np.array([finished.load(folder).miou_T for folder in folders]) * 100
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


def test_interval_equals_a_plain_loop_over_drawn_images(tmp_path):
    rng = np.random.default_rng(2)
    keys = [["a", "b", "c", "d", "e", "f"], ["d", "c", "e", "f", "g", "h"]]
    confusion = {}
    for seed in range(2):
        for name, right in (("source", 0.4), ("adapted", 0.6)):
            confusion[name, seed] = {task: confusions(rng, 6, right=right) for task in TASKS}
            write_run(tmp_path / f"{name}/s{seed}", confusion[name, seed], seed=seed, keys=keys[seed])
    pairs = [tuple(finished.load(tmp_path / f"{name}/s{seed}") for name in ("adapted", "source")) for seed in range(2)]
    got = finished.bootstrap(pairs, resamples=30)
    draws_RU = numpy_generator(0, "bootstrap").multinomial(8, [1 / 8] * 8, 30)
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


def test_interval_is_a_point_where_images_are_alike_and_zero_where_methods_are(tmp_path):
    rng = np.random.default_rng(3)
    one_CC, better_CC = confusions(rng, 2, right=0.5)[0], confusions(rng, 1, right=0.9)[0]
    alike = finished.load(write_run(tmp_path / "source", {"fog/5": np.stack([one_CC] * 9)}))
    better = finished.load(write_run(tmp_path / "adapted", {"fog/5": np.stack([better_CC] * 9)}))
    gain = float(better.miou_T[0] - alike.miou_T[0])
    assert finished.bootstrap([(better, alike)]) == pytest.approx((gain, gain), abs=1e-12)
    varied = finished.load(write_run(tmp_path / "varied", {"fog/5": confusions(rng, 9, right=0.5)}))
    assert finished.bootstrap([(varied, varied)]) == pytest.approx((0, 0), abs=1e-12)


def test_interval_contains_the_truth_about_as_often_as_it_says(tmp_path):
    rng = np.random.default_rng(4)
    source_nCC, adapted_nCC = (confusions(rng, 3000, right=right) for right in (0.5, 0.6))
    total = [metrics.scores(all_nCC.sum(axis=0)[:3, :3]).miou for all_nCC in (adapted_nCC, source_nCC)]
    truth, hits, widths, gains = total[0] - total[1], 0, [], []
    for trial in range(100):
        drawn = rng.choice(3000, 40, replace=False)
        runs = [finished.load(write_run(tmp_path / f"{trial}{name}", {"fog/5": all_nCC[drawn][:, :3, :3]}))
                for name, all_nCC in (("adapted", adapted_nCC), ("source", source_nCC))]  # fmt: skip
        low, high = finished.bootstrap([tuple(runs)])
        hits += low <= truth <= high
        widths.append(high - low)
        gains.append(runs[0].miou_T[0] - runs[1].miou_T[0])
    assert 87 <= hits <= 100
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std(gains), rel=0.2)


def test_too_few_images_have_no_interval(tmp_path):
    rng = np.random.default_rng(6)
    pairs = []
    for key in "ab":  # half of all draws leave out one of the two
        folders = [
            write_run(tmp_path / key / name, {"fog/5": confusions(rng, 1, right=0.5)}, keys=[key]) for name in "xy"
        ]
        pairs.append(tuple(map(finished.load, folders)))
    assert finished.bootstrap(pairs) is None


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


def corruptions(*names: str, **more: object) -> dict[str, dict[str, object]]:
    return {"data": {"corruptions": list(names), **more}}


def test_runs_of_other_tasks_and_equal_settings_are_one(script, tmp_path):
    results, rng = script("results"), np.random.default_rng(11)
    for name, right in (("source", 0.4), ("adapted", 0.6)):
        for seed in range(2):
            of_task = {task: confusions(rng, 12, right=right) for task in TASKS}
            run = {"seed": seed, "method": "source" if name == "source" else "generative"}
            write_run(tmp_path / f"whole/{name}/s{seed}", of_task, more=corruptions("fog", "contrast"), **run)
            if (name, seed) == ("source", 0):  # a run in parts is paired with a whole one
                write_run(tmp_path / f"parts/{name}/s{seed}", of_task, more=corruptions("fog", "contrast"), **run)
                continue
            for task, confusion_nCC in of_task.items():
                stem = task.partition("/")[0]
                folder = tmp_path / f"parts/{name}/s{seed}-{stem}"
                write_run(folder, {task: confusion_nCC}, more=corruptions(stem), **run)

    def table(kind: str) -> str:
        return results.main(["--source", f"{tmp_path / kind}/source/s*", "--row", f"a={tmp_path / kind}/adapted/s*"])

    assert table("parts") == table("whole")
    write_run(tmp_path / "parts/adapted/s2-fog", {"fog/5": confusions(rng, 12, right=0.5)}, seed=2,
              more=corruptions("fog"))  # fmt: skip
    with pytest.raises(UserError, match=r"s2-fog and .*s0-.* differ in their tasks"):
        table("parts")


@pytest.mark.parametrize("more", [{"data": {"rounds": 2}}, {"tta": {"continual": True}}])
def test_runs_whose_tasks_depend_on_each_other_are_not_joined(script, tmp_path, more):
    for task in TASKS:
        write_run(tmp_path / f"s{task[:3]}", {task: confusions(np.random.default_rng(1), 3, right=0.5)}, more=more)
    with pytest.raises(UserError, match="differ in their tasks"):
        script("results").load_group(f"{tmp_path}/s*")


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
    gain = np.mean([finished.load(tmp_path / f"adapted/s{s}").miou_T - finished.load(tmp_path / f"source/s{s}").miou_T
                    for s in range(2)])  # fmt: skip
    assert f"{100 * gain:+.2f} " in text.splitlines()[-1]
    rng = np.random.default_rng(5)
    for name in ("second", "third"):
        write_run(tmp_path / f"{name}/s7", {t: confusions(rng, 3, right=0.5) for t in TASKS}, seed=7)
    groups = ["--source", f"{tmp_path}/source/s*", "--source", f"second={tmp_path}/second/s*"]
    assert "third" in results.main([*groups, "--row", f"third={tmp_path}/third/s*"])
    with pytest.raises(UserError, match="no source run has the same data;"):  # controls: in the first group alone
        results.main([*groups, "--control", f"third={tmp_path}/third/s*"])


def test_runs_without_counts_or_results_are_refused(tmp_path):
    old = write_run(tmp_path / "old", {"fog/5": confusions(np.random.default_rng(8), 3, right=0.5)})
    (old / "records.jsonl").write_text('{"task": "fog/5", "key": "000"}\n')
    with pytest.raises(UserError, match="records without the column classes"):
        finished.pixel_counts(old)
    with pytest.raises(UserError, match=r"results\.json is missing"):
        finished.load(tmp_path / "unfinished")


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
