"""Parts of a checkpoint: they come back, and one that is damaged or missing makes it another's turn."""

from functools import partial

import pytest
import torch

from segadapt.checkpoint import Checkpoints, Parts
from segadapt.errors import UserError
from segadapt.training import shards
from segadapt.training.parallel import World

TENSORS = {"weights/a.b": torch.arange(6.0).reshape(2, 3), "moments/a.b/step": torch.tensor(3.0)}


def written(path, *steps: int) -> Checkpoints:
    checkpoints = Checkpoints(path, seconds=None, images=None)
    for step in steps:
        tensors = {name: tensor + step for name, tensor in TENSORS.items()}
        parts = Parts(shards.FOLDER, tensors, partial(shards.write, tensors=tensors, world=World()))
        checkpoints.write(step, {"step": step}, parts)
    return checkpoints


def test_parts_come_back_in_place(tmp_path):
    checkpoints = written(tmp_path, 1)
    assert checkpoints.read(lambda _: None) == {"step": 1}
    folder = checkpoints.path_of(1) / shards.FOLDER
    assert sorted(shards.names_in(folder)) == sorted(TENSORS)
    found = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    shards.read(folder, found)
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor + 1)


@pytest.mark.parametrize("how", ["missing", "one bit"])
def test_a_damaged_part_is_named_and_the_checkpoint_before_it_is_taken(tmp_path, caplog, how):
    checkpoints = written(tmp_path, 1, 2)
    (part,) = (checkpoints.path_of(2) / shards.FOLDER).iterdir()
    if how == "missing":
        part.unlink()
    else:
        data = bytearray(part.read_bytes())
        data[-1] ^= 1
        part.write_bytes(data)
    assert checkpoints.read(lambda _: None) == {"step": 1}
    assert "00000002 is damaged and passed over" in caplog.text
    assert part.name in caplog.text


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    checkpoints = written(tmp_path, 1)

    def write(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"the checkpoint cannot be written \(No space left on device\); expected room"):
        checkpoints.write(2, {"step": 2}, Parts(shards.FOLDER, TENSORS, write))
    assert [path.name for path in checkpoints.folder.iterdir()] == ["00000001"]
