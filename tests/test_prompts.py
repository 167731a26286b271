"""Text embeddings: equal to the raw pipeline, cached under a key of everything they depend on, encoders freed."""

import gc
import os
import shutil
import socket
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sd3_folder import build_sd3_folder

from segadapt.errors import UserError
from segadapt.models.checkpoint_errors import explain_checkpoint_errors
from segadapt.models.generative import prompts
from segadapt.models.generative.prompts import (
    PromptEmbeddings,
    load_embeddings,
    prompt_embeddings,
    save_embeddings,
)

CLASSES = ("bed ", "road", "sky", "traffic light", "car", "person", "wall", "tree", "grass")  # more than one batch
LENGTH = 16


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return build_sd3_folder(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a local folder needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def options(sd3, tmp_path):
    return {
        "classes": CLASSES,
        "dataset_name": "ADE20K",
        "overrides": {"sky": "the blue sky"},
        "checkpoint": str(sd3),
        "revision": None,
        "max_sequence_length": LENGTH,
        "dtype": torch.float32,
        "cache_dir": tmp_path / "cache",
        "device": "cpu",
    }


@pytest.fixture
def loads(monkeypatch):
    """Weak references to every text encoder that the real from_pretrained gives."""
    found, original = [], StableDiffusion3Pipeline.from_pretrained

    def watched(*args, **kwargs):
        pipeline = original(*args, **kwargs)
        assert pipeline.transformer is None
        assert pipeline.vae is None
        found.extend(
            weakref.ref(encoder)
            for encoder in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3)
            if encoder is not None
        )
        return pipeline

    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", watched)
    return found


def same(one: PromptEmbeddings, other: PromptEmbeddings) -> bool:
    names = ("sequence_CLE", "pooled_CD", "null_sequence_LE", "null_pooled_D")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


def test_embeddings_equal_those_of_the_whole_pipeline(options, sd3):
    got = prompt_embeddings(**options)
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(sd3)
    rows = {"a photo of a bed": 0, "the blue sky": 2, "a photo of a grass": 8, "": -1}
    got_sequence = torch.cat([got.sequence_CLE, got.null_sequence_LE[None]])
    got_pooled = torch.cat([got.pooled_CD, got.null_pooled_D[None]])
    for prompt, row in rows.items():
        with torch.no_grad():
            sequence_1LE, _, pooled_1D, _ = pipeline.encode_prompt(
                prompt, prompt, prompt, do_classifier_free_guidance=False, max_sequence_length=LENGTH
            )
        torch.testing.assert_close(got_sequence[row], sequence_1LE[0])  # another batch size: equal up to rounding
        torch.testing.assert_close(got_pooled[row], pooled_1D[0])
    assert got.sequence_CLE.shape == (len(CLASSES), 77 + LENGTH, 32)
    assert got.pooled_CD.shape == (len(CLASSES), 24)
    assert got.source == "encoded"
    assert len({tuple(row.tolist()) for row in got.pooled_CD}) == len(CLASSES)


def test_encoders_are_loaded_once_and_freed(options, loads):
    first = prompt_embeddings(**options)
    gc.collect()
    assert len(loads) == 3
    assert all(reference() is None for reference in loads)
    assert same(prompt_embeddings(**options), first)
    assert len(loads) == 3


def test_valid_file_spares_even_the_import_of_the_pipeline(options):
    prompt_embeddings(**options)
    code = (
        "import sys, torch; from pathlib import PosixPath; from segadapt.models.generative.prompts import *;"
        f"prompt_embeddings(**{ {**options, 'dtype': 'x'}!r}".replace("'x'", "torch.float32")
        + "); assert not [m for m in sys.modules if m.startswith(('diffusers.pipelines', 'transformers.models'))]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_file_name_shows_prompt_and_data_set_and_content_tells_the_rest(options):
    prompt_embeddings(**options)
    (path,) = Path(options["cache_dir"]).iterdir()
    prefix, _, key = path.stem.rpartition("__")
    assert prefix == "a_photo_of_a__ade20k"
    assert len(key) == 8
    with safe_open(path, framework="pt") as file:
        facts = prompts.json.loads(file.metadata()["segadapt"])
        assert file.get_slice("sequence").get_shape() == [len(CLASSES) + 1, 77 + LENGTH, 32]
    assert facts["classes"][0] == "bed"
    assert facts["prompts"][:3] == ["a photo of a bed", "a photo of a road", "the blue sky"]
    assert facts["t5"] is True
    assert facts["encoders"].startswith("sha256:")
    assert str(Path(options["checkpoint"]).parent) not in str(facts)


PROMPTS = [f"{name.strip()} seen from a street" for name in CLASSES]


@pytest.mark.parametrize("kind", ["txt", "json"])
def test_prompts_of_a_file_are_encoded_as_they_stand_and_name_the_cache(options, tmp_path, kind):
    """Equal to overrides of every class; a JSON object may have another order."""
    path = tmp_path / f"Street Views.{kind}"
    by_class = dict(zip(reversed(CLASSES), reversed(PROMPTS), strict=True))
    path.write_text("\n".join(PROMPTS) + "\n" if kind == "txt" else prompts.json.dumps(by_class))
    options |= {"overrides": {}}
    got = prompt_embeddings(**options, file=path)
    (cached,) = Path(options["cache_dir"]).iterdir()
    assert cached.name.startswith("street_views__ade20k__")
    with safe_open(cached, framework="pt") as file:
        assert prompts.json.loads(file.metadata()["segadapt"])["prompts"] == PROMPTS
    assert same(got, prompt_embeddings(**options | {"overrides": dict(zip(CLASSES, PROMPTS, strict=True))}))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.txt",
            "\n".join(PROMPTS[:-1]),
            r"line 9 is missing or empty; expected the prompt of class 8, 'grass', one of 9",
        ),
        ("a.txt", "\n".join([PROMPTS[0], "", *PROMPTS[2:]]), r"line 2 is missing or empty; .* class 1, 'road'"),
        ("a.txt", "\n".join([*PROMPTS, "more"]), r"line 10 is of no class; expected 9 lines"),
        ("a.json", '{"bed": "a", "raod": "b"}', r"'raod' is not a class of the data set\. Did you mean road\?"),
        ("a.json", '{"bed": "a", "bed ": "b"}', r"class 'bed' has two prompts"),
        ("a.json", '{"bed": "a"}', r"class 'road' has no prompt; expected one for each of 9"),
        ("a.json", '{"bed": 3}', r"the prompt of 'bed' is 3; expected text"),
        ("a.json", '["bed"]', r"holds no JSON object"),
        ("a.json", "{", r"expected JSON"),
        ("a.json", None, r"a\.json cannot be read"),
    ],
)
def test_a_prompt_file_that_does_not_fit_the_classes_names_the_first_fault(tmp_path, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        prompts.read_prompts(path, [each.strip() for each in CLASSES])
    assert str(error.value).startswith(f"model.generative.prompts.file={path}")
    assert "\n" not in str(error.value)


CHANGES = {
    "one word": {"overrides": {"sky": "the grey sky"}},
    "template": {"template": "an image of a {}"},
    "dtype": {"dtype": torch.bfloat16},
    "T5 length": {"max_sequence_length": LENGTH + 1},
    "data set": {"dataset_name": "cityscapes"},
    "class order": {"classes": (*CLASSES[1:], CLASSES[0])},
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_is_encoded_anew_and_keeps_the_other_file(options, loads, change):
    prompt_embeddings(**options)
    changed = prompt_embeddings(**(options | CHANGES[change]))
    assert len(loads) == 6
    assert len(list(Path(options["cache_dir"]).iterdir())) == 2
    assert changed.sequence_CLE.dtype == (torch.bfloat16 if change == "dtype" else torch.float32)


def test_other_encoder_weights_are_another_key_but_moving_the_folder_is_not(options, loads, sd3, tmp_path):
    first = prompt_embeddings(**options)
    moved = Path(shutil.copytree(sd3, tmp_path / "moved"))
    assert same(prompt_embeddings(**(options | {"checkpoint": str(moved)})), first)
    assert len(loads) == 3
    weights = load_file(moved / "text_encoder_2" / "model.safetensors")
    weights["text_projection.weight"] += 1
    save_file(weights, moved / "text_encoder_2" / "model.safetensors", metadata={"format": "pt"})
    assert not same(prompt_embeddings(**(options | {"checkpoint": str(moved)})), first)
    assert len(loads) == 6


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "stale", "rows"])
def test_bad_file_under_the_right_name_is_rebuilt(options, loads, damage):
    first = prompt_embeddings(**options)
    (path,) = Path(options["cache_dir"]).iterdir()
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "foreign":
        save_file(tensors, path)
    elif damage == "stale":
        save_file({name: value + 1 for name, value in tensors.items()}, path,
                  metadata={"segadapt": metadata["segadapt"].replace('"key": "', '"key": "0')})  # fmt: skip
    else:
        save_file({name: value[1:].clone() for name, value in tensors.items()}, path, metadata=metadata)
    assert same(prompt_embeddings(**options), first)
    assert len(loads) == 6
    assert same(prompt_embeddings(**options), first)
    assert len(loads) == 6
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_failed_write_leaves_the_old_file(options, monkeypatch):
    embeddings = prompt_embeddings(**options)
    (path,) = Path(options["cache_dir"]).iterdir()
    before = path.read_bytes()

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        save_embeddings(path, embeddings, classes=CLASSES, dataset_name="ade20k", model="tiny")
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_missing_t5_is_zeros_and_recorded(options, tmp_path):
    folder = build_sd3_folder(tmp_path / "without", with_t5=False)
    embeddings = prompt_embeddings(**(options | {"checkpoint": str(folder)}))
    assert embeddings.sequence_CLE.shape == (len(CLASSES), 77 + LENGTH, 32)
    assert not embeddings.sequence_CLE[:, 77:].any()
    assert embeddings.sequence_CLE[:, :77].any()
    (path,) = Path(options["cache_dir"]).iterdir()
    with safe_open(path, framework="pt") as file:
        assert '"t5": false' in file.metadata()["segadapt"]


def test_learned_embeddings_survive_the_file(tmp_path):
    generator = torch.Generator().manual_seed(0)
    sequence, pooled = torch.randn(3, 5, 8, generator=generator), torch.randn(3, 4, generator=generator)
    learned = PromptEmbeddings(sequence[:2], pooled[:2], sequence[2], pooled[2], "learned")
    save_embeddings(tmp_path / "a.safetensors", learned, classes=["bed ", "sky"], dataset_name="toy", model="tiny")
    loaded = load_embeddings(tmp_path / "a.safetensors", classes=["bed", "sky "])
    assert same(loaded, learned)
    assert loaded.source == "learned"
    save_embeddings(tmp_path / "b.safetensors", learned, classes=["bed ", "sky"], dataset_name="toy", model="tiny")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["bed", "sea"], "class 1 is 'sky' .* expects 'sea'"),
        (["bed"], r"class 1 is 'sky' \(2 classes\); the data set expects 'nothing' \(1 classes\)"),
        (["bed", "sky", "sea"], "class 2 is 'nothing' .* expects 'sea'"),
    ],
)
def test_embeddings_of_other_classes_are_refused(tmp_path, classes, message):
    path = tmp_path / "a.safetensors"
    embeddings = PromptEmbeddings(torch.zeros(2, 5, 8), torch.zeros(2, 3), torch.zeros(5, 8), torch.zeros(3), "learned")
    save_embeddings(path, embeddings, classes=["bed", "sky"], dataset_name="toy", model="tiny")
    with pytest.raises(UserError, match=message):
        load_embeddings(path, classes=classes)


def test_unreadable_embeddings_are_a_user_error(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_embeddings(tmp_path / "none.safetensors", classes=["a"])
    (tmp_path / "bad.safetensors").write_bytes(b"{}")
    with pytest.raises(UserError, match="cannot be read"):
        load_embeddings(tmp_path / "bad.safetensors", classes=["a"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"template": "a photo"}, "has 0 places"),
        ({"overrides": {"raod": "x"}}, "'raod' is not a class of the data set. Did you mean road"),
        ({"dtype": torch.float16}, "T5 is wrong in float16"),
        ({"max_sequence_length": 0}, "expected 1..512"),
        ({"checkpoint": "/nowhere/sd3"}, "neither a folder that exists nor a hub id"),
    ],
)
def test_wrong_settings_are_refused_before_any_encoder_is_loaded(options, loads, change, message):
    with pytest.raises(UserError, match=message):
        prompt_embeddings(**(options | change))
    assert not loads


@pytest.mark.parametrize("missing", ["text_encoder_2/model.safetensors", "text_encoder_3", "model_index.json"])
def test_incomplete_folder_is_one_line_with_a_cure(options, sd3, tmp_path, missing):
    folder = Path(shutil.copytree(sd3, tmp_path / "broken"))
    target = folder / missing
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(UserError, match="incomplete or damaged") as error:
        prompt_embeddings(**(options | {"checkpoint": str(folder)}))
    assert "\n" not in str(error.value)
    assert "model.generative.checkpoint" in str(error.value)


def hub_error(kind):
    return kind(
        "401 Client Error", response=httpx.Response(401, request=httpx.Request("GET", "https://huggingface.co"))
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_error(GatedRepoError), "behind a licence"),
        (hub_error(RepositoryNotFoundError), "the hub shows no such"),
        (LocalEntryNotFoundError("not cached\nno connection"), "could not be fetched"),
    ],
)
def test_hub_errors_say_what_to_download_and_where_to_point(error, message):
    @explain_checkpoint_errors("generative model", "owner/sd3", "model.generative.checkpoint")
    def load():
        raise OSError("transformers wraps it") from error

    with pytest.raises(UserError, match=message) as caught:
        load()
    text = str(caught.value)
    assert "\n" not in text
    assert "https://huggingface.co/owner/sd3" in text
    assert "hf download owner/sd3" in text
    assert "model.generative.checkpoint=/path/to/folder" in text
    assert isinstance(caught.value.__cause__, OSError)


def test_cached_commit_of_a_hub_id_is_known_without_network(tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--sd3"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "model_index.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert prompts._hub_commit("owner/sd3", None) == commit
    assert prompts._hub_commit("owner/other", commit) == commit
