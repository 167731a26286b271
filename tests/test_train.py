"""Both trainings: what they refuse, their schedules. The segmenter: its loss against loops, and what its runs leave."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pretraining_runs import tiny
from training_runs import QUIET, TINY, generative_training, lines_of, training

from segadapt import adapt, config, pretrain, scoring, train, train_generative
from segadapt.datasets.toytown import CLASSES, ToyTown
from segadapt.errors import UserError
from segadapt.losses import LOSSES
from segadapt.models.discriminative.load import load_segmenter
from segadapt.parse import from_overrides
from segadapt.training import autoencoder as train_autoencoder
from segadapt.training import loop, preparation

BOTH = pytest.mark.parametrize(
    ("verb", "prepared"),
    [(train, training), (train_generative, generative_training)],
    ids=["train", "train-generative"],
)


LR = {train: "train.optimizer.lr", train_generative: "train.lr"}

# Both verbs


@BOTH
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.corruptions=[fog]", r"data\.corruptions=\['fog'\].*no effect.*data\.corruptions=\[\]"),
        ("runtime.checkpoint_images=5", r"runtime\.checkpoint_images=5.*null.*train\.checkpoint_every"),
        ("data.limit=2", r"data\.limit=2.*no effect.*data\.limit=null"),
        ("logging.predictions=all", r"logging\.predictions=all.*logging\.predictions=none"),
    ],
)
def test_what_training_would_pass_over_is_refused(tmp_path, verb, prepared, override, said):
    with pytest.raises(UserError, match=said):
        verb.run(prepared(tmp_path, override))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("verb", "prepared", "override", "said"),
    [
        (train_generative, generative_training, "train.scale_low=9",
         r"train\.scale_low=9\.0 is above train\.scale_high=1\.5"),
        (train_generative, generative_training, "train.sigma_low=0.9",
         r"train\.sigma_low=0\.9 is above train\.sigma_high=0\.6"),
        (train_generative, generative_training, "train.broad.grain_min_px=5",
         r"train\.broad\.grain_min_px=5 is above train\.broad\.grain_max_px=4"),
        (train, training, "train.transforms.scale_step=1",
         r"train\.transforms\.scale_step=1\.0 leaves scale_low=0\.75 alone of the factors up to scale_high=1\.5"),
        (train, training, "train.transforms.longest_px=64 train.transforms.resize=own",
         r"train\.transforms\.longest_px=64 with train\.transforms\.resize=own: it would have no effect"),
        (train, training, "train.transforms.scale_low=9",
         r"train\.transforms\.scale_low=9\.0 is above train\.transforms\.scale_high=1\.5"),
        (train, training, "train.transforms.aspect_low=2",
         r"train\.transforms\.aspect_low=2\.0 is above train\.transforms\.aspect_high=1\.0"),
        (train, training, "train.transforms.broad.grain_min_px=5",
         r"train\.transforms\.broad\.grain_min_px=5 is above train\.transforms\.broad\.grain_max_px=4"),
    ],
)  # fmt: skip
def test_a_range_upside_down_is_refused(tmp_path, verb, prepared, override, said):
    with pytest.raises(UserError, match=said):
        verb.run(prepared(tmp_path, *override.split()))
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
    other = prepared(tmp_path, "experiment.name=other", "data.workers=1")
    plain, renamed = preparation.found_folder(prepared(tmp_path)), preparation.found_folder(other)
    assert plain.id == renamed.id
    assert plain.path != renamed.path


@BOTH
def test_the_copy_is_finished_even_if_the_run_fails(tmp_path, verb, prepared, mirror):
    with pytest.raises(UserError, match=r"lr=1e\+30"):
        verb.run(prepared(tmp_path, f"{LR[verb]}=1e30"))
    assert mirror.finished == 1


def test_a_gradient_that_is_not_finite_stops_before_the_step_under_a_finite_loss(tmp_path, monkeypatch):
    """Of the last step nothing else would tell, and its model would be saved."""
    loss_of = LOSSES["cross_entropy"]

    def steep(logits_BCss, *rest):
        return loss_of(logits_BCss, *rest) + (0 * logits_BCss).sum().sqrt()  # adds 0, with a gradient of nan

    monkeypatch.setitem(LOSSES, "cross_entropy", steep)
    with pytest.raises(UserError, match=r"^train\.optimizer\.lr=\S+: the norm of the gradient is nan at step 1; "):
        train.run(training(tmp_path, "train.iters=1"))
    assert not list(tmp_path.rglob("*.safetensors"))


@BOTH
def test_a_broken_model_is_noticed_before_it_is_validated_or_saved(tmp_path, verb, prepared):
    """Between two lines of the record a checkpoint of NaN was once saved, from which the run then went on."""
    settings = prepared(tmp_path, "experiment.id=one", f"{LR[verb]}=1e30", "train.iters=9", "train.validate_every=3")
    with pytest.raises(UserError, match=r"^train\.\S*lr=1e\+30: the (flow )?loss is (nan|inf) at step 3; [^\n]*$"):
        verb.run(settings)
    folder = tmp_path / settings.experiment.name / "one"
    assert lines_of(folder) == []
    kept = {str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")}
    assert kept == (set() if verb is train else {"model/vae/diffusion_pytorch_model.safetensors"})
    assert not (folder / "results.json").exists()


@BOTH
def test_the_copy_has_the_losses_and_the_validation(tmp_path, verb, prepared, mirror):
    verb.run(prepared(tmp_path))
    rates = {f"train/lr_{name}" for name in ("encoder", "encoder_undecayed", "head")}
    losses = {"train/loss", "train/cross_entropy", "train/grad_norm", "train/images_per_second", *rates}
    losses |= {"validation/miou", "validation/macc", "validation/aacc"}
    terms = {"train/flow", "train/comparing", "train/accuracy", "train/null", "train/scale"}
    terms |= {"validation/accuracy", "validation/miou"}
    assert mirror.names == (losses if verb is train else terms)
    assert mirror.finished == 1


# Schedule of the teacher


@pytest.mark.parametrize(("step", "factor"), [(0, 1 / 5), (4, 1.0), (29, 0.5 + math.sqrt(0.125)), (54, 0.5), (104, 0)])
def test_cosine_rises_linearly_and_falls_as_half_a_wave(step, factor):
    assert train_autoencoder.cosine(step, iters=104, warmup_iters=4) == pytest.approx(factor, abs=1e-12)


@given(iters=st.integers(1, 60), warmup_iters=st.integers(0, 70))
def test_cosine_stays_between_0_and_1(iters, warmup_iters):
    for step in range(iters + 1):
        assert 0 <= train_autoencoder.cosine(step, iters=iters, warmup_iters=warmup_iters) <= 1


# The segmenter


def test_two_images_are_learned(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 10)
    settings = training(
        tmp_path,
        "data.count=2",
        "train.iters=40",
        "train.optimizer.lr=0.01",
        "train.transforms.scale_low=1",
        "train.transforms.scale_high=1",
    )
    losses = [line["loss"] for line in lines_of(train.run(settings)["folder"]) if "loss" in line]
    assert losses[-1] < 0.3 * math.log(len(CLASSES))  # 0.24 measured
    assert losses == sorted(losses, reverse=True)


def test_a_trained_folder_loads_with_equal_logits(tmp_path, monkeypatch, random_image):
    kept = {}
    count = scoring.count

    def keep(segmenter, *rest, **named):
        kept["segmenter"] = segmenter
        return count(segmenter, *rest, **named)

    monkeypatch.setattr(scoring, "count", keep)
    done = train.run(training(tmp_path))
    loaded = load_segmenter(
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
    done = train.run(
        training(tmp_path, "runtime.precision=bf16", "train.validation_images=null", "train.optimizer.lr=0.01")
    )
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


# Its losses


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.losses.cross_entropy.weight=0"], r"every weight is 0"),
        (["train.losses.class_weights.recipe=list", "train.losses.class_weights.values=[1,2]"], r"2 numbers.*12 cl"),
        (["train/losses=contrast"], r"warmup_iters=625 with train\.iters=6"),
        (["train/losses=auxiliary"], r"auxiliary\.weight=0\.4, but segformer has no auxiliary head"),
    ],
)
def test_losses_that_cannot_be_are_refused_before_a_folder_is_made(tmp_path, overrides, said):
    with pytest.raises(UserError, match=rf"train\.losses.*{said}"):
        train.run(training(tmp_path, *overrides))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("split", ["training", "validation"])
def test_labels_that_all_are_ignored_are_refused_before_the_first_step(tmp_path, monkeypatch, split):
    load = ToyTown.load

    def ignored(self, task, key):
        sample = load(self, task, key)
        return replace(sample, label_HW=np.full_like(sample.label_HW, 255)) if self.split == split else sample

    monkeypatch.setattr(ToyTown, "load", ignored)
    with pytest.raises(
        UserError, match=rf"^data\.name=toytown, split {split}: no pixel of its \d labels is of a class"
    ):
        train.run(training(tmp_path))
    assert not any(lines_of(file.parent) for file in tmp_path.rglob("records.jsonl"))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"depths": [1, 1, 1]}, "no net can be made of it: IndexError"),
        ({"num_attention_heads": [1, 1, 2, 0]}, "no net can be made of it: ZeroDivisionError"),
        ({"hidden_act": "foo"}, "no net can be made of it: KeyError: 'foo'"),
        ({"num_channels": 4}, "no net that takes an image of 48 x 48 px: RuntimeError"),
        ({"decoder_hidden_size": 0}, "no net that takes an image of 48 x 48 px: RuntimeError"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_what_no_segformer_can_be_is_one_line(tmp_path, wrong, said):
    settings = training(tmp_path)
    settings.model.discriminative.config |= wrong
    expected = rf"^model\.discriminative\.config: {said}[^\n]* Correct it, or leave it out\.$"
    with pytest.raises(UserError, match=expected):
        train.run(settings)


@pytest.mark.parametrize("name", ["attention_probs_dropout_prob", "drop_path_rate"])
@pytest.mark.parametrize("share", [-0.1, 1, 3])
def test_a_share_to_drop_that_is_none_is_refused(tmp_path, name, share):
    settings = training(tmp_path)
    settings.model.discriminative.config |= {name: share}
    said = rf"^model\.discriminative\.config\.{name}={share}: expected at least 0 and less than 1\. Correct it\.$"
    with pytest.raises(UserError, match=said):
        train.run(settings)


def test_what_no_classifier_can_be_is_one_line(tmp_path):
    settings = tiny(tmp_path)
    settings.model.discriminative.config |= {"depths": [1, 1, 1]}
    with pytest.raises(UserError, match=r"^model\.discriminative\.config: no net can be made of it: IndexError[^\n]*$"):
        pretrain.run(settings)


def test_a_rate_that_would_rise_to_its_minimum_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"train\.schedule\.min_lr=1\.0 is above 0\.0003"):
        train.run(training(tmp_path, "train.schedule.min_lr=1"))
    assert not any(tmp_path.iterdir())


def test_the_record_has_the_value_and_the_weight_of_each_term(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    done = train.run(
        training(
            tmp_path, "train/losses=contrast_memory", "train.losses.contrast.warmup_iters=3",
            "train.losses.contrast.min_views=1", "train.losses.contrast.memory.min_filled=1",
            "train.losses.class_weights.recipe=inverse_sqrt", "train.losses.contrast.projection=linear",
        )
    )  # fmt: skip
    lines = [line for line in lines_of(done["folder"]) if "terms" in line]
    assert [line["weights"]["contrast"] for line in lines] == [0, 0, 0, 0.1, 0.1, 0.1]
    for line in lines:
        assert line["loss"] == pytest.approx(
            sum(value * line["weights"][name] for name, value in line["terms"].items()), rel=1e-5
        )
        assert all(value > 0 for value in line["terms"].values())
    assert sum(done["class_weights"]["weight"].values()) == pytest.approx(len(CLASSES))
    assert sum(done["class_weights"]["pixels"].values()) == 4 * 240 * 320
