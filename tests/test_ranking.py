"""`segadapt results` of runs under several rules: never in one table; ranked, the best first."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from run_folders import confusions, write_run

from segadapt import metrics, ranking
from segadapt.config_verbs import ResultsConfig
from segadapt.errors import UserError
from segadapt.parse import from_overrides
from segadapt.results import build_tables, read, run, run_folders
from segadapt.tables import FORMATS, titles

BOX = {"input_resize": "box", "long_side_px": 2048, "logit_resize": "two_step", "scales": [1.0], "flip": False}
MIRRORED = BOX | {"flip": True}
RULES = {"plain": None, "box": BOX, "mirrored": MIRRORED}
TASK = "clean"


def write(root: Path, name: str, *, right: float, rule: str, model: str = "b0", data: str = "ade20k",
          method: str = "source", root_of_data: str = "/here") -> float:  # fmt: skip
    """A run folder as evaluate leaves it; its mIoU."""
    counts_nCC = confusions(np.random.default_rng(int(100 * right)), 12, right=right)
    more = {"data": {"name": data, "split": "validation", "short_side_px": 512, "corruptions": [],
                     "data_root": root_of_data},
            "model": {"discriminative": {"checkpoint": model, "short_side_px": None}}}  # fmt: skip
    if RULES[rule] is not None:
        more["evaluate"] = RULES[rule]
    folder = write_run(root / name, {TASK: counts_nCC}, method=method, segmenter=model, more=more)
    scores = metrics.scores(counts_nCC.sum(axis=0))
    results = json.loads((folder / "results.json").read_text())
    results["tasks"][0]["images"] = 12
    results |= {"rule": f"rule {rule}", "method": method,
                "mean": {name: getattr(scores, name) for name in ("miou", "macc", "aacc")}}  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    return scores.miou


@pytest.fixture
def runs(tmp_path) -> Path:
    for place, (rule, right) in enumerate([("box", 0.4), ("plain", 0.9), ("box", 0.7), ("mirrored", 0.5)]):
        write(tmp_path, f"run{place}", right=right, rule=rule, model=f"model{place}")
    return tmp_path


def ranked(root: Path) -> list[ranking.Ranked]:
    return ranking.build(run_folders([str(root)]))


def test_one_table_a_rule_with_the_best_run_first(runs):
    write(runs, "elsewhere", right=0.6, rule="box", model="model9", root_of_data="/there")
    tables = {table.rule: [row.run for row in table.rows] for table in ranked(runs)}
    assert tables == {
        "rule box": ["run2", "elsewhere", "run0"],
        "rule plain": ["run1"],
        "rule mirrored": ["run3"],
    }


def test_other_data_is_another_table_that_says_so(tmp_path):
    for name in ("ade20k", "camvid"):
        write(tmp_path, name, right=0.5, rule="box", data=name)
    assert [table.data for table in ranked(tmp_path)] == ["ade20k validation", "camvid validation"]


def test_a_row_has_the_scores_of_its_run(tmp_path):
    miou = write(tmp_path, "one", right=0.5, rule="box", model="b3")
    ((row,),) = (table.rows for table in ranked(tmp_path))
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    assert (row.model, row.method, row.images, row.run) == ("b3", "source", 12, "one")
    assert (row.miou, row.macc, row.aacc) == (miou, results["mean"]["macc"], results["mean"]["aacc"])


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_every_format_shows_every_score_with_its_rule(runs, form):
    output = runs / "out.txt"
    overrides = [f"runs=[{runs}]", "table=ranked", f"format={form}", f"output={output}"]
    run(from_overrides("results", overrides, ResultsConfig))
    text, tables = output.read_text(), ranked(runs)
    for table in tables:
        assert table.rule in text
        for row in table.rows:
            assert (str(row.miou) if form == "json" else f"{100 * row.miou:.2f}") in text
    if form == "csv":
        lines = list(csv.reader(line for line in text.splitlines() if line))
        assert len(lines) == sum(1 + len(table.rows) for table in tables)
        assert {len(line) for line in lines} == {1 + len(ranking.COLUMNS)}


def test_what_has_no_score_is_left_out_and_named(runs, capsys):
    (runs / "run2" / "results.json").unlink()
    path = runs / "run3" / "results.json"
    unlabelled = json.loads(path.read_text())
    unlabelled["mean"]["miou"] = unlabelled["tasks"][0]["miou"] = None
    path.write_text(json.dumps(unlabelled))
    assert sorted(row.run for table in ranked(runs) for row in table.rows) == ["run0", "run1"]
    assert capsys.readouterr().err == "left out, not finished or without labels: 2 runs (run2, run3)\n"


def test_a_run_that_names_no_rule_is_refused(runs):
    path = runs / "run0" / "results.json"
    results = json.loads(path.read_text())
    del results["rule"]
    path.write_text(json.dumps(results))
    with pytest.raises(UserError, match=r"run0: results\.json without the column rule"):
        ranked(runs)


def test_tables_of_gains_keep_rules_apart_too(tmp_path):
    """One model under three rules, beside an adapted run: the source of the rule of adapt alone is its source."""
    for rule in RULES:
        write(tmp_path, rule, right=0.5, rule=rule)
    write(tmp_path, "adapted", right=0.7, rule="plain", method="generative")
    tables = build_tables([read(folder) for folder in run_folders([str(tmp_path)])], against="source", resamples=0,
                          is_timed=False)  # fmt: skip
    rows = {title: [row.name for row in table.rows] for title, table in zip(titles(tables), tables, strict=True)}
    assert sorted(map(len, rows.values())) == [1, 1, 2]
    (title,) = [title for title, names in rows.items() if names == ["source", "generative"]]
    assert "evaluate=as adapt" in title
    assert any("evaluate.flip=True" in title for title in rows)
