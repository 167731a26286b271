"""A run that is cut off and started again ends as one that was not, or starts anew where that is asked.

Of a teacher; and of a segmenter whose losses have a memory.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_training_loop import cut, left_by, within
from training_runs import LONG, QUIET, Cut, files_of, generative_training, interrupt, lines_of, training

from segadapt import train, train_generative
from segadapt.training import autoencoder as train_autoencoder
from segadapt.training import loop


@pytest.fixture(scope="module", autouse=True)
def every_step_has_its_line():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_generative, "LOG_EVERY", 1)  # the last step's line is there, its weights are not
        yield


@pytest.fixture(scope="module")
def run_whole(tmp_path_factory, every_step_has_its_line) -> Callable[..., dict[str, Any]]:
    """run_whole(*overrides): the results of LONG where nothing cuts it off; made once."""

    @functools.cache
    def run(*more: str) -> dict[str, Any]:
        results = train_generative.run(generative_training(tmp_path_factory.mktemp("whole"), *LONG, *more))
        assert not Path(results["folder"], train_generative.CHECKPOINT).exists()
        return results

    return run


@pytest.mark.parametrize("after", [1, 3, 5], ids=lambda after: f"{after} steps")
@pytest.mark.parametrize("more", [(), ("train.balanced=true", "data.workers=1", "runtime.precision=bf16")], ids=str)
def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path, run_whole, monkeypatch, mirror, after, more):
    """Before the first checkpoint, and one step after the first and the second: same model, same records."""
    whole = run_whole(*more)
    settings = generative_training(tmp_path, *LONG, *more)
    folder = interrupt(monkeypatch, settings, after=after)
    checkpoint = folder / train_generative.CHECKPOINT
    assert checkpoint.is_file() == (after >= 2)
    mirror.logged.clear()
    again = train_generative.run(settings)
    assert files_of(folder) == files_of(whole["folder"])
    assert (folder / "records.jsonl").read_bytes() == Path(whole["folder"], "records.jsonl").read_bytes()
    assert min(step for step, _ in mirror.logged) == 2 * (after // 2) + 1  # what was done is not done again
    assert again["validation"] == whole["validation"]
    assert not checkpoint.exists()


def test_a_run_cut_after_its_last_step_only_saves(tmp_path, run_whole, monkeypatch):
    whole, settings = run_whole(), generative_training(tmp_path, *LONG)
    with monkeypatch.context() as patch:
        patch.setattr(train_generative, "save_generative", lambda *_: (_ for _ in ()).throw(Cut()))
        with pytest.raises(Cut):
            train_generative.run(settings)
    monkeypatch.setattr(train_generative, "batch_loss", None)  # not one step more
    again = train_generative.run(settings)
    assert files_of(again["folder"]) == files_of(whole["folder"])
    assert again["validation"] == whole["validation"]
    assert lines_of(again["folder"]) == lines_of(whole["folder"])


def test_a_line_cut_short_is_dropped(tmp_path, run_whole, monkeypatch):
    whole, settings = run_whole(), generative_training(tmp_path, *LONG)
    folder = interrupt(monkeypatch, settings, after=3)
    with (folder / "records.jsonl").open("a") as file:
        file.write('{"stage": "transformer", "step": 2, "fl')
    assert lines_of(train_generative.run(settings)["folder"]) == lines_of(whole["folder"])


def test_where_it_is_asked_a_run_starts_anew(tmp_path, run_whole, monkeypatch, mirror):
    whole, settings = run_whole(), generative_training(tmp_path, *LONG)
    folder = interrupt(monkeypatch, settings, after=5)
    mirror.logged.clear()
    anew = generative_training(tmp_path, *LONG, "experiment.restart=true")
    assert train_generative.run(anew)["folder"] == str(folder)
    assert min(step for step, _ in mirror.logged) == 1
    assert files_of(folder) == files_of(whole["folder"])
    assert lines_of(folder) == lines_of(whole["folder"])


@pytest.mark.parametrize("restart", [True, False])
def test_a_finished_run_started_again_trains_its_autoencoder_too(tmp_path, monkeypatch, restart):
    """It once took the one of the earlier start, and its losses were missing from the records."""
    monkeypatch.setattr(train_autoencoder, "LOG_EVERY", 2)
    settings = generative_training(tmp_path, *LONG, f"experiment.restart={str(restart).lower()}")
    first = train_generative.run(settings)
    kept, lines = files_of(first["folder"]), lines_of(first["folder"])
    assert [line["step"] for line in lines if line["stage"] == "autoencoder"] == [2, 4]
    for path in Path(first["folder"], "model", "vae").glob("*.safetensors"):
        path.write_bytes(b"not weights")
    again = train_generative.run(settings)
    assert files_of(again["folder"]) == kept
    assert lines_of(again["folder"]) == lines


def test_a_memory_of_the_losses_goes_on_to_the_bit(tmp_path, monkeypatch):
    """With micro-batches and the contrast loss on, a step after a checkpoint: rings, draws and the projection."""
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    own = (
        "experiment.id=one", "train.checkpoint_every=2", "train.accumulate=2", "train.losses.contrast.warmup_iters=1",
        "train/losses=contrast_memory", "train.losses.contrast.min_views=1", "train.losses.contrast.weight=1",
        "train.losses.contrast.memory.min_filled=1", "train.losses.contrast.memory.pixel_rows=20",
        "train.losses.contrast.max_views=4", "train.losses.contrast.width=8", "train.losses.contrast.max_samples=64",
        "train.optimizer.lr=0.01",
    )  # fmt: skip
    whole = Path(train.run(training(tmp_path / "whole", *own), console=QUIET)["folder"])
    settings = training(tmp_path / "cut", *own)
    folder = within(monkeypatch, settings, cut, after=3)
    train.run(settings, console=QUIET)
    assert left_by(folder) == left_by(whole)
    terms = [line["terms"]["contrast"] for line in lines_of(folder) if "terms" in line]
    assert len(set(terms)) == 6
