"""Files of NVIDIA and mmsegmentation: every weight in its place, the same logits; every fault one line."""

import re
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_segformer import DEPTHS, HEAD_WIDTH, WIDTHS, MmsegNet, nvidia_state, scramble
from safetensors.torch import load_file, save_file
from torch import nn
from training_runs import training
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from segadapt.errors import UserError
from segadapt.models.discriminative import keymaps
from segadapt.models.discriminative.load import load_segmenter
from segadapt.models.discriminative.make import make_segmenter
from segadapt.models.set_up import fingerprint
from segadapt.record import RunFolder
from segadapt.training.optimizer import parameter_groups

CONFIG = {"depths": list(DEPTHS), "hidden_sizes": list(WIDTHS), "decoder_hidden_size": HEAD_WIDTH}


def load(path, num_classes=5, **options):
    return load_segmenter(str(path), num_classes=num_classes, device="cpu", **options)


def image(dtype=torch.float32):
    return torch.rand(1, 3, 65, 97, generator=torch.Generator().manual_seed(0), dtype=dtype)


def normalised(image_B3HW):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (image_B3HW - mean) / std


@pytest.fixture(scope="module")
def raw():
    """transformers' own class with random weights, 5 classes."""
    return scramble(SegformerForSemanticSegmentation(SegformerConfig(**CONFIG, num_labels=5)))


@pytest.fixture(scope="module")
def hf_folder(raw, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    raw.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def nvidia(hf_folder):
    return nvidia_state(load_file(hf_folder / "model.safetensors"))


@pytest.fixture(scope="module")
def mmseg_net():
    return scramble(MmsegNet(5), seed=1)


@pytest.fixture(scope="module")
def mmseg(mmseg_net):
    return dict(mmseg_net.state_dict())


@pytest.fixture
def write(tmp_path):
    def to(state, name="weights.safetensors"):
        path = tmp_path / name
        if name.endswith("safetensors"):
            save_file({key: value.contiguous() for key, value in state.items()}, path)
        else:
            torch.save(state, path)
        return path

    return to


# --- the same net ---


def test_nvidia_file_gives_the_logits_of_transformers_own_class(raw, nvidia, write):
    segmenter = load(write(nvidia))
    with torch.no_grad():
        assert torch.equal(segmenter.logits(image()), raw(pixel_values=normalised(image())).logits)
    assert fingerprint(segmenter.net) == fingerprint(raw)
    assert not segmenter.net.training


def test_mmseg_file_gives_the_logits_of_mmsegs_own_net(mmseg_net, mmseg, write):
    segmenter = load(write(mmseg))
    segmenter.net.double()
    reference = scramble(MmsegNet(5), seed=1).double()
    with torch.no_grad():
        got, expected = segmenter.logits(image(torch.float64)), reference(normalised(image(torch.float64)))
    assert got.shape == (1, 5, 17, 25)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_layer_norm_eps_is_that_of_each_code_base(nvidia, mmseg, write):
    for state, eps in ((nvidia, 1e-5), (mmseg, 1e-6)):
        norms = [m for m in load(write(state)).net.modules() if isinstance(m, nn.LayerNorm)]
        assert len(norms) == 4 * 2 + sum(DEPTHS) * 2 + sum(DEPTHS[:3])
        assert {norm.eps for norm in norms} == {eps}


def test_what_a_killed_process_leaves_of_a_model_is_known_to_the_next_start(nvidia, write, tmp_path, monkeypatch):
    first, drafts = load(write(nvidia)), []
    monkeypatch.setattr(first.net, "save_pretrained", lambda draft: drafts.append(Path(draft)))
    first.save(tmp_path / "run" / "model")
    (draft,) = drafts
    run = RunFolder.open(tmp_path, "run", run_id="one", settings={})
    (run.path / draft.name).mkdir()
    (run.path / draft.name / "model.safetensors").write_bytes(b"half")
    with run.locked():
        assert not list(run.path.glob(".model*"))


@pytest.mark.parametrize("layout", ["nvidia", "mmseg"])
def test_saved_folder_reads_back_bit_equal(layout, write, tmp_path, request):
    first = load(write(request.getfixturevalue(layout)))
    first.save(tmp_path / "folder")
    first.save(tmp_path / "folder")  # over an older one
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["config.json", "model.safetensors"]
    assert {path.name for path in tmp_path.iterdir()} == {"weights.safetensors", "folder"}
    second = load(tmp_path / "folder")
    assert type(second.net) is type(first.net)
    assert fingerprint(second.net) == fingerprint(first.net)
    with torch.no_grad():
        assert torch.equal(second.logits(image()), first.logits(image()))


def test_converted_nvidia_folder_is_read_by_transformers(raw, nvidia, write, tmp_path):
    load(write(nvidia)).save(tmp_path / "folder")
    again, info = SegformerForSemanticSegmentation.from_pretrained(tmp_path / "folder", output_loading_info=True)
    assert not any(info[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert fingerprint(again) == fingerprint(raw)


def test_conversion_as_documented(raw, nvidia, write, tmp_path, monkeypatch):
    text = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    write(nvidia, "weights/segformer.b5.640x640.ade.160k.pth")
    exec(code.replace("150", "5"))
    assert fingerprint(SegformerForSemanticSegmentation.from_pretrained("weights/segformer-b5-ade-640")) == fingerprint(
        raw
    )


def test_nvidias_own_eps_is_another_by_little(raw, nvidia, write):
    """What docs/checkpoints.md says of it: transformers' net with the eps of NVIDIA's code."""
    segmenter = load(write(nvidia))
    with torch.no_grad():
        one = segmenter.logits(image())
        for name, module in segmenter.net.named_modules():
            if isinstance(module, nn.LayerNorm) and "patch_embeddings" not in name and "reduction" not in name:
                module.eps = 1e-6
        other = segmenter.logits(image())
    assert 0 < (one - other).norm() / one.norm() < 1e-4


def test_folders_with_old_and_new_key_names_are_the_same_net(raw, hf_folder, tmp_path):
    old, new = load_file(hf_folder / "model.safetensors"), raw.state_dict()
    assert any(key.startswith("segformer.encoder.block.") for key in old)
    save_file({key: value.contiguous() for key, value in new.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((hf_folder / "config.json").read_text())
    for folder in (hf_folder, tmp_path):
        segmenter = load(folder)
        assert fingerprint(segmenter.net) == fingerprint(raw)
        segmenter.save(tmp_path / "again")
        assert fingerprint(load(tmp_path / "again").net) == fingerprint(raw)


def test_mmseg_net_recomputes_in_eval_mode_and_drops_nothing(mmseg, write):
    gradients = {}
    for recompute in (False, True):
        segmenter, calls = load(write(mmseg), gradient_checkpointing=recompute), []
        for name, module in segmenter.net.named_modules():
            if name.endswith(("layernorm_before", "layer_norm_1")):
                module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        segmenter.logits(image()).square().mean().backward()
        assert len(calls) == sum(DEPTHS) * (1 + recompute)
        gradients[recompute] = {name: parameter.grad for name, parameter in segmenter.parameters().items()}
    for name, gradient in gradients[False].items():
        assert gradient is not None
        torch.testing.assert_close(gradients[True][name], gradient)


def test_norms_of_an_mmseg_net(mmseg, write, tmp_path):
    segmenter = load(write(mmseg))
    norms, top = segmenter.norm_parameters(), segmenter.top_norm_parameters()
    assert len([name for name in norms if name.startswith("decode_head.")]) == 2 * 5  # convs and fusion
    assert len([name for name in top if not name.startswith("decode_head.")]) == 2 * (2 + 2 * DEPTHS[3])
    assert {name for name in norms if name.startswith("decode_head.")} < top.keys() < norms.keys()
    grouped = [p for group in parameter_groups(segmenter, training(tmp_path).train.optimizer)
               for p in group["params"]]  # fmt: skip
    assert sorted(map(id, grouped)) == sorted(map(id, segmenter.net.parameters()))  # it can be trained further


# --- files ---


@pytest.mark.parametrize("layout", ["nvidia", "mmseg"])
@pytest.mark.parametrize("name", ["weights.pth", "weights.pt"])
def test_pickle_as_training_left_it_is_read_with_the_switch(layout, name, write, request):
    state = request.getfixturevalue(layout)
    meta = {"epoch": 3, "CLASSES": ("a", "b"), "PALETTE": [[1, 2, 3]], "config": "model = dict()", "seed": None}
    path = write({"meta": meta, "state_dict": OrderedDict(state), "optimizer": {"state": {}, "lr": 0.1}}, name)
    with pytest.raises(UserError, match=r"is a pickle.*allow_pickle=true"):
        load(path)
    assert fingerprint(load(path, allow_pickle=True).net) == fingerprint(load(write(state)).net)


@pytest.mark.parametrize("layout", ["nvidia", "mmseg"])
def test_batch_counters_may_be_absent(layout, write, request):
    state = {key: value for key, value in request.getfixturevalue(layout).items() if "num_batches" not in key}
    counters = [value for key, value in load(write(state)).net.state_dict().items() if "num_batches" in key]
    assert counters
    assert not any(counters)


def test_half_precision_file_is_read_as_float32(mmseg, write):
    state = {key: value.half() if value.is_floating_point() else value for key, value in mmseg.items()}
    assert {p.dtype for p in load(write(state)).net.parameters()} == {torch.float32}


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_pickle_never_runs(nvidia, write, tmp_path):
    path = write({"state_dict": nvidia, "meta": Malicious(tmp_path / "ran")}, "weights.pth")
    for allow_pickle in (False, True):
        with pytest.raises(UserError, match=r"io\.open.*refuses it" if allow_pickle else "is a pickle"):
            load(path, allow_pickle=allow_pickle)
    assert not (tmp_path / "ran").exists()


def test_more_than_tensors_is_refused_by_name(nvidia, write):
    path = write({"state_dict": nvidia, "meta": np.zeros(3)}, "weights.pth")
    with pytest.raises(UserError, match=r"holds numpy\.\S+_reconstruct, and not only tensors and plain values"):
        load(path, allow_pickle=True)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth", "old.pth"])
def test_truncated_files_are_one_line_wherever_they_end(name, nvidia, write):
    path = write(nvidia, "weights.pth" if name == "old.pth" else name)
    if name == "old.pth":
        torch.save(nvidia, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for length in {*range(0, 200, 7), *range(200, len(whole), len(whole) // 50), len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"damaged|refuses it") as error:
            load(path, allow_pickle=True)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no weights"),
        ([1, 2], "holds no weights"),
        ({"state_dict": {}}, "holds no weights"),
        ({"state_dict": 3}, "holds no weights"),
        ({"epoch": 3}, "holds a int as 'epoch'"),
        ({1: torch.zeros(2)}, "holds a Tensor as 1"),
        ({"conv1.weight": torch.zeros(2)}, "its 1 keys, conv1.weight and others, are not those of NVIDIA or mmseg"),
    ],
)
def test_foreign_pickles_are_one_line(content, message, write):
    with pytest.raises(UserError, match=message):
        load(write(content, "weights.pth"), allow_pickle=True)


def test_other_files_are_explained(hf_folder, raw, nvidia, write, tmp_path):
    with pytest.raises(UserError, match="names of transformers: give the folder"):
        load(hf_folder / "model.safetensors")
    with pytest.raises(UserError, match="names of transformers: give the folder"):
        load(write(raw.state_dict()))
    with pytest.raises(UserError, match="an encoder of NVIDIA alone"):
        load(write({key.removeprefix("backbone."): v for key, v in nvidia.items() if "backbone" in key}))
    with pytest.raises(UserError, match="no such file"):
        load("weights/gone.pth", allow_pickle=True)
    (tmp_path / "weights.onnx").write_bytes(b"onnx")
    with pytest.raises(UserError, match="no file of weights; expected a folder, or a file"):
        load(tmp_path / "weights.onnx")


# --- every key counts ---

NAMES = {
    "nvidia": ("backbone.block2.1.attn.kv.weight", "backbone.block2.1.mlp.fc1.weight", "decode_head.linear_pred"),
    "mmseg": (
        "backbone.layers.1.1.1.attn.attn.in_proj_weight",
        "backbone.layers.1.1.1.ffn.layers.0.weight",
        "decode_head.conv_seg",
    ),
}


@pytest.mark.parametrize("layout", ["nvidia", "mmseg"])
def test_no_key_can_be_left_out(layout, write, request):
    """One by one: what would be missed in silence is nothing but the keys that are dropped by name."""
    state = request.getfixturevalue(layout)
    chosen = keymaps.LAYOUTS[layout == "mmseg"]
    config, _ = keymaps.sizes(keymaps.renamed(state, chosen), chosen)
    expected = keymaps.renamed(state, chosen)
    for key in state:
        got = keymaps.renamed({name: value for name, value in state.items() if name != key}, chosen)
        is_free = "num_batches" in key or any(key.startswith(module) for module in chosen.dropped)
        assert (got.keys() == expected.keys()) == is_free, key
    assert config["depths"] == list(DEPTHS)
    assert config["hidden_sizes"] == list(WIDTHS)


@pytest.mark.parametrize("layout", ["nvidia", "mmseg"])
def test_missing_unexpected_and_misshapen_keys_are_listed(layout, write, request):
    state, (packed, linear, head) = dict(request.getfixturevalue(layout)), NAMES[layout]
    for edit, said in (
        (lambda s: s.pop(packed), r"(k_proj|key)\.weight is missing.*(v_proj|value)\.weight is missing"),
        (lambda s: s.pop("decode_head.linear_fuse.bn.running_var", s.pop("decode_head.fusion_conv.bn.running_var", 0)),
         "running_var is missing"),
        (lambda s: s.update(extra=torch.zeros(2)), "extra is unexpected"),
        (lambda s: s.update({"auxiliary_head.conv_seg.bias": torch.zeros(2)}), "auxiliary_head.conv_seg.bias is unex"),
        (lambda s: s.update({"backbone.head.weight": torch.zeros(2)}), "backbone.head.weight is unexpected"),
        (lambda s: s.update({packed: s[packed][:-3]}), r"has shape \(1., 16\), expected \(16, 16\)"),
        (lambda s: s.update({packed: torch.tensor(1.0)}), "weight has shape|weight is missing"),
        (lambda s: s.update({linear: s[linear][:, :-1]}), r"has shape \(64, 15\), expected \(64, 16\)"),
        (lambda s: s.pop(f"{head}.weight"), r"(classifier|conv_seg)\.weight is missing"),
        (lambda s: s.update({f"{head}.bias": torch.zeros(6)}), r"bias has shape \(6,\), expected \(5,\)"),
        (lambda s: s.update({packed.replace("backbone.", ""): s[packed].clone()}), "is unexpected"),  # twice
    ):  # fmt: skip
        damaged = dict(state)
        edit(damaged)
        with pytest.raises(UserError, match=said) as error:
            load(write(damaged))
        assert "\n" not in str(error.value)
        assert "the SegFormer that their shapes describe" in str(error.value)


@pytest.mark.parametrize("layout", ["nvidia", "mmseg"])
def test_a_whole_stage_cannot_be_missing(layout, write, request):
    stage = r"\.block3\." if layout == "nvidia" else r"\.layers\.2\.1\."
    state = {key: v for key, v in request.getfixturevalue(layout).items() if not re.search(stage, key)}
    with pytest.raises(UserError, match=r"encoder\.block\.2\.0 is missing"):
        load(write(state))


@pytest.mark.parametrize("layout", ["nvidia", "mmseg"])
def test_other_classes_are_refused_with_both_numbers(layout, write, request):
    with pytest.raises(UserError, match="head has 5 classes, but the data set has 19"):
        load(write(request.getfixturevalue(layout)), num_classes=19)


def test_two_norms_of_a_block_are_not_swapped(nvidia, hf_folder):
    """LiBai's loader wrote one onto the other at every size."""
    new, old = keymaps.renamed(nvidia, keymaps.NVIDIA), load_file(hf_folder / "model.safetensors")
    assert new.keys() == old.keys()
    assert all(torch.equal(new[key], old[key]) for key in old)


@pytest.mark.parametrize("depths", [[2, 2, 2, 2], [3, 4, 6, 3], [3, 6, 40, 3]], ids=["B0", "B2", "B5"])
def test_every_size_goes_round(depths, tmp_path, monkeypatch):
    monkeypatch.setattr("foreign_segformer.DEPTHS", depths)
    config = {**CONFIG, "depths": depths, "num_attention_heads": [1, 2, 5, 8]}
    first = make_segmenter("segformer", config, 5, seed=2)
    first.save(tmp_path)
    state = nvidia_state(load_file(tmp_path / "model.safetensors"))
    save_file(state, tmp_path / "weights.safetensors")
    assert fingerprint(load(tmp_path / "weights.safetensors").net) == fingerprint(first.net)


# --- in a run ---


def test_a_run_names_the_file_and_fingerprints_it(write, compose_settings, saved_models, tmp_path):
    from segadapt.adapt import run
    from segadapt.datasets.build import build_dataset

    base = compose_settings("experiment=toytown_c")
    classes = build_dataset(base.data).classes
    path = write(scramble(MmsegNet(len(classes))).state_dict(), "weights.pth")
    settings = compose_settings("experiment=toytown_c", "tta.method=tent", "data.limit=1", "data.corruptions=[fog]",
                                "data.workers=0", f"logging.root={tmp_path / 'runs'}", "tta.save_adapted=true",
                                f"model.discriminative.checkpoint={path}",
                                "model.discriminative.allow_pickle=true")  # fmt: skip
    results = run(settings)
    source = load(path, len(classes), allow_pickle=True)
    assert f"segmenter {path};" in results["protocol"]
    assert results["weights_sha256"] == {"discriminative": fingerprint(source.net)}
    (adapted,) = (tmp_path / "runs").glob("**/adapted/*")
    assert fingerprint(load(adapted, len(classes)).net) != fingerprint(source.net)
