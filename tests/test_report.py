"""The report says what the run folders say, escapes what they name, and shows what is there when not all is."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reported import SEEDS, gathered, make_runs, rendered

from segadapt import metrics
from segadapt.__main__ import main
from segadapt.config_verbs import ReportConfig
from segadapt.datasets.toytown import CLASSES
from segadapt.errors import UserError
from segadapt.report import data, figures, gallery, page

TASKS = ("fog/5", "contrast/5")
HOSTILE = "</script><img src=x onerror=alert(1)> {{ 7*7 }} <u>&amp;"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def runs(root, compose_settings, saved_models):
    return make_runs(root, compose_settings, saved_models)


@pytest.fixture(scope="module")
def report(root, runs):
    return gathered(root)


@pytest.fixture(scope="module")
def shown(root, runs):
    return rendered(root)


@pytest.fixture
def copied(root, runs, tmp_path):
    """Folders of the same runs that a test may change."""
    return {name: Path(shutil.copytree(folder, tmp_path / f"{name[0]}{name[1]}")) for name, folder in runs.items()}


def results(folder):
    return json.loads((folder / "results.json").read_text())


def edit(path, change):
    path.write_text(change(path.read_text()))


# --- identities ---


def test_table_is_the_mean_of_the_results(runs, shown):
    expected = [
        np.mean([next(row["miou"] for row in results(runs[method, seed])["tasks"] if row["task"] == task)
                 for seed in SEEDS])
        for task in TASKS for method in ("source", "generative")
    ]  # fmt: skip
    expected += [np.mean([results(runs[method, seed])["mean"]["miou"] for seed in SEEDS])
                 for method in ("source", "generative")]  # fmt: skip
    assert shown.values == pytest.approx(expected, rel=1e-12)


def test_spread_and_gain_are_over_seeds(runs, report):
    (*_, mean), of_seed = page._table(report), {}
    for method in ("source", "generative"):
        of_seed[method] = np.array([results(runs[method, seed])["mean"]["miou"] for seed in SEEDS])
    cell = mean["cells"][1]
    assert cell["spread"] == pytest.approx(np.std(of_seed["generative"], ddof=1))
    assert cell["gain"] == pytest.approx(np.mean(of_seed["generative"] - of_seed["source"]))
    assert mean["cells"][0]["gain"] is None
    assert [each["is_best"] for each in mean["cells"]] == [cell["gain"] <= 0, cell["gain"] >= 0]


def test_running_score_ends_at_the_score_of_the_task(report):
    for row, method in zip(report.table.rows, report.methods, strict=True):
        for number, task in enumerate(TASKS):
            values = data.running(method, task)
            assert len(values) == 4
            assert values[-1] == pytest.approx(row.miou_ST[:, number].mean(), rel=1e-12)
            drawn = figures.running(report, task)["data"]
            assert drawn[report.methods.index(method)]["y"][-1] == pytest.approx(100 * values[-1], abs=1e-3)


def test_confusion_holds_every_labelled_pixel(runs, report):
    for method in report.methods:
        counts_CC, name = data.confusion(method), method.first.settings["method"]
        label_C = np.zeros(len(CLASSES), np.int64)
        for seed in SEEDS:
            for line in (runs[name, seed] / "records.jsonl").read_text().splitlines():
                for number, (_, label, _) in json.loads(line)["classes"].items():
                    label_C[int(number)] += label
        assert counts_CC.sum(axis=1).tolist() == label_C.tolist()
        rows = np.array(figures.confusion(report, method)["data"][0]["z"], float).sum(axis=1)
        np.testing.assert_allclose(rows[label_C > 0], 100, atol=0.1 * len(CLASSES))


def test_changes_of_the_classes_are_sorted_differences_of_the_results(runs, report):
    found = figures.class_changes(report, report.methods[1], [TASKS[0]])
    of = {name: [next(row["per_class"] for row in results(runs[name, seed])["tasks"] if row["task"] == TASKS[0])
                 for seed in SEEDS] for name in ("source", "generative")}  # fmt: skip
    changes = {}
    for name in CLASSES:
        means = [[row[name] for row in of[method] if row[name] is not None] for method in ("generative", "source")]
        if all(means):
            changes[name] = 100 * (np.mean(means[0]) - np.mean(means[1]))
    drawn = dict(zip(found["layout"]["yaxis"]["ticktext"], found["data"][0]["x"], strict=True))
    assert drawn == pytest.approx(changes, abs=0.006)
    assert list(drawn.values()) == sorted(drawn.values())


def test_pairs_are_the_scores_of_each_image(runs, report):
    pairs, alone = data.pairs(report.methods[0], report.methods[1])
    assert alone == 0
    assert len(pairs) == 2 * 4 * len(SEEDS)
    pair = pairs[-1]
    for score, method in ((pair.source, "source"), (pair.adapted, "generative")):
        lines = map(json.loads, (runs[method, pair.seed[0]] / "records.jsonl").read_text().splitlines())
        (record,) = (line for line in lines if (line["task"], line["key"]) == (pair.task, pair.key))
        counts_C3 = np.array(list(record["classes"].values()), float)
        union_C = counts_C3[:, 1] + counts_C3[:, 2] - counts_C3[:, 0]
        assert score == pytest.approx(np.mean(counts_C3[:, 0] / union_C))


def test_gallery_shows_kept_images_from_the_largest_change_down(report, shown):
    items = shown.json("items")
    kept = {(item["task"], item["key"], item["seed"]) for item in items}
    assert 0 < len(kept) <= 2 * 3 * len(SEEDS)
    gains = {group: [item["adapted"] - item["source"] for item in items if item["group"] == group]
             for group in ("improved", "harmed")}  # fmt: skip
    assert gains["improved"] == sorted(gains["improved"], reverse=True)
    assert gains["harmed"] == sorted(gains["harmed"])
    pictures = shown.json("pictures")
    assert all(name in pictures for item in items for name in item["pictures"].values())
    assert all(set(item["pictures"]) == {"image", "label", "source", "adapted"} for item in items)
    for item in items:
        assert sum(row["share"] for row in item["legend"]) == pytest.approx(1)
        mean = np.mean([row["adapted"] for row in item["legend"] if row["adapted"] is not None])
        assert mean == pytest.approx(item["adapted"])


def test_page_shows_loss_and_maps_of_the_teacher(shown):
    assert {"loss/1", "candidates/1", "masked/1"} <= set(shown.json("figures"))
    assert "loss/0" not in shown.json("figures")
    text = shown.text()
    assert "velocity error" in text
    assert "teacher's decision" in text
    assert sum(name.startswith("error ") for name in shown.json("pictures")) == text.count("velocity error 0 to")


def test_page_asks_for_nothing(shown):
    addresses = [value for _, attrs in shown.tags for name, value in attrs.items() if name in ("src", "href")]
    assert [address for address in addresses if address and not address.startswith(("#", "data:"))] == []


@given(st.integers(1, 3000))
def test_thinned_lines_keep_their_end(count):
    places, values = figures.thinned(np.arange(count) / 7)
    assert len(places) == min(count, figures.MOST_POINTS)
    assert places[-1] == count
    np.testing.assert_array_equal(values, (places - 1) / 7)


def test_of_many_classes_the_most_changed_are_shown(report, monkeypatch):
    whole = figures.class_changes(report, report.methods[1], TASKS)["data"][0]["x"]
    monkeypatch.setattr(figures, "MOST_CLASSES", 4)
    shown = figures.class_changes(report, report.methods[1], TASKS)["data"][0]["x"]
    assert len(whole) > 4
    assert shown == [*whole[:2], *whole[-2:]]
    assert len(figures.confusion(report, report.methods[1])["data"][0]["z"]) == 4


# --- what is not trusted ---


def test_hostile_names_stay_text(copied):
    for folder in copied.values():
        for path in (folder / "results.json", folder / "config.yaml", *(folder / "tasks").iterdir()):
            edit(path, lambda text: text.replace('"sky"', json.dumps(HOSTILE)).replace("toytown", HOSTILE))
        for path in (folder / "results.json", folder / "records.jsonl", *(folder / "tasks").iterdir()):
            edit(path, lambda text: text.replace("fog/5", HOSTILE))
    shown = rendered(*copied.values())
    assert [attrs for tag, attrs in shown.tags if tag == "u" or attrs.get("src") == "x"] == []
    assert [name for _, attrs in shown.tags for name in attrs if name.startswith("on")] == []
    assert [attrs.get("id") for tag, attrs in shown.tags if tag == "script"] == [
        "figures",
        "pictures",
        "items",
        None,
        None,
    ]
    assert shown.json("items")[0]["legend"][0]["name"] in (HOSTILE, *CLASSES)
    assert any(row["name"] == HOSTILE for item in shown.json("items") for row in item["legend"])
    assert "{{ 7*7 }}" in shown.text()
    drawn = json.dumps([figure["layout"] for figure in shown.json("figures").values()])
    assert "&lt;/script&gt;" in drawn
    assert "<" not in drawn


# --- not all is there ---


def test_a_single_run_is_shown_alone(runs):
    shown = rendered(runs["generative", 1])
    tasks = results(runs["generative", 1])["tasks"]
    assert shown.values == [*(row["miou"] for row in tasks), results(runs["generative", 1])["mean"]["miou"]]
    assert "There is no run of the source" in shown.text()
    assert {item["group"] for item in shown.json("items")} == {"alone"}
    assert all(set(item["pictures"]) == {"image", "label", "adapted"} for item in shown.json("items"))
    iou = shown.json("figures")["classes/0/all"]["data"][0]["x"]
    expected = [
        metrics._mean_of_defined(np.array([row["per_class"][name] for row in tasks], float)) for name in CLASSES
    ]
    assert sorted(iou) == pytest.approx(sorted(100 * value for value in expected if not np.isnan(value)), abs=0.006)


def test_the_source_alone_is_a_report_too(runs):
    shown = rendered(runs["source", 0])
    assert "source: mean mIoU" in shown.text()
    assert "has no loss and asks no teacher" in shown.text()
    assert all(set(item["pictures"]) == {"image", "label", "adapted"} for item in shown.json("items"))
    assert max(shown.json("figures")["classes/0/all"]["data"][0]["x"]) > 0


def test_runs_without_samples_say_so(copied):
    for folder in copied.values():
        shutil.rmtree(folder / "samples")
    shown = rendered(*copied.values())
    assert "The runs kept no images (logging.samples)" in shown.text()
    assert shown.json("items") == []
    assert "scatter/1" in shown.json("figures")


def test_images_of_other_pixels_are_no_pairs(copied):
    changed = copied["generative", 0] / "records.jsonl"
    lines = [json.loads(line) for line in changed.read_text().splitlines()]
    lines[2]["data"] = "other"
    changed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = gathered(*copied.values())
    pairs, alone = data.pairs(report.methods[0], report.methods[1])
    assert alone == 1
    assert (lines[2]["task"], lines[2]["key"], 0) not in {(pair.task, pair.key, pair.seed[0]) for pair in pairs}
    assert "1 more have no partner" in rendered(*copied.values()).text()


def test_classes_are_compared_over_the_seeds_that_both_have(copied):
    """Else a change of data would be shown as a change by the method."""
    whole, fewer = (gathered(*(copied[name, seed] for name, seed in copied if (name, seed) != left_out))
                    for left_out in (None, ("generative", 1)))  # fmt: skip
    index = fewer.compared[0]
    seed_0 = gathered(copied["source", 0], copied["generative", 0])
    shown, expected, other = (
        figures.class_changes(report, report.methods[index], report.tasks) for report in (fewer, seed_0, whole)
    )
    assert shown["data"][0]["x"] == expected["data"][0]["x"] != other["data"][0]["x"]


def test_unfinished_runs_are_named_and_left_out(copied):
    (copied["generative", 1] / "results.json").unlink()
    shown = rendered(*copied.values())
    assert "generative1 has not finished and is left out." in shown.text()
    assert "1 cells are missing" not in shown.text()
    assert "2 cells are missing: generative fog/5 seed 1, generative contrast/5 seed 1." in shown.text()


def test_what_is_too_much_is_left_out_and_counted(root, runs, monkeypatch):
    whole = rendered(root).json("items")
    monkeypatch.setattr(gallery, "MOST_BYTES", 1500)
    shown = rendered(root)
    assert 0 < len(shown.json("items")) < len(whole)
    assert f"{len(whole) - len(shown.json('items'))} images are left out" in shown.text()


def test_two_protocols_are_refused(runs, copied):
    settings = copied["source", 1] / "settings.json"
    edit(settings, lambda text: text.replace('"shuffle": true', '"shuffle": false'))
    with pytest.raises(UserError, match=r"2 protocols in one report \(data.shuffle="):
        gathered(*copied.values())


def test_no_finished_run_is_refused(copied):
    (copied["source", 0] / "results.json").unlink()
    with pytest.raises(UserError, match=r"source0 has not finished; expected a run with results\.json"):
        gathered(copied["source", 0])


def test_command_writes_into_the_first_folder(copied, monkeypatch, capsys):
    first, second = copied["generative", 0], copied["source", 0]
    monkeypatch.setattr(sys, "argv", ["segadapt", "report", str(first), str(second), "resamples=0"])
    main()
    assert (first / page.NAME).read_bytes().startswith(b"<!doctype html>")
    assert not (second / page.NAME).exists()
    assert f"report {first / page.NAME}" in capsys.readouterr().out
    assert not list(first.glob(".*.tmp"))


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_a_folder_without_runs_is_one_line(tmp_path, monkeypatch, capsys, folder):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["segadapt", "report", folder])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"segadapt report: {folder} ")
    assert error.count("\n") == 1


def test_a_missing_package_is_one_line(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(UserError, match=r"report needs plotly, which is not installed"):
        page.run(ReportConfig(runs=[str(runs["source", 0])], resamples=0))
