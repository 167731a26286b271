"""Two GPUs over NCCL train as one does, BatchNorm's statistics taken over both (SyncBatchNorm)."""

import pytest
import torch
from test_parallel_training import begin, finish, left_by

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
# SGD: AdamW would make steps of the learning rate out of rounding, where a gradient is next to 0
ON_GPU = ("runtime.device=cuda", "runtime.deterministic=false", "runtime.precision=fp32", "train.ema_decay=0",
          "train.optimizer.name=sgd", "train.recorded=false")  # fmt: skip


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    root = tmp_path_factory.mktemp("single")
    assert finish(begin(root, *ON_GPU, processes=1, batch_norm_learns=True)) == 0
    return left_by(root)


@pytest.mark.parametrize(
    "how",
    [
        ["train.parallel=ddp"],
        ["train.parallel=ddp", "train.recorded=true"],
        ["train.parallel=fsdp"],
        ["train.parallel=tp"],
        ["train.parallel=2d"],
    ],
    ids=str,
)
def test_two_gpus_train_as_one_does(tmp_path, single, how):
    assert finish(begin(tmp_path, *ON_GPU, *how, processes=2, batch_norm_learns=True)) == 0
    assert_alike(tmp_path, single)


@pytest.mark.parametrize("recorded", ["false", "true"])
def test_copies_of_a_net_with_many_norms_train_as_one(tmp_path, recorded):
    """What the statistics of a SyncBatchNorm need of other cards is part of the graph."""
    own = (*ON_GPU, "model.discriminative.family=segadapt_deeplabv3")
    assert finish(begin(tmp_path / "one", *own, processes=1, batch_norm_learns=True)) == 0
    both = (*own, "train.parallel=ddp", f"train.recorded={recorded}")
    assert finish(begin(tmp_path / "two", *both, processes=2, batch_norm_learns=True)) == 0
    assert_alike(tmp_path / "two", left_by(tmp_path / "one"))


def test_a_pipeline_of_two_gpus_trains_as_one_does_with_its_micro_batches(tmp_path):
    own = (*ON_GPU, "train.accumulate=2")
    assert finish(begin(tmp_path / "one", *own, processes=1, batch_norm_learns=True)) == 0
    assert finish(begin(tmp_path / "two", *own, "train.parallel=pipeline", processes=2, batch_norm_learns=True)) == 0
    assert_alike(tmp_path / "two", left_by(tmp_path / "one"))


def test_slices_train_under_autocast_with_a_fused_rule_and_go_on_as_shards(tmp_path, monkeypatch):
    """Their checkpoint is read by FSDP."""
    own = ("runtime.device=cuda", "runtime.deterministic=false", "runtime.precision=bf16", "train.parallel=2d")
    monkeypatch.setenv("STOP_AT", "3")
    assert finish(begin(tmp_path, *own, processes=2, batch_norm_learns=True)) != 0
    monkeypatch.setenv("STOP_AT", "0")
    assert finish(begin(tmp_path, *own[:3], "train.parallel=fsdp", processes=2, batch_norm_learns=True)) == 0
    assert left_by(tmp_path)[1]["steps"] == 6


@pytest.mark.parametrize("rank", [None, 1])
def test_a_signal_ends_recorded_copies_and_they_go_on(tmp_path, single, monkeypatch, rank):
    """NCCL does not end while a graph with its messages is alive: `finish` would wait in vain."""
    own = (*ON_GPU, "train.parallel=ddp", "train.recorded=true")
    monkeypatch.setenv("STOP_AT", "3")
    if rank is not None:
        monkeypatch.setenv("STOP_RANK", str(rank))
    assert finish(begin(tmp_path, *own, processes=2, batch_norm_learns=True)) != 0
    monkeypatch.setenv("STOP_AT", "0")
    assert finish(begin(tmp_path, *own, processes=2, batch_norm_learns=True)) == 0
    assert_alike(tmp_path, single)


def assert_alike(root, single):
    """Weights, BatchNorm's statistics and scores."""
    (model, results), (expected, its) = left_by(root), single
    moved = 0
    for name, value in expected.items():
        torch.testing.assert_close(model[name], value, rtol=2e-3, atol=1e-4, msg=lambda said, name=name: name + said)
        moved += name.endswith("running_mean") and bool(value.any())
    assert moved, "BatchNorm's statistics are still those it began with"
    assert results["processes"] == 2
    assert results["validation"] == pytest.approx(its["validation"], abs=5e-3)
