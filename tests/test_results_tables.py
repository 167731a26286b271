"""`segadapt results`: cells joined to rows, one table a protocol, nothing merged or made up, four formats."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_folders import TASKS, confusions, write_run

from segadapt import finished
from segadapt.__main__ import GATHERED, gathered
from segadapt.config_verbs import ResultsConfig
from segadapt.errors import UserError
from segadapt.parse import from_overrides
from segadapt.results import build_tables, columns, read, run, run_folders
from segadapt.tables import FORMATS, Row, Table, as_markdown, lines, mean_of, whole

METHODS = {"source": 0.4, "bn": 0.5, "generative": 0.6}  # method: how often it is right


def write_grid(root: Path, *, seeds: int = 2, images: int = 12, more: dict | None = None, name: str = "") -> None:
    """{name}METHOD-SEED-TASK of every cell of METHODS and TASKS; the corruptions of the settings are the cell's own."""
    rng = np.random.default_rng(5)
    for method, right in METHODS.items():
        for seed in range(seeds):
            for task in TASKS:
                cell = {task: confusions(rng, images, right=right)}
                settings = {"data": {"severity": 5, **(more or {}), "corruptions": [task.partition("/")[0]]}}
                folder = root / f"{name}{method}-{seed}-{task.partition('/')[0]}"
                write_run(folder, cell, seed=seed, method=method, more=settings)


def tables_of(*roots: Path, against: str = "source", resamples: int = 0) -> list[Table]:
    runs = [read(folder) for folder in run_folders(map(str, roots))]
    return build_tables(runs, against=against, resamples=resamples, is_timed=False)


def row(table: Table, name: str) -> Row:
    (found,) = [row for row in table.rows if row.name == name]
    return found


# --- joining ---


def test_cells_of_one_task_each_give_the_table_of_whole_runs(tmp_path):
    write_grid(tmp_path / "cells")
    for method in METHODS:
        for seed in range(2):
            parts = [tmp_path / "cells" / f"{method}-{seed}-{task.partition('/')[0]}" for task in TASKS]
            target = shutil.copytree(parts[0], tmp_path / f"whole/{method}-{seed}")
            for name in ("records.jsonl", "timings.jsonl"):
                (target / name).write_text("".join((part / name).read_text() for part in parts))
            results = [json.loads((part / "results.json").read_text()) for part in parts]
            results[0]["tasks"] += results[1]["tasks"]
            (target / "results.json").write_text(json.dumps(results[0]))
    (cells,), (whole_runs,) = (tables_of(tmp_path / name, resamples=50) for name in ("cells", "whole"))
    assert cells.tasks == whole_runs.tasks == TASKS
    assert as_markdown([cells]) == as_markdown([whole_runs])
    assert [row.name for row in cells.rows] == ["source", "bn", "generative"]
    assert all(row.interval is not None for row in cells.rows[1:])


def test_gains_are_paired_by_seed_and_their_interval_is_that_of_the_bootstrap(tmp_path):
    write_grid(tmp_path, seeds=3)
    (table,) = tables_of(tmp_path, resamples=200)
    scores = {
        method: np.array([[finished.load((tmp_path / f"{method}-{seed}-{task.partition('/')[0]}").resolve()).miou_T[0]
                           for task in TASKS] for seed in range(3)])
        for method in METHODS
    }  # fmt: skip
    ours = row(table, "generative")
    assert np.array_equal(ours.miou_ST, scores["generative"])
    assert ours.gain_ST == pytest.approx(scores["generative"] - scores["source"], abs=1e-15)
    pairs = []
    for seed in range(3):
        both = [
            [finished.load((tmp_path / f"{method}-{seed}-{task.partition('/')[0]}").resolve()) for task in TASKS]
            for method in ("generative", "source")
        ]
        pairs.append(tuple(finished.join(parts, TASKS) for parts in both))
    assert ours.interval == finished.bootstrap(pairs, resamples=200)
    line = lines(table.tasks, [ours])[1]
    gain_S = (scores["generative"] - scores["source"]).mean(axis=1) * 100
    assert line[3] == f"{gain_S.mean():+.2f} \N{PLUS-MINUS SIGN} {gain_S.std(ddof=1):.2f}"
    assert row(table, "source").gain_ST is None
    (other,) = tables_of(tmp_path, against="bn")
    assert row(other, "bn").gain_ST is None
    assert row(other, "source").gain_ST == pytest.approx(scores["source"] - scores["bn"], abs=1e-15)


def test_a_missing_cell_is_shown_as_missing_and_leaves_its_seed_out_of_the_means(tmp_path):
    write_grid(tmp_path, seeds=3)
    (before,) = tables_of(tmp_path, resamples=20)
    shutil.rmtree(tmp_path / "bn-1-fog")
    (tmp_path / "generative-2-contrast" / "results.json").unlink()  # begun, not finished
    (table,) = tables_of(tmp_path, resamples=20)
    assert table.missing == ["bn fog/5 seed 1", "generative contrast/5 seed 2"]
    bn = row(table, "bn")
    assert np.argwhere(np.isnan(bn.miou_ST)).tolist() == [[1, TASKS.index("fog/5")]]
    assert np.array_equal(whole(bn.miou_ST), row(before, "bn").miou_ST[[0, 2]].mean(axis=1))
    assert mean_of(bn.gain_ST)[0] == pytest.approx(row(before, "bn").gain_ST[[0, 2], 0].mean())
    text = as_markdown([table])
    assert "2 cells are missing (-): bn fog/5 seed 1, generative contrast/5 seed 2" in text
    for seed in (0, 2):
        shutil.rmtree(tmp_path / f"bn-{seed}-fog")
    text = as_markdown(tables_of(tmp_path))
    shown = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| bn")]
    assert shown[0][1] == shown[0][3] == "-"
    assert shown[0][2] != "-"
    assert "0.00" not in text


@given(st.lists(st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=3, max_size=3), min_size=1, max_size=4))
def test_means_leave_out_what_is_missing(values):
    values_ST = np.array([[np.nan if value is None else value for value in line] for line in values], dtype=float)
    for task in range(3):
        there = [line[task] for line in values if line[task] is not None]
        got = mean_of(values_ST)[task]
        assert np.isnan(got) if not there else got == pytest.approx(np.mean(there))
    assert whole(values_ST) == pytest.approx([np.mean(line) for line in values if None not in line])
    cells = lines(("a", "b", "c"), [Row("x", values_ST, float("nan"))])[0]
    assert [cell == "-" for cell in cells[1:4]] == [all(line[t] is None for line in values) for t in range(3)]


# --- protocols ---


def test_runs_under_different_protocols_get_tables_of_their_own(tmp_path):
    write_grid(tmp_path, name="five")
    write_grid(tmp_path, name="three", more={"severity": 3})
    made = tables_of(tmp_path)
    assert [table.protocol["data.severity"] for table in made] == [3, 5]
    text = as_markdown(made)
    assert [line for line in text.splitlines() if line.startswith("data.")] == ["data.severity=3", "data.severity=5"]
    assert [len(table.rows) for table in made] == [3, 3]
    for table in made:
        assert not table.missing


def test_the_source_stands_in_the_tables_of_every_reset_rule(tmp_path):
    write_grid(tmp_path)
    rng, corruptions = np.random.default_rng(1), [task.partition("/")[0] for task in TASKS]
    of_task = {task: confusions(rng, 12, right=0.5) for task in TASKS}
    more = {"data": {"severity": 5, "corruptions": corruptions}, "tta": {"continual": True}}
    write_run(tmp_path / "continual", of_task, method="cotta", more=more)
    reset, continual = sorted(tables_of(tmp_path), key=lambda table: "tta.continual" in table.protocol)
    assert [row.name for row in continual.rows] == ["source", "cotta"]
    assert [row.name for row in reset.rows] == ["source", "bn", "generative"]
    assert np.array_equal(row(reset, "source").miou_ST, row(continual, "source").miou_ST)


def test_a_method_with_two_settings_has_two_rows_that_name_them(tmp_path):
    write_grid(tmp_path)
    for task in TASKS:
        cell = {task: confusions(np.random.default_rng(1), 12, right=0.5)}
        more = {"data": {"severity": 5, "corruptions": [task.partition("/")[0]]}}
        write_run(tmp_path / f"more-{task[:3]}", cell, method="bn", lr=1e-3, more=more)
    (table,) = tables_of(tmp_path)
    assert [row.name for row in table.rows] == [
        "source", "bn (tta.optimizer.lr=0.001)", "bn (tta.optimizer.lr=1e-05)", "generative",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"against=bn: bn \(tta\.optimizer\.lr=0\.001\) and bn \(.*expected one row"):
        tables_of(tmp_path, against="bn")


def edit(folder: Path, old: str, new: str) -> None:
    """In results.json, which is read once a path."""
    path = folder / "results.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    finished.load.cache_clear()


def test_what_only_seems_alike_is_refused_and_both_are_named(tmp_path):
    write_grid(tmp_path)
    cell = tmp_path / "bn-0-fog"
    shutil.copytree(cell, tmp_path / "twice")
    assert len(tables_of(tmp_path)) == 1  # the very same
    edit(tmp_path / "twice", '"data0"', '"other"')
    with pytest.raises(UserError, match=r"twice and .*bn-0-fog hold fog/5 .*|bn-0-fog and .*twice hold fog/5 .*"):
        tables_of(tmp_path)
    shutil.rmtree(tmp_path / "twice")
    edit(cell, '"data0"', '"other"')
    with pytest.raises(UserError, match=r"bn-0-.* and .*source-0-.*: other images or labels of fog/5"):
        tables_of(tmp_path)
    edit(cell, '"other"', '"data0"')
    edit(cell, '"first"', '"retrained"')
    with pytest.raises(UserError, match="name the same segmenter, but its weights differ"):
        tables_of(tmp_path)


# --- folders, order, formats ---


def test_run_folders_are_found_below_and_other_verbs_named_and_passed_over(tmp_path, capsys):
    write_grid(tmp_path / "deep/er")
    trained = {"fog/5": confusions(np.random.default_rng(1), 2, right=0.5)}
    write_run(tmp_path / "deep/trained", trained, more={"train": {"iters": 3}})
    (tmp_path / "deep/er/logs").mkdir()
    found = run_folders([str(tmp_path / "deep"), str(tmp_path / "deep/er/bn-0-fog")])
    assert len(found) == len(set(found)) == 12
    assert capsys.readouterr().err == (
        "left out, of other verbs: 1 runs (trained); a trained model is scored by `segadapt evaluate`\n"
    )
    with pytest.raises(UserError, match="nowhere is no folder"):
        run_folders([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="holds no run folder"):
        run_folders([str(tmp_path / "deep/er/logs")])
    with pytest.raises(UserError, match="a run of another verb"):
        run_folders([str(tmp_path / "deep/trained")])


@given(st.permutations(["gaussian_noise/5", "fog/5", "snow/5", "jpeg_compression/5", "night"]))
def test_columns_have_the_papers_order_but_a_long_stream_its_own(names):
    one = finished.Run({}, tuple(names), (Path(),) * 5, np.zeros(5), ("",) * 5, "")
    assert columns([one]) == ("gaussian_noise/5", "snow/5", "fog/5", "jpeg_compression/5", "night")
    stream = finished.Run({"tta.continual": True}, tuple(names), (Path(),) * 5, np.zeros(5), ("",) * 5, "")
    assert columns([stream]) == tuple(names)


SMALL = [
    Table({"data.severity": 5, "a_b": 1}, ("fog/5", "contrast/5"), ((0, 0), (1, 0)), [
        Row("source", np.array([[0.25, 0.5], [0.25, 0.5]]), 0.5),
        Row("bn", np.array([[0.5, 0.5], [0.75, np.nan]]), 0.25, np.array([[0.25, 0.0], [0.5, np.nan]]), (0.1, 0.15))]),
    Table({"data.severity": 3, "a_b": 1}, ("fog/3",), ((0, 0),), [Row("source", np.array([[0.25]]), float("nan"))]),
]  # fmt: skip


def test_markdown():
    assert FORMATS["markdown"](SMALL) == (
        "data.severity=5\n\n"
        "|  | fog | contr | mean | 95 % interval | worst | s/image |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        "| source | 25.00 | 50.00 | 37.50 \N{PLUS-MINUS SIGN} 0.00 |  |  | 0.500 |\n"
        "| bn | 62.50 | 50.00 | 50.00 |  |  | 0.250 |\n"
        "| gain | +37.50 | +0.00 | +12.50 | +10.00 to +15.00 | +0.00 contr |  |\n\n"
        "1 cells are missing (-): bn contrast/5 seed 1\n\n"
        "data.severity=3\n\n"
        "|  | fog/3 | mean | 95 % interval | worst | s/image |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| source | 25.00 | 25.00 |  |  |  |\n"
    )


def test_latex_is_escaped():
    text = FORMATS["latex"](SMALL)
    assert text.startswith("% data.severity=5\n% missing: bn contrast/5 seed 1\n\\begin{tabular}{lrrrrrr}\n")
    assert "source & 25.00 & 50.00 & 37.50 $\\pm$ 0.00 &  &  & 0.500 \\\\\n" in text
    assert "95 \\% interval" in text
    assert text.count("\\end{tabular}") == 2


def test_csv_reads_back_and_json_has_null_for_what_is_missing():
    first, second = FORMATS["csv"](SMALL).split("\n\n")
    rows = list(csv.DictReader(first.splitlines()))
    assert [(row["protocol"], row["row"], row["contr"]) for row in rows] == [
        ("data.severity=5", name, value) for name, value in (("source", "50.00"), ("bn", "50.00"), ("gain", "+0.00"))
    ]  # fmt: skip
    assert list(csv.reader(second.splitlines()))[1][:3] == ["data.severity=3", "source", "25.00"]
    stored = json.loads(FORMATS["json"](SMALL))
    assert stored[0]["rows"][1]["miou_ST"] == [[0.5, 0.5], [0.75, None]]
    assert stored[0]["missing"] == ["bn contrast/5 seed 1"]


def test_the_verb_writes_the_file_that_is_asked_for_or_prints(tmp_path, capsys):
    write_grid(tmp_path / "grid")
    words = [f"runs=[{tmp_path / 'grid'}]", "resamples=20"]
    run(from_overrides("results", words, ResultsConfig))
    printed = capsys.readouterr().out
    assert printed.startswith("|  | fog | contr | mean |")
    assert " to " in printed
    assert "0.200" in printed
    run(from_overrides("results", [*words, f"output={tmp_path / 'table.md'}"], ResultsConfig))
    assert capsys.readouterr().out == ""
    assert (tmp_path / "table.md").read_text() == printed
    with pytest.raises(UserError, match=r"against=sorce is not a method\. Did you mean source\?"):
        run(from_overrides("results", [*words, "against=sorce"], ResultsConfig))


@pytest.mark.parametrize("name", ["outputs/a", "with space", "it's", "a,b", "[x]", "back\\slash", "ünïcode"])
def test_folders_stand_by_themselves_whatever_their_name(name):
    words = gathered(["--config-dir", "mine", name, "format=csv", "other"], *GATHERED["results"])
    assert words[:3] == ["--config-dir", "mine", "format=csv"]
    assert from_overrides("results", words[2:], ResultsConfig).runs == [name, "other"]
