"""The memory of the contrast loss: what rows it takes, where they go, which are read; against plain Python lists."""

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed as dist
from torch.nn import functional as F

from segadapt.losses.contrast import label_on_grid
from segadapt.losses.memory import Memory, Ring, new_pixels, new_regions


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def bands(classes=8, *, side=64):
    """A label of horizontal bands, one a class, [1, side, side]."""
    return (torch.arange(side) * classes // side)[None, :, None].expand(1, side, side)


def coded(label_Byx):
    """Embeddings of unit length that say their own class."""
    return F.one_hot(label_Byx, 9).permute(0, 3, 1, 2).float()


def memory_of(classes=8, **options):
    sizes = {"region_rows": 5, "pixel_rows": 30, "pixels_per_image": 10}
    return Memory(classes, 9, **(sizes | options))


@pytest.mark.parametrize("stride", [4, 8])
def test_every_row_has_the_class_that_its_pixel_has(stride):
    """Purity was once 1, 0, 0, 0, 0, 0, 0, 0 over eight bands: labels were strided, not resized, by a fixed 8."""
    label_Byx = label_on_grid(bands(), torch.Size([64 // stride, 64 // stride]))
    memory = memory_of(pixels_per_image=8)
    memory.keep(coded(label_Byx), label_Byx, generator())
    memory.write()
    for ring, count in ((memory.regions, 1), (memory.pixels, 8)):
        assert ring.filled_C.tolist() == [count] * 8
        for c in range(8):
            assert ring.rows_CMD[c, :count].argmax(dim=1).tolist() == [c] * count
            assert ring.rows_CMD[c, :count].norm(dim=1).tolist() == [1.0] * count


def test_regions_are_normalised_means_of_each_image_and_ignored_pixels_are_in_none():
    label_Byx = torch.tensor([[[0, 0, 255]], [[0, 2, 2]]])
    embedding_BDyx = torch.randn(2, 5, 1, 3, generator=generator())
    rows = new_regions(embedding_BDyx, label_Byx, 3)
    assert rows.class_R[rows.is_there_R].tolist() == [0, 0, 2]
    first, second = embedding_BDyx[..., 0, :].unbind()  # [D, x]
    means = [first[:, :2].mean(dim=1), second[:, 0], second[:, 1:].mean(dim=1)]
    torch.testing.assert_close(rows.embedding_RD[rows.is_there_R], torch.stack([m / m.norm() for m in means]))


def test_a_class_gives_no_more_pixels_than_it_has_and_none_twice():
    label_Byx = torch.tensor([[[1, 1, 1, 0, 255, 1, 1, 1]]])
    embedding_BDyx = torch.arange(8.0).view(1, 1, 1, 8)
    rows = new_pixels(embedding_BDyx, label_Byx, 3, count=4, generator=generator())
    assert rows.class_R[rows.is_there_R].tolist() == [0, 1, 1, 1, 1]
    zero, *ones = rows.embedding_RD[rows.is_there_R].flatten().tolist()
    assert zero == 3
    assert len(set(ones)) == 4
    assert set(ones) <= {0, 1, 2, 5, 6, 7}


@given(st.integers(1, 6), st.lists(st.lists(st.integers(0, 2), max_size=14), max_size=5))
def test_a_ring_holds_the_last_rows_of_each_class_in_the_order_of_their_coming(size, batches):
    """Also where a batch goes past the end, or brings more rows than the ring has."""
    ring, seen, number = Ring(3, size, 1), {0: [], 1: [], 2: []}, 0
    for classes in batches:
        values = torch.arange(number + 1, number + 1 + len(classes)).float()
        ring.write(values[:, None], torch.tensor(classes, dtype=torch.int64))
        for c, value in zip(classes, values.tolist(), strict=True):
            seen[c].append(value)
        number += len(classes)
    for c, came in seen.items():
        assert ring.filled_C[c] == min(len(came), size)
        assert ring.next_C[c] == len(came) % size
        expected = [0.0] * size
        for place, value in enumerate(came):
            expected[place % size] = value
        assert ring.rows_CMD[c, :, 0].tolist() == expected


def test_only_rows_that_were_written_are_read_each_once_and_class_0_too():
    ring = Ring(4, 6, 1)
    ring.write(torch.arange(1.0, 10.0)[:, None], torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 3]))
    seen = set()
    for seed in range(30):
        rows = ring.read(2, min_filled=3, generator=generator(seed))
        there = rows.embedding_RD[rows.is_there_R].flatten().tolist()
        assert rows.class_R[rows.is_there_R].tolist() == [0, 0, 1, 1]  # of 2 there is none, of 3 too few
        assert len(set(there)) == 4
        seen |= set(there)
    assert seen == set(range(1, 9))
    everything = ring.read(99, min_filled=1, generator=generator())
    assert sorted(everything.embedding_RD[everything.is_there_R].flatten().tolist()) == list(range(1, 10))


def test_a_memory_reads_both_rings_in_a_mixed_order():
    memory = memory_of(classes=3)
    for ring in (memory.regions, memory.pixels):
        ring.write(torch.ones(12, 9), torch.arange(12) % 3)
    rows = memory.read(4, min_filled=1, generator=generator())
    classes = rows.class_R[rows.is_there_R].tolist()
    assert sorted(classes) == [0] * 8 + [1] * 8 + [2] * 8
    assert classes != sorted(classes)


def test_rows_are_written_after_the_step_and_once():
    label_Byx, memory = bands(2, side=4), memory_of(classes=2)
    memory.keep(coded(label_Byx).requires_grad_(), label_Byx, generator())
    memory.keep(coded(label_Byx), label_Byx, generator())  # of the same step: its gradient is accumulated
    assert not memory.regions.filled_C.any()
    memory.write()
    assert memory.regions.filled_C.tolist() == [2, 2]
    memory.keep(coded(label_Byx), label_Byx, generator())
    memory.write()
    assert memory.regions.filled_C.tolist() == [3, 3]
    assert not memory.regions.rows_CMD.requires_grad


def _rank(rank: int, folder) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    memory = memory_of(pixels_per_image=4 + 3 * rank)
    for step in range(2):
        label_Byx = (bands(8 - 2 * rank - step) + rank)[:, ::4, ::4]
        memory.keep(coded(label_Byx) * (1 + rank), label_Byx, generator(rank))
        memory.write()
    torch.save(memory.state_dict(), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_hold_equal_rings_in_the_order_of_ranks(tmp_path):
    mp.spawn(_rank, (tmp_path,), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert one["pixels.filled_C"].tolist() == [8, 22, 22, 22, 22, 22, 15, 4]  # rank 1: 4 to 6 classes from class 1 on
    of_class_1 = one["pixels.rows_CMD"][1, :22].norm(dim=1).tolist()
    assert of_class_1 == [1.0] * 4 + [2.0] * 7 + [1.0] * 4 + [2.0] * 7
