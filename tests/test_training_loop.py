"""The loop of a segmenter's training: what it keeps, when it ends, how it goes on, what it refuses. In one process."""

import io
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from parallel_training import train_without_batch_norm
from rich.console import Console
from safetensors.torch import load_file
from training_runs import QUIET, Cut, files_of, lines_of, training

from segadapt import train
from segadapt.datasets.toytown import CLASSES
from segadapt.errors import UserError
from segadapt.models.discriminative.load import load_segmenter
from segadapt.models.discriminative.segmenter import NetSegmenter
from segadapt.record import plain
from segadapt.signals import Stopped
from segadapt.training import images, loop, preparation
from segadapt.training.begin import Times
from segadapt.training.loop import Training

OF_THE_CLOCK = ("seconds", "started", "peak_memory_gib", "folder")
ONE = (
    "experiment.id=one", "train.validate_every=2", "train.checkpoint_every=2", "train.ema_decay=0.9",
    "train.optimizer.clip_norm=0.5", "train.keep=best", "train.accumulate=2", "train.optimizer.lr=0.01",
    "model.discriminative.config.classifier_dropout_prob=0.3",
)  # fmt: skip


@pytest.fixture(autouse=True)
def every_step_has_its_line(monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 1)


def left_by(folder: Path) -> dict:
    results = json.loads((folder / "results.json").read_text())
    kept = {name: value for name, value in results.items() if name not in OF_THE_CLOCK}
    return files_of(folder) | {"records": (folder / "records.jsonl").read_bytes(), "results": kept}


def model_of(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder, "model", "model.safetensors"))


def within(monkeypatch, settings, action, *, after: int) -> Path:
    """Start a run that does something in the midst of step `after` + 1; gives its folder."""
    real, calls = Training._step, []

    def step(self, *arguments, **named):
        if len(calls) == after:
            action()
        calls.append(1)
        return real(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", step)
        with pytest.raises((Cut, Stopped)):
            train.run(settings, console=QUIET)
    return Path(settings.logging.root, settings.experiment.name, settings.experiment.id)


# Going on


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    """What a run leaves that nothing stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "LOG_EVERY", 1)
        torch.manual_seed(1)
        return left_by(Path(train.run(training(tmp_path_factory.mktemp("whole"), *ONE), console=QUIET)["folder"]))


def cut() -> None:
    raise Cut


@pytest.mark.parametrize("after", [1, 3, 5])
def test_a_run_that_is_cut_off_ends_as_one_that_was_not(tmp_path, monkeypatch, whole, after):
    """With average, dropout, micro-batches, best weights: before the first checkpoint, and a step after each."""
    torch.manual_seed(2)  # nothing is drawn from what the process happens to hold
    settings = training(tmp_path, *ONE)
    folder = within(monkeypatch, settings, cut, after=after)
    found = sorted(path.name for path in folder.glob("checkpoints/*"))
    assert found == [f"{step:08d}" for step in (2, 4) if step <= after]
    train.run(training(tmp_path, *ONE, "data.workers=1"), console=QUIET)
    assert left_by(folder) == whole
    assert not (folder / "checkpoints").exists()


def test_a_signal_saves_at_the_step_at_hand_and_the_same_command_goes_on(tmp_path, monkeypatch, whole):
    settings = training(tmp_path, *ONE)
    folder = within(monkeypatch, settings, lambda: os.kill(os.getpid(), signal.SIGTERM), after=2)
    assert [path.name for path in folder.glob("checkpoints/*4")] == ["00000004"]  # noted in step 3, seen before 4
    train.run(settings, console=QUIET)
    assert left_by(folder) == whole
    begun = [json.loads(line) for line in (folder / "timings.jsonl").read_text().splitlines()]
    assert [line["step"] for line in begun if "started" in line] == [0, 4]


def test_a_finished_run_is_left_as_it_is_unless_it_is_to_start_anew(tmp_path, monkeypatch):
    settings = training(tmp_path, "train.iters=1", "experiment.id=one")
    first = train.run(settings, console=QUIET)
    kept = {path: path.stat().st_mtime_ns for path in Path(first["folder"]).rglob("*.json*")}
    with monkeypatch.context() as patch:
        for name in ("read_labels", "build", "Training"):  # no label is read, no network built, no step taken
            patch.setattr(train, name, None)
        again = train.run(settings, console=QUIET)
    assert again == plain(first)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    train.run(training(tmp_path, "train.iters=1", "experiment.id=one", "experiment.restart=true"), console=QUIET)
    assert Path(first["folder"], "results.json").stat().st_mtime_ns != kept[Path(first["folder"], "results.json")]


def test_a_finished_run_of_other_images_is_refused(tmp_path, monkeypatch):
    own = ("train.iters=1", "experiment.id=one")
    train.run(training(tmp_path, *own), console=QUIET)
    real = images.stream.manifest_hash
    monkeypatch.setattr(images.stream, "manifest_hash", lambda dataset, entries: real(dataset, entries)[::-1])
    with pytest.raises(UserError, match=r"was started with manifest_sha256\.training="):
        train.run(training(tmp_path, *own), console=QUIET)


def test_a_run_that_goes_on_reads_no_labels_again_and_keeps_its_class_weights(tmp_path, monkeypatch):
    own = ("experiment.id=one", "train.checkpoint_every=2", "train.iters=4", "data.count=8",
           "train.losses.class_weights.recipe=max_over_count", "train.losses.class_weights.cap=3")  # fmt: skip
    done = train.run(training(tmp_path / "whole", *own), console=QUIET)
    settings = training(tmp_path / "cut", *own)
    folder = within(monkeypatch, settings, cut, after=3)
    monkeypatch.setattr(train, "read_labels", None)
    again = train.run(settings, console=QUIET)
    assert again["class_weights"] == done["class_weights"]
    assert len(set(again["class_weights"]["weight"].values())) > 1
    assert files_of(folder) == files_of(done["folder"])


def test_a_run_that_goes_on_from_other_weights_is_refused(tmp_path, monkeypatch):
    settings = training(tmp_path, "experiment.id=one", "train.checkpoint_every=2", "train.iters=4")
    within(monkeypatch, settings, cut, after=3)
    monkeypatch.setattr(train, "fingerprint", lambda _: "other")
    with pytest.raises(UserError, match=r"was started with weights_sha256\.discriminative=\w+; now other") as said:
        train.run(settings, console=QUIET)
    assert str(said.value).endswith(
        " The weights that the training starts from are others now. Restore it, choose another experiment.id, or start "
        "anew with experiment.restart=true."
    )


def test_a_folder_that_another_process_begins_in_the_meantime_is_left_to_it(tmp_path, monkeypatch):
    settings, real = training(tmp_path, "experiment.id=one"), train.read_labels

    def slow(*given):
        preparation.found_folder(settings)
        return real(*given)

    monkeypatch.setattr(train, "read_labels", slow)
    with pytest.raises(
        UserError, match=r"^Run folder \S+ was begun by another process in the meantime; [^\n]*again\.$"
    ):
        train.run(settings, console=QUIET)


def test_sgd_and_its_momentum_go_on_too(tmp_path, monkeypatch):
    own = ("experiment.id=one", "train.checkpoint_every=2", "train.iters=4", "train.optimizer.name=sgd")
    done = train.run(training(tmp_path / "whole", *own), console=QUIET)
    settings = training(tmp_path / "cut", *own)
    folder = within(monkeypatch, settings, cut, after=3)
    train.run(settings, console=QUIET)
    assert files_of(folder) == files_of(done["folder"])


# What a step is


def test_micro_batches_make_the_step_of_one_large_batch(tmp_path, monkeypatch):
    """BatchNorm frozen; crops that reach over the image have unlabelled pixels, in each micro-batch another number."""
    monkeypatch.setattr(NetSegmenter, "train", train_without_batch_norm)
    own = ("train.batch_size=4", "train.iters=2", "train.schedule.decay=constant", "train.optimizer.name=sgd",
           "train.optimizer.lr=0.5", "train.transforms.scale_low=0.4")  # fmt: skip
    runs = [train.run(training(tmp_path, *own, f"train.accumulate={parts}"), console=QUIET) for parts in (1, 2, 4)]
    one, *others = [model_of(done["folder"]) for done in runs]
    assert all(torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-6) for other in others for name in one)
    start = train.build(training(tmp_path, *own), CLASSES, torch.device("cpu")).net.state_dict()
    assert not torch.allclose(one["decode_head.classifier.bias"], start["decode_head.classifier.bias"], atol=1e-3)
    records = [[line["loss"] for line in lines_of(done["folder"]) if "loss" in line] for done in runs]
    assert records[1] == pytest.approx(records[0], rel=1e-5)
    assert records[2] == pytest.approx(records[0], rel=1e-5)


def test_the_average_is_what_is_saved(tmp_path):
    """After one step its decay is 2 / 11, whatever the setting above that."""
    own = ("train.iters=1", "train.optimizer.lr=0.01")
    start = train.build(training(tmp_path), CLASSES, torch.device("cpu")).net.state_dict()
    trained, average = (
        model_of(train.run(training(tmp_path, *own, f"train.ema_decay={decay}"), console=QUIET)["folder"])
        for decay in (0, 0.999)
    )
    name = "decode_head.classifier.weight"
    torch.testing.assert_close(average[name], torch.lerp(start[name], trained[name], 9 / 11))
    assert not torch.equal(average[name], trained[name])


def test_a_gradient_is_clipped_to_the_norm(tmp_path):
    """Plain SGD moves the weights by rate x gradient, whose norm is 0.01."""
    own = ("train.iters=1", "train.optimizer.name=sgd", "train.optimizer.momentum=0", "train.optimizer.lr=1",
           "train.optimizer.head_lr_factor=1", "train.optimizer.weight_decay=0")  # fmt: skip
    settings = training(tmp_path, *own, "train.optimizer.clip_norm=0.01")
    segmenter = train.build(settings, CLASSES, torch.device("cpu"))
    start = {name: p.detach().clone() for name, p in segmenter.parameters().items()}
    done = train.run(settings, console=QUIET)
    segmenter.net.load_state_dict(type(segmenter.net).from_pretrained(f"{done['folder']}/model").state_dict())
    moved = sum(
        (p.detach().double() - start[name].double()).square().sum().item() for name, p in segmenter.parameters().items()
    )
    assert moved**0.5 == pytest.approx(0.01, rel=1e-3)
    assert lines_of(done["folder"])[0]["grad_norm"] > 0.1  # as it was before


def test_every_term_is_recorded_with_its_weight(tmp_path):
    lines = [line for line in lines_of(train.run(training(tmp_path), console=QUIET)["folder"]) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["terms"].keys() == line["weights"].keys() == {"cross_entropy"} for line in lines)
    assert all(line["terms"]["cross_entropy"] == line["loss"] for line in lines)
    assert lines[0]["lr"] == {"encoder": 3e-4, "encoder undecayed": 3e-4, "head": pytest.approx(9e-4)}
    assert lines[-1]["lr"] == {"encoder": 0, "encoder undecayed": 0, "head": 0}


# What is kept, and when training ends


def scripted(monkeypatch, hits: list[float]) -> list[dict]:
    """Validations of these mIoU in percent, one after the other; the weights that each has seen."""
    seen: list[dict] = []

    def count(segmenter, *_, **__) -> np.ndarray:
        counts_CC = np.zeros((len(CLASSES), len(CLASSES)), np.int64)
        counts_CC[0, :2] = 40 * hits[len(seen)], 2000 - 40 * hits[len(seen)]  # IoU of class 0, and 0 of class 1
        seen.append({name: value.clone() for name, value in segmenter.net.state_dict().items()})
        return counts_CC

    monkeypatch.setattr(images.scoring, "count", count)
    return seen


@pytest.mark.parametrize(
    ("keep", "folders"),
    [("best", {"model": 2}), ("last", {"model": 4}), ("both", {"model": 2, "model_last": 4})],
    ids=["best", "last", "both"],
)
def test_training_ends_when_patience_does_and_keeps_the_best_the_last_or_both(tmp_path, monkeypatch, keep, folders):
    seen = scripted(monkeypatch, [10, 30, 30, 20, 40])
    settings = training(tmp_path, "train.validate_every=1", "train.patience=2", f"train.keep={keep}")
    heard = Console(file=io.StringIO(), width=10_000)
    done = train.run(settings, console=heard)
    assert "; ended at step 4 of 6, 2 validations without a better mIoU; " in heard.file.getvalue()
    assert done["steps"] == 4
    assert (done["best"]["step"], done["best"]["miou"]) == (2, pytest.approx(0.3))
    assert (done["last"]["step"], done["last"]["miou"]) == (4, pytest.approx(0.2))
    assert done["kept"]["step"] == folders["model"]
    assert done["validation"]["miou"] == pytest.approx(0.2 if keep == "last" else 0.3)
    assert sorted(path.name for path in Path(done["folder"]).glob("model*")) == sorted(folders)
    for name, step in folders.items():
        net = load_segmenter(f"{done['folder']}/{name}", num_classes=len(CLASSES), device="cpu").net
        assert all(torch.equal(value, seen[step - 1][key]) for key, value in net.state_dict().items())
    assert not torch.equal(seen[1]["decode_head.classifier.weight"], seen[3]["decode_head.classifier.weight"])


def test_both_are_kept_over_an_interruption(tmp_path, monkeypatch):
    """The best weights are of the earlier start, the last ones of the later."""
    own = ("experiment.id=one", "train.validate_every=1", "train.checkpoint_every=1", "train.iters=4")
    seen = scripted(monkeypatch, [10, 30, 20, 20])
    settings = training(tmp_path, *own, "train.keep=both")
    within(monkeypatch, settings, cut, after=3)
    folder = Path(train.run(settings, console=QUIET)["folder"])
    for name, step in (("model", 2), ("model_last", 4)):
        found = load_segmenter(str(folder / name), num_classes=len(CLASSES), device="cpu").net.state_dict()
        assert all(torch.equal(value, seen[step - 1][key]) for key, value in found.items())


def test_patience_goes_on_counting_after_an_interruption(tmp_path, monkeypatch):
    scripted(monkeypatch, [10, 30, 20, 30, 20, 20])
    settings = training(tmp_path, "experiment.id=one", "train.validate_every=1", "train.patience=2",
                        "train.checkpoint_every=1", "train.keep=best")  # fmt: skip
    within(monkeypatch, settings, cut, after=3)
    done = train.run(settings, console=QUIET)
    assert (done["steps"], done["kept"]["step"]) == (4, 2)


# What is refused


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.patience=1"], r"train\.patience=1, but there is 1 validation "),
        (["train.patience=5", "train.validate_every=1"], r"train\.patience=5, but there are 6 validations"),
        (["train.transforms.crop_px=28"], r"train\.transforms\.crop_px: images of 28 px .* segformer; expected 29 px"),
        (["train.transforms.crop_width_px=16"], r"train\.transforms\.crop_width_px: images of 16 px are too small"),
        (
            ["data.short_side_px=16"],
            r"data\.short_side_px: images of 16 px are too small for segformer; expected 29 px",
        ),
        (["train.checkpoint_every=6"], r"train\.checkpoint_every=6 with train\.iters=6: it would have no effect"),
        (["train.accumulate=4"], r"train\.batch_size=2: expected a multiple of 4, 1 process x train\.accumulate=4"),
        (["train.parallel=ddp"], r"train\.parallel=ddp, but torchrun has not started this process"),
    ],
    ids=str,
)
def test_settings_of_the_loop_without_effect_are_refused_before_anything_is_written(tmp_path, overrides, said):
    with pytest.raises(UserError, match=rf"^{said}[^\n]*$"):
        train.run(training(tmp_path, *overrides), console=QUIET)
    assert not any(tmp_path.iterdir())


def test_one_process_alone_under_torchrun_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"^train\.parallel=none under torchrun with 2 processes"):
        train.run(training(tmp_path), console=QUIET)


def test_an_unknown_label_is_found_before_the_first_step(tmp_path, monkeypatch):
    """In the training images, and in those of the validation."""
    import cv2

    for split in ("training", "validation"):
        for kind in ("image", "label"):
            (tmp_path / split / kind).mkdir(parents=True)
        for index in range(2):
            cv2.imwrite(str(tmp_path / split / "image" / f"{index}.png"), np.full((48, 64, 3), 90, np.uint8))
            cv2.imwrite(str(tmp_path / split / "label" / f"{index}.png"), np.full((48, 64), index, np.uint8))
    own = ("data=folder", "data.name=own", "data.classes=toytown", f"data.data_root={tmp_path}", "data.count=null",
           "data.split=training", "data.image_path='{data_root}/{split}/image/{key}.png'",
           "data.label_path='{data_root}/{split}/label/{key}.png'", "data.id_map=as_is",
           "data.cache=false")  # fmt: skip
    monkeypatch.setattr(Training, "_step", None)
    one_folder = [word.replace("{split}", "training") for word in own]
    assert images.list_images(training(tmp_path, *own)).num_shared == 0
    assert images.list_images(training(tmp_path, *one_folder)).num_shared == 2  # the template has no {split}
    for split in ("training", "validation"):
        path = tmp_path / split / "label" / "1.png"
        cv2.imwrite(str(path), np.full((48, 64), 77, np.uint8))
        with pytest.raises(UserError, match=rf"{split}/label/1\.png.*77"):
            train.run(training(tmp_path / "runs", *own), console=QUIET)
        cv2.imwrite(str(path), np.full((48, 64), 1, np.uint8))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("split", "trained_on"), [("training", 2), ("validation", 0)])
def test_validation_on_training_images_is_said_and_recorded(tmp_path, split, trained_on):
    """An overfit check is one, and a slip of the split is another thing; neither passes for a test score."""
    said = io.StringIO()
    own = ("train.iters=1", "train.keep=best", f"train.validation_split={split}")
    done = train.run(training(tmp_path, *own), console=Console(file=said, width=400))
    assert done["validated_on"] == {"split": split, "images": 2, "trained_on": trained_on}
    warned = f"train.validation_split={split}: 2 of 2 validation images are training images too" in said.getvalue()
    assert warned == bool(trained_on)
    assert ("2 of which were trained on" in done["kept"]["chosen_on"]) == bool(trained_on)


@pytest.mark.parametrize("mode", ["quiet", "json"])
def test_the_terminal_speaks_to_scripts(tmp_path, capsys, mode):
    done = train.run(training(tmp_path, f"logging.terminal={mode}", "train.iters=2"))
    lines = capsys.readouterr().out.splitlines()
    if mode == "quiet":
        said = f"{done['folder']}/model: step 2, validation mIoU {100 * done['validation']['miou']:.2f} %"
        assert lines == [f"{said}; {done['rule']}; loss reduction valid"]
    else:
        events = [json.loads(line) for line in lines]
        assert [event["event"] for event in events] == ["step", "step", "validation", "result"]
        assert events[-1]["folder"] == done["folder"]


def test_seconds_are_those_of_all_starts():
    earlier = {"started": "2026-01-01T00:00:00+0000", "seconds": 100.0}
    assert Times(earlier).state_dict() == {"started": earlier["started"], "seconds": pytest.approx(100, abs=0.5)}
    assert Times(None).state_dict()["seconds"] < 0.5
