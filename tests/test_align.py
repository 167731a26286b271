"""`segadapt align`: references written and compared, what differs is said, what is too far is not saved."""

import json

import numpy as np
import pytest
import torch
from foreign_segformer import DEPTHS, HEAD_WIDTH, WIDTHS, MmsegNet, nvidia_state, scramble
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from segadapt.align import difference
from segadapt.models.discriminative.load import load_segmenter
from segadapt.models.set_up import fingerprint

CONFIG = {"depths": list(DEPTHS), "hidden_sizes": list(WIDTHS), "decoder_hidden_size": HEAD_WIDTH}
MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))


@pytest.fixture(scope="module")
def raw():
    return scramble(SegformerForSemanticSegmentation(SegformerConfig(**CONFIG, num_labels=5)))


@pytest.fixture
def nvidia(raw, tmp_path):
    """A file of NVIDIA's own code, and what its net says of an image, as a user of that code would store it."""
    raw.save_pretrained(tmp_path / "hf")
    state = nvidia_state(load_file(tmp_path / "hf" / "model.safetensors"))
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "nvidia.safetensors")
    image = torch.randint(0, 256, (3, 65, 97), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = raw(pixel_values=((image - MEAN) / STD)[None]).logits[0]
    return store(tmp_path, image, logits)


def store(folder, image, logits):
    save_file({"image": image, "logits": logits.contiguous()}, folder / "reference.safetensors")
    return folder


def align(segadapt, folder, *more, file="nvidia.safetensors"):
    return segadapt("align", f"model.discriminative.checkpoint={folder / file}", *more)


def test_a_converted_file_agrees_and_is_saved_as_a_folder(nvidia, raw, segadapt):
    given = f"align.reference={nvidia / 'reference.safetensors'}", f"align.output={nvidia / 'out'}"
    status, out, err = align(segadapt, nvidia, *given)
    assert (status, err) == (0, "")
    assert "segformer" in out
    assert "the same class at 100.00 % of the pixels" in out
    assert fingerprint(SegformerForSemanticSegmentation.from_pretrained(nvidia / "out")) == fingerprint(raw)


def test_one_changed_weight_is_too_far_and_nothing_is_saved(nvidia, segadapt):
    state = load_file(nvidia / "nvidia.safetensors")
    state["decode_head.linear_pred.bias"][3] += 0.5
    save_file(state, nvidia / "changed.safetensors")
    given = f"align.reference={nvidia / 'reference.safetensors'}", f"align.output={nvidia / 'out'}"
    status, out, err = align(segadapt, nvidia, *given, file="changed.safetensors")
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert "the largest difference is 0.5, " in err
    assert not (nvidia / "out").exists()
    status, out, _ = align(segadapt, nvidia, *given, "align.tolerance=10", file="changed.safetensors")
    assert status == 0
    assert (nvidia / "out" / "config.json").exists()


def test_a_net_of_mmsegmentation_is_saved_in_our_own_layout(tmp_path, segadapt):
    net = scramble(MmsegNet(5), seed=1)
    save_file({key: value.contiguous() for key, value in net.state_dict().items()}, tmp_path / "mmseg.safetensors")
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        store(tmp_path, image, net(((image - MEAN) / STD)[None])[0])
    given = f"align.reference={tmp_path / 'reference.safetensors'}", f"align.output={tmp_path / 'out'}"
    status, out, err = align(segadapt, tmp_path, *given, file="mmseg.safetensors")
    assert status == 0, err
    assert "segadapt_segformer_mmseg" in out
    assert load_segmenter(str(tmp_path / "out"), num_classes=5, device="cpu").net.config.num_labels == 5


def test_a_written_reference_compares_equal(nvidia, segadapt):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(nvidia / "image.png")
    status, out, err = align(
        segadapt, nvidia, f"align.image={nvidia / 'image.png'}", f"align.write={nvidia / 'own.safetensors'}"
    )
    assert status == 0, err
    assert "[5, 10, 14]" in out
    assert torch.equal(load_file(nvidia / "own.safetensors")["image"], torch.from_numpy(pixels).permute(2, 0, 1))
    status, out, _ = align(segadapt, nvidia, f"align.reference={nvidia / 'own.safetensors'}", "align.tolerance=0")
    assert status == 0
    assert "largest difference 0, 0 of the largest logit" in out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        (b"no safetensors", "cannot be read"),
        ({"image": torch.zeros(3, 8, 8)}, r"holds image torch.float32 [3, 8, 8]; expected `image`, uint8 RGB"),
        ({"image": torch.zeros(3, 8, 8, dtype=torch.uint8)}, "`logits`, float32 [classes, h, w]"),
        ({"image": torch.zeros(3, 64, 64, dtype=torch.uint8), "logits": torch.zeros(5, 64, 64)},
         "the stored logits are [5, 64, 64], the checkpoint's [5, 16, 16]"),
        ({"image": torch.zeros(3, 64, 64, dtype=torch.uint8), "logits": torch.full((5, 16, 16), torch.nan)},
         "the largest difference is nan"),
    ],
)  # fmt: skip
def test_unusable_references_are_one_line(content, said, nvidia, segadapt):
    path = nvidia / "bad.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        save_file(content, path)
    status, _, err = align(segadapt, nvidia, f"align.reference={path}")
    assert status == 2
    assert err.count("\n") == 1
    assert said in err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "align.reference and align.write: expected one of them"),
        (("align.reference=a", "align.write=b", "align.image=c"), "expected one of them"),
        (("align.write=b",), "align.write and align.image belong together"),
        (("align.reference=a", "align.image=c"), "align.write and align.image belong together"),
        (("align.reference=a", "model.discriminative.short_side_px=64"), "the image is taken as it is stored"),
    ],
)
def test_settings_without_effect_are_refused(given, said, tmp_path, segadapt):
    status, _, err = align(segadapt, tmp_path, *given)
    assert status == 2
    assert said in err


def test_an_image_that_is_too_large_names_no_setting_of_other_verbs(nvidia, segadapt, monkeypatch):
    monkeypatch.setattr("segadapt.align.MAX_PIXELS", 10)
    Image.new("RGB", (4, 3)).save(nvidia / "a.png")
    status, _, err = align(segadapt, nvidia, f"align.write={nvidia / 'w'}", f"align.image={nvidia / 'a.png'}")
    assert status == 2
    assert err.endswith("a.png: 4 x 3 px; expected at most 10 px. Give a smaller image.\n")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("align.write=b", "align.image=no.png"), "align.image=no.png is not a file; expected an image."),
        (
            ("align.write=theirs.safetensors", "align.image=a.png"),
            "align.write=theirs.safetensors is there, and align ",
        ),
        (("align.reference=a", "align.output=theirs"), "align.output=theirs holds files that align did not write"),
        (("align.reference=a", "align.output=a.png"), "align.output=a.png holds files that align did not write"),
    ],
)
def test_what_others_wrote_is_not_overwritten(given, said, tmp_path, segadapt):
    (tmp_path / "theirs").mkdir()
    for name in ("a.png", "theirs/config.json"):
        (tmp_path / name).write_bytes(b"theirs")
    save_file({"image": torch.zeros(3, 8, 8)}, tmp_path / "theirs.safetensors")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    status, _, err = align(segadapt, tmp_path, *given)
    assert (status, err.count("\n")) == (2, 1)
    assert said in err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_its_own_files_are_written_anew_also_below_the_home_folder(nvidia, segadapt, monkeypatch):
    monkeypatch.setenv("HOME", str(nvidia))
    Image.new("RGB", (40, 56), (90, 120, 60)).save(nvidia / "image.png")
    written = "align.image='~/image.png'", "align.write='~/own.safetensors'"
    compared = "align.reference='~/own.safetensors'", "align.output='~/out'"
    for arguments in (written, written, compared, compared):
        status, _, err = align(segadapt, nvidia, *arguments)
        assert status == 0, err
    assert sorted(path.name for path in (nvidia / "out").iterdir()) == [
        "align.json",
        "config.json",
        "model.safetensors",
    ]
    assert json.loads((nvidia / "out/align.json").read_text())["reference"] == "~/own.safetensors"


@pytest.mark.parametrize("name", ["pickled_data", "model/snapshot_done"])
def test_a_checkpoint_of_oneflow_is_recognised(name, nvidia, segadapt):
    (nvidia / "libai" / name).parent.mkdir(parents=True)
    (nvidia / "libai" / name).touch()
    status, _, err = align(segadapt, nvidia, f"align.reference={nvidia / 'reference.safetensors'}", file="libai")
    assert status == 2
    assert "is a checkpoint of OneFlow, as LiBai saves" in err


@given(st.integers(1, 6), st.integers(0, 2**16))
def test_the_difference_in_numbers(classes, seed):
    """Against numpy."""
    rng = np.random.default_rng(seed)
    one, other = rng.normal(size=(2, classes, 3, 4)).astype(np.float32)
    found = difference(torch.from_numpy(one), torch.from_numpy(other))
    gap = np.abs(one.astype(np.float64) - other).max()
    assert found.largest == pytest.approx(gap, rel=1e-12)
    assert found.relative == pytest.approx(gap / np.abs(other).max(), rel=1e-6)
    assert found.same_class == np.mean(one.argmax(0) == other.argmax(0))
