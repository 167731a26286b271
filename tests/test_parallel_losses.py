"""Losses over two processes and over one: what is equal, and a memory that goes on over another number of processes.

Means over pixels are those of one process. Anchors of the contrast loss and pixels for its memory are drawn by each
process, so that they differ from those of one; regions, which nobody draws, do not, before the loss moves weights.
"""

from pathlib import Path

import pytest
import torch
from test_parallel_training import begin, finish, left_by
from training_runs import lines_of
from transformers.utils.import_utils import is_scipy_available

SUPERVISED = (
    "model.discriminative.family=segadapt_deeplabv3", "train/losses=auxiliary",
    "train.losses.class_weights.recipe=inverse_sqrt", "train.transforms.crop_px=64",
)  # fmt: skip
MASKS = (
    "model.discriminative.family=mask2former", "train/losses=masks", "train.losses.masks.points=100",
    "train.transforms.crop_px=64", "train.optimizer.lr=0.01", "train.optimizer.name=sgd",
)  # fmt: skip
CONTRAST = (
    "train/losses=contrast_memory", "train.losses.contrast.warmup_iters=5", "train.losses.contrast.min_views=1",
    "train.losses.contrast.projection=linear", "train.losses.contrast.width=8",
    "train.losses.contrast.memory.region_rows=12", "train.losses.contrast.memory.pixel_rows=40",
    "train.losses.contrast.memory.min_filled=2", "train.losses.contrast.memory.hardest_share=1",
)  # fmt: skip

pytestmark = pytest.mark.slow


def run(root: Path, *overrides: str, processes: int) -> None:
    assert finish(begin(root, *overrides, processes=processes)) == 0


def buffers_of(root: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    return torch.load(root / f"objective-{rank}.pt")


@pytest.fixture(scope="module")
def contrast_of_one(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("contrast")
    run(root, *CONTRAST, processes=1)
    return root


def assert_alike_but_for_draws(root: Path, one: Path) -> None:
    found, expected = buffers_of(root), buffers_of(one)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name != "memory.pixels.rows_CMD":
            torch.testing.assert_close(
                found[name], value, rtol=1e-3, atol=1e-4, msg=lambda said, name=name: name + said
            )
    assert expected["memory.pixels.filled_C"].max() == 40
    mine, its = ([line for line in lines_of(at / "train" / "one") if "terms" in line] for at in (root, one))
    assert [line["weights"] for line in mine] == [line["weights"] for line in its]
    assert mine[-1]["weights"]["contrast"] == 0.1
    for line, other in zip(mine, its, strict=True):
        assert line["terms"]["cross_entropy"] == pytest.approx(other["terms"]["cross_entropy"], rel=1e-3)
        assert line["terms"]["contrast"] == pytest.approx(other["terms"]["contrast"], rel=0.2)


def test_class_weights_and_an_auxiliary_head_train_as_in_one_process(tmp_path):
    run(tmp_path / "one", *SUPERVISED, processes=1)
    run(tmp_path / "two", *SUPERVISED, "train.parallel=ddp", processes=2)
    (model, results), (expected, its) = left_by(tmp_path / "two"), left_by(tmp_path / "one")
    for name, value in expected.items():
        torch.testing.assert_close(model[name], value, rtol=1e-3, atol=1e-5, msg=lambda said, name=name: name + said)
    assert results["class_weights"] == its["class_weights"]
    assert results["validation"] == pytest.approx(its["validation"], abs=2e-3)


@pytest.mark.skipif(not is_scipy_available(), reason="needs segadapt[mask2former]")
def test_masks_train_as_in_one_process_whatever_each_has_of_them(tmp_path):
    """Micro-batches and processes have other numbers of masks; every weight that moves has a gradient."""
    run(tmp_path / "one", *MASKS, processes=1)
    expected, its = left_by(tmp_path / "one")
    for kind in ("ddp", "fsdp"):
        run(tmp_path / kind, *MASKS, f"train.parallel={kind}", "train.accumulate=2", processes=2)
        model, results = left_by(tmp_path / kind)
        for name, value in expected.items():
            torch.testing.assert_close(
                model[name], value, rtol=1e-3, atol=1e-4, msg=lambda said, name=name: name + said
            )
        assert results["validation"] == pytest.approx(its["validation"], abs=2e-3)
        mine, theirs = (
            [line for line in lines_of(tmp_path / at / "train" / "one") if "terms" in line] for at in (kind, "one")
        )
        for line, other in zip(mine, theirs, strict=True):
            assert line["terms"] == pytest.approx(other["terms"], rel=1e-3)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_both_processes_hold_one_memory(tmp_path, contrast_of_one, kind):
    run(tmp_path, *CONTRAST, f"train.parallel={kind}", processes=2)
    theirs = buffers_of(tmp_path, 1)
    for name, value in buffers_of(tmp_path).items():
        assert torch.equal(value, theirs[name]), name
    assert_alike_but_for_draws(tmp_path, contrast_of_one)


def test_two_processes_stop_and_one_goes_on(tmp_path, contrast_of_one, monkeypatch):
    own = (*CONTRAST, "train.parallel=ddp")
    monkeypatch.setenv("STOP_AT", "3")
    assert finish(begin(tmp_path, *own, processes=2)) != 0
    assert [path.name for path in (tmp_path / "train" / "one" / "checkpoints").iterdir()] == ["00000004"]
    monkeypatch.setenv("STOP_AT", "0")
    alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    for name, value in alone.items():
        monkeypatch.setenv(name, str(value))
    run(tmp_path, *own, processes=1)
    assert left_by(tmp_path)[1]["processes"] == 1
    assert_alike_but_for_draws(tmp_path, contrast_of_one)
