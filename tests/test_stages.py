"""The scripts of the two worlds: which jobs they list, on which split, with which settings."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import BENCHMARKS
from quick_settings import quick_settings

from segadapt.__main__ import VERBS

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
        return data.name, data.split, drawn, broad_of(jobs_of[name])

    def broad_of(job):
        return job.train.transforms.broad if hasattr(job.train, "transforms") else job.train.broad

    assert broad_of(jobs_of["segmenter/s0"]).probability == 0
    assert seen("teacher-narrow/s0") == seen("segmenter/s0") == seen("segmenter/s1")
    assert jobs_of["teacher-broad/s0"].train.broad.probability > 0
    assert seen("teacher-broad/s0") == seen("segmenter-wide/s0") == seen("teacher-broad/s1")
    assert [jobs_of[f"{name}/s1"].experiment.seed for name in ("segmenter", "teacher-broad")] == [1, 1]
