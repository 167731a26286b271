"""A checkpoint trained further: whole or by adapters, averaged, with alignment, and after an interruption."""

from pathlib import Path

import pytest
import torch
from training_runs import (
    LONG,
    assert_equal_states,
    files_of,
    interrupt,
    lines_of,
    noted_autoencoders,
    settings_of,
)
from transformers import Dinov2Config, Dinov2Model

from segadapt import config_training, train_generative
from segadapt.datasets.toytown import CLASSES
from segadapt.models.generative.prompts import load_embeddings
from segadapt.models.generative.sd3 import load_autoencoder, load_transformer


def further_training(root: Path, overrides: tuple[str, ...], *more: str) -> config_training.TrainGenerativeConfig:
    """From the tiny checkpoint of `saved_models`."""
    checkpoint = next(text for text in overrides if text.startswith("model.generative.checkpoint="))
    return settings_of(
        "train_generative", config_training.TrainGenerativeConfig,
        "model/generative=local", checkpoint, f"logging.root={root}",
        "model.generative.window_px=48", "model.generative.stride_px=48", "train.autoencoder_iters=0",
        "train.batch_size=2", "train.iters=3", "train.warmup_iters=0", "train.lr=0.01", "train.ema_decay=0",
        "train.weight_decay=0", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def toytown_models(saved_models) -> tuple[str, ...]:
    return saved_models(CLASSES)


def transformers_of(settings: config_training.TrainGenerativeConfig, folder: str):
    checkpoint = str(settings.model.generative.checkpoint)
    before = load_transformer(checkpoint, revision=None).state_dict()
    after = load_transformer(f"{folder}/model", revision=None).state_dict()  # strict: every key once, in its shape
    assert before.keys() == after.keys()
    return before, after, {name for name, value in before.items() if not torch.equal(value, after[name])}


def embeddings_of(folder: str):
    return load_embeddings(Path(folder, "embeddings.safetensors"), classes=CLASSES)


@pytest.mark.parametrize("recompute", ["false", "true"])
def test_adapters_are_trained_on_a_checkpoint_and_saved_merged(tmp_path, toytown_models, recompute):
    settings = further_training(
        tmp_path, toytown_models, "train.lora_rank=2", "train.lora_alpha=4",
        f"model.generative.gradient_checkpointing={recompute}",
    )  # fmt: skip
    done = train_generative.run(settings)
    before, after, moved = transformers_of(settings, done["folder"])
    attention = {name for name in before if ".attn" in name and ".norm_" not in name and name.endswith(".weight")}
    last = {name for name in attention if name.startswith("transformer_blocks.1.") and "add_q_proj" in name}
    assert moved == attention - last  # the last block drops what its text queries read
    for name in moved:
        assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) <= 2, name
    checkpoint = str(settings.model.generative.checkpoint)
    assert embeddings_of(f"{done['folder']}/model").fingerprint() == embeddings_of(checkpoint).fingerprint()
    vaes = [load_autoencoder(path, revision=None, folder=None) for path in (checkpoint, f"{done['folder']}/model")]
    assert_equal_states(*vaes)
    assert done["parameters"] == sum(
        value.numel() for name, value in before.items() if "pos_embed.pos_embed" not in name
    )


def test_a_checkpoint_is_trained_whole(tmp_path, toytown_models):
    settings = further_training(tmp_path, toytown_models)
    done = train_generative.run(settings)
    before, _, moved = transformers_of(settings, done["folder"])
    assert {name.split(".")[0] for name in moved} >= {"pos_embed", "transformer_blocks", "proj_out", "context_embedder"}
    assert len(moved) > 0.8 * len(before)
    checkpoint = str(settings.model.generative.checkpoint)
    assert embeddings_of(f"{done['folder']}/model").fingerprint() == embeddings_of(checkpoint).fingerprint()


def test_the_saved_teacher_is_the_average(tmp_path, toytown_models):
    """After one step its decay is 2 / 11, whatever the setting above that."""
    runs = [
        further_training(tmp_path, toytown_models, "train.iters=1", f"train.ema_decay={decay}") for decay in (0, 0.999)
    ]
    folders = [train_generative.run(settings)["folder"] for settings in runs]
    before, trained, _ = transformers_of(runs[0], folders[0])
    _, average, moved = transformers_of(runs[1], folders[1])
    for name in moved:
        torch.testing.assert_close(average[name], torch.lerp(before[name], trained[name], 9 / 11))
    assert not torch.equal(average["proj_out.weight"], trained["proj_out.weight"])


def test_a_checkpoints_autoencoder_is_used_as_it_will_be_stored(tmp_path, toytown_models, monkeypatch):
    used = noted_autoencoders(monkeypatch)
    settings = further_training(tmp_path, toytown_models, "train.save_dtype=bfloat16", "train.iters=1")
    kept = load_autoencoder(f"{train_generative.run(settings)['folder']}/model", revision=None, folder=None)
    assert all(torch.equal(value, value.bfloat16().float()) for value in kept.state_dict().values())
    assert_equal_states(used[0], kept)


@pytest.mark.parametrize("more", [("train.lora_rank=2",), ()], ids=["adapters", "whole"])
def test_further_training_goes_on_after_an_interruption_with_alignment_too(tmp_path, monkeypatch, toytown_models, more):
    dinov2 = tmp_path / "dinov2"
    Dinov2Model(
        Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, patch_size=4, image_size=12)
    ).save_pretrained(dinov2)
    aligned = ("train.align.weight=0.5", f"train.align.checkpoint={dinov2}", "train.align.block=1", *more)
    whole, cut = (
        further_training(tmp_path / name, toytown_models, *LONG, "train.ema_decay=0.9", *aligned)
        for name in ("whole", "cut")
    )
    torch.manual_seed(1)
    done = train_generative.run(whole)
    torch.manual_seed(2)  # nothing is drawn from what the process happens to hold
    folder = interrupt(monkeypatch, cut, after=3)
    train_generative.run(cut)
    assert files_of(folder) == files_of(done["folder"])
    assert lines_of(folder) == lines_of(done["folder"])
    assert "align" in lines_of(folder)[-2]
    assert not any("align" in name or "project" in name for name in files_of(folder))


def test_alignment_learns(tmp_path, toytown_models):
    dinov2 = tmp_path / "dinov2"
    Dinov2Model(
        Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, patch_size=4, image_size=12)
    ).save_pretrained(dinov2)
    done = train_generative.run(
        further_training(tmp_path, toytown_models, "train.align.weight=1", f"train.align.checkpoint={dinov2}",
                         "train.align.block=0", "train.iters=100", "train.lr=0.003", "train.validate_every=1000")
    )  # fmt: skip
    terms = [line["align"] for line in lines_of(done["folder"]) if "align" in line]
    assert len(terms) == 2
    assert terms[1] < 0.6  # 1 for directions that have nothing to do with each other
