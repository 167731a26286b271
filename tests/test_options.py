"""Options of the adaptation: draws, fill, the shuffle control; and how all are told."""

import pytest
import torch
from conftest import CLASSES
from hypothesis import given
from hypothesis import strategies as st
from test_combined import watch
from torch.nn.functional import interpolate

from segadapt.errors import UserError
from segadapt.models.build import build_models
from segadapt.models.generative import windows
from segadapt.models.generative.build import shuffled
from segadapt.models.generative.prompts import PromptEmbeddings
from segadapt.models.generative.sd3 import NoisyLatent
from segadapt.parse import _check_fields_together
from segadapt.protocol import protocol


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- draws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_pairs", [1, 4, 7, 12, 1000])
@pytest.mark.parametrize("sigma_high", ["null", "0.8"])
def test_several_draws_give_the_mean_of_the_losses_and_gradients_of_each(
    build_combined, random_image, max_pairs, sigma_high
):
    D, options = 3, (f"model.generative.max_pairs={max_pairs}", f"model.generative.sigma_high={sigma_high}")
    options += ("model.loss.classes_threshold=4",)
    image_3HW = random_image(width=64, dtype=torch.float64)
    combined = build_combined(*options, f"model.generative.draws={D}", dtype=torch.float64)
    noisy = combined.sight.noise(image_3HW, task="t", key="k")
    assert len(noisy.sigma_K) == 3 * D
    assert len(noisy.x_t_Kzyx.flatten(1).unique(dim=0)) == 3 * D  # every row has its own noise
    assert len(noisy.sigma_K.unique()) == (1 if sigma_high == "null" else 3 * D)
    seen = watch(combined)
    prediction = combined.step(image_3HW, task="t", key="k")
    ((loss, gradients, _),) = seen

    losses, sums = [], dict.fromkeys(gradients, 0.0)
    for draw in range(D):
        single = build_combined(*options, dtype=torch.float64)
        rows = NoisyLatent(*(value[draw::D] for value in vars(noisy).values()))
        single.sight.noise = lambda *_, rows=rows, **__: rows
        seen = watch(single)
        assert single.step(image_3HW, task="t", key="k").candidates == prediction.candidates
        losses.append(seen[0][0])
        sums = {name: total + (0 if (g := seen[0][1][name]) is None else g) for name, total in sums.items()}
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-10, atol=1e-10)
    assert len({round(value.item(), 9) for value in losses}) == D
    for name, gradient in gradients.items():
        expected = torch.zeros(()) if gradient is None else sums[name] / D
        got = torch.zeros(()) if gradient is None else gradient
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


# -- fill --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", ["uniform", "likely"])
def test_filled_window_of_one_class_teaches_the_segmenter(build_combined, random_image, fill):
    def gradients(*options):
        combined = build_combined("model.loss.topk=1", *options)
        with torch.no_grad():
            combined.segmenter.net.decode_head.classifier.bias[2] = 50
        seen = watch(combined)
        prediction = combined.step(random_image(), task="t", key="k")
        return prediction, [g for name, g in seen[0][1].items() if name.startswith("discriminative") and g is not None]

    alone, none = gradients()
    assert alone.candidates == (1, 1)
    assert not any(gradient.any() for gradient in none)
    filled, some = gradients("model.loss.min_classes=2", f"model.loss.fill={fill}")
    assert filled.candidates == (2, 2)
    assert any(gradient.any() for gradient in some)
    assert filled.kept == alone.kept == 1


def test_likely_fill_reads_the_mean_probability_of_the_raw_logits(build_combined, random_image, monkeypatch):
    from segadapt.models import combined as module

    given, select = [], module.candidate_classes.select
    monkeypatch.setattr(
        module.candidate_classes, "select", lambda *args, **names: given.append(names) or select(*args, **names)
    )
    combined, image_3HW = build_combined("model.loss.min_classes=3", "model.loss.fill=likely"), random_image()
    logits_BChw = combined.segmenter.logits(image_3HW[None]).detach()
    combined.step(image_3HW, task="t", key="k")
    logits_1CHW = interpolate(logits_BChw, size=image_3HW.shape[1:], mode="bilinear", align_corners=False)
    for window, (top, left, _) in enumerate(windows.plan(32, 45, window_px=32, stride_px=16).tolist()):
        crop_1Css = logits_1CHW[:, :, top : top + 32, left : left + 32]
        on_grid_1Cyx = interpolate(crop_1Css, size=(4, 4), mode="bilinear", align_corners=False)
        expected_C = on_grid_1Cyx.softmax(dim=1).mean(dim=(0, 2, 3))
        torch.testing.assert_close(given[0]["likely_KC"][window], expected_C)


# -- the shuffle control -----------------------------------------------------------------------------------------------


def embeddings_of(classes):
    return PromptEmbeddings(
        random(classes, 2, 3), random(classes, 4, seed=1), torch.zeros(2, 3), torch.zeros(4), source="learned"
    )


@given(classes=st.integers(2, 30), seed=st.integers(0, 999))
def test_shuffled_classes_are_a_permutation_in_which_none_keeps_its_own(classes, seed):
    plain, got = embeddings_of(classes), shuffled(embeddings_of(classes), seed=seed)
    source = [(plain.sequence_CLE == row).all(dim=(1, 2)).nonzero().item() for row in got.sequence_CLE]
    assert sorted(source) == list(range(classes))
    assert all(index != own for own, index in enumerate(source))
    assert torch.equal(got.pooled_CD, plain.pooled_CD[source])  # both parts of an embedding stay together
    assert torch.equal(got.sequence_CLE, shuffled(plain, seed=seed).sequence_CLE)


def test_shuffle_depends_on_the_seed_and_needs_two_classes():
    assert len({shuffled(embeddings_of(9), seed=seed).fingerprint() for seed in range(5)}) == 5
    with pytest.raises(UserError, match=r"model\.generative\.shuffle_classes=true: the data set has 1 class"):
        shuffled(embeddings_of(1), seed=0)


def test_shuffle_control_reaches_the_teacher(saved_models, compose_settings):
    files = saved_models(CLASSES)
    plain, control = (
        build_models(compose_settings(*files, f"model.generative.shuffle_classes={on}"), CLASSES)
        for on in ("false", "true")
    )
    assert plain.fingerprints["embeddings"] != control.fingerprints["embeddings"]
    assert plain.fingerprints["generative"] == control.fingerprints["generative"]
    expected = shuffled(plain.method.generative.embeddings, seed=0)
    assert torch.equal(control.method.generative.embeddings.sequence_CLE, expected.sequence_CLE)


# -- how they are told -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.trust.mode=skip"], r"model\.trust\.mode=skip, but model\.generative\.draws=1"),
        (["model.trust.mode=weight"], r"model\.trust\.mode=weight, but model\.generative\.draws=1"),
        (["model.trust.restore=0.1"], r"model\.trust\.restore=0\.1, but model\.trust\.max_agreement=1"),
        (["model.loss.min_classes=21"], r"model\.loss\.min_classes=21 is above model\.loss\.classes_threshold=20"),
        (["model.loss.select=area", "model.loss.topk=3"], r"model\.loss\.topk=3, but model\.loss\.select=area"),
        (
            ["model.update.prompt_offset=true", "model.update.generative=false"],
            r"model\.update\.prompt_offset=true, but",
        ),
        (
            ["model.generative.prompts.file=a.txt", "model.generative.prompts.template='a {}'"],
            r"template='a \{\}': the file",
        ),
        (["model.update.lora_rank=2", "model.update.generative=false"], r"model\.update\.lora_rank=2, but"),
    ],
)
def test_options_that_contradict_are_refused_in_one_line(compose_settings, overrides, message):
    with pytest.raises(UserError, match=message) as error:
        compose_settings(*overrides)
    assert "\n" not in str(error.value)
    compose_settings(*overrides, "tta.forward_mode=discriminative_only")  # nothing reads them


def test_a_prompt_file_leaves_nothing_for_overrides_or_beside_given_embeddings(compose_settings, saved_models):
    settings = compose_settings("model.generative.prompts.file=a.txt")
    settings.model.generative.prompts.overrides = {"sky": "blue"}
    with pytest.raises(UserError, match=r"prompts\.file=a\.txt and model\.generative\.prompts\.overrides: the file"):
        _check_fields_together(settings)
    with pytest.raises(UserError, match=r"prompts\.file=a\.txt, but the class embeddings in .* are taken"):
        build_models(compose_settings(*saved_models(CLASSES), "model.generative.prompts.file=a.txt"), CLASSES)


TOLD = {
    "model.generative.draws=4": "sigma 0.25, 4 draws;",
    "model.loss.min_classes=3": "at least 3 (uniform fill) and at most 20 a window",
    "model.trust.max_agreement=0.9": "no update where teacher and segmenter agree on more than 0.9",
    "model.loss.window_weights=entropy": "windows weighted by entropy, tau 1;",
    "model.generative.windows=entropy": "up to 8 windows of high entropy, 8..32 px, or else windows 32",
    "model.loss.ignored_classes=[road,car]": "classes top-3 without road, car, at most 20 a window",
    "model.update.prompt_offset=true": "generative 1e-05 and a shared prompt offset;",
    "model.generative.prompts.file=mine.txt": ", prompts of mine.txt;",
    "model.update.lora_rank=8": "(adapters of rank 8, alpha 16)",
    "tta.optimizer.clip_norm=0.5": "clipped to norm 0.5",
    "tta.optimizer.warmup=9": "rates rise over 9 steps",
    "tta.optimizer.accumulate=6": "a step every 6 images",
    "model.generative.shuffle_classes=true": "CONTROL: class embeddings shuffled",
}


def test_protocol_names_every_option_that_is_on_and_no_other(compose_settings):
    def sentence(*overrides):
        return protocol(compose_settings(*overrides), order_sha256="0" * 64)

    for override, words in TOLD.items():
        assert words in sentence(override)
        assert words not in sentence()
    assert "classes of area above 15 (top-5), at most" in sentence("model.loss.select=area", "model.loss.topk=1")
    for mode, words in (("skip", "only pixels on which 0.75 of the draws agree"), ("weight", "pixels weighted by")):
        options = ("model.generative.draws=2", "model.trust.threshold=0.75")
        assert words in sentence(*options, f"model.trust.mode={mode}")
        assert words not in sentence(*options)
    refusing = "model.trust.max_agreement=0.7"  # what `there` refers to comes just before
    words = "agree on more than 0.7; there 0.05 of the way back to the source weights;"
    assert words in sentence(refusing, "model.trust.restore=0.05")
    assert "source weights" not in sentence(refusing)


def test_default_options_change_nothing(compose_settings):
    """The shipped values are the method as it is published here: each is the one that switches its option off."""
    model, optimizer = compose_settings().model, compose_settings().tta.optimizer
    assert (model.trust.mode, model.trust.max_agreement, model.trust.restore) == ("none", 1, 0)
    assert (model.generative.draws, model.generative.shuffle_classes) == (1, False)
    assert (model.loss.min_classes, model.update.lora_rank) == (1, 0)
    assert (model.loss.select, model.loss.ignored_classes) == ("topk", [])
    assert (model.update.prompt_offset, optimizer.lr_prompt_offset) == (False, None)
    assert (model.generative.windows, model.loss.window_weights) == ("grid", "uniform")
    assert (optimizer.clip_norm, optimizer.warmup, optimizer.accumulate) == (None, 0, 1)
