"""Checkpoints: nested state comes back bit for bit, damage is passed over, and a full disk costs none of the others."""

import json
import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from segadapt import checkpoint
from segadapt.checkpoint import MOST_SHARE, Checkpoints, decode, encode, size_of
from segadapt.errors import UserError

STATE = {
    "weights": {"a/b": torch.arange(6.0).reshape(2, 3).t(), "c": torch.tensor(True)},  # one not contiguous
    "optimizer": {0: {"step": torch.tensor(3.0), "betas": (0.9, 0.999)}, 1: {}},
    "memory": [torch.zeros(2, dtype=torch.bfloat16), None, "text", math.inf, -0.0, [torch.zeros(0)]],
}


def equal(one, other):
    """Types too; tensors and floats bit for bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return repr(one) == repr(other)


def at(path, **more):
    return Checkpoints(path, **({"seconds": None, "images": None} | more))


def any_state(_):
    return None


def warned(caplog):
    return [record.getMessage() for record in caplog.records]


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.builds(
    lambda values: torch.tensor(values), st.lists(st.floats(width=32, allow_nan=False), max_size=3)
)  # fmt: skip
nested = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(nested)
def test_whatever_state_is_nested_of_comes_back(value):
    tensors = {}
    try:
        text = json.dumps(encode(value, tensors, "state"), allow_nan=False)
    except AssertionError:  # two paths of one name: a key that holds a slash beside what it names
        return
    assert equal(decode(json.loads(text), tensors), value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(limit=st.integers(1, 60))
def test_state_comes_back_from_files_of_any_size(tmp_path_factory, monkeypatch, limit):
    """Down to a file for each tensor; no file but one with a single tensor is larger than the limit."""
    folder = tmp_path_factory.mktemp("shards")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "SHARD_BYTES", limit)
        at(folder).write(7, STATE)
    assert equal(at(folder).read(any_state), STATE)
    assert size_of(STATE) == 24 + 1 + 4 + 4
    counts = [len(_tensors(path)) for path in (folder / "checkpoints/00000007").glob("*.safetensors")]
    assert sum(counts) == 5
    assert limit > 8 or max(counts) <= 3


def _tensors(path):
    header = path.read_bytes()
    return json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])


@pytest.mark.parametrize("value", [{1, 2}, object(), {"a": torch.nn.Linear(1, 1)}], ids=["set", "object", "module"])
def test_what_json_and_tensors_cannot_hold_is_refused(value):
    with pytest.raises(TypeError, match="which a checkpoint does not hold"):
        encode(value, {})


def test_the_newest_two_are_kept_and_none_at_the_end(tmp_path):
    checkpoints = at(tmp_path)
    for images in (1, 2, 5):
        checkpoints.write(images, {"images": images})
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["00000002", "00000005"]
    assert at(tmp_path).read(any_state) == {"images": 5}
    checkpoints.clear()
    checkpoints.clear()
    assert list(tmp_path.iterdir()) == []
    assert at(tmp_path).read(any_state) is None


def two(path):
    """After images 1 and 2; the folder of the second."""
    checkpoints = at(path)
    for images in (1, 2):
        checkpoints.write(images, STATE | {"images": images})
    return checkpoints.path_of(2)


@pytest.mark.parametrize("tenth", range(10))
@pytest.mark.parametrize("name", ["state.json", "00000.safetensors"])
def test_one_that_is_cut_is_passed_over_with_one_warning(tmp_path, caplog, name, tenth):
    path = two(tmp_path) / name
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * tenth // 10])
    checkpoints = at(tmp_path)
    assert equal(checkpoints.read(any_state), STATE | {"images": 1})
    [line] = warned(caplog)
    assert line.startswith(f"{path.parent} is damaged and passed over (")
    assert "\n" not in line
    checkpoints.write(3, STATE)  # the damaged one counts as none of the two that are kept
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["00000001", "00000003"]


def test_any_changed_byte_is_noticed(tmp_path, caplog):
    folder = two(tmp_path)
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for place in range(0, len(data), max(1, len(data) // 40)):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            assert at(tmp_path).read(any_state)["images"] == 1, (path, place)
        path.write_bytes(data)
    assert at(tmp_path).read(any_state)["images"] == 2
    assert len(warned(caplog)) > 40


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "state.json").unlink(),
        lambda folder: (folder / "00000.safetensors").unlink(),
        lambda folder: (folder / "state.json").write_text("[]"),
        lambda folder: (folder / "state.json").write_text('{"sha256": 1, "files": 2}'),
        lambda folder: (folder / "state.json").write_bytes(b"\xff\xfe"),
        lambda folder: os.replace(folder / "state.json", folder / ".state.json"),
    ],
)
def test_parts_that_are_missing_or_foreign_are_passed_over(tmp_path, caplog, damage):
    damage(two(tmp_path))
    assert at(tmp_path).read(any_state)["images"] == 1
    assert len(warned(caplog)) == 1


def test_half_renamed_ones_are_not_seen(tmp_path, caplog):
    folder = two(tmp_path)
    os.replace(folder, folder.with_name(".00000002.123.tmp"))
    assert at(tmp_path).read(any_state)["images"] == 1
    assert warned(caplog) == []


def test_what_the_run_finds_unusable_is_passed_over_with_its_reason(tmp_path, caplog):
    two(tmp_path)
    assert at(tmp_path).read(lambda state: "too young" if state["images"] == 2 else None)["images"] == 1
    assert "00000002 is damaged and passed over (too young)" in warned(caplog)[0]
    assert at(tmp_path).read(lambda _: "no") is None


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_full_disk_leaves_the_earlier_ones_and_says_what_is_needed(tmp_path, monkeypatch, call):
    two(tmp_path)
    checkpoints, calls = at(tmp_path), []
    assert checkpoints.read(any_state)["images"] == 2
    real = os.fsync

    def full(descriptor):
        calls.append(1)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"00000003: .*No space left on device.*0\.00 GiB for 3.*goes on") as caught:
            checkpoints.write(3, STATE)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["00000001", "00000002"]
    assert at(tmp_path).read(any_state)["images"] == 2
    checkpoints.write(3, STATE | {"images": 3})
    assert at(tmp_path).read(any_state)["images"] == 3


def test_when_one_is_due(tmp_path):
    now = [0.0]
    by_clock = at(tmp_path, seconds=10.0, clock=lambda: now[0])
    by_images = at(tmp_path, images=3, clock=lambda: now[0])
    never = at(tmp_path, clock=lambda: now[0])
    assert [by_images.is_due(images) for images in (1, 2, 3, 4)] == [False, False, True, True]
    now[0] = 9.9
    assert not by_clock.is_due(1)
    now[0] = 10.0
    assert by_clock.is_due(1)
    now[0] = 1e9
    assert not never.is_due(10**9)
    by_images.write(4, STATE)
    assert [by_images.is_due(images) for images in (5, 6, 7)] == [False, False, True]


def test_slow_ones_come_so_rarely_that_they_take_no_more_than_their_share(tmp_path):
    now = [0.0]

    def clock():
        now[0] += 1.0  # writing takes a second or more
        return now[0]

    checkpoints = at(tmp_path, seconds=5.0, clock=clock)
    checkpoints.write(1, STATE)
    since = now[0]
    while not checkpoints.is_due(2):
        pass
    assert now[0] - since >= 1 / MOST_SHARE
