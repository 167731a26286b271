"""Layouts of processes that cannot be are refused in one line; how slices and stages are planned."""

from contextlib import nullcontext

import pytest
from tiny_networks import TINY
from torch import nn
from training_runs import QUIET, training

from segadapt import train
from segadapt.errors import UserError
from segadapt.models.discriminative.make import make_segmenter
from segadapt.training.parallel import World, refuse_parts
from segadapt.training.pipeline import refuse_pipeline, stages_of
from segadapt.training.tensor_parallel import segformer_plan

CONFIG = {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 16, 16, 16], "num_attention_heads": [1, 2, 1, 4],
          "decoder_hidden_size": 16}  # fmt: skip


@pytest.fixture(scope="module")
def segformer() -> nn.Module:
    return make_segmenter("segformer", CONFIG, 3, seed=0, device="cpu").net


@pytest.mark.parametrize(
    ("overrides", "processes", "said"),
    [
        (["train.parallel=2d", "train.tensor_parallel=2"], 3, r"train\.tensor_parallel=2 with 3 processes"),
        (["train.parallel=2d", "train.batch_size=3"], 4,
         r"train\.batch_size=3: expected a multiple of 2, 4 processes / 2 on the same images x train\.accumulate=1"),
        (["train.parallel=tp", "train.batch_size=3", "train.accumulate=2"], 2,
         r"train\.batch_size=3: expected a multiple of 2, .* Use 4\."),
        (["train.parallel=2d"], 3, r"train\.tensor_parallel=2 with 3 processes"),
        (["train.parallel=ddp", "train.tensor_parallel=4"], 2, r"train\.tensor_parallel=4 with train\.parallel=ddp: it "
         r"would have no effect\. Set it to null, or train\.parallel=2d\."),
        ([], 2, r"train\.parallel=none under torchrun with 2 processes.*ddp, fsdp, tp, 2d or pipeline, or start one"),
    ],
    ids=str,
)  # fmt: skip
def test_processes_that_cannot_share_a_batch_are_refused(tmp_path, monkeypatch, overrides, processes, said):
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": processes}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=rf"^{said}[^\n]*$"):
        train.run(training(tmp_path, *overrides), console=QUIET)
    assert not any(tmp_path.iterdir())


def test_what_torchrun_cannot_help_is_refused_before_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match=r"^runtime\.compile=true with train\.parallel=fsdp[^\n]*$"):
        train.run(training(tmp_path, "train.parallel=fsdp", "runtime.compile=true"), console=QUIET)


@pytest.mark.parametrize(
    ("overrides", "kind", "together", "said"),
    [
        ([], "tp", 3, r"train\.parallel=tp over slices of 3 processes: expected a divisor of 32, which divides the "
         r"channels of every Mix-FFN\. Start as many processes as one of 2, 4, 8, 16, 32\."),
        ([], "2d", 3, r"train\.parallel=2d over .* Set train\.tensor_parallel to one of 2, 4, 8, 16, 32\."),
        (["train/losses=contrast"], "2d", 2, r"train\.losses\.contrast\.weight=0\.1 with train\.parallel=2d"),
    ],
    ids=str,
)  # fmt: skip
def test_slices_that_cannot_be_are_refused(tmp_path, segformer, overrides, kind, together, said):
    with pytest.raises(UserError, match=rf"^{said}[^\n]*$"):
        refuse_parts(training(tmp_path, *overrides), World(kind, size=together, together=together), segformer)


@pytest.mark.parametrize(
    ("overrides", "size", "said"),
    [
        ([], 5, r"train\.parallel=pipeline with 5 processes: expected 2 to 4"),
        (["train.accumulate=2"], 4, r"train\.accumulate=2 with train\.parallel=pipeline: expected 4 micro-batches"),
        (["train.accumulate=2", "train.transforms.size_mode=max"], 2, r"train\.transforms\.size_mode=max with"),
    ],
    ids=str,
)  # fmt: skip
def test_pipelines_that_cannot_be_are_refused(tmp_path, segformer, overrides, size, said):
    with pytest.raises(UserError, match=rf"^{said}[^\n]*$"):
        refuse_pipeline(training(tmp_path, *overrides), World("pipeline", size=size, together=size), segformer)


@pytest.mark.parametrize("kind", ["tp", "pipeline"])
def test_other_networks_than_segformer_are_refused(tmp_path, kind):
    config = {"hidden_sizes": [4, 8, 12, 16], "modules": [1, 1, 1], "blocks": 1, "stem_size": 4}
    net, world = make_segmenter("segadapt_hrnet", config, 3, seed=0, device="cpu").net, World(kind, size=2, together=2)
    with pytest.raises(UserError, match=rf"^train\.parallel={kind}: segadapt_hrnet .* expected one of segformer, "):
        (refuse_pipeline if kind == "pipeline" else refuse_parts)(training(tmp_path), world, net)


def test_a_network_that_no_layout_helps_is_refused_before_its_batches_are(tmp_path, monkeypatch):
    """Micro-batches of one image, of which DeepLabV3's BatchNorm has no statistics: more of them would not help."""
    family, batches = "segadapt_deeplabv3", ("train.batch_size=2", "train.accumulate=2")
    settings = training(tmp_path, f"model.discriminative.family={family}", *batches)
    settings.model.discriminative.config = TINY[family]
    monkeypatch.setattr(train, "joined", lambda _: nullcontext(World("pipeline")))
    with pytest.raises(UserError, match=rf"^train\.parallel=pipeline: {family} is not divided into stages"):
        train.run(settings, console=QUIET)


def test_attention_is_sliced_where_its_heads_divide_and_every_mix_ffn_is(segformer):
    plan = segformer_plan(segformer, 2)
    blocks = {".".join(name.split(".")[2:5]) for name in plan}
    assert blocks == {"0.blocks.0", "1.blocks.0", "2.blocks.0", "2.blocks.1", "3.blocks.0"}
    assert {name.split(".")[2] for name in plan if "attention" in name} == {"1", "3"}
    assert sum(how == "channel" for how in plan.values()) == 5


def test_stages_are_divided_so_that_the_longest_part_is_shortest():
    assert stages_of([3, 6, 40, 3], 2) == [range(2), range(2, 4)]
    assert stages_of([2, 2, 2, 2], 2) == [range(2), range(2, 4)]
    assert stages_of([3, 4, 6, 3], 3) == [range(2), range(2, 3), range(3, 4)]
    assert stages_of([1, 1, 1, 1], 4) == [range(i, i + 1) for i in range(4)]
