"""Training by replays equals training as it is: weights, BatchNorm's statistics, what dropout draws."""

import pytest
import torch
from again import Captured
from safetensors.torch import load_file
from test_knet import CONFIG as KNET
from test_t2t import CONFIG as T2T
from test_upernet import CONFIG as UPERNET
from tiny_networks import TINY
from training_runs import QUIET, lines_of, training

from segadapt import train
from segadapt.errors import UserError
from segadapt.training import learner, recorded

CONTRAST = ("train/losses=contrast", "train.losses.contrast.warmup_iters=1", "train.losses.contrast.min_views=1")
NETS = TINY | {"segadapt_knet": KNET, "segadapt_t2t": T2T, "upernet": UPERNET}
LOSSES = {"segadapt_deeplabv3": ["train/losses=auxiliary"], "segadapt_knet": ["train/losses=knet"]}
POOLED = ("segadapt_knet", "upernet")  # backward of their pools adds in any order on a GPU
RANDOM = {"drop_path_rate": 0.3, "classifier_dropout_prob": 0.3}


@pytest.fixture
def memories(monkeypatch) -> list[Captured]:
    """In the place of a GPU's; what stands against a CPU is taken out."""
    made: list[Captured] = []

    def memory_of(net: torch.nn.Module) -> Captured:
        made.append(Captured(net))
        return made[-1]

    monkeypatch.setattr(learner, "memory_of", memory_of)
    monkeypatch.setattr(train, "refuse_recorded", lambda *_: None)
    return made


@pytest.fixture
def starts(tmp_path, monkeypatch) -> list[dict[str, torch.Tensor]]:
    """Weights and statistics that trainings begin with."""
    seen, real = [], train.build

    def build(*given, **more):
        segmenter = real(*given, **more)
        segmenter.save(tmp_path / f"start{len(seen)}")
        seen.append(load_file(tmp_path / f"start{len(seen)}" / "model.safetensors"))
        return segmenter

    monkeypatch.setattr(train, "build", build)
    return seen


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("segformer", ["train.accumulate=2", "train.batch_size=4", "train.optimizer.clip_norm=0.5"]),
        ("segformer", [*CONTRAST, "train.ema_decay=0.9"]),
        *((family, []) for family in NETS),
        # some of their work is float32 whatever the precision, and so is its backward
        *((family, ["runtime.precision=bf16"]) for family in ("segadapt_hrnet_ocr", "segadapt_knet", "segadapt_t2t")),
    ],
)
def test_replays_train_as_the_net_itself_does(tmp_path, memories, starts, family, overrides):
    runs = both_ways(tmp_path, family, *overrides)
    assert [memory.recorded for memory in memories] == [2]  # forward and backward of one size
    assert_moved_alike(runs, starts, 1e-4)
    losses = [[line["loss"] for line in lines_of(run["folder"]) if "loss" in line] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["runtime.compile=true"], r"train\.recorded=true with runtime\.compile=true"),
        (["train.transforms.size_mode=max"], r"train\.recorded=true with train\.transforms\.size_mode=max"),
        (["train.losses.masks.weight=1"], r"train\.recorded=true with train\.losses\.masks\.weight=1"),
        (
            ["model.discriminative.gradient_checkpointing=true"],
            r"train\.recorded=true with model\.discriminative\.grad",
        ),
        (["train.parallel=fsdp"], r"train\.recorded=true with train\.parallel=fsdp"),
        ([], r"train\.recorded=true on cpu: CUDA graphs need a GPU"),
    ],
    ids=str,
)
def test_what_cannot_be_recorded_is_refused(tmp_path, overrides, said):
    settings = training(tmp_path, "train.recorded=true", *overrides)
    with pytest.raises(UserError, match=rf"^{said}[^\n]*$"):
        recorded.refuse_recorded(settings, torch.device("cpu"))


def test_a_net_that_asks_the_gpu_for_numbers_is_named(tmp_path, memories, monkeypatch):
    """As torch says it where a capture is under way."""

    def record(self, work):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors might ...")

    monkeypatch.setattr(Captured, "record", record)
    said = r"^train\.recorded=true: SegformerForSemanticSegmentation cannot be a CUDA graph \(CUDA error: op[^\n]*$"
    with pytest.raises(UserError, match=said):
        train.run(training(tmp_path, "train.recorded=true"), console=QUIET)


def test_other_errors_of_the_net_stay_as_they_are(tmp_path, memories, monkeypatch):
    def record(self, work):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Captured, "record", record)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        train.run(training(tmp_path, "train.recorded=true"), console=QUIET)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ["segformer", *NETS])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_graphs_of_a_gpu_train_as_the_net_itself_does(tmp_path, starts, precision, family):
    """Dropout, drop path and BatchNorm's statistics among it."""
    varies = family in POOLED
    own = ("runtime.device=cuda", f"runtime.precision={precision}", f"runtime.deterministic={not varies}",
           "train.accumulate=2", "train.batch_size=4", "train.ema_decay=0.5")  # fmt: skip
    within = {"fp32": 1e-3, "bf16": 5e-2}[precision] if varies else 1e-5
    assert_moved_alike(both_ways(tmp_path, family, *own), starts, within)


def both_ways(root, family, *overrides) -> list[dict]:
    """Results as the net is, and recorded. Not by AdamW, which makes steps of rounding errors."""
    runs = []
    for is_recorded in (False, True):
        settings = training(
            root / str(is_recorded), f"model.discriminative.family={family}", "train.optimizer.name=sgd",
            "train.optimizer.lr=0.01", *LOSSES.get(family, ()), *overrides, f"train.recorded={is_recorded}",
        )  # fmt: skip
        chosen = settings.model.discriminative
        chosen.config = (chosen.config | RANDOM) if family == "segformer" else NETS[family]
        runs.append(train.run(settings, console=QUIET))
    return runs


def assert_moved_alike(runs, starts, within) -> None:
    """Weights and statistics, in parts of how far each of them went, and all of them."""
    plain, replayed = (load_file(f"{run['folder']}/model/model.safetensors") for run in runs)
    start, again = starts
    assert start.keys() == again.keys() == plain.keys() == replayed.keys()
    assert all(torch.equal(value, again[name]) for name, value in start.items())
    went = {name: (plain[name].float() - value.float()).norm() for name, value in start.items()}
    farthest = max(way for name, way in went.items() if start[name].is_floating_point())
    assert farthest > 0
    apart = {name: (replayed[name].float() - plain[name].float()).norm() for name in start}
    too_far = {name: f"{apart[name]:.1e} of {way:.1e}" for name, way in went.items()
               if apart[name] > within * (way + 1e-3 * farthest)}  # fmt: skip
    assert not too_far
