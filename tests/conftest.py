"""Tiny real models and composed settings: a SegFormer of 4 blocks, an SD3 of 2, windows of 32 px, 4 x 4 latents."""

import gc
import importlib
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from hydra.core.global_hydra import GlobalHydra
from quick_settings import quick_settings
from sd3_folder import build_transformer
from torch import Tensor

from segadapt import config, wandb_mirror
from segadapt.__main__ import main
from segadapt.models import set_up
from segadapt.models.combined import Combined
from segadapt.models.discriminative.make import make_segmenter
from segadapt.models.discriminative.segmenter import NetSegmenter
from segadapt.models.generative.prompts import PromptEmbeddings, save_embeddings
from segadapt.models.generative.sd3 import Sd3, save_generative
from segadapt.parse import options_of
from segadapt.wandb_mirror import NoWandb

hypothesis.settings.register_profile("same every time", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same every time")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CLASSES = ("sky", "road", "tree", "car", "person", "sign")
SEGFORMER = {  # dropout on: only eval mode keeps two forwards equal
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 16, 16, 16],
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 16,
    "drop_path_rate": 0.5,
    "hidden_dropout_prob": 0.5,
}
AUTOENCODER: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (4, 4, 8, 8),
    "norm_num_groups": 2,
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
SETTINGS = (
    "data=toytown_c",
    "runtime=cpu",
    "model/discriminative=local",
    "model/generative=local",
    "model.discriminative.checkpoint=none",
    "model.generative.checkpoint=none",
    "model.generative.max_pairs=16",
    "model.generative.window_px=32",
    "model.generative.stride_px=16",
    "data.short_side_px=32",
    "model.loss.topk=3",
)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models this small are slower on several threads, and one thread always sums in one order."""
    torch.set_num_threads(1)
    set_up.DEFAULT_THREADS = 1  # each run sets them anew


@pytest.fixture(scope="session", autouse=True)
def libraries_are_no_garbage():
    """Collections pass over what the imports made: each took 0.3 s, and encoding prompts asks for one. Settings and
    traced graphs are many small cycles, so that Python's own rate of them took a tenth of the time."""
    gc.collect()
    gc.freeze()
    rate = gc.get_threshold()
    gc.set_threshold(20_000, *rate[1:])
    yield
    gc.set_threshold(*rate)


@pytest.fixture(scope="session")
def compose_settings() -> Callable[..., config.AdaptConfig]:
    """compose_settings(*overrides): the shipped configuration for tiny models, as `segadapt adapt` reads it."""

    def build(*overrides: str) -> config.AdaptConfig:
        return quick_settings("adapt", [*SETTINGS, *overrides], config.AdaptConfig)

    return build


@pytest.fixture(scope="session")
def build_teacher() -> Callable[..., Sd3]:
    """build_teacher(num_classes, ...): a random Sd3 with 16-channel latents; the same weights at each call."""

    def build(
        num_classes: int = len(CLASSES),
        *,
        dtype: torch.dtype = torch.float32,
        precision: str = "fp32",
        num_layers: int = 2,
    ) -> Sd3:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            transformer, autoencoder = build_transformer(num_layers), AutoencoderKL(**AUTOENCODER)
            embeddings = PromptEmbeddings(
                torch.randn(num_classes, 7, 32),
                torch.randn(num_classes, 24),
                torch.randn(7, 32),
                torch.randn(24),
                source="learned",
            )
        if dtype == torch.float64:
            transformer, autoencoder = transformer.double(), autoencoder.double()
        return Sd3(transformer, autoencoder, embeddings, device=torch.device("cpu"), precision=precision)

    return build


@pytest.fixture(scope="session")
def build_segmenter() -> Callable[..., NetSegmenter]:
    """build_segmenter(num_classes, ...): a random SegFormer; the same weights at each call."""

    def build(num_classes: int = len(CLASSES), *, dtype: torch.dtype = torch.float32) -> NetSegmenter:
        segmenter = make_segmenter("segformer", SEGFORMER, num_classes, seed=1)
        segmenter.net.to(dtype)  # pyright: ignore[reportArgumentType]
        return segmenter

    return build


@pytest.fixture(scope="session")
def build_combined(compose_settings, build_segmenter, build_teacher) -> Callable[..., Combined]:
    """build_combined(*overrides, dtype): the two tiny models as one step; frozen or not as the settings say."""

    def build(
        *overrides: str, dtype: torch.dtype = torch.float32, num_layers: int = 2, kind: type[Combined] = Combined
    ) -> Combined:
        settings = compose_settings(*overrides)
        precision = settings.runtime.precision
        return kind(
            build_segmenter(dtype=dtype),
            build_teacher(dtype=dtype, precision=precision, num_layers=num_layers),
            settings.model,
            settings.tta.optimizer,
            seed=settings.experiment.seed,
            precision=precision,
            options=options_of(settings.tta),
        )

    return build


@pytest.fixture(scope="session")
def random_image() -> Callable[..., Tensor]:
    """random_image(height, width, seed): [3, H, W] in 0..1; the default holds two windows."""

    def build(height: int = 32, width: int = 45, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
            dtype
        )

    return build


@pytest.fixture(scope="session")
def saved_models(tmp_path_factory, build_segmenter, build_teacher) -> Callable[..., tuple[str, ...]]:
    """saved_models(classes): both models on disk, with embeddings; gives the overrides that name them."""

    def save(classes: tuple[str, ...], *, num_layers: int = 2) -> tuple[str, ...]:
        folder: Path = tmp_path_factory.mktemp("models")
        build_segmenter(len(classes)).save(folder / "segformer")
        teacher = build_teacher(len(classes), num_layers=num_layers)
        save_generative(folder / "sd3", teacher.transformer, teacher.autoencoder)
        beside = folder / "sd3" / "embeddings.safetensors"
        save_embeddings(beside, teacher.embeddings, classes=classes, dataset_name="tiny", model="tiny")
        return (
            f"model.discriminative.checkpoint={folder / 'segformer'}",
            f"model.generative.checkpoint={folder / 'sd3'}",
        )

    return save


@pytest.fixture(scope="session", autouse=True)
def attempts():
    """Connections to other machines: refused, and kept; processes of this one may talk to each other."""
    kept: list[str] = []
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def refuse(host: object) -> None:
        if str(host) not in ("localhost", "::1", "0.0.0.0", "") and not str(host).startswith("127."):
            kept.append(f"{host}, from\n{''.join(traceback.format_stack(limit=12))}")
            raise OSError(f"tests do not connect to {host}")

    def connected(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            refuse(address[0])
        return connect(self, address)

    def looked_up(host, *rest, **more):
        refuse("" if host is None else host if isinstance(host, str) else host.decode())
        return look_up(host, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connected)
        patch.setattr(socket, "getaddrinfo", looked_up)
        yield kept


@pytest.fixture(autouse=True)
def no_network(attempts):
    """A test fails if anything in it wanted another machine, even if nobody minded that it was refused."""
    before = len(attempts)
    yield
    assert attempts[before:] == []


class Remembered(NoWandb):
    """A W&B copy that keeps what it is given."""

    def __init__(self) -> None:
        self.names, self.logged, self.tables, self.last, self.finished = set(), [], {}, {}, 0

    def log(self, values, step) -> None:
        self.names |= set(values)
        self.logged.append((step, dict(values)))

    def table(self, name, columns, rows) -> None:
        self.tables[name] = [dict(zip(columns, row, strict=True)) for row in rows]

    def summary(self, values) -> None:
        self.last |= dict(values)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def mirror(monkeypatch) -> Remembered:
    """What the W&B copy of a run is given in this test."""
    kept = Remembered()
    monkeypatch.setattr(wandb_mirror, "open_mirror", lambda *_, **__: kept)
    return kept


@pytest.fixture(scope="session")
def script():
    """script(name): the module benchmarks/NAME.py, as running it would find its neighbours."""
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def segadapt(monkeypatch, tmp_path, capsys):
    """segadapt(*arguments) -> (exit status, stdout, stderr), in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # `main` sets it: undo that after the test

    def command(*arguments: str) -> tuple[object, str, str]:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["segadapt", *arguments])
        status: object = 0
        try:
            main()
        except SystemExit as error:
            status = error.code or 0
        return status, *capsys.readouterr()

    return command
