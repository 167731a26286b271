"""Training without memory: one line that says at which step, of which images, and what to lower."""

import pytest
import torch
from again import Captured
from pretraining_runs import tiny
from tiny_networks import TINY
from training_runs import QUIET, training

from segadapt import pretrain, scoring, train
from segadapt.errors import UserError
from segadapt.training import learner
from segadapt.training.learner import AllLayers

CUDA = "CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has a total capacity of 79 GiB of which 1 GiB is free. See"


def refuse(*_, **__):
    raise torch.OutOfMemoryError(CUDA)


def said_by(settings, verb=train) -> str:
    with pytest.raises(UserError) as caught:
        verb.run(settings, console=QUIET)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "count", "first", "missing"),
    [
        ([], 2, "raise train.accumulate=1, or lower train.batch_size=2", "recorded"),
        (["train.accumulate=2"], 1, "set model.discriminative.gradient_checkpointing=true", "accumulate"),
        (["train.batch_size=1"], 1, "set model.discriminative.gradient_checkpointing=true", "batch_size"),
        (
            ["train.batch_size=1", "model.discriminative.gradient_checkpointing=true"],
            1,
            "lower train.transforms.crop_px=48",
            "checkpointing",
        ),
    ],
    ids=str,
)
def test_a_step_without_memory_says_of_what_and_what_to_lower(tmp_path, monkeypatch, overrides, count, first, missing):
    monkeypatch.setattr(AllLayers, "backward", refuse)
    said = said_by(training(tmp_path, "runtime.precision=bf16", *overrides))
    images = f"{count} image{'s' * (count > 1)}"
    assert said.startswith(f"step 1 ({images} of 48 x 48 px on cpu): CUDA out of memory. Tried to allocate 2 GiB. ")
    assert f". To need less: {first}" in said
    assert said.endswith("lower train.transforms.crop_px=48.")
    assert missing not in said


def test_graphs_are_among_it_where_the_net_cannot_recompute(tmp_path, monkeypatch):
    monkeypatch.setattr(learner, "memory_of", Captured)
    monkeypatch.setattr(train, "refuse_recorded", lambda *_: None)
    monkeypatch.setattr(AllLayers, "backward", refuse)
    settings = training(tmp_path, "train.recorded=true", "model.discriminative.family=segadapt_hrnet")
    settings.model.discriminative.config = TINY["segadapt_hrnet"]
    assert ", or set train.recorded=false, or lower train.transforms.crop_px=48." in said_by(settings)


def test_of_a_pretraining(tmp_path, monkeypatch):
    monkeypatch.setattr(AllLayers, "backward", refuse)
    said = said_by(tiny(tmp_path), pretrain)
    assert said.startswith("step 1 (")
    assert said.endswith(" lower train.transforms.image_px=32.")


def test_a_validation_without_memory_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "count", refuse)
    said = said_by(training(tmp_path))
    assert said.startswith("validation: CUDA out of memory. ")
    assert said.endswith("To need less: lower data.short_side_px=48.")


@pytest.mark.parametrize("said", ["CUDA error: out of memory\nmore", "CUBLAS_STATUS_ALLOC_FAILED when calling x"])
def test_a_library_without_memory_is_known_too(tmp_path, monkeypatch, said):
    def fail(*_, **__):
        raise RuntimeError(said)

    monkeypatch.setattr(AllLayers, "backward", fail)
    assert said.splitlines()[0] in said_by(training(tmp_path))


def test_other_errors_of_a_step_are_bugs(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(AllLayers, "backward", fail)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train.run(training(tmp_path), console=QUIET)
