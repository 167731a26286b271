"""The verb diagnose, and the columns that it adds to a run."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from quick_settings import quick_settings
from rich.console import Console

from segadapt import adapt, config, config_verbs, diagnose, diagnosis
from segadapt.datasets.toytown import CLASSES as TOYTOWN
from segadapt.errors import UserError


@pytest.fixture(scope="module")
def overrides(saved_models) -> list[str]:
    return [
        "data=toytown_c", "data.corruptions=[fog,contrast]", "data.limit=2", "data.workers=0", "runtime=cpu",
        "data.short_side_px=32", "model.generative.window_px=32", "model.generative.stride_px=32",
        *saved_models(TOYTOWN),
    ]  # fmt: skip


def settings_of(overrides, root, *more) -> config_verbs.DiagnoseConfig:
    return quick_settings("diagnose", [*overrides, f"logging.root={root}", *more], config_verbs.DiagnoseConfig)


def test_the_verb_leaves_numbers_and_a_plot_and_ends_in_a_verdict(overrides, tmp_path, capsys):
    found = diagnose.run(settings_of(overrides, tmp_path, "diagnose.sigmas=[0.25,0.6]", "diagnose.draws=2"))
    folder = Path(found["folder"])
    written = json.loads((folder / "diagnosis.json").read_text())
    assert [row["task"] for row in written["tasks"]] == ["clean", "fog/5", "contrast/5"]
    for row in written["tasks"]:
        assert (row["images"], [level["sigma"] for level in row["levels"]]) == (2, [0.25, 0.6])
        assert all(0 <= level["teacher"]["self_agreement"] <= 1 for level in row["levels"])
    assert (folder / "diagnosis.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (folder / "diagnosis.svg").read_bytes()
    printed = capsys.readouterr().out
    assert printed.endswith("\n".join(diagnosis.sentences(found["verdict"])) + "\n")
    assert "never choose settings by it on a test split" in printed


def test_too_little_memory_names_the_image_and_what_to_lower(overrides, tmp_path, monkeypatch):
    def examine(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has 79 GiB. See")

    monkeypatch.setattr(diagnose, "examine", examine)
    with pytest.raises(
        UserError, match=r"^\w+ of clean: CUDA out of memory.* To need less: lower model.generative.max_"
    ):
        diagnose.run(settings_of(overrides, tmp_path))


def test_a_task_has_the_same_numbers_alone_and_in_company(overrides, tmp_path, monkeypatch):
    monkeypatch.setattr(diagnose, "plot", lambda *_, **__: b"")  # 0.7 s a run, and other tests look at it
    few = ("diagnose.sigmas=[0.25]", "data.limit=1")
    whole = diagnose.run(settings_of(overrides, tmp_path / "a", *few))["tasks"]
    again = diagnose.run(settings_of(overrides, tmp_path / "b", *few))["tasks"]
    alone = diagnose.run(
        settings_of(overrides, tmp_path / "c", *few, "data.corruptions=[contrast]", "diagnose.clean=false")
    )
    clean = diagnose.run(settings_of(overrides, tmp_path / "d", *few, "data.corruptions=[]"))
    assert repr(whole) == repr(again)
    assert repr(alone["tasks"]) == repr(whole[2:])
    assert repr(clean["tasks"]) == repr(whole[:1])


def test_how_a_run_would_update_makes_no_other_diagnosis(overrides, tmp_path):
    one, other, third = (
        diagnose.identity_of(settings_of(overrides, tmp_path, *more))
        for more in ((), ("tta.optimizer.lr=1", "model.update.generative=false"), ("model.loss.temperature=2",))
    )
    assert one == other != third


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ("tta.forward_mode=discriminative_only",),
            r"tta\.forward_mode=discriminative_only, tta\.method=generative: diagnose asks the teacher",
        ),
        (("diagnose.sigmas=[]",), r"diagnose\.sigmas=\[\]: expected one or more"),
        (("diagnose.sigmas=[0.5,0]",), r"diagnose\.sigmas=\[0\.5, 0\.0\]: expected"),
        (("diagnose.sigmas=[0.5,0.5]",), r"diagnose\.sigmas=\[0\.5, 0\.5\]: expected"),
        (("diagnose.sigmas=[1.5]",), r"diagnose\.sigmas=\[1\.5\]: expected"),
        (("data.kind=files",), r"data\.label_path=null: diagnose compares"),
        (("data.image_path='{corruption}/{key}.png'",), r"diagnose\.clean=true, but data\.image_path="),
    ],
)
def test_what_cannot_be_diagnosed_is_refused_before_any_work(overrides, tmp_path, more, message):
    with pytest.raises(UserError, match=message) as caught:
        diagnose.run(settings_of(overrides, tmp_path, *more))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# -- the verdict -------------------------------------------------------------------------------------------------------


def row_of(task: str, segmenter: float, *teacher: float, cosine: float = 0.1) -> dict:
    """A row of levels at sigma 0.25, 0.5, ...; accuracies among the candidates."""
    levels = [
        {
            "sigma": 0.25 * (index + 1),
            "teacher": {"accuracy": 0.9, "miou": 0.5, "agreement": 0.5, "self_agreement": math.nan},
            "candidates": {"accuracy": value, "miou": 0.4, "agreement": 0.5, "self_agreement": math.nan},
            "cosine": cosine,
            "entropy_share": 0.9,
            "masked": 0.0,
        }
        for index, value in enumerate(teacher)
    ]
    return {
        "task": task, "images": 2, "pixels": 9, "segmenter": {"accuracy": segmenter, "miou": segmenter / 2},
        "best_sigma": diagnosis.best_sigma(levels), "levels": levels,
    }  # fmt: skip


def test_verdict_compares_candidates_with_the_segmenter_at_the_best_level_of_the_shifted_tasks():
    rows = [row_of("clean", 0.9, 0.99, 0.1), row_of("fog/5", 0.5, 0.4, 0.6, cosine=0.2),
            row_of("snow/5", 0.7, 0.3, 0.5, cosine=math.nan), row_of("frost/5", 0.6, 0.3, 0.59)]  # fmt: skip
    verdict = diagnosis.verdict_of(rows)
    assert verdict["sigma"] == 0.5
    assert [pair["task"] for pair in verdict["better"]] == ["fog/5"]
    assert [pair["task"] for pair in verdict["worse"]] == ["snow/5", "frost/5"]  # the worst first
    assert verdict["cosine"] == pytest.approx(0.15)
    assert [row["best_sigma"] for row in rows] == [0.25, 0.5, 0.5, 0.5]
    text = "\n".join(diagnosis.sentences(verdict))
    assert "better than the segmenter on 1 of 3 tasks" in text
    assert "gains are likely there: fog/5 (0.60 against 0.50)." in text
    assert "Harm is possible where it is worse: snow/5 (0.50 against 0.70), frost/5 (0.59 against 0.60)." in text
    assert "Best sigma 0.5; mean gradient cosine +0.15: a small step lowers the cross-entropy" in text


def test_verdict_without_hope_or_numbers_says_so():
    nothing = math.nan
    text = "\n".join(diagnosis.sentences(diagnosis.verdict_of([row_of("clean", 0.9, 0.5, nothing, cosine=nothing)])))
    assert "on 0 of 1 tasks" in text
    assert "expect no gain." in text
    assert "sigma 0.25" in text
    assert "no image had two gradients to compare" in text
    against = diagnosis.verdict_of([row_of("fog/5", 0.9, 0.5, cosine=-0.1)])
    assert "does not lower the cross-entropy" in "\n".join(diagnosis.sentences(against))
    empty = diagnosis.verdict_of([row_of("fog/5", nothing, nothing, nothing)])
    assert (empty["better"], empty["worse"]) == ([], [])


def test_table_fits_a_terminal_of_80_columns_and_the_plot_any_number_of_tasks():
    rows = [row_of(task, 1.0, 1.0, 0.5, cosine=-0.25) for task in ("clean", "gaussian_noise/5", "elastic_transform/5")]
    console = Console(width=80, record=True)
    console.print(diagnosis.table_of([*rows, row_of("fog/5", math.nan, math.nan, cosine=math.nan)]))
    lines = console.export_text().splitlines()
    for row in rows:
        (line,) = [line for line in lines if row["task"] in line]
        assert line.split()[1:] == ["100.0", "50.0", "0.25", "100.0", "40.0", "50.0", "50.0", "-0.25", "90.0", "0.0"]
    for count in (1, 3, 5):
        picture = diagnosis.plot((rows * 2)[:count], title="a title", kind="svg")
        assert picture == diagnosis.plot((rows * 2)[:count], title="a title", kind="svg")


# -- columns of a run --------------------------------------------------------------------------------------------------


def test_diagnostics_of_every_second_image_leave_the_run_as_it_is(overrides, tmp_path):
    found = {}
    for every in (0, 2):
        settings = quick_settings(
            "adapt",
            [*overrides, "data.limit=3", "tta.optimizer.lr=0.01", "tta.save_adapted=true", "model.generative.draws=2",
             f"logging.root={tmp_path / str(every)}", f"tta.diagnose_every={every}"],
            config.AdaptConfig,
        )  # fmt: skip
        folder = Path(adapt.run(settings)["folder"])
        lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
        diagnosed = {(line["task"], line["index"]) for line in lines if line.pop("diagnosis", None)}
        weights = [path.read_bytes() for path in sorted(folder.glob("adapted/*/*.safetensors"))]
        found[every] = (folder.name, lines, weights, diagnosed)
    assert found[0][:3] == found[2][:3]
    assert len(found[0][2]) == 2
    assert found[0][3] == set()
    assert found[2][3] == {(task, index) for task in ("fog/5", "contrast/5") for index in (0, 2)}


def test_columns_are_those_of_the_weights_before_the_step(overrides, tmp_path, monkeypatch):
    """The first image of a task is judged by the source weights: as the verb judges it, but for the noise."""
    monkeypatch.setattr(diagnose, "plot", lambda *_, **__: b"")
    settings = quick_settings(
        "adapt",
        [*overrides, "data.limit=1", "tta.optimizer.lr=1", f"logging.root={tmp_path}", "tta.diagnose_every=1"],
        config.AdaptConfig,
    )  # fmt: skip
    lines = (Path(adapt.run(settings)["folder"]) / "records.jsonl").read_text().splitlines()
    verb = diagnose.run(
        settings_of(overrides, tmp_path, "data.limit=1", f"diagnose.sigmas=[{settings.model.generative.sigma}]")
    )
    for line, row in zip(map(json.loads, lines), verb["tasks"][1:], strict=True):
        assert line["diagnosis"]["segmenter"] == row["segmenter"]
        for name in ("cosine", "entropy", "masked", "reachable"):  # the gradient has the noise of the step in both
            assert line["diagnosis"][name] == row["levels"][0][name]


def test_diagnostics_of_a_run_need_labels(overrides, tmp_path):
    settings = quick_settings("adapt", [*overrides, "tta.diagnose_every=2", f"logging.root={tmp_path}"],
                              config.AdaptConfig)  # fmt: skip
    settings.data = dataclasses.replace(settings.data, kind="files", label_path=None)
    settings.logging.predictions = "all"
    with pytest.raises(UserError, match=r"tta\.diagnose_every=2 and data\.label_path=null"):
        adapt.run(settings)
    assert list(tmp_path.iterdir()) == []
