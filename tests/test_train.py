"""Both trainings: schedules in closed form, losses against loops, tiny runs that learn and whose folders load."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from sd3_folder import build_transformer
from torch.nn import functional as F

from segadapt import adapt, config, train, train_generative, wandb_mirror
from segadapt.datasets import Sample, Source, Task
from segadapt.datasets.toytown import CLASSES, PALETTE_C3, ToyTown
from segadapt.errors import UserError
from segadapt.models.discriminative.segformer import load_segformer
from segadapt.models.generative.sd3 import Sd3
from segadapt.parse import from_overrides
from segadapt.record import JsonLines
from segadapt.train_generative import ClassTokens
from segadapt.wandb_mirror import NoWandb

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
    return from_overrides(primary, [*TINY, *overrides], schema)


def training(root: Path, *overrides: str) -> config.TrainConfig:
    return settings_of(
        "train", config.TrainConfig, TINY_SEGFORMER, f"logging.root={root}", "train.crop_px=48", "train.batch_size=2",
        "train.iters=6", "train.warmup_iters=2", *overrides,
    )  # fmt: skip


def generative_training(root: Path, *overrides: str) -> config.TrainGenerativeConfig:
    return settings_of(
        "train_generative", config.TrainGenerativeConfig, TINY_SD3, TINY_VAE, f"logging.root={root}",
        "model.generative.window_px=48", "model.generative.stride_px=48", "train.batch_size=2", "train.iters=4",
        "train.autoencoder_iters=4", "train.warmup_iters=1", "train.tokens=2", *overrides,
    )  # fmt: skip


class Remembered(NoWandb):
    """A W&B copy that keeps what it is given."""

    def __init__(self) -> None:
        self.names, self.finished = set(), 0

    def log(self, values, step) -> None:
        self.names |= set(values)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def mirror(monkeypatch) -> Remembered:
    kept = Remembered()
    monkeypatch.setattr(wandb_mirror, "open_mirror", lambda *_, **__: kept)
    return kept


BOTH = pytest.mark.parametrize(
    ("verb", "prepared"),
    [(train, training), (train_generative, generative_training)],
    ids=["train", "train-generative"],
)


# Both verbs


@BOTH
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.corruptions=[fog]", r"data\.corruptions=\['fog'\].*no effect.*data\.corruptions=\[\]"),
        ("data.limit=2", r"data\.limit=2.*no effect.*data\.limit=null"),
        ("logging.predictions=all", r"logging\.predictions=all.*logging\.predictions=none"),
        ("train.scale_low=9", r"train\.scale_low=9\.0 is above train\.scale_high=1\.5"),
    ],
)
def test_what_training_would_pass_over_is_refused(tmp_path, verb, prepared, override, said):
    with pytest.raises(UserError, match=said):
        verb.run(prepared(tmp_path, override))
    assert not any(tmp_path.iterdir())


@BOTH
def test_what_cannot_change_weights_is_no_other_run(tmp_path, verb, prepared):
    """A bug once: the same id with another number of workers was refused as another run."""
    named = ("experiment.id=v1", "train.iters=1")
    first = verb.run(prepared(tmp_path, *named))
    again = verb.run(prepared(tmp_path, *named, "data.workers=1", "data.cache=false", "runtime.threads=1"))
    assert first["folder"] == again["folder"]
    with pytest.raises(UserError, match=r"was started with train\.batch_size=2; now 3"):
        verb.run(prepared(tmp_path, *named, "train.batch_size=3"))


@BOTH
def test_a_default_id_does_not_depend_on_the_name_or_the_workers(tmp_path, verb, prepared):
    plain = train.open_folder(prepared(tmp_path))
    renamed = train.open_folder(prepared(tmp_path, "experiment.name=other", "data.workers=1"))
    assert (plain.id, plain.path) != (renamed.id, renamed.path)
    assert plain.id == renamed.id


@BOTH
def test_the_copy_is_finished_even_if_the_run_fails(tmp_path, verb, prepared, mirror):
    with pytest.raises(UserError, match=r"train\.lr=1e\+30"):
        verb.run(prepared(tmp_path, "train.lr=1e30"))
    assert mirror.finished == 1


@BOTH
def test_the_copy_has_the_losses_and_the_validation(tmp_path, verb, prepared, mirror):
    verb.run(prepared(tmp_path))
    losses = {"train/loss", "validation/miou"}
    terms = {"train/flow", "train/comparing", "train/accuracy", "validation/accuracy"}
    assert mirror.names == (losses if verb is train else terms)
    assert mirror.finished == 1


# Schedules


@pytest.mark.parametrize(("step", "factor"), [(0, 1 / 5), (3, 4 / 5), (4, 1.0), (54, 0.5**0.9), (104, 0.0)], ids=str)
def test_poly_rises_linearly_and_falls_as_a_power(step, factor):
    assert train.poly(step, iters=104, warmup_iters=4, power=0.9) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize(("step", "factor"), [(0, 1 / 5), (4, 1.0), (29, 0.5 + math.sqrt(0.125)), (54, 0.5), (104, 0)])
def test_cosine_rises_linearly_and_falls_as_half_a_wave(step, factor):
    assert train_generative.cosine(step, iters=104, warmup_iters=4) == pytest.approx(factor, abs=1e-12)


@given(iters=st.integers(1, 60), warmup_iters=st.integers(0, 70), power=st.floats(0.1, 3))
def test_factors_stay_between_0_and_1(iters, warmup_iters, power):
    for step in range(iters + 1):
        assert 0 <= train.poly(step, iters=iters, warmup_iters=warmup_iters, power=power) <= 1
        assert 0 <= train_generative.cosine(step, iters=iters, warmup_iters=warmup_iters) <= 1


# The segmenter


def test_each_parameter_is_in_one_group_with_its_own_rate_and_decay(build_segmenter):
    segmenter = build_segmenter()
    groups = train.parameter_groups(segmenter, lr=1.0, head_lr_factor=10.0, weight_decay=0.5)
    placed = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(placed) == sorted(id(parameter) for parameter in segmenter.net.parameters())
    of = {id(parameter): group for group in groups for parameter in group["params"]}
    norms = {id(parameter) for parameter in segmenter.norm_parameters().values()}
    for name, parameter in segmenter.net.named_parameters():
        assert of[id(parameter)]["lr"] == (10.0 if name.startswith("decode_head.") else 1.0), name
        assert of[id(parameter)]["weight_decay"] == (0 if id(parameter) in norms else 0.5), name


def test_loss_is_the_mean_over_labelled_pixels():
    generator = torch.Generator().manual_seed(0)
    logits_BChw = torch.randn(2, 3, 4, 4, generator=generator)
    label_Bss = torch.randint(0, 3, (2, 16, 16), generator=generator)
    label_Bss[0, :5] = 255
    wide_BCss = F.interpolate(logits_BChw, (16, 16), mode="bilinear", align_corners=False).double()
    terms = [
        -wide_BCss[b, :, y, x].log_softmax(0)[label_Bss[b, y, x]].item()
        for b in range(2) for y in range(16) for x in range(16) if label_Bss[b, y, x] != 255
    ]  # fmt: skip
    assert train.segmentation_loss(logits_BChw, label_Bss).item() == pytest.approx(np.mean(terms), rel=1e-5)


@given(seed=st.integers(0, 2**32 - 1), num_classes=st.integers(1, 6), share=st.floats(0, 1))
def test_cross_entropy_and_its_gradient_are_torchs(seed, num_classes, share):
    generator = torch.Generator().manual_seed(seed)
    logits_BCss = 9 * torch.randn(2, num_classes, 5, 5, generator=generator, dtype=torch.float64)
    label_Bss = torch.randint(0, num_classes, (2, 5, 5), generator=generator)
    label_Bss[torch.rand(2, 5, 5, generator=generator) < share] = 255
    label_Bss[0, 0, 0] = 0  # the mean of nothing is NaN in torch
    ours, torchs = (logits_BCss.clone().requires_grad_() for _ in range(2))
    loss = train.cross_entropy(ours, label_Bss, label_Bss != 255)
    expected = F.cross_entropy(torchs, label_Bss, ignore_index=255)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, torchs.grad)


def test_a_pixel_that_does_not_count_may_hold_anything():
    logits_BCss = torch.tensor([[1.0, math.inf], [2.0, math.nan]]).view(1, 2, 1, 2)
    loss = train.cross_entropy(logits_BCss, torch.tensor([[[0, 255]]]), torch.tensor([[[True, False]]]))
    assert loss.item() == pytest.approx(math.log1p(math.e))


def test_loss_of_nothing_labelled_is_zero_with_zero_gradient():
    logits_BChw = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = train.segmentation_loss(logits_BChw, torch.full((1, 16, 16), 255))
    loss.backward()
    assert loss.item() == 0
    assert logits_BChw.grad is not None
    assert not logits_BChw.grad.any()


def test_two_images_are_learned(tmp_path):
    done = train.run(
        training(
            tmp_path, "data.count=2", "train.iters=100", "train.lr=0.01", "train.scale_low=1", "train.scale_high=1"
        )
    )
    lines = [json.loads(line) for line in Path(done["folder"], "records.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.6 * math.log(len(CLASSES))
    assert losses[-1] < losses[0]


def test_a_trained_folder_loads_with_equal_logits(tmp_path, monkeypatch, random_image):
    kept = {}
    validate = train.validate

    def keep(segmenter, *rest, **named):
        kept["segmenter"] = segmenter
        return validate(segmenter, *rest, **named)

    monkeypatch.setattr(train, "validate", keep)
    done = train.run(training(tmp_path))
    loaded = load_segformer(
        str(Path(done["folder"], "model")), revision=None, num_classes=len(CLASSES), device=torch.device("cpu"),
        gradient_checkpointing=False, allow_pickle=False,
    )  # fmt: skip
    image_B3HW = random_image(48, 64)[None]
    with torch.no_grad():
        assert torch.equal(loaded.logits(image_B3HW), kept["segmenter"].eval().logits(image_B3HW))
    assert list(loaded.net.config.id2label.values()) == list(CLASSES)  # pyright: ignore


def test_training_repeats_to_the_bit_whatever_the_workers(tmp_path):
    runs = [train.run(training(tmp_path / str(workers), f"data.workers={workers}")) for workers in (0, 1)]
    weights = [Path(done["folder"], "model", "model.safetensors").read_bytes() for done in runs]
    assert weights[0] == weights[1]


def test_validation_scores_are_those_of_evaluate(tmp_path):
    """In bf16 too: validation once ran in float32 whatever the precision."""
    common = ("runtime.precision=bf16", "data.split=validation")
    done = train.run(training(tmp_path, "runtime.precision=bf16", "train.validation_images=null", "train.lr=0.01"))
    evaluated = adapt.run(
        from_overrides(
            "evaluate", [*TINY[:-1], "data=toytown", f"logging.root={tmp_path}", *common,
            f"model.discriminative.checkpoint={done['folder']}/model"],
            config.EvaluateConfig,
        ),
        console=QUIET,
    )  # fmt: skip
    assert {name: evaluated["mean"][name] for name in ("miou", "macc", "aacc")} == done["validation"]


def test_a_segmenter_from_scratch_recomputes_if_asked(tmp_path):
    recomputing = "model.discriminative.gradient_checkpointing=true"
    segmenter = train.build(training(tmp_path, recomputing), CLASSES, torch.device("cpu"))
    assert any(getattr(module, "gradient_checkpointing", False) for module in segmenter.net.modules())
    runs = [train.run(training(tmp_path, *overrides)) for overrides in ((), (recomputing,))]
    weights = [Path(done["folder"], "model", "model.safetensors").read_bytes() for done in runs]
    assert weights[0] == weights[1]


def test_training_without_labels_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"data\.label_path=null: training needs labels"):
        train.run(
            training(tmp_path, "data=folder", "data.classes=toytown", f"data.data_root={tmp_path}", "data.count=null")
        )


# The teacher


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_teacher_loss_is_that_of_a_loop_over_pixels(weight):
    generator = torch.Generator().manual_seed(0)
    error_BNyx = torch.rand(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    prompts_BN = torch.tensor([[4, 1, 0], [2, 3, 1]])
    classes_Byx = torch.randint(0, 5, (2, 4, 5), generator=generator)
    classes_Byx[1, 0] = 255
    scale = 7.0
    flow, comparing, hits = [], [], []
    for b in range(2):
        for y in range(4):
            for x in range(5):
                true = int(classes_Byx[b, y, x])
                if true not in prompts_BN[b].tolist():
                    continue
                own, errors_N = prompts_BN[b].tolist().index(true), error_BNyx[b, :, y, x].numpy()
                flow.append(errors_N[own])
                comparing.append(math.log(np.exp(-scale * errors_N).sum()) + scale * errors_N[own])
                hits.append(errors_N.argmin() == own)
    loss = train_generative.teacher_loss(error_BNyx, prompts_BN, classes_Byx, torch.tensor(scale))
    assert loss.flow.item() == pytest.approx(np.mean(flow), rel=1e-12)
    assert loss.comparing.item() == pytest.approx(np.mean(comparing), rel=1e-12)
    assert loss.accuracy.item() == pytest.approx(np.mean(hits), rel=1e-6)
    assert loss.total(weight).item() == pytest.approx(np.mean(flow) + weight * np.mean(comparing), rel=1e-12)


def test_teacher_loss_of_nothing_asked_is_zero():
    loss = train_generative.teacher_loss(
        torch.rand(1, 2, 3, 3), torch.tensor([[0, 1]]), torch.full((1, 3, 3), 255), torch.tensor(1.0)
    )
    assert (loss.flow.item(), loss.comparing.item(), loss.accuracy.item()) == (0, 0, 0)


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 6))
def test_prompts_of_a_window_are_distinct_classes(seed, count):
    classes_Byx = torch.randint(0, 6, (3, 2, 2), generator=torch.Generator().manual_seed(seed))
    classes_Byx[0] = 255
    prompts_BN = train_generative.draw_prompts(classes_Byx, 6, count, torch.Generator().manual_seed(seed))
    assert prompts_BN.shape == (3, count)
    for row in prompts_BN.tolist():
        assert len(set(row)) == count
        assert set(row) <= set(range(6))


def test_prompts_are_mostly_present_classes():
    """Weights 1.05 and 0.05: of 2 present and 10 absent classes the first draw is present with 2.1 / 2.6."""
    classes_Byx = torch.tensor([3, 7]).repeat(4000, 2, 1)
    prompts_BN = train_generative.draw_prompts(classes_Byx, 12, 1, torch.Generator().manual_seed(0))
    share = ((prompts_BN == 3) | (prompts_BN == 7)).double().mean().item()
    assert share == pytest.approx(2.1 / 2.6, abs=0.02)  # 3 standard deviations


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
        vae = train_generative.train_autoencoder(dataset, settings, main, records, QUIET)
    teacher = Sd3(build_transformer(1), vae, ClassTokens(1, tokens=1, width=1, pooled_width=1).frozen(), device=main)
    batches = train_generative.batches(dataset, settings, iters=3, purpose="autoencoder")
    latents = torch.cat([teacher.encode(windows_B3ss) for windows_B3ss, _ in batches])
    assert latents.mean().item() == pytest.approx(0, abs=1e-5)
    assert latents.std().item() == pytest.approx(1, abs=1e-5)


def test_more_prompts_than_classes_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"train\.prompts_per_window=13.*12 classes"):
        train_generative.run(generative_training(tmp_path, "train.prompts_per_window=13"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model/generative=toytown"], r"model\.generative\.config=\{\}.*Use model/generative=toytown_scratch"),
        ([TINY_SD3, TINY_VAE, "model.generative.checkpoint=mine"], r"checkpoint=mine beside.*would be ignored"),
        ([TINY_SD3, TINY_VAE, "+model.generative.config.num_layer=1"],
         r"config\.num_layer is not a setting of SD3Transformer2DModel here\. Did you mean num_layers\?"),
        ([TINY_SD3, TINY_VAE, "+model.generative.autoencoder_config.layer_per_block=1"],
         r"autoencoder_config\.layer_per_block is not a setting of AutoencoderKL here\. Did you mean layers_per_block"),
        ([TINY_SD3, TINY_VAE, "+model.generative.autoencoder_config.use_quant_conv=true"],
         r"autoencoder_config\.use_quant_conv is not a setting"),
        ([TINY_SD3, TINY_VAE, "train.autoencoder_iters=0"], r"autoencoder_iters=0 beside.*would stay random"),
        (["model/generative=camvid_scratch", "model.generative.autoencoder=mine"],
         r"autoencoder_iters=2000 beside .*autoencoder_config=\{\}.*Set train\.autoencoder_iters=0"),
        ([TINY_SD3, TINY_VAE, "model.generative.autoencoder=mine"], r"autoencoder=mine beside.*one of the two"),
        (["model/generative=camvid_scratch", "model.generative.autoencoder=null", "train.autoencoder_iters=0"],
         r"autoencoder=null beside .*autoencoder_config=\{\}.*one of the two"),
        ([TINY_SD3, TINY_VAE, "train.sigma_low=0.95"], r"sigma_low=0\.95 is above train\.sigma_high=0\.9"),
    ],
)  # fmt: skip
def test_a_teacher_that_cannot_be_made_is_refused_before_anything_is_written(tmp_path, overrides, said):
    sizes = ("model.generative.window_px=48", "model.generative.stride_px=48", f"logging.root={tmp_path}")
    with pytest.raises(UserError, match=said):
        train_generative.run(settings_of("train_generative", config.TrainGenerativeConfig, *overrides, *sizes))
    assert not any(tmp_path.iterdir())


def test_a_small_null_share_still_trains_the_null_prompt(tmp_path):
    """0.1 of 2 windows once rounded to none, and the null embedding stayed as drawn."""
    moved = []
    for share in (0.1, 0.0):
        settings = generative_training(tmp_path, f"train.null_share={share}", "train.autoencoder_iters=1")
        settings.train.warmup_iters, settings.train.ema_decay = 0, 0.0
        dataset, main = ToyTown(split="training", count=4), torch.device("cpu")
        with JsonLines(tmp_path / "records.jsonl") as records:
            vae = train_generative.train_autoencoder(dataset, settings, main, records, QUIET)
            torch.manual_seed(0)
            _, tokens, _ = train_generative.train_transformer(
                dataset, dataset, vae, settings, main, records, NoWandb(), QUIET
            )
        moved.append(tokens.frozen())
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
        "train.prompts_per_window=2", "train.broad=false", "train.scale_high=1", "train.ema_decay=0.9",
        "train.batch_size=4", "train.comparing_weight=1", "train.validate_every=1000",
    )  # fmt: skip
    dataset, main = Halves(), torch.device("cpu")
    with JsonLines(tmp_path / "records.jsonl") as records:
        vae = train_generative.train_autoencoder(dataset, settings, main, records, QUIET)
        train_generative.train_transformer(dataset, copy.copy(dataset), vae, settings, main, records, NoWandb(), QUIET)
    lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    accuracies = [line["accuracy"] for line in lines if "accuracy" in line]
    assert accuracies[-1] > 0.8
