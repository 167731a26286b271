"""Training by replays equals training as it is: weights, BatchNorm's statistics, what dropout draws."""

import signal
from types import SimpleNamespace

import pytest
import torch
from again import Captured
from safetensors.torch import load_file
from test_knet import CONFIG as KNET
from test_t2t import CONFIG as T2T
from test_transformer_networks import VIT
from test_upernet import CONFIG as UPERNET
from test_upernet import CONVNEXT, RESNET
from tiny_networks import TINY
from training_runs import QUIET, lines_of, training
from transformers import Dinov2Config, Dinov2Model

from segadapt import train
from segadapt.errors import UserError
from segadapt.models.discriminative.families import FAMILIES
from segadapt.models.recording import Recorder, Recording
from segadapt.signals import Stopped
from segadapt.training import learner, recorded
from segadapt.training.loop import Training

CONTRAST = ("train/losses=contrast", "train.losses.contrast.warmup_iters=1", "train.losses.contrast.min_views=1")
DINOV2 = {"backbone_config": {"model_type": "dinov2", **VIT}, "frozen": False, "layers": 4}
NETS = TINY | {  # family, and which of it: config
    "segadapt_dinov2": DINOV2,
    "segadapt_dinov2 frozen": DINOV2 | {"frozen": True},
    "segadapt_knet": KNET,
    "segadapt_t2t": T2T,
    "upernet": UPERNET,
    "upernet convnext": UPERNET | {"backbone_config": CONVNEXT},
    "upernet resnet": UPERNET | {"backbone_config": RESNET},
}
SEGFORMERS = ("segformer", "segadapt_segformer_mmseg")
LOSSES = {"segadapt_deeplabv3": ["train/losses=auxiliary"], "segadapt_knet": ["train/losses=knet"]}
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
    ("net", "overrides"),
    [
        ("segformer", ["train.accumulate=2", "train.batch_size=4", "train.optimizer.clip_norm=0.5"]),
        ("segformer", [*CONTRAST, "train.ema_decay=0.9"]),
        # no loss reads the classifier, which then must not decay
        ("segformer", [*CONTRAST, "train.losses.cross_entropy.weight=0", "train.optimizer.weight_decay=0.5"]),
        *((net, []) for net in (SEGFORMERS[1], *NETS)),
        # some of their work is float32 whatever the precision, and so is its backward
        *((net, ["runtime.precision=bf16"]) for net in ("segadapt_hrnet_ocr", "segadapt_knet", "segadapt_t2t")),
    ],
)
def test_replays_train_as_the_net_itself_does(tmp_path, memories, starts, net, overrides):
    runs = both_ways(tmp_path, net, *overrides)
    assert [memory.recorded for memory in memories] == [2]  # forward and backward of one size
    assert [run["recorded"] for run in runs] == [False, True]
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


@pytest.mark.parametrize(
    ("family", "overrides", "device", "chosen"),
    [
        ("segformer", [], "cuda", True),
        ("segformer", [], "cpu", False),
        ("segformer", ["train.recorded=false"], "cuda", False),
        ("segformer", ["train.parallel=fsdp"], "cuda", False),
        ("segformer", ["train.parallel=ddp"], "cuda", True),
        ("segformer", ["runtime.compile=true"], "cuda", False),
        ("segformer", ["train.transforms.size_mode=max"], "cuda", False),
        ("segformer", ["model.discriminative.gradient_checkpointing=true"], "cuda", False),
        ("segadapt_timm", [], "cuda", False),
        ("segadapt_timm", ["train.recorded=true"], "cuda", True),
        ("mask2former", [], "cuda", False),
    ],
    ids=str,
)
def test_null_records_on_a_gpu_where_it_can_be(tmp_path, family, overrides, device, chosen):
    net = SimpleNamespace(device=torch.device(device))
    segmenter = SimpleNamespace(net=net, family=FAMILIES[family])
    assert recorded.is_recorded(training(tmp_path, *overrides), segmenter) is chosen


def test_every_family_that_records_on_its_own_is_trained_so_here():
    assert {net.split()[0] for net in (*SEGFORMERS, *NETS)} == {
        name for name, family in FAMILIES.items() if family.can_record
    }


@pytest.mark.parametrize("end", [None, Stopped(signal.SIGTERM, "SIGTERM"), UserError("not finite")], ids=repr)
def test_no_graph_outlives_the_run_however_it_ends(tmp_path, memories, monkeypatch, end):
    """NCCL waits for graphs with messages in them, and an error's frames would hold them."""
    made, step = [], Training._step
    monkeypatch.setattr(recorded, "Recorder", lambda *given: made.append(Recorder(*given)) or made[-1])
    held: list[Recording] = []

    def second_fails(self, *given, **named):
        held.extend(recording for recorder in made for recording in recorder.recordings.values())
        if end is not None and self.step == 1:
            raise end
        return step(self, *given, **named)

    monkeypatch.setattr(Training, "_step", second_fails)
    settings = training(tmp_path, "train.recorded=true")
    if end is None:
        train.run(settings, console=QUIET)
    else:
        with pytest.raises(type(end)) as caught:
            train.run(settings, console=QUIET)
        assert caught.value is end
    assert held
    assert all(not vars(recording) for recording in held)
    assert not made[0].recordings


@pytest.mark.parametrize("asked", ["null", "true"])
def test_a_net_that_asks_the_gpu_for_numbers_is_named(tmp_path, memories, monkeypatch, asked):
    """As torch says it where a capture is under way."""

    def record(self, work):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors might ...")

    monkeypatch.setattr(Captured, "record", record)
    if asked == "null":
        monkeypatch.setattr(recorded, "_obstacle", lambda *_: None)
    said = rf"^train\.recorded={asked}: SegformerForSemanticSegmentation cannot be a CUDA graph \(CUDA error: op[^\n]*$"
    with pytest.raises(UserError, match=said):
        train.run(training(tmp_path, f"train.recorded={asked}"), console=QUIET)


def test_other_errors_of_the_net_stay_as_they_are(tmp_path, memories, monkeypatch):
    def record(self, work):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Captured, "record", record)
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2 shapes"):
        train.run(training(tmp_path, "train.recorded=true"), console=QUIET)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("net", [*SEGFORMERS, *NETS])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_graphs_of_a_gpu_train_as_the_net_itself_does(tmp_path, starts, precision, net):
    """Dropout, drop path and BatchNorm's statistics among it."""
    own = ("runtime.device=cuda", f"runtime.precision={precision}", "runtime.deterministic=true",
           "train.accumulate=2", "train.batch_size=4", "train.ema_decay=0.5")  # fmt: skip
    assert_moved_alike(both_ways(tmp_path, net, *own), starts, 1e-5)


def both_ways(root, net, *overrides) -> list[dict]:
    """Results as the net is, and recorded. Not by AdamW, which makes steps of rounding errors."""
    runs, family = [], net.split()[0]
    if "frozen" in net:
        Dinov2Model(Dinov2Config(**VIT)).save_pretrained(root / "encoder")
    for is_recorded in (False, True):
        settings = training(
            root / str(is_recorded), f"model.discriminative.family={family}", "train.optimizer.name=sgd",
            "train.optimizer.lr=0.01", *LOSSES.get(family, ()), *overrides, f"train.recorded={is_recorded}",
        )  # fmt: skip
        chosen = settings.model.discriminative
        chosen.config = (chosen.config | RANDOM) if net in SEGFORMERS else NETS[net]
        if "frozen" in net:
            chosen.backbone = str(root / "encoder")
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
