"""The compiled segmenter of `train`: one graph, the values of the plain one, and a run."""

import functools
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from training_runs import QUIET, lines_of, training

from segadapt import train
from segadapt.models.discriminative.make import make_segmenter

CONFIG = {
    "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 16], "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 16,
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["segformer", "segadapt_segformer_mmseg"])
def test_segformer_is_one_graph_and_its_outputs_are_those_of_the_plain_forward(family):
    """A hook on the head once broke the graph in two."""
    segmenter, seen = make_segmenter(family, CONFIG, 6, seed=1), []
    head: Any = segmenter.net.decode_head
    image_B3HW = torch.rand(2, 3, 50, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # compiled first, as in training: transformers' forward leaves hooks behind
        compiled = torch.compile(segmenter.outputs, backend="eager", fullgraph=True)(image_B3HW)
        found = segmenter.outputs(image_B3HW)
        head.dropout.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        logits_BChw = segmenter.logits(image_B3HW)
    assert torch.equal(found.logits_BChw, logits_BChw)
    assert torch.equal(found.features_BDyx, seen[0])
    assert found.auxiliary_BChw is None
    torch.testing.assert_close(compiled.logits_BChw, logits_BChw)
    torch.testing.assert_close(compiled.features_BDyx, found.features_BDyx)


@pytest.mark.slow
def test_a_compiled_training_takes_the_steps_of_a_plain_one(tmp_path, monkeypatch):
    """Traced as inductor does, its operations run one by one: its C++ takes minutes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    counters.clear()
    own = ("train.iters=2", "train.validate_every=1", "train.optimizer.lr=0.01", "train.schedule.decay=constant",
           "model.discriminative.config.classifier_dropout_prob=0.0")  # fmt: skip
    plain, compiled = (
        train.run(training(tmp_path / name, *own, f"runtime.compile={name}"), console=QUIET)
        for name in ("false", "true")
    )
    losses = [[line["loss"] for line in lines_of(done["folder"]) if "loss" in line] for done in (plain, compiled)]
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert counters["graph_break"] == {}
    assert counters["stats"]["unique_graphs"] > 0
