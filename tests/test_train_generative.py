"""Training a teacher from nothing: what is refused, what it learns, the folder and the records that it leaves."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sd3_folder import build_transformer
from training_runs import (
    QUIET,
    TINY_SD3,
    TINY_VAE,
    assert_equal_states,
    generative_training,
    lines_of,
    noted_autoencoders,
    settings_of,
)

from segadapt import adapt, config_training, train_generative
from segadapt.datasets import Sample, Source, Task
from segadapt.datasets.toytown import CLASSES, PALETTE_C3, ToyTown
from segadapt.errors import UserError
from segadapt.models.generative.sd3 import Sd3, load_autoencoder
from segadapt.record import JsonLines
from segadapt.training import autoencoder as train_autoencoder
from segadapt.training.teacher_objective import ClassTokens
from segadapt.wandb_mirror import NoWandb

# Settings that make no teacher


def test_more_prompts_than_classes_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"train\.prompts_per_window=13.*12 classes"):
        train_generative.run(generative_training(tmp_path, "train.prompts_per_window=13"))


CAMVID = "model/generative=camvid_scratch"
FROM_FILES = ("model/generative=local", "model.generative.checkpoint=/absent")
GIVEN = "train.autoencoder_iters=0"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model/generative=local", "model.generative.checkpoint=null"],
         r"config=\{\} and model\.generative\.checkpoint=null: there is no transformer.*toytown_scratch"),
        (["model/generative=toytown"],
         r"autoencoder_iters=2000 beside model\.generative\.checkpoint=segadapt:toytown/sd3.*Set train\.auto.*=0\."),
        ([*FROM_FILES, GIVEN], r"model\.generative\.checkpoint=/absent"),
        ([TINY_SD3, TINY_VAE, "model.generative.checkpoint=mine"], r"checkpoint=mine beside.*would be ignored"),
        ([TINY_SD3, TINY_VAE, "+model.generative.config.num_layer=1"],
         r"config\.num_layer is not a setting of SD3Transformer2DModel here\. Did you mean num_layers\?"),
        ([TINY_SD3, TINY_VAE, "+model.generative.autoencoder_config.layer_per_block=1"],
         r"autoencoder_config\.layer_per_block is not a setting of AutoencoderKL here\. Did you mean layers_per_block"),
        ([TINY_SD3, TINY_VAE, "+model.generative.autoencoder_config.use_quant_conv=true"],
         r"autoencoder_config\.use_quant_conv is not a setting"),
        ([TINY_SD3, TINY_VAE, GIVEN], r"autoencoder=null, train\.autoencoder_iters=0 and .*no trained autoencoder"),
        ([CAMVID, "model.generative.autoencoder=null"], r"autoencoder=null.*autoencoder_config=\{\}: there is no"),
        ([CAMVID, "model.generative.autoencoder=mine"],
         r"autoencoder_iters=2000 beside model\.generative\.autoencoder=mine: .*is not trained.*iters=0, or"),
        ([TINY_SD3, TINY_VAE, "model.generative.autoencoder=mine"], r"autoencoder=mine: a given autoencoder is not"),
        ([CAMVID, "model.generative.autoencoder=/absent", GIVEN], r"model\.generative\.autoencoder=/absent"),
        ([TINY_SD3, TINY_VAE, "train.lora_rank=2"], r"train\.lora_rank=2 beside .*adapters on random weights.*rank=0"),
        ([TINY_SD3, TINY_VAE, "train.sigma_low=0.95", "train.sigma_high=0.9"],
         r"sigma_low=0\.95 is above train\.sigma_high=0\.9"),
        ([TINY_SD3, TINY_VAE, "train.align.weight=0.5"], r"align\.weight=0\.5, but train\.align\.checkpoint=null"),
        ([TINY_SD3, TINY_VAE, "train.align.weight=1", "train.align.checkpoint=/absent", "train.align.block=0"],
         r"train\.align\.checkpoint=/absent is neither a folder"),
        ([TINY_SD3, TINY_VAE, "train.align.weight=1", "train.align.checkpoint=/absent", "train.align.block=1"],
         r"train\.align\.block=1: the transformer has 1 blocks"),
    ],
)  # fmt: skip
def test_a_teacher_that_cannot_be_made_is_refused_before_anything_is_written(tmp_path, overrides, said):
    sizes = ("model.generative.window_px=48", "model.generative.stride_px=48", f"logging.root={tmp_path}")
    with pytest.raises(UserError, match=rf"^[^\n]*{said}[^\n]*$"):
        train_generative.run(settings_of("train_generative", config_training.TrainGenerativeConfig, *overrides, *sizes))
    assert not any(tmp_path.iterdir())


# What it learns


def teacher_of(settings: config_training.TrainGenerativeConfig, vae, folder: Path):
    """A random teacher and its tokens, moved by the loop that is tested."""
    main = torch.device("cpu")
    transformer, tokens = train_generative.build_teacher(settings, "", CLASSES, main)
    return Sd3(transformer, vae, tokens.frozen(), device=main, precision=settings.runtime.precision), tokens


def fit(settings: config_training.TrainGenerativeConfig, dataset, folder: Path) -> ClassTokens:
    main = torch.device("cpu")
    with JsonLines(folder / "records.jsonl") as records:
        vae = train_autoencoder.train_autoencoder(dataset, settings, main, records, QUIET)
        teacher, tokens = teacher_of(settings, vae, folder)
        train_generative.train_transformer(
            teacher, tokens, None, dataset, copy.copy(dataset), settings, folder, records, NoWandb(), QUIET
        )
    return tokens


def test_a_small_null_share_still_trains_the_null_prompt(tmp_path):
    """0.1 of 2 windows once rounded to none, and the null embedding stayed as drawn."""
    moved = []
    for share in (0.1, 0.0):
        settings = generative_training(tmp_path, f"train.null_share={share}", "train.autoencoder_iters=1")
        settings.train.warmup_iters, settings.train.ema_decay = 0, 0.0
        folder = tmp_path / str(share)
        moved.append(fit(settings, ToyTown(split="training", count=4), folder).frozen())
    assert not torch.equal(moved[0].null_sequence_LE, moved[1].null_sequence_LE)


class Halves:
    """One picture: class 0 left, class 1 right, in two plain colours."""

    classes, palette_C3 = CLASSES, PALETTE_C3

    def keys(self, task: Task) -> list[str]:
        return ["0", "1"]

    def load(self, task: Task, key: str) -> Sample:
        label_HW = np.zeros((48, 48), np.uint8)
        label_HW[:, 24:] = 1
        return Sample(key, np.where(label_HW[..., None] == 0, [230, 60, 60], [40, 90, 220]).astype(np.uint8), label_HW)

    def source(self, task: Task, key: str) -> Source:
        return Source(key, key)

    def verify(self, task: Task, key: str, *, label: bool) -> None:
        pass


def test_the_teacher_learns_to_tell_two_colours(tmp_path):
    """A bug in prompts, masks or targets leaves the accuracy among two prompts at one half."""
    settings = generative_training(
        tmp_path, "train.iters=150", "train.autoencoder_iters=60", "train.lr=0.01", "train.autoencoder_lr=0.01",
        "train.prompts_per_window=2", "train/broad=none", "train.scale_high=1", "train.ema_decay=0.9",
        "train.batch_size=4", "train.comparing_weight=1", "train.validate_every=1000",
    )  # fmt: skip
    fit(settings, Halves(), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    accuracies = [line["accuracy"] for line in lines if "accuracy" in line]
    assert accuracies[-1] > 0.8


# How it is scored


@pytest.mark.parametrize("batch_size", [1, 2, 4, 7])
def test_validation_scores_as_many_windows_as_asked_whatever_the_batch(
    tmp_path, build_teacher, monkeypatch, batch_size
):
    """6 windows in batches of 4 were once 8."""
    teacher, held_out = build_teacher(len(CLASSES)), ToyTown(split="validation", count=4)
    sizes = ("model.generative.window_px=32", "model.generative.stride_px=32", "train.validation_images=6")
    settings = generative_training(tmp_path, *sizes, f"train.batch_size={batch_size}")
    drawn = train_autoencoder.batches(
        held_out, generative_training(tmp_path, *sizes, "train.batch_size=1"), iters=6, purpose="validation", plain=True
    )
    expected_K3ss, label_Kss = (torch.cat(each) for each in zip(*drawn, strict=True))
    seen, judged, real = [], [], train_generative.classify

    def note(teacher, windows_K3ss, **more):
        seen.append(windows_K3ss)
        judged.append(real(teacher, windows_K3ss, **more))
        return judged[-1]

    monkeypatch.setattr(train_generative, "classify", note)
    scores = train_generative.validate(teacher, held_out, settings)
    assert torch.equal(torch.cat(seen), expected_K3ss)
    truth_Kyx = label_Kss[:, 4::8, 4::8]
    is_right_Kyx = torch.cat(judged) == truth_Kyx
    assert scores.aacc == pytest.approx(is_right_Kyx[truth_Kyx != 255].double().mean().item(), abs=1e-12)


# What it leaves


def test_a_tiny_teacher_is_saved_as_a_folder_that_adapts(tmp_path, compose_settings, build_segmenter):
    done = train_generative.run(generative_training(tmp_path))
    assert 0 <= done["validation"]["pixel_accuracy"] <= 1
    build_segmenter(len(CLASSES)).save(tmp_path / "segformer")
    settings = compose_settings(
        "data.corruptions=[fog]", "data.limit=2", "data.workers=0", "data.short_side_px=48",
        "model.generative.window_px=48", "model.generative.stride_px=48",
        f"model.generative.checkpoint={done['folder']}/model", f"model.discriminative.checkpoint={tmp_path}/segformer",
        f"logging.root={tmp_path}",
    )  # fmt: skip
    results = adapt.run(settings)
    lines = Path(results["folder"], "records.jsonl").read_text().splitlines()
    assert [json.loads(line)["is_updated"] for line in lines] == [True, True]


def test_latents_are_standard_after_shift_and_scale(tmp_path):
    """Measured on the last 20 batches; at learning rate 0 these can be encoded again."""
    settings = generative_training(tmp_path, "train.autoencoder_lr=0", "train.autoencoder_iters=3")
    dataset, main = ToyTown(split="training", count=4), torch.device("cpu")
    with JsonLines(tmp_path / "records.jsonl") as records:
        vae = train_autoencoder.train_autoencoder(dataset, settings, main, records, QUIET)
    teacher = Sd3(
        build_transformer(1), vae, ClassTokens.random(1, tokens=1, width=1, pooled_width=1).frozen(), device=main
    )
    batches = train_autoencoder.batches(dataset, settings, iters=3, purpose="autoencoder")
    latents = torch.cat([teacher.encode(windows_B3ss) for windows_B3ss, _ in batches])
    assert latents.mean().item() == pytest.approx(0, abs=1e-5)
    assert latents.std().item() == pytest.approx(1, abs=1e-5)


class Broken(ToyTown):
    """No image of it can be read."""

    def load(self, task, key):
        raise UserError(f"{key} is damaged. Copy it again.")

    def verify(self, task, key, *, label):
        self.load(task, key)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_cannot_be_read_is_one_line_in_any_process(tmp_path, workers):
    settings = generative_training(tmp_path, f"data.workers={workers}")
    batches = train_autoencoder.batches(Broken(split="training", count=4), settings, iters=3, purpose="autoencoder")
    with pytest.raises(UserError, match=r"^\S+ is damaged\. Copy it again\.$"):
        next(batches)


def test_damaged_files_are_found_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(train_generative, "labelled_split", lambda *_: Broken(split="training", count=4))
    with pytest.raises(UserError, match=r"is damaged\. Copy it again\.$"):
        train_generative.run(generative_training(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_broken_autoencoder_is_not_kept(tmp_path):
    with pytest.raises(UserError, match=r"^train\.autoencoder_lr=1e\+30: the loss of the autoencoder is (nan|inf) .*"):
        train_generative.run(generative_training(tmp_path, "train.autoencoder_lr=1e30"))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_gradient_that_is_not_finite_stops_before_the_model_is_saved_under_a_finite_loss(tmp_path, monkeypatch):
    loss_of = train_generative.batch_loss

    def steep(*args):
        loss, extra = loss_of(*args)
        return loss, extra | {"steep": (0 * loss.flow).sqrt()}  # adds 0, with a gradient of nan

    monkeypatch.setattr(train_generative, "batch_loss", steep)
    with pytest.raises(UserError, match=r"^train\.lr=\S+: the norm of the gradient is nan at step \d+; [^\n]*$"):
        train_generative.run(generative_training(tmp_path, "train.iters=1"))
    assert [path.parent.name for path in tmp_path.rglob("*.safetensors")] == ["vae"]


def test_the_teacher_learns_on_the_autoencoder_that_is_kept(tmp_path, monkeypatch):
    """In bf16, where the stored weights are not those that were trained; shift and scale as in the file."""
    used = noted_autoencoders(monkeypatch)
    done = train_generative.run(generative_training(tmp_path, "train.save_dtype=bfloat16"))
    kept = load_autoencoder(f"{done['folder']}/model", revision=None, folder=None)
    assert all(torch.equal(value, value.bfloat16().float()) for value in kept.state_dict().values())
    assert_equal_states(used[0], kept)
    assert dict(kept.config)["shift_factor"] == used[0].config["shift_factor"]


def test_the_validation_curve_is_in_the_records_and_in_the_copy(tmp_path, mirror):
    done = train_generative.run(generative_training(tmp_path, "train.validate_every=2", "train.iters=5"))
    curve = [line for line in lines_of(done["folder"]) if "validation_miou" in line]
    assert [line["step"] for line in curve] == [2, 4, 5]
    assert all(0 <= line["validation_accuracy"] <= 1 and 0 <= line["validation_miou"] <= 1 for line in curve)
    copied = [(step, values) for step, values in mirror.logged if "validation/miou" in values]
    assert copied == [
        (line["step"], {f"validation/{name}": line[f"validation_{name}"] for name in ("accuracy", "miou")})
        for line in curve
    ]
    last = curve[-1]
    assert mirror.last == {
        "validation/accuracy": last["validation_accuracy"],
        "validation/miou": last["validation_miou"],
    }
    assert done["validation"]["pixel_accuracy"] == last["validation_accuracy"]
