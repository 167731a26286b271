"""Tiny runs of both trainings on ToyTown: settings, what a run leaves, and a run that is cut off."""

import copy
import json
from pathlib import Path

import pytest
import torch
from quick_settings import quick_settings
from rich.console import Console

from segadapt import config_training, train_generative

TINY = ("data.count=4", "data.workers=0", "data.short_side_px=48", "runtime=cpu", "train.validation_images=2")
TINY_SEGFORMER = (
    "model.discriminative.config={depths:[1,1,1,1],hidden_sizes:[8,16,16,16],num_attention_heads:[1,1,2,2],"
    "decoder_hidden_size:16,classifier_dropout_prob:0.0,drop_path_rate:0.0}"
)
TINY_SD3 = (
    "model.generative.config={sample_size:6,patch_size:2,in_channels:4,out_channels:4,num_layers:1,attention_head_dim:8,"
    "num_attention_heads:2,joint_attention_dim:16,caption_projection_dim:16,pooled_projection_dim:8,"
    "pos_embed_max_size:8}"
)
TINY_VAE = (
    "model.generative.autoencoder_config={latent_channels:4,block_out_channels:[4,4,8,8],layers_per_block:1,"
    "norm_num_groups:2,mid_block_add_attention:false}"
)
QUIET = Console(quiet=True)


def settings_of(primary: str, schema: type, *overrides: str):
    return quick_settings(primary, [*TINY, *overrides], schema)


def training(root: Path, *overrides: str) -> config_training.TrainConfig:
    return settings_of(
        "train", config_training.TrainConfig, TINY_SEGFORMER, f"logging.root={root}",
        "train.transforms.crop_px=48", "train.batch_size=2",
        "train.iters=6", "train.schedule.warmup_iters=0", *overrides,
    )  # fmt: skip


def generative_training(root: Path, *overrides: str) -> config_training.TrainGenerativeConfig:
    return settings_of(
        "train_generative", config_training.TrainGenerativeConfig, TINY_SD3, TINY_VAE, f"logging.root={root}",
        "model.generative.window_px=48", "model.generative.stride_px=48", "train.batch_size=2", "train.iters=4",
        "train.autoencoder_iters=4", "train.warmup_iters=1", "train.tokens=2", *overrides,
    )  # fmt: skip


def lines_of(folder: Path | str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "records.jsonl").read_text().splitlines()]


def files_of(folder: Path | str) -> dict[str, bytes]:
    """Whatever the run leaves as a model."""
    model = Path(folder, "model")
    return {str(path.relative_to(model)): path.read_bytes() for path in sorted(model.rglob("*")) if path.is_file()}


def assert_equal_states(one, other) -> None:
    theirs = other.state_dict()
    assert one.state_dict().keys() == theirs.keys()
    assert all(torch.equal(value.float(), theirs[name].float()) for name, value in one.state_dict().items())


def noted_autoencoders(monkeypatch) -> list:
    """Copies of those that training begins with: saving casts the model in place."""
    used, real = [], train_generative.train_transformer

    def note(teacher, *rest):
        used.append(copy.deepcopy(teacher.autoencoder))
        return real(teacher, *rest)

    monkeypatch.setattr(train_generative, "train_transformer", note)
    return used


# A run that is cut off

LONG = ("train.iters=6", "train.validate_every=2", "experiment.id=one")


class Cut(Exception):
    """The machine goes down."""


def interrupt(monkeypatch, settings, *, after: int) -> Path:
    """Start a run that ends in the midst of step `after` + 1; gives its folder."""
    real = train_generative.batch_loss
    calls = []

    def cut(*arguments):
        if len(calls) == after:
            raise Cut
        calls.append(1)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_generative, "batch_loss", cut)
        with pytest.raises(Cut):
            train_generative.run(settings)
    return Path(settings.logging.root, settings.experiment.name, settings.experiment.id)
