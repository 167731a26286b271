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
          "train.optimizer.name=sgd")  # fmt: skip


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    root = tmp_path_factory.mktemp("single")
    assert finish(begin(root, *ON_GPU, processes=1, batch_norm_learns=True)) == 0
    return left_by(root)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_gpus_train_as_one_does(tmp_path, single, kind):
    assert finish(begin(tmp_path, *ON_GPU, f"train.parallel={kind}", processes=2, batch_norm_learns=True)) == 0
    (model, results), (expected, its) = left_by(tmp_path), single
    moved = 0
    for name, value in expected.items():
        torch.testing.assert_close(model[name], value, rtol=2e-3, atol=1e-4, msg=lambda said, name=name: name + said)
        moved += name.endswith("running_mean") and bool(value.any())
    assert moved, "BatchNorm's statistics are still those it began with"
    assert results["processes"] == 2
    assert results["validation"] == pytest.approx(its["validation"], abs=5e-3)
