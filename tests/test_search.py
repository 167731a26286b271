"""The search: what is safe, what is chosen, what is refused."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from conftest import BENCHMARKS

from segadapt.errors import UserError

TASKS = ("fog/5", "contrast/5")


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
