"""Pretraining: top-k, groups, what a run leaves and how it goes on, official names, a segmenter that starts from it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from foreign_segformer import DEPTHS, HEADS, WIDTHS, nvidia_state
from PIL import Image
from pretraining_runs import SMALL_IMAGES, THREE, pretraining, three_classes, tiny, write
from safetensors.torch import load_file
from training_runs import QUIET, Cut, files_of, lines_of, training
from transformers import SegformerForImageClassification

from segadapt import pretrain, train
from segadapt.datasets.toytown import CLASSES
from segadapt.errors import UserError
from segadapt.models.discriminative.keymaps import encoder_names, nvidia_names
from segadapt.models.discriminative.make import make_segmenter
from segadapt.pretrain import OFFICIAL
from segadapt.training import loop
from segadapt.training.classification import SoftCrossEntropy, make_classifier, ranks
from segadapt.training.loop import Training
from segadapt.training.optimizer import parameter_groups

OF_THE_CLOCK = ("seconds", "started", "peak_memory_gib", "folder")
CPU = torch.device("cpu")


# Scores and objective


def test_ranks_are_those_of_a_stable_sort_with_ties():
    rng = np.random.default_rng(0)
    logits_BC = rng.integers(0, 4, (200, 9)).astype(np.float32)  # many ties
    label_B = rng.integers(0, 9, 200)
    expected = [
        sorted(range(9), key=lambda c, row=row: (-row[c], c)).index(label)
        for row, label in zip(logits_BC, label_B, strict=True)
    ]
    assert ranks(torch.from_numpy(logits_BC), torch.from_numpy(label_B)).tolist() == expected


def test_a_prediction_that_is_not_finite_is_never_right():
    logits_BC = torch.tensor([[1.0, float("nan"), 0], [float("inf"), 0, 0], [2.0, 1, 0]])
    assert ranks(logits_BC, torch.tensor([1, 0, 0])).tolist() == [3, 3, 0]


def test_the_loss_is_cross_entropy_against_probabilities():
    rng = np.random.default_rng(1)
    logits_BC, target_BC = rng.normal(size=(5, 7)), rng.dirichlet(np.ones(7), 5)
    terms = SoftCrossEntropy()(torch.from_numpy(logits_BC), torch.from_numpy(target_BC), step=1)
    logs_BC = logits_BC - np.log(np.exp(logits_BC).sum(1, keepdims=True))
    assert float(terms.total) == pytest.approx(
        -np.mean([(t * log).sum() for t, log in zip(target_BC, logs_BC, strict=True)])
    )


def test_norms_and_biases_have_no_decay_and_the_head_its_own_rate(tmp_path):
    settings = pretraining(tmp_path, "train.optimizer.head_lr_factor=2")
    classifier = make_classifier(settings.model.discriminative.config, THREE, seed=0, device=CPU)
    groups = {group["name"]: group for group in parameter_groups(classifier, settings.train.optimizer)}
    names = {id(p): name for name, p in classifier.parameters().items()}
    moved = [names[id(p)] for group in groups.values() for p in group["params"]]
    assert sorted(moved) == sorted(classifier.parameters())
    without = {names[id(p)] for name in ("encoder undecayed", "head undecayed") for p in groups[name]["params"]}
    assert without == {*classifier.norm_parameters(), *(name for name in moved if name.endswith(".bias"))}
    rates = {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()}
    assert rates == {"encoder": (5e-4, 0.05), "encoder undecayed": (5e-4, 0), "head": (1e-3, 0.05),
                     "head undecayed": (1e-3, 0)}  # fmt: skip


# Runs


def left_by(folder: Path) -> dict:
    results = json.loads((folder / "results.json").read_text())
    kept = {name: value for name, value in results.items() if name not in OF_THE_CLOCK}
    official = (folder / OFFICIAL).read_bytes()
    return files_of(folder) | {"records": (folder / "records.jsonl").read_bytes(), "results": kept, OFFICIAL: official}


ONE = ("experiment.id=one", "train.checkpoint_every=2", "train.ema_decay=0.9", "train.accumulate=2", "train.keep=best",
       "model.discriminative.config.drop_path_rate=0.2")  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run that nothing stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "LOG_EVERY", 1)
        torch.manual_seed(1)
        return Path(pretrain.run(tiny(tmp_path_factory.mktemp("whole"), *ONE), console=QUIET)["folder"])


def test_a_run_that_is_cut_off_ends_as_one_that_was_not(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    torch.manual_seed(2)
    settings, real, calls = tiny(tmp_path, *ONE), Training._step, []

    def step(self, *arguments, **named):
        if len(calls) == 3:
            raise Cut
        calls.append(1)
        return real(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", step)
        with pytest.raises(Cut):
            pretrain.run(settings, console=QUIET)
    folder = tmp_path / "pretrain" / "one"
    assert sorted(path.name for path in folder.glob("checkpoints/*")) == ["00000002"]
    settings.data.workers = 1
    pretrain.run(settings, console=QUIET)
    mine, theirs = left_by(folder), left_by(whole)
    assert [name for name in theirs if mine[name] != theirs[name]] == []


def test_what_a_run_leaves(whole):
    results = json.loads((whole / "results.json").read_text())
    assert results["classes"] == list(THREE)
    assert set(results["validation"]) == {"top1"}  # of three classes five would always be right
    assert results["validated_on"] == {"split": "val", "images": 6, "trained_on": 0}
    assert results["training"]["images"] == 12
    assert 0 <= results["validation"]["top1"] <= 1
    assert results["best"]["top1"] == max(line["top1"] for line in lines_of(whole) if "top1" in line)
    config = json.loads((whole / "model" / "config.json").read_text())
    assert list(config["id2label"].values()) == list(THREE)
    assert config["architectures"] == ["SegformerForImageClassification"]


def test_the_accuracy_is_that_of_the_saved_classifier_on_each_image(whole):
    net = SegformerForImageClassification.from_pretrained(whole / "model").eval()
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    right = []
    for path in sorted((whole.parents[1] / "images" / "val").glob("*/*.png")):
        resized_HW3 = cv2.resize(np.asarray(Image.open(path)), (32, 32), interpolation=cv2.INTER_CUBIC)
        pixels = torch.from_numpy((resized_HW3 / 255 - mean) / std).permute(2, 0, 1)[None].float()
        right.append(int(net(pixels).logits.argmax()) == THREE.index(path.parent.name))
    results = json.loads((whole / "results.json").read_text())
    assert results["validation"]["top1"] == pytest.approx(np.mean(right))


def test_a_finished_run_is_left_as_it_is(whole, monkeypatch):
    monkeypatch.setattr(pretrain, "make_classifier", None)
    settings = pretraining(whole.parents[1], *SMALL_IMAGES, *ONE)
    assert pretrain.run(settings, console=QUIET)["folder"] == str(whole)


def test_official_names_are_those_of_nvidias_own_code(tmp_path):
    config = {"depths": list(DEPTHS), "hidden_sizes": list(WIDTHS), "num_attention_heads": list(HEADS)}
    make_segmenter("segformer", config, 3).save(tmp_path)
    file = load_file(tmp_path / "model.safetensors")
    theirs = {name.removeprefix("backbone."): value for name, value in nvidia_state(file).items()
              if name.startswith("backbone.")}  # fmt: skip
    mine = nvidia_names({name: value for name, value in file.items() if not name.startswith("decode_head.")})
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_official_names_hold_the_same_weights_and_lead_back(whole):
    official, files = load_file(whole / OFFICIAL), load_file(whole / "model" / "model.safetensors")
    assert {"patch_embed1.proj.weight", "block4.0.attn.kv.weight", "norm4.bias", "head.weight"} <= set(official)
    back = encoder_names({name: value for name, value in official.items() if not name.startswith("head.")})
    assert back.keys() == {name for name in files if not name.startswith("classifier.")}
    assert all(torch.equal(value, files[name]) for name, value in back.items())
    assert torch.equal(official["head.weight"], files["classifier.weight"])
    again = nvidia_names(back | {name: files[name] for name in files if name.startswith("classifier.")})
    assert all(torch.equal(again[name], value) for name, value in official.items())
    kv, key = official["block2.0.attn.kv.weight"], "segformer.encoder.block.1.0.attention.self.key.weight"
    assert torch.equal(kv[: len(kv) // 2], files[key])


def test_a_segmenter_starts_from_it_strictly(tmp_path, whole):
    settings = training(tmp_path, f"model.discriminative.backbone={whole / OFFICIAL}")
    segmenter = train.build(settings, CLASSES, CPU)
    files = load_file(whole / "model" / "model.safetensors")
    expected = make_classifier(settings.model.discriminative.config, THREE, seed=3, device=CPU)
    expected.net.segformer.load_state_dict(type(expected.net).from_pretrained(whole / "model").segformer.state_dict())
    mine = segmenter.net.segformer.state_dict()
    assert len(mine) > len(files) / 2
    assert all(torch.equal(mine[name], value) for name, value in expected.net.segformer.state_dict().items())
    with pytest.raises(UserError, match="the weights do not fit the encoder"):
        train.build(training(tmp_path, f"model.discriminative.backbone={whole / OFFICIAL}",
                             "model.discriminative.config.hidden_sizes=[8,16,16,32]"), CLASSES, CPU)  # fmt: skip


def test_it_starts_from_an_official_file_too(tmp_path, whole):
    settings = tiny(tmp_path, f"model.discriminative.backbone={whole / OFFICIAL}")
    classifier = pretrain.build(settings, THREE, CPU, QUIET)
    files = load_file(whole / "model" / "model.safetensors")
    state = classifier.net.state_dict()
    assert torch.equal(state["segformer.stages.0.patch_embeddings.proj.weight"],
                       files["segformer.encoder.patch_embeddings.0.proj.weight"])  # fmt: skip
    assert not torch.equal(state["classifier.weight"], files["classifier.weight"])  # a head is made anew


# Refusals


REFUSED = {
    r"train\.batch_size=1 with 1 process x train\.accumulate=1 is one image a micro-batch, which cannot be mixed ": [
        "train.batch_size=1"
    ],
    r"train\.transforms\.area_low=0\.9 is above train\.transforms\.area_high=0\.5": [
        "train.transforms.area_low=0.9", "train.transforms.area_high=0.5"
    ],
    r"train\.transforms\.validation_short_side_px=32: .*px to 64 or more, or lower image_px\.$": [
        "train.transforms.image_px=64"
    ],
    r"model\.discriminative\.checkpoint=x: `pretrain` trains the encoder of a segformer [^\n]*\. Set it to null\.$": [
        "model.discriminative.checkpoint=x"
    ],
    r"model\.discriminative\.family=segadapt_hrnet: [^\n]* Set it to segformer\.$": [
        "model.discriminative.family=segadapt_hrnet"
    ],
    r"train\.patience=9, but there are 2 validations": ["train.patience=9"],
}  # fmt: skip


@pytest.mark.parametrize("said", REFUSED)
def test_settings_without_effect_are_refused(tmp_path, said):
    with pytest.raises(UserError, match=f"^{said}"):
        pretrain.run(pretraining(tmp_path, *SMALL_IMAGES, *REFUSED[said]), console=QUIET)
    assert not list(tmp_path.iterdir())


def test_a_validation_on_what_is_trained_on_is_said(tmp_path, capsys):
    results = pretrain.run(tiny(tmp_path, "data.split=val"))
    assert results["validated_on"] == {"split": "val", "images": 6, "trained_on": 6}
    assert "train.validation_split=val: the images are those that are trained on" in capsys.readouterr().out


def test_a_damaged_image_is_found_before_the_first_step(tmp_path, monkeypatch):
    settings = tiny(tmp_path)
    (tmp_path / "images/val/sky/00001.png").write_bytes(b"")
    monkeypatch.setattr(Training, "_step", None)
    with pytest.raises(UserError, match=r"sky/00001\.png: cannot be decoded: the file is empty"):
        pretrain.run(settings, console=QUIET)
    assert not (tmp_path / "pretrain").exists()


# Slow


@pytest.mark.slow
def test_it_learns_ten_classes(tmp_path):
    """Chance is 0.1."""
    write(tmp_path / "images", train=100, val=20)
    own = ("train.transforms.image_px=48", "train.transforms.validation_short_side_px=48", "train.batch_size=32",
           "train.iters=300", "train.schedule.warmup_iters=30", "train.validate_every=300", "train.optimizer.lr=1e-3",
           "model.discriminative.config={depths:[2,2,2,2],hidden_sizes:[24,48,96,144],num_attention_heads:[1,2,4,6]}",
           "train.transforms.randaugment.operations=0", "train.transforms.mixing=0",
           "train.transforms.area_low=0.7")  # fmt: skip
    done = pretrain.run(pretraining(tmp_path, *own), console=QUIET)
    losses = [line["loss"] for line in lines_of(done["folder"]) if "loss" in line]
    assert losses[-1] < losses[0] - 0.2
    assert done["validation"]["top1"] > 0.2
    assert done["validation"]["top5"] > done["validation"]["top1"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one_does(tmp_path, kind):
    """Without mixing, whose pairs are of a micro-batch; validation images are shared out."""
    own = [*SMALL_IMAGES, "train.transforms.mixing=0", "train.optimizer.lr=0.01", "experiment.id=one",
           "train.schedule.decay=constant", "train.schedule.min_lr=0",
           "model.discriminative.config.drop_path_rate=0.0"]  # fmt: skip
    script = f"""import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pretraining_runs import pretraining
from training_runs import QUIET
from segadapt import pretrain
pretrain.run(pretraining(sys.argv[1], *sys.argv[2:]), console=QUIET)
"""
    (tmp_path / "run.py").write_text(script)
    found = []
    for processes in (1, 2):
        root = tmp_path / str(processes)
        three_classes(root)
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        spread = [f"train.parallel={kind}"] if processes > 1 else []
        command = [sys.executable, *(torchrun if spread else []), str(tmp_path / "run.py"), str(root), *own, *spread]
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        own_env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=own_env, timeout=300, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "Warning" not in done.stderr
        folder = root / "pretrain" / "one"
        found.append((load_file(folder / OFFICIAL), json.loads((folder / "results.json").read_text())))
    (one, its), (two, theirs) = found
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)
    assert theirs["validation"] == its["validation"]
    assert theirs["processes"] == 2
