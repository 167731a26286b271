"""The stream: its order is a function of seed and keys; the samples do not depend on who reads them."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from segadapt import adapt, stream
from segadapt.datasets import Task
from segadapt.datasets.files import Files
from segadapt.datasets.labels import palette
from segadapt.datasets.toytown import CLASSES as TOYTOWN_CLASSES
from segadapt.datasets.toytown import ToyTown
from segadapt.errors import UserError
from segadapt.stream import Entry, Prepared, order, order_hash, read

CLEAN, FOG = Task(0), Task(1, "fog", 5)
NAMES = [f"street_{number}" for number in range(12)]


@pytest.fixture
def files(tmp_path):
    """files(names): a data set whose files were made in that order, each with pixels of its own."""

    def make(names, folder="data") -> Files:
        for part in ("images", "labels"):
            (tmp_path / folder / part / "val").mkdir(parents=True)
        for name in names:
            rng = np.random.default_rng(NAMES.index(name))
            pixels_HW3, ids_HW = rng.integers(0, 256, (20, 30, 3), np.uint8), rng.integers(0, 4, (20, 30), np.uint8)
            Image.fromarray(pixels_HW3).save(tmp_path / folder / "images/val" / f"{name}.png")
            Image.fromarray(ids_HW).save(tmp_path / folder / "labels/val" / f"{name}.png")
        return Files(
            data_root=tmp_path / folder,
            image_path="{data_root}/images/{split}/{key}.png",
            label_path="{data_root}/labels/{split}/{key}.png",
            classes=("sky", "tree", "road"),
            palette_C3=palette(3),
            id_map="zero_is_ignore",
            split="val",
            corruption_seed=0,
        )

    return make


def keys(dataset, *, task=CLEAN, seed=0, shuffle=True, limit=None):
    return [entry.key for entry in order(dataset, task, seed=seed, shuffle=shuffle, limit=limit)]


def facts(prepared: Prepared):
    """Everything of a sample that can be compared."""
    assert prepared.label_HW is not None
    pixels = prepared.image_3HW.numpy().tobytes(), prepared.label_HW.numpy().tobytes()
    return prepared.entry, prepared.digest, prepared.size_px, *pixels


def test_order_does_not_depend_on_how_the_files_were_made_or_listed(files, monkeypatch):
    expected = keys(files(NAMES, "one"))
    other = files(NAMES[::-1], "other")
    assert keys(other) == expected
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda top: ((p, d[::-1], sorted(n)[::-1]) for p, d, n in walk(top)))
    assert keys(other) == expected


def test_order_is_a_permutation_by_seed_and_task(files):
    dataset = files(NAMES)
    expected = keys(dataset)
    assert keys(dataset) == expected
    assert sorted(expected) == sorted(NAMES)
    assert expected != sorted(NAMES)
    assert keys(dataset, seed=1) != expected
    assert keys(dataset, task=FOG) != expected
    assert keys(dataset, task=Task(7)) == expected  # the place of a task in the run plays no part


def test_limit_takes_the_first_of_the_shuffled_order(files):
    dataset = files(NAMES)
    assert keys(dataset, limit=5) == keys(dataset)[:5]
    assert keys(dataset, limit=100) == keys(dataset)


def test_without_shuffle_the_keys_are_sorted(files):
    assert keys(files(NAMES[::-1]), shuffle=False, seed=3) == sorted(NAMES)


def test_order_hash_sees_every_change_of_task_key_and_place():
    entries = [Entry(CLEAN, "a"), Entry(CLEAN, "b"), Entry(FOG, "a")]
    variants = [entries, entries[::-1], entries[:2], [*entries[:2], Entry(FOG, "b")], [Entry(FOG, "a"), *entries[1:]]]
    assert len({order_hash(variant) for variant in variants}) == len(variants)
    assert order_hash(entries) == order_hash([Entry(Task(9), "a"), *entries[1:]])


def test_samples_are_equal_with_and_without_workers():
    dataset = ToyTown(split="test", count=5, world_seed=0, weather="all", tasks_seed=0)
    entries = [e for task in (CLEAN, FOG) for e in order(dataset, task, seed=0, shuffle=True, limit=3)]
    alone, helped = ([facts(p) for p in read(dataset, entries, short_side_px=32, workers=n)] for n in (0, 2))
    assert [sample[0] for sample in alone] == entries
    assert alone == helped
    assert len({sample[1] for sample in alone}) == len(entries)


def test_digest_is_of_the_pixels_and_the_label_as_read(files, tmp_path):
    dataset = files(NAMES[:2])
    entries = order(dataset, CLEAN, seed=0, shuffle=False, limit=None)

    def digests(short_side_px=20):
        return [prepared.digest for prepared in read(dataset, entries, short_side_px=short_side_px, workers=0)]

    before = digests()
    assert digests(short_side_px=10) == before
    for part in ("images", "labels"):
        path = tmp_path / "data" / part / "val" / f"{entries[0].key}.png"
        pixels = np.array(Image.open(path))
        pixels[3, 4] ^= 1
        Image.fromarray(pixels).save(path)
        after = digests()
        assert after[0] != before[0]
        assert after[1] == before[1]
        before = after


def test_images_are_resized_and_labels_are_not(files):
    dataset = files(NAMES[:1])
    entries = order(dataset, CLEAN, seed=0, shuffle=False, limit=None)
    (prepared,) = read(dataset, entries, short_side_px=16, workers=0)
    assert (prepared.image_3HW.dtype, prepared.image_3HW.shape) == (torch.float32, (3, 16, 24))
    assert prepared.label_HW is not None
    assert (prepared.label_HW.dtype, prepared.label_HW.shape, prepared.size_px) == (torch.uint8, (20, 30), (20, 30))


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_file_arrives_as_the_one_line_user_error(files, tmp_path, workers):
    dataset = files(NAMES[:3])
    (tmp_path / "data/images/val/street_1.png").write_bytes(b"no picture")
    entries = order(dataset, CLEAN, seed=0, shuffle=False, limit=None)
    samples = read(dataset, entries, short_side_px=20, workers=workers)
    assert next(samples).entry == entries[0]
    with pytest.raises(UserError) as caught:
        next(samples)
    assert type(caught.value) is UserError
    assert "street_1.png" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_both_forward_modes_see_the_same_images_in_the_same_order(saved_models, compose_settings, tmp_path):
    results = {}
    for mode in ("tta", "discriminative_only"):
        settings = compose_settings(
            *saved_models(TOYTOWN_CLASSES),
            f"tta.forward_mode={mode}",
            "data.corruptions=[fog,contrast]",
            "data.limit=2",
            "data.workers=0",
            "logging.wandb.mode=disabled",
            f"logging.root={tmp_path / mode}",
        )
        results[mode] = adapt.run(settings, console=Console(quiet=True))
    for fact in ("order_sha256", "data_sha256"):
        assert results["tta"][fact] == results["discriminative_only"][fact]
    assert results["tta"]["method"] != results["discriminative_only"]["method"]


def test_more_workers_than_cores_are_no_warning(monkeypatch, recwarn):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert list(stream.ahead(abs, [-3, -2, -1], workers=2)) == [3, 2, 1]
    assert [str(warning.message) for warning in recwarn if "worker" in str(warning.message)] == []
