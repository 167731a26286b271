"""What a teacher is trained to do: losses against loops, noise levels in range, and alignment with a tiny DINOv2."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model

from segadapt import config_training
from segadapt.errors import UserError
from segadapt.models.discriminative.families import IMAGENET_MEAN, IMAGENET_STD
from segadapt.parse import from_overrides
from segadapt.training import teacher_objective
from segadapt.training.teacher_objective import (
    Alignment,
    ClassTokens,
    batch_loss,
    draw_sigmas,
    load_dinov2,
    teacher_loss,
)

DINOV2 = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4, "image_size": 24,
          "mlp_ratio": 2}  # fmt: skip


@pytest.fixture(scope="module")
def shipped() -> config_training.TrainGenerativeSettings:
    return from_overrides("train_generative", ["runtime=cpu"], config_training.TrainGenerativeConfig).train


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory) -> Path:
    """As `from_pretrained` reads it."""
    folder = tmp_path_factory.mktemp("dinov2", numbered=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        Dinov2Model(Dinov2Config(**DINOV2)).save_pretrained(folder)
    return folder


@pytest.fixture
def single_file(dinov2_folder, tmp_path) -> Path:
    """The weights alone, with the config beside them under another name."""
    file = tmp_path / "dinov2_tiny.safetensors"
    file.write_bytes((dinov2_folder / "model.safetensors").read_bytes())
    (tmp_path / "dinov2_tiny_config.json").write_bytes((dinov2_folder / "config.json").read_bytes())
    return file


# Flow matching and the comparing term


@pytest.mark.parametrize("flow_mask", [True, False])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_teacher_loss_is_that_of_a_loop_over_pixels(weight, flow_mask):
    generator = torch.Generator().manual_seed(0)
    error_BNyx = torch.rand(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    prompts_BN = torch.tensor([[4, 1, 0], [2, 3, 1]])
    classes_Byx = torch.randint(0, 5, (2, 4, 5), generator=generator)
    classes_Byx[1, 0] = 255
    scale = 7.0
    own_flow, every_flow, comparing, hits = [], [], [], []
    for b in range(2):
        for y in range(4):
            for x in range(5):
                true, errors_N = int(classes_Byx[b, y, x]), error_BNyx[b, :, y, x].numpy()
                every_flow.extend(errors_N)
                if true not in prompts_BN[b].tolist():
                    continue
                own = prompts_BN[b].tolist().index(true)
                own_flow.append(errors_N[own])
                comparing.append(math.log(np.exp(-scale * errors_N).sum()) + scale * errors_N[own])
                hits.append(errors_N.argmin() == own)
    flow = np.mean(own_flow if flow_mask else every_flow)
    loss = teacher_loss(error_BNyx, prompts_BN, classes_Byx, torch.tensor(scale), flow_mask=flow_mask)
    assert loss.flow.item() == pytest.approx(flow, rel=1e-12)
    assert loss.comparing.item() == pytest.approx(np.mean(comparing), rel=1e-12)
    assert loss.accuracy.item() == pytest.approx(np.mean(hits), rel=1e-6)
    assert loss.total(weight).item() == pytest.approx(flow + weight * np.mean(comparing), rel=1e-12)


@pytest.mark.parametrize("flow_mask", [True, False])
def test_with_the_mask_alone_the_flow_term_leaves_other_classes_pixels_alone(flow_mask):
    error_BNyx = torch.rand(1, 2, 1, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    prompts_BN, classes_Byx = torch.tensor([[0, 1]]), torch.tensor([[[0, 1, 255]]])
    teacher_loss(error_BNyx, prompts_BN, classes_Byx, torch.tensor(1.0), flow_mask=flow_mask).flow.backward()
    assert error_BNyx.grad is not None
    expected = torch.tensor([[0.5, 0, 0], [0, 0.5, 0]]) if flow_mask else torch.full((2, 3), 1 / 6)
    torch.testing.assert_close(error_BNyx.grad[0, :, 0], expected)


def test_teacher_loss_of_nothing_asked_is_zero():
    loss = teacher_loss(torch.rand(1, 2, 3, 3), torch.tensor([[0, 1]]), torch.full((1, 3, 3), 255), torch.tensor(1.0))
    assert (loss.flow.item(), loss.comparing.item(), loss.accuracy.item()) == (0, 0, 0)


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 6))
def test_prompts_of_a_window_are_distinct_classes(seed, count):
    classes_Byx = torch.randint(0, 6, (3, 2, 2), generator=torch.Generator().manual_seed(seed))
    classes_Byx[0] = 255
    prompts_BN = teacher_objective.draw_prompts(classes_Byx, 6, count, torch.Generator().manual_seed(seed))
    assert prompts_BN.shape == (3, count)
    for row in prompts_BN.tolist():
        assert len(set(row)) == count
        assert set(row) <= set(range(6))


def test_prompts_are_mostly_present_classes():
    """Weights 1.05 and 0.05: of 2 present and 10 absent classes the first draw is present with 2.1 / 2.6."""
    classes_Byx = torch.tensor([3, 7]).repeat(4000, 2, 1)
    prompts_BN = teacher_objective.draw_prompts(classes_Byx, 12, 1, torch.Generator().manual_seed(0))
    share = ((prompts_BN == 3) | (prompts_BN == 7)).double().mean().item()
    assert share == pytest.approx(2.1 / 2.6, abs=0.02)  # 3 standard deviations


# Noise levels


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
@given(seed=st.integers(0, 2**32 - 1), low=st.floats(0.01, 0.5), width=st.floats(0, 0.5))
def test_sigmas_lie_in_their_range_and_follow_from_the_generator(shipped, distribution, seed, low, width):
    t = dataclasses.replace(shipped, sigma_low=low, sigma_high=low + width, sigma_distribution=distribution)
    sigma_B, again_B = (draw_sigmas(50, t, torch.Generator().manual_seed(seed)) for _ in range(2))
    assert sigma_B.shape == (50,)
    assert sigma_B.min() >= low - 1e-6
    assert sigma_B.max() <= low + width + 1e-6
    assert torch.equal(sigma_B, again_B)


def test_logit_normal_is_more_central_than_uniform(shipped):
    """Share within the middle half: uniform 1/2, P(|z| < ln 3) = 0.728."""
    shares = {}
    for distribution in ("uniform", "logit_normal"):
        t = dataclasses.replace(shipped, sigma_low=0.2, sigma_high=0.8, sigma_distribution=distribution)
        sigma_B = draw_sigmas(20000, t, torch.Generator().manual_seed(0))
        shares[distribution] = ((sigma_B > 0.35) & (sigma_B < 0.65)).double().mean().item()
        assert sigma_B.mean().item() == pytest.approx(0.5, abs=0.01)
    assert shares["uniform"] == pytest.approx(0.5, abs=0.015)
    assert shares["logit_normal"] == pytest.approx(0.728, abs=0.015)


# Class tokens


def test_tokens_of_embeddings_are_frozen_and_give_them_back(build_teacher):
    embeddings = build_teacher().embeddings
    tokens = ClassTokens.of(embeddings)
    assert not any(p.requires_grad for p in tokens.parameters())
    back = tokens.frozen()
    assert back.fingerprint() == embeddings.fingerprint()
    learned = ClassTokens.random(3, tokens=2, width=5, pooled_width=4)
    assert all(p.requires_grad for p in learned.parameters())
    assert learned.frozen().sequence_CLE.shape == (3, 2, 5)
    assert torch.equal(learned.frozen().null_pooled_D, learned.pooled[-1])


# Alignment


def aligned(teacher, folder: Path, *, block: int = 0, seed: int = 0) -> Alignment:
    settings = config_training.AlignSettings(weight=0.5, checkpoint=str(folder), block=block)
    return Alignment(teacher.transformer, settings, seed=seed)


def forward(teacher, count: int):
    """As in training: `count` pairs of 8 x 8 latents, 4 x 4 tokens."""
    generator = torch.Generator().manual_seed(1)
    return teacher.transformer(
        torch.randn(count, 16, 8, 8, generator=generator),
        encoder_hidden_states=torch.randn(count, 7, 32, generator=generator),
        pooled_projections=torch.randn(count, 24, generator=generator),
        timestep=torch.full((count,), 250.0),
        return_dict=False,
    )[0]


def windows(count: int, side: int = 64) -> torch.Tensor:
    return 2 * torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(2)) - 1


@pytest.mark.parametrize("block", [0, 1])
def test_alignment_is_one_minus_the_mean_cosine_of_tokens_and_patches(build_teacher, dinov2_folder, block):
    """Token by token in float64; windows of 16 px are what the 4 x 4 patches of 4 px need, so nothing is resized."""
    teacher = build_teacher()
    align, seen = aligned(teacher, dinov2_folder, block=block), []
    teacher.transformer.transformer_blocks[block].register_forward_hook(lambda *call: seen.append(call[2][1]))
    windows_B3ss, pair_P = windows(2, side=16), torch.tensor([1, 3])
    with torch.no_grad():
        forward(teacher, 4)
        got = align(windows_B3ss, pair_P)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        features = load_dinov2(str(dinov2_folder)).eval()(((windows_B3ss + 1) / 2 - mean) / std).last_hidden_state
        cosines = []
        for window, pair in enumerate(pair_P.tolist()):
            for token in range(16):
                projected = align.project(seen[0][pair, token]).double()
                feature = features[window, 1 + token].double()
                cosines.append((projected @ feature / (projected.norm() * feature.norm())).item())
    assert got.item() == pytest.approx(1 - np.mean(cosines), abs=1e-5)
    assert align.tokens_Ptd is None


def test_alignment_is_0_where_the_projection_is_the_feature_and_2_where_it_is_its_opposite(
    build_teacher, dinov2_folder
):
    teacher = build_teacher()
    align, windows_B3ss = aligned(teacher, dinov2_folder), windows(1, side=16)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    features = align.dinov2(((windows_B3ss + 1) / 2 - mean) / std).last_hidden_state[:, 1:]
    for sign, expected in ((3.0, 0.0), (-3.0, 2.0)):
        align.project = torch.nn.Identity()
        align.tokens_Ptd = sign * features
        assert align(windows_B3ss, torch.tensor([0])).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("side", [32, 64])
def test_dinov2_sees_one_patch_for_each_token(build_teacher, dinov2_folder, monkeypatch, side):
    teacher, seen = build_teacher(), []
    align = aligned(teacher, dinov2_folder)
    run = align.dinov2.forward
    monkeypatch.setattr(align.dinov2, "forward", lambda image, **more: seen.append(image) or run(image, **more))
    forward(teacher, 2)
    windows_B3ss = windows(2, side)
    align(windows_B3ss, torch.arange(2))
    assert seen[0].shape == (2, 3, 4 * 4, 4 * 4)  # 4 x 4 tokens, patches of 4 px
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    small = F.interpolate((windows_B3ss + 1) / 2, size=(16, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(seen[0], (small - mean) / std)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradient_of_the_alignment_reaches_the_projector_and_the_blocks_up_to_its_own(
    build_teacher, dinov2_folder, recompute
):
    teacher = build_teacher()
    align, features = aligned(teacher, dinov2_folder), load_dinov2(str(dinov2_folder))
    if recompute:
        teacher.transformer.enable_gradient_checkpointing()
    forward(teacher, 2)
    align(windows(2), torch.arange(2)).backward()
    assert all(p.grad is not None and p.grad.any() for p in align.project.parameters())
    assert all(p.grad is None and not p.requires_grad for p in align.dinov2.parameters())
    assert not align.dinov2.training
    assert all(torch.equal(*pair) for pair in zip(align.dinov2.parameters(), features.parameters(), strict=True))
    reached = {name for name, p in teacher.transformer.named_parameters() if p.grad is not None and p.grad.any()}
    assert "transformer_blocks.0.attn.to_q.weight" in reached
    assert "pos_embed.proj.weight" in reached
    assert not any(name.startswith(("transformer_blocks.1.", "proj_out")) for name in reached)
    assert [name for name, p in align.named_parameters() if p.requires_grad] == [
        f"project.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    ]


def test_recomputing_changes_no_gradient_of_the_alignment(build_teacher, dinov2_folder):
    gradients = []
    for recompute in (False, True):
        teacher = build_teacher()
        align = aligned(teacher, dinov2_folder)
        if recompute:
            teacher.transformer.enable_gradient_checkpointing()
        loss = forward(teacher, 2).square().mean() + align(windows(2), torch.arange(2))
        loss.backward()
        gradients.append([p.grad for p in teacher.transformer.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_the_projector_depends_on_the_seed_alone(build_teacher, dinov2_folder):
    """Training a checkpoint further seeds nothing else: it was drawn from the state the process happened to have."""
    drawn = []
    for waste, seed in ((0, 0), (1, 0), (0, 1)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(waste)
            align = aligned(build_teacher(), dinov2_folder, seed=seed)
        drawn.append(torch.cat([p.detach().flatten() for p in align.project.parameters()]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_block_that_is_not_there_is_refused(build_teacher, dinov2_folder):
    with pytest.raises(UserError, match=r"^train\.align\.block=2: the transformer has 2 blocks.* Use 1 or less\.$"):
        aligned(build_teacher(), dinov2_folder, block=2)


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_weight_of_the_alignment_in_the_batch(build_teacher, dinov2_folder, shipped, weight):
    """The further terms of a batch are weighted; without alignment there is no such term."""
    t = dataclasses.replace(
        shipped, align=config_training.AlignSettings(weight, str(dinov2_folder), 0), prompts_per_window=2
    )
    losses = []
    for w in (weight, 1.0):
        teacher = build_teacher()
        tokens, t.align.weight = ClassTokens.of(teacher.embeddings), w
        align = aligned(teacher, dinov2_folder) if w else None
        label_Bss = torch.randint(0, 6, (2, 64, 64), generator=torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(5)
        _, extra = batch_loss(teacher, tokens, align, windows(2), label_Bss, torch.tensor(1.0), t, generator)
        losses.append(extra)
    assert ("align" in losses[0]) == (weight > 0)
    if weight:
        assert losses[0]["align"].item() == pytest.approx(weight * losses[1]["align"].item(), rel=1e-6)
    assert losses[0]["null"].item() == pytest.approx(losses[1]["null"].item(), rel=1e-6)


# Files of DINOv2


def test_folder_and_single_file_give_the_same_model(dinov2_folder, single_file):
    folder, file = load_dinov2(str(dinov2_folder)), load_dinov2(str(single_file))
    stored = load_file(dinov2_folder / "model.safetensors")
    for model in (folder, file):
        state = model.state_dict()
        assert all(value.dtype == torch.float32 for value in state.values())
        pooled = (3, 24, 24)
        with torch.no_grad():
            assert model(torch.ones(1, *pooled)).last_hidden_state.shape == (1, 1 + 36, 12)
    assert len(stored) == len(folder.state_dict())
    for one, other in zip(folder.state_dict().values(), file.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_half_precision_files_are_read_as_float32(single_file):
    from safetensors.torch import save_file

    save_file({name: value.half() for name, value in load_file(single_file).items()}, single_file)
    assert next(load_dinov2(str(single_file)).parameters()).dtype == torch.float32


def other_config(file: Path, **changed) -> None:
    path = file.parent / "dinov2_tiny_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda file: file.unlink(), "expected this file and one dinov2.*got no such file and 1 configs"),
        (lambda file: (file.parent / "dinov2_tiny_config.json").unlink(), "got the file and 0 configs"),
        (lambda file: (file.parent / "dinov2_b_config.json").write_text("{}"), "got the file and 2 configs"),
        (lambda file: file.write_bytes(b"cut"), "incomplete or damaged"),
        (lambda file: other_config(file, num_hidden_layers=2), r"do not fit their config \(encoder\.layer\.1\."),
        (lambda file: other_config(file, hidden_size=16), r"do not fit their config \(embeddings\.cls_token"),
        (lambda file: other_config(file, patch_size=8), r"do not fit their config \(embeddings\.patch_embeddings"),
    ],
    ids=["no file", "no config", "two configs", "damaged", "missing keys", "other width", "other patches"],
)  # fmt: skip
def test_wrong_files_of_dinov2_are_one_line(single_file, capfd, spoil, said):
    spoil(single_file)
    with pytest.raises(UserError, match=rf"^train\.align\.checkpoint=[^\n]*{said}[^\n]*$"):
        load_dinov2(str(single_file))
    assert "LOAD REPORT" not in capfd.readouterr().err


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^train\.align\.checkpoint=[^\n]*neither a folder[^\n]*$"):
        load_dinov2(str(tmp_path / "absent"))


@pytest.mark.parametrize("name", ["dinov2-base", "./dinov2", "~/absent-dinov2", "facebook/dinov2/base"])
def test_a_name_that_is_no_folder_and_no_hub_id_is_one_line_and_nobody_is_asked(tmp_path, monkeypatch, name):
    """Without a slash it was once looked for at the hub."""

    def ask(*arguments, **more):
        raise AssertionError(f"asked for {arguments}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Dinov2Model, "from_pretrained", ask)
    with pytest.raises(
        UserError, match=rf"^train\.align\.checkpoint={name} is neither a folder that exists nor [^\n]*$"
    ):
        load_dinov2(name)


@pytest.mark.parametrize("name", ["dinov2", "./dinov2", "~/dinov2"])
def test_a_folder_may_be_named_from_here_or_from_home(dinov2_folder, monkeypatch, name):
    monkeypatch.chdir(dinov2_folder.parent)
    monkeypatch.setenv("HOME", str(dinov2_folder.parent))
    assert load_dinov2(name).config.hidden_size == DINOV2["hidden_size"]
