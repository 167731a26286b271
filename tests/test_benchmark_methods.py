"""The comparison of all methods: what is searched, chosen, taken for the best; the table of rounds."""

import json
from pathlib import Path

import pytest
from test_search import write_tried

from segadapt.config import AdaptConfig
from segadapt.methods import METHODS
from segadapt.parse import from_overrides

NO_RATE = {"bn", "bn-alpha"}


@pytest.fixture
def methods(script):
    return script("methods")


@pytest.fixture
def world(methods, tmp_path):
    """world(*names): these methods on ToyTown, searched at severities 5 and 2."""
    return lambda *names: methods.World("toytown", tmp_path, "", None, names, (5, 2), 40, False, {})


def settings_of(job: str) -> AdaptConfig:
    verb, *overrides = job.split()
    assert verb == "adapt"
    return from_overrides("adapt", overrides, AdaptConfig)


def finish(folder: Path, scores: list[float], task: str = "fog/5") -> None:
    """A run folder that holds results, fractions; the last part of their mean tells them apart."""
    folder.mkdir(parents=True)
    tasks = [{"task": task, "miou": score} for score in scores]
    (folder / "results.json").write_text(json.dumps({"tasks": tasks, "mean": {"miou": sum(scores) / len(scores)}}))


def test_every_method_that_learns_is_searched_at_as_many_rates_around_its_published_one(methods):
    names = set(METHODS) - {"source"}
    assert {name for name in names if not methods.grid(name)} == NO_RATE
    for name in names - NO_RATE:
        points = methods.grid(name)
        assert len(points) == len(methods.RATES) * (1 + len(methods.VARIANTS.get(name, ())))
        published = from_overrides("adapt", ["experiment=toytown_c", f"tta.method={name}"], AdaptConfig).tta.optimizer
        rates = [float(point.split()[0].partition("=")[2]) for point in points.values()]
        expected = [factor * published.lr for factor in methods.RATES] * (len(rates) // len(methods.RATES))
        assert rates == pytest.approx(expected, rel=1e-3)


def test_jobs_of_the_search_are_valid_settings_of_held_out_images(methods, world):
    jobs = list(methods.search_jobs(world(*(set(METHODS) - {"source"}))))
    assert len(set(jobs)) == len(jobs)
    first = {job.split("tta.method=")[1].split()[0]: job for job in jobs}
    assert set(first) == set(METHODS) - NO_RATE
    for name, job in first.items():
        settings = settings_of(job)
        assert settings.tta.method == name
        assert (settings.data.split, settings.data.limit) == ("validation", 40)
        assert not set(settings.data.corruptions) & set(methods.CONDITIONS)


def test_chosen_is_what_the_rule_of_the_search_says(methods, world):
    both = world("tent")
    for severity in both.severities:
        write_tried(both.folder("search", f"source-{severity}"), {"fog/5": 40.0}, data="x")
        gains = (0.2, 5.0, 5.3, -9.0)  # the third is best, the second as good and slower
        for (identity, point), gain in zip(methods.grid("tent").items(), gains, strict=True):
            folder, rate = both.folder("search", f"{identity}-{severity}"), float(point.partition("=")[2])
            write_tried(folder, {"fog/5": 40 + gain}, lr=rate, data="x")
    assert methods.chosen(both, "tent") == "tta.method=tent tta.optimizer.lr=7.5e-06"
    assert methods.chosen(both, "bn") == "tta.method=bn"
    job = next(methods.tested_jobs(both, "run", ["tent"], (3,), both.images, tasks_a_job=15))
    settings = settings_of(job)
    assert (settings.tta.optimizer.lr, settings.experiment.seed, settings.data.corruption_seed) == (7.5e-6, 3, 0)


def test_parts_of_a_tested_run_hold_each_corruption_once_one_seed_after_the_other(methods, world):
    one = world("bn")
    (whole,) = methods.tested_jobs(one, "best", ["bn"], (0,), one.images, tasks_a_job=15)
    parts = list(methods.tested_jobs(one, "best", ["source", "bn"], (0, 1), one.images, tasks_a_job=4))
    settings = [settings_of(job) for job in parts]
    assert [own.experiment.seed for own in settings] == [0] * 8 + [1] * 8
    assert len({(own.experiment.name, own.experiment.id) for own in settings}) == len(parts)
    of_bn = [own.data.corruptions for own in settings if (own.tta.method, own.experiment.seed) == ("bn", 1)]
    assert [len(names) for names in of_bn] == [4, 4, 4, 3]
    assert [name for names in of_bn for name in names] == settings_of(whole).data.corruptions


def test_best_are_the_generative_method_and_three_others(methods, world):
    names = ("generative", "tent", "bn", "sar", "eata", "cotta")
    for name, score in zip(names, (0.1, 0.5, 0.2, 0.4, 0.45, 0.3), strict=True):
        finish(world().folder(f"run-{name}", "s0"), [score])
    assert methods.best(world(*names)) == ["generative", "tent", "eata", "sar"]


def test_table_of_rounds_has_means_over_conditions_and_the_clean_score_after_each(methods, world):
    one = world("tent")
    width, rounds = len(methods.CONDITIONS), methods.ROUNDS
    finish(one.folder("clean", "source"), [0.7])
    finish(one.folder("continual", "source"), [0.1, 0.2, 0.3, 0.4] * rounds)
    finish(one.folder("continual", "tent"), [0.01 * (task // width) for task in range(width * rounds)])
    for number in range(1, rounds + 1):
        finish(one.folder("clean", f"tent-{number}"), [0.7 - 0.01 * number])
    rows = [line.strip("| ").split(" | ") for line in methods.continual_table(one).splitlines()[2:]]
    assert rows[0] == ["source", *["25.00"] * rounds, "25.00"]
    assert rows[1][1:] == ["70.00"] * (rounds + 1)
    assert rows[2] == ["tent", *[f"{number:.2f}" for number in range(rounds)], "4.50"]
    assert rows[3][-2:] == ["60.00", "64.50"]


def test_tables_that_lack_runs_say_which(methods, world):
    said = list(methods.tables(world("tent")))
    assert [text.partition(":")[0] for text in said] == ["search", "run", "best", "continual"]
    assert all("expected the" in text for text in said)


def test_segmenters_after_a_round_are_those_of_its_last_condition(methods, tmp_path):
    width = len(methods.CONDITIONS)
    for index in range(width * methods.ROUNDS):
        (tmp_path / "adapted" / f"{index:02d}_fog-5@{1 + index // width}").mkdir(parents=True)
    found = [path.name for path in methods.after_rounds(tmp_path)]
    assert found == [f"{width * n - 1:02d}_fog-5@{n}" for n in range(1, methods.ROUNDS + 1)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["toytown", "serach"], "no such stage: serach"),
        (["toytown", "run", "--methods", "tent,tnt"], "no such method: tnt"),
        (["camvid", "run"], "camvid needs --models"),
        (["toytown", "run", "--severities", "5,x"], "argument --severities: invalid severities_of value: '5,x'"),
        (["toytown", "best", "--tasks-a-job", "0"], "argument --tasks-a-job: invalid choice: 0"),
        (["toytown", "run", "--severities", "6"], "argument --severities: invalid severities_of value: '6'"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(methods, tmp_path, capsys, arguments, said):
    with pytest.raises(SystemExit) as error:
        methods.main([str(tmp_path), *arguments])
    assert error.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
