"""The fault table: what is wrong with the input is said before any step, in one line with its cure and status 2."""

import json
import pickle
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from image_files import save
from PIL import Image
from safetensors.torch import load_file, save_file

from faults.said import assert_says

IDS_HW = np.zeros((40, 48), np.uint8)
PIXELS_HW3 = np.random.default_rng(1).integers(0, 256, (40, 48, 3), np.uint8)


def huge_png(path: Path, *, gray: bool) -> Path:
    """A header of 50000 x 50000 px and a few bytes of pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0 if gray else 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(100))), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])


def jpeg_cut(root: Path) -> None:
    (root / "images/b.png").unlink()
    cut(save(root / "images/b.jpg", PIXELS_HW3))


def link_out(root: Path) -> None:
    outside = save(root.parent / "private/b.png", PIXELS_HW3)
    (root / "images/b.png").unlink()
    (root / "images/b.png").symlink_to(outside)


# name: (what is done to the data folder, overrides, and parts of the message: where, got, expected, cure)
DATA = {
    "no image folder": (
        lambda root: shutil.rmtree(root / "images"), (),
        ("data.image_path", "data/images is not a folder", "folder", "Set data.data_root"),
    ),
    "no image in it": (
        lambda root: [path.unlink() for path in (root / "images").iterdir()], (),
        ("data.image_path", "no file in", "expected at least one", "Correct the template"),
    ),
    "an empty image": (
        lambda root: (root / "images/b.png").write_bytes(b""), (),
        ("images/b.png", "the file is empty", "expected a whole image", "Fetch the file again"),
    ),
    "a cut png": (
        lambda root: cut(root / "images/b.png"), (),
        ("images/b.png", "cannot be decoded", "expected a whole image", "Fetch the file again"),
    ),
    "a cut jpg": (jpeg_cut, (), ("images/b.jpg", "cannot be decoded", "expected a whole", "Fetch the file")),
    "text that calls itself an image": (
        lambda root: (root / "images/b.png").write_text("<html>404</html>"), (),
        ("images/b.png", "cannot identify", "expected a whole image", "Fetch the file again"),
    ),
    "an image of floats": (
        lambda root: ((root / "images/b.png").unlink(), Image.fromarray(np.zeros((40, 48), np.float32)).save(
            root / "images/b.tiff")), (),
        ("images/b.tiff", "pixel format F", "expected 8-bit", "Convert"),
    ),
    "a bomb of an image": (
        lambda root: huge_png(root / "images/b.png", gray=False), (),
        ("images/b.png", "2500000000 pixels", "expected at most data.max_pixels", "Replace the file"),
    ),
    "two images of one key": (
        lambda root: save(root / "images/b.jpg", PIXELS_HW3), (),
        ("images/b.", "have the same key b", "expected one file a key", "Remove one"),
    ),
    "an image that is a link out of the data": (
        link_out, (), ("images/b.png", "private/b.png", "expected a place inside", "Copy the file"),
    ),
    "no label for an image": (
        lambda root: (root / "labels/b.png").unlink(), (),
        ("data/labels", "no label for 1 of 3 images (b)", "labels", "Add the labels"),
    ),
    "a label of another size": (
        lambda root: save(root / "labels/b.png", IDS_HW[:20]), (),
        ("labels/b.png", "48 x 20 px", "expected equal sizes", "Resize the image file"),
    ),
    "an unknown id": (
        lambda root: save(root / "labels/b.png", IDS_HW + np.uint8(7)), (),
        ("labels/b.png", "label id 7 at row 0, column 0", "expected 0..2 or 255", "Set data.id_map"),
    ),
    "colours for ids": (
        lambda root: save(root / "labels/b.png", PIXELS_HW3), (),
        ("labels/b.png", "pixel format RGB", "expected one id a pixel", "Convert the colours"),
    ),
    "instance ids of 16 bit": (
        lambda root: save(root / "labels/b.png", IDS_HW.astype(np.uint16) + np.uint16(1000)), (),
        ("labels/b.png", "label id 1000 at row 0", "expected 0..255", "Store class ids"),
    ),
    "a cut label": (
        lambda root: cut(root / "labels/b.png"), (),
        ("labels/b.png", "cannot be decoded", "expected a whole image", "Fetch the file again"),
    ),
    "a bomb of a label": (
        lambda root: huge_png(root / "labels/b.png", gray=True), (),
        ("labels/b.png", "2500000000 pixels", "expected at most data.max_pixels", "Replace the file"),
    ),
    "a class twice": (
        lambda root: (root / "names.txt").write_text("sky\nsky\nroad"), (),
        ("data.classes", "3 names, 2 different", "each once", "Correct the list"),
    ),
    "class names that are no text": (
        lambda root: (root / "names.txt").write_bytes(b"sky\n\xff\xfe\nroad"), (),
        ("data.classes", "byte 4", "UTF-8", "Save the file as UTF-8"),
    ),
    "no class": (
        lambda root: (root / "names.txt").write_text("\n \n"), (),
        ("data.classes", "0 names", "expected one name a class", "Correct the list"),
    ),
    "a class more than the head has": (
        lambda root: (root / "names.txt").write_text("sky\ntree\nroad\ncar"), (),
        ("model.discriminative.checkpoint", "3 classes", "the data set has 4", "Choose a checkpoint"),
    ),
    "an image too small to corrupt": (
        lambda root: (save(root / "images/b.png", PIXELS_HW3[:8, :8]), save(root / "labels/b.png", IDS_HW[:8, :8])),
        ("data.corruptions=[fog]",),
        ("image b", "got 8 x 8 px", "32 px or more", "Leave the image out"),
    ),
}  # fmt: skip

SETTINGS = {
    "a setting that there is not": (
        ("tta.non_finit=skip",), ("tta.non_finit", "is not a setting", "Did you mean", "tta.non_finite?")),
    "a number out of range": (
        ("model.generative.sigma=2",), ("model.generative.sigma=2", "2.0", "at most 1", "lower end of its range")),
    "a value of another type": (
        ("data.severity=high",), ("data.severity", "'high'", "expected", "1..5")),
    "no such policy": (
        ("tta.non_finite=ignore",), ("tta.non_finite", "'ignore'", "is not a choice", "Choose from: reset")),
    "no such method": (("tta.method=tentt",), ("tta=tentt", "is not a choice", "Did you mean", "tent?")),
    "no such corruption": (
        ("data.corruptions=[fogg]",), ("corruption", "'fogg'", "is not known", "Did you mean fog?")),
    "a key that would be code": (
        ("+model.discriminative._target_=os.system",),
        ("model.discriminative._target_", "is not a setting", "Did you mean", "model.discriminative.")),
    "a path without a key": (
        ("data.image_path='{data_root}/images'",),
        ("data.image_path", "{data_root}/images", "expected one {key}", "Write it like")),
    "a split that climbs out": (
        ("data.split=../x", "data.image_path='{data_root}/{split}/{key}.*'"),
        ("data.split=../x", "'..'", "leaves the folder of the data", "Name a folder inside it")),
    "a corruption that climbs out": (
        ("data.corruptions=[../../x]", "data.image_path='{data_root}/{corruption}/{key}.*'"),
        ("data.corruptions=../../x", "'..'", "leaves the folder of the data", "Name a folder inside it")),
    "a run name that climbs out": (
        ("experiment.name=../x",),
        ("experiment.name='../x'", "../x", "expected letters, digits", "Choose another experiment.name")),
    "a run id that is a path": (
        ("experiment.id=/tmp/x",),
        ("experiment.id='/tmp/x'", "/tmp/x", "expected letters, digits", "Choose another experiment.id")),
    "windows larger than images": (
        ("model.generative.window_px=64", "model.generative.stride_px=64"),
        ("data.short_side_px=32", "model.generative.window_px=64", "no window fits", "Use the same value for both")),
    "two settings that contradict": (
        ("tta.continual=true", "tta.episodic=true"),
        ("tta.continual=true", "tta.episodic=true", "keep all, or nothing?", "Switch one off")),
    "no such checkpoint": (
        ("model.discriminative.checkpoint=/no/such/folder",),
        ("model.discriminative.checkpoint=/no/such/folder", "neither a folder", "hub id", "Correct the path")),
    "a gpu that is not there": (
        ("runtime.device=cuda",), ("runtime.device=cuda", "no GPU is visible", "expected one or more",
                                   "set runtime.device=cpu")),
    "weights with another hash": (
        (f"+model.sha256={{discriminative: '{'0' * 64}'}}",),
        ("model.sha256.discriminative", "0000000", "the weights that were loaded have", "Fetch the checkpoint again")),
    "the hash of no model": (
        ("+model.sha256={segmenter: abc}",),
        ("model.sha256.segmenter", "nothing of that name is loaded", "Choose from", "discriminative")),
}  # fmt: skip


class RunsCode:
    """A pickle of it makes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def changed_state(folder: Path, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def evil_pickle(segmenter: Path) -> None:
    (segmenter / "model.safetensors").unlink()
    (segmenter / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": RunsCode(segmenter / "ran")}, protocol=2))


def teacher_pickle(teacher: Path) -> None:
    for path in (teacher / "transformer").glob("*.safetensors"):
        path.unlink()
    path = teacher / "transformer/diffusion_pytorch_model.bin"
    path.write_bytes(pickle.dumps({"weight": RunsCode(teacher / "ran")}, protocol=2))


SEGMENTER, TEACHER = "model.discriminative.checkpoint", "model.generative.checkpoint"
# name: (which model, what is done to its folder, overrides, parts of the message)
WEIGHTS = {
    "a segmenter as a pickle": (
        0, evil_pickle, (), (SEGMENTER, "only pickled weights", "expected model.safetensors", "Convert it")),
    "a segmenter as a pickle, asked for": (
        0, evil_pickle, ("model.discriminative.allow_pickle=true",),
        (SEGMENTER, "cannot be loaded", "incomplete or damaged", "Download it again")),
    "a teacher as a pickle": (1, teacher_pickle, (), (TEACHER, "cannot be loaded", "safetensors", "Download it again")),
    "cut weights": (
        0, lambda folder: cut(folder / "model.safetensors"), (),
        (SEGMENTER, "cannot be loaded", "incomplete or damaged", "Download it again")),
    "cut weights of the teacher": (
        1, lambda folder: [cut(path) for path in (folder / "transformer").glob("*.safetensors")], (),
        (TEACHER, "cannot be loaded", "incomplete or damaged", "Download it again")),
    "a key that is missing": (
        0, lambda folder: changed_state(folder, lambda state: state.pop("decode_head.classifier.bias")), (),
        (SEGMENTER, "decode_head.classifier.bias is missing", "Expected every key once", "save them anew")),
    "a key too many": (
        0, lambda folder: changed_state(
            folder, lambda state: state.update(more=state["decode_head.classifier.bias"].clone())), (),
        (SEGMENTER, "more is unexpected", "Expected every key once", "save them anew")),
    "a key of another shape": (
        0, lambda folder: changed_state(folder, lambda state: state.update(
            {"decode_head.classifier.bias": state["decode_head.classifier.bias"][:2].clone()})), (),
        (SEGMENTER, "decode_head.classifier.bias has shape (2,)", "expected (3,)", "save them anew")),
    "no config": (
        0, lambda folder: (folder / "config.json").unlink(), (),
        (SEGMENTER, "model_type None", "expected one of segformer, ", "Give the folder")),
    "a config nested without end": (
        0, lambda folder: (folder / "config.json").write_text("[" * 200_000), (),
        (SEGMENTER, "cannot be loaded", "incomplete or damaged", "Download it again")),
    "a config that is a list": (
        0, lambda folder: (folder / "config.json").write_text("[]"), (),
        (SEGMENTER, "config.json holds no names", "holds no names with values", "Fetch the folder again")),
    "another kind of model": (
        0, lambda folder: (folder / "config.json").write_text(json.dumps({"model_type": "bert"})), (),
        (SEGMENTER, "model_type 'bert'", "expected one of segformer, ", "Give the folder")),
    "embeddings of other classes": (
        1, lambda folder: shutil.copy(folder / "other.safetensors", folder / "embeddings.safetensors"), (),
        ("embeddings.safetensors", "class 0 is 'sea'", "the data set expects 'sky'", "Use the embeddings made for")),
    "embeddings that are cut": (
        1, lambda folder: cut(folder / "embeddings.safetensors"), (),
        ("embeddings.safetensors", "cannot be read", "expected a file written by segadapt", "Correct the path")),
}  # fmt: skip


def assert_refused_before_any_step(root, steps_taken, status, stderr, parts):
    where, got, expected, cure = parts
    assert status == 2
    assert_says(stderr, where=where, got=got, expected=expected, cure=cure)
    assert steps_taken == []
    assert not list((root.parent / "runs").rglob("records.jsonl"))


def test_the_good_run_passes(segadapt, overrides_of, steps_taken):
    """Or the table would prove nothing."""
    status, _, stderr = segadapt("adapt", *overrides_of())
    assert (status, stderr) == (0, "")
    assert sorted(steps_taken) == ["a", "b", "c"]


@pytest.mark.parametrize("fault", DATA)
def test_bad_data_is_refused(segadapt, root, overrides_of, steps_taken, fault):
    damage, overrides, parts = DATA[fault]
    damage(root)
    status, _, stderr = segadapt("adapt", *overrides_of(*overrides))
    assert_refused_before_any_step(root, steps_taken, status, stderr, parts)


# `check` without models compares no head
@pytest.mark.parametrize("fault", [fault for fault in DATA if "head" not in fault])
def test_check_finds_the_same_data(segadapt, root, overrides_of, steps_taken, fault):
    damage, overrides, parts = DATA[fault]
    damage(root)
    status, stdout, stderr = segadapt("check", *overrides_of(*overrides))
    assert status == 2
    found = [line for line in [*stdout.splitlines(), stderr] if parts[0] in line and "missing_images" not in line]
    assert_says(found[0], where=parts[0], got=parts[1], expected=parts[2], cure=parts[3])
    assert steps_taken == []


@pytest.mark.parametrize("fault", SETTINGS)
def test_bad_settings_are_refused(segadapt, root, overrides_of, steps_taken, fault):
    overrides, parts = SETTINGS[fault]
    status, _, stderr = segadapt("adapt", *overrides_of(*overrides))
    assert_refused_before_any_step(root, steps_taken, status, stderr, parts)


@pytest.fixture
def copies(models, tmp_path, build_teacher):
    """Both models, to be damaged; beside the teacher's embeddings those of other classes."""
    from segadapt.models.generative.prompts import save_embeddings

    for name, source in zip(("segmenter", "teacher"), models, strict=True):
        shutil.copytree(source, tmp_path / name)
    other = tmp_path / "teacher/other.safetensors"
    save_embeddings(other, build_teacher(3).embeddings, classes=("sea", "sand", "sun"), dataset_name="d", model="m")
    return tmp_path / "segmenter", tmp_path / "teacher"


@pytest.mark.parametrize("verb", ["adapt", "check"])
@pytest.mark.parametrize("fault", WEIGHTS)
def test_bad_weights_are_refused(segadapt, root, copies, overrides_of, steps_taken, fault, verb):
    which, damage, overrides, parts = WEIGHTS[fault]
    damage(copies[which])
    where = (f"{SEGMENTER}={copies[0]}", f"{TEACHER}={copies[1]}")
    status, stdout, stderr = segadapt(
        verb, *overrides_of(*where, *overrides), *(["check.load_models=true"] if verb == "check" else [])
    )
    assert not list(root.parent.rglob("ran")), "code in a pickle was run"
    if verb == "check":
        assert status == 2
        assert steps_taken == []
        [stderr] = [line for line in stdout.splitlines() if line.startswith("problem: ")]
    assert_refused_before_any_step(root, steps_taken, status, stderr, parts)


def test_one_byte_of_the_weights_is_noticed_where_their_hash_is_asked_for(segadapt, root, copies, overrides_of):
    """model.sha256 takes what results.json says of the weights."""
    where = (f"{SEGMENTER}={copies[0]}", f"{TEACHER}={copies[1]}")
    status, _, stderr = segadapt("adapt", *overrides_of(*where, "experiment.id=first"))
    assert (status, stderr) == (0, "")
    [path] = (root.parent / "runs").rglob("results.json")
    known = json.loads(path.read_text())["weights_sha256"]
    assert set(known) == {"discriminative", "generative", "autoencoder", "embeddings"}
    asked = "+model.sha256={" + ",".join(f"{model}: {sha256}" for model, sha256 in known.items()) + "}"
    assert segadapt("adapt", *overrides_of(*where, asked, "experiment.id=second"))[0] == 0
    files = {
        "discriminative": copies[0] / "model.safetensors",
        "generative": next((copies[1] / "transformer").glob("*.safetensors")),
        "autoencoder": next((copies[1] / "vae").glob("*.safetensors")),
        "embeddings": copies[1] / "embeddings.safetensors",
    }
    for model, file in files.items():
        whole = file.read_bytes()
        flip_a_byte(file)
        status, _, stderr = segadapt("adapt", *overrides_of(*where, asked, "experiment.id=third"))
        assert status == 2
        assert_says(stderr, where=f"model.sha256.{model}", got="the weights that were loaded have",
                    expected=known[model], cure="Fetch the checkpoint again")  # fmt: skip
        assert not list((root.parent / "runs").rglob("third/records.jsonl"))
        file.write_bytes(whole)
