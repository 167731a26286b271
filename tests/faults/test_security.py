"""No code from a config or a checkpoint, no secret in what a run leaves, no file outside of its folders."""

import ast
import json
import os
import shutil
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import save
from sd3_folder import build_sd3_folder

import segadapt as package
from faults.said import assert_says
from segadapt.corrupt import write_set
from segadapt.datasets import Task
from segadapt.datasets.toytown import ToyTown
from segadapt.errors import UserError
from segadapt.models.generative.prompts import prompt_embeddings
from segadapt.models.generative.sd3 import load_autoencoder, load_transformer
from segadapt.record import RunFolder, write_json
from segadapt.wandb_mirror import Wandb

PACKAGE = Path(package.__file__).parent
CALLS = {"eval", "exec", "compile", "__import__", "instantiate", "execfile", "import_module"}
KEYWORDS = {"trust_remote_code", "custom_pipeline"}
UNSAFE = {"pickle": {"load", "loads", "Unpickler"}, "yaml": {"load", "unsafe_load", "full_load"},
          "joblib": {"load"}, "subprocess": {"run", "Popen", "call", "check_call", "check_output"},
          "os": {"system", "popen"}, "marshal": {"load", "loads"}, "shelve": {"open"}}  # fmt: skip
ALLOWED = {
    ("__main__.py", "import_module"),  # by the table of verbs
    ("models/discriminative/foreign.py", "import_module"),  # timm and smp, named by the two modules that call it
    ("engines.py", "Popen"),  # this package's own command, without a shell
}


def unsafe_calls(tree: ast.AST) -> list[str]:
    """Names of calls that could run what a file or a setting says."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")
        owner = getattr(called.value, "id", "") if isinstance(called, ast.Attribute) else ""
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        is_method = isinstance(called, ast.Attribute) and name in ("eval", "compile")  # net.eval(), re.compile()
        if (name in CALLS and not is_method) or name in UNSAFE.get(owner, ()) or KEYWORDS & set(given):
            found.append(name)
        if name == "load" and owner == "torch":
            only = given.get("weights_only")
            if not (isinstance(only, ast.Constant) and only.value is True):
                found.append("torch.load")
        if name == "from_pretrained" and "use_safetensors" not in given and None not in given:
            found.append("from_pretrained")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_code_comes_from_a_file_or_a_setting(path):
    name = path.relative_to(PACKAGE).as_posix()
    found = [call for call in unsafe_calls(ast.parse(path.read_text())) if (name, call) not in ALLOWED]
    assert found == []


@pytest.mark.parametrize(
    "line",
    ["eval(text)", "exec(text)", "hydra.utils.instantiate(x)", "pickle.load(f)", "torch.load(f)", "yaml.load(f)",
     "torch.load(f, weights_only=False)", "A.from_pretrained(x, trust_remote_code=True)", "A.from_pretrained(x)",
     "importlib.import_module(x)", "os.system(x)"],
)  # fmt: skip
def test_the_scan_finds(line):
    assert unsafe_calls(ast.parse(line))


# -- checkpoints ------------------------------------------------------------------------------------------------------

EVIL = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass CLIPTextModelWithProjection: ...\n"


def test_a_pipeline_whose_parts_are_its_own_code_is_refused(tmp_path):
    folder = build_sd3_folder(tmp_path / "sd3", with_t5=False)
    (folder / "text_encoder/evil.py").write_text(EVIL)
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"] = ["evil", "CLIPTextModelWithProjection"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError) as caught:
        prompt_embeddings(
            classes=("sky",), dataset_name="d", template="{}", overrides={}, file=None, checkpoint=str(folder),
            revision=None, max_sequence_length=8, dtype=torch.float32, cache_dir=tmp_path / "cache", device="cpu",
        )  # fmt: skip
    assert_says(str(caught.value), where="model.generative.checkpoint", got="text_encoder from 'evil'",
                expected="diffusers or transformers", cure="Use a checkpoint of Stable Diffusion 3")  # fmt: skip
    assert not list(tmp_path.rglob("ran"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("part", "load"),
    [("transformer", partial(load_transformer, revision=None)),
     ("vae", partial(load_autoencoder, revision=None, folder=None))],
)  # fmt: skip
def test_a_teachers_pickle_is_not_read_whatever_lies_beside_it(models, tmp_path, part, load):
    folder = Path(shutil.copytree(models[1], tmp_path / "sd3"))
    [weights] = (folder / part).glob("*.safetensors")
    weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
    with pytest.raises(UserError, match=r"cannot be loaded from this folder.*safetensors"):
        load(str(folder))


# -- paths ------------------------------------------------------------------------------------------------------------


def test_a_run_folder_that_is_a_link_elsewhere_is_not_emptied(tmp_path):
    private = tmp_path / "private"
    write_json(private / "id/settings.json", {})
    write_json(private / "id/results.json", {"precious": True})
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/name").symlink_to(private)
    with pytest.raises(UserError) as caught:
        RunFolder.open(tmp_path / "runs", "name", run_id="id", settings={})
    assert_says(str(caught.value), where="runs/name/id leads to", got="private/id", expected="expected a place inside",
                cure="Remove the link")  # fmt: skip
    assert json.loads((private / "id/results.json").read_text()) == {"precious": True}


def test_a_result_that_is_a_link_is_removed_and_not_followed(tmp_path):
    save(tmp_path / "private/precious.png", np.zeros((4, 4), np.uint8))
    folder = RunFolder.open(tmp_path / "runs", "name", run_id="id", settings={})
    (folder.path / "predictions").symlink_to(tmp_path / "private")
    folder.start_over({})
    assert not (folder.path / "predictions").exists()
    assert (tmp_path / "private/precious.png").exists()


def test_the_root_of_all_runs_may_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    RunFolder.open(tmp_path / "runs", "name", run_id="id", settings={"a": 1})
    assert (tmp_path / "disk/name/id/settings.json").exists()


def test_linked_files_inside_of_the_data_are_data(segadapt, root, overrides_of):
    (root / "images/b.png").rename(root / "elsewhere.png")
    (root / "images/b.png").symlink_to(root / "elsewhere.png")
    assert segadapt("adapt", *overrides_of("tta.method=source"))[0] == 0


@pytest.mark.parametrize("name", ["../outside.png", "/etc/hostname", "linked/file.png"])
def test_an_entry_of_a_manifest_cannot_leave_its_set(tmp_path, name):
    (tmp_path / "outside.png").touch()
    (tmp_path / "elsewhere").mkdir()
    dataset = ToyTown(split="validation", count=1, world_seed=0, weather="clear", tasks_seed=0)
    task, output = [Task(0, "contrast", 1)], tmp_path / "set"
    write_set(dataset, task, output, seed=0, workers=1, progress=False)
    (output / "linked").symlink_to(tmp_path / "elsewhere")
    manifest = json.loads((output / "manifest.json").read_text())
    manifest["sha256"][name] = "0" * 64
    (output / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError) as caught:
        write_set(dataset, task, output, seed=0, workers=1, progress=False)
    assert_says(str(caught.value), where="leads to", got=Path(name).name, expected="expected a place inside",
                cure="Delete the whole set")  # fmt: skip


@pytest.mark.parametrize("key", ["../x", "/x", "a/../../x", "a\\..\\x", "a//x"])
def test_a_key_cannot_leave_the_set_that_is_written(tmp_path, key):
    class Climbing(ToyTown):
        def keys(self, task):
            return [key]

    dataset = Climbing(split="validation", count=1, world_seed=0, weather="clear", tasks_seed=0)
    with pytest.raises(UserError, match="would not stay inside the output folder"):
        write_set(dataset, [Task(0, "contrast", 1)], tmp_path / "set", seed=0, workers=1, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["[" * 100_000, "[1, 2]", "{", '{"settings": {}}'])
def test_json_that_others_wrote_is_one_line(tmp_path, content):
    dataset = ToyTown(split="validation", count=1, world_seed=0, weather="clear", tasks_seed=0)
    task, output = [Task(0, "contrast", 1)], tmp_path / "set"
    write_set(dataset, task, output, seed=0, workers=1, progress=False)
    (output / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json: .*expected .* Delete the whole set and write it again\.$"):
        write_set(dataset, task, output, seed=0, workers=1, progress=False)
    RunFolder.open(tmp_path, "name", run_id="id", settings={"a": 1})
    (tmp_path / "name/id/settings.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested too deep to be read; expected a few levels"):
        RunFolder.open(tmp_path, "name", run_id="id", settings={"a": 1})


# -- what a run leaves ------------------------------------------------------------------------------------------------

CANARY = "canary0123456789canary0123456789canary01"  # as long as a key of W&B


def files_below(*folders: Path) -> set[Path]:
    return {path for folder in folders for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_no_secret_and_no_stray_file_is_left(tmp_path, root, overrides_of):
    """Keys of the environment are in no record, config, log or file of W&B, and only the run folder has new files."""
    pytest.importorskip("wandb")
    for name in ("home", "work", "temporary"):
        (tmp_path / name).mkdir()
    before = files_below(tmp_path)
    names = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "DATABASE_URL")
    own = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment = own | dict.fromkeys(names, CANARY) | {
        "DATABASE_URL": f"postgres://user:{CANARY}@host/db", "HTTPS_PROXY": f"http://user:{CANARY}@127.0.0.1:9",
        "WANDB_BASE_URL": f"https://user:{CANARY}@wandb.example", "HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "temporary"), "WANDB_MODE": "offline",
    }  # fmt: skip
    command = overrides_of("tta.save_adapted=true", "logging.predictions=all", "logging.wandb.mode=offline")
    program = "import sys; from segadapt.__main__ import main; sys.argv[0] = 'segadapt'; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "adapt", *command], cwd=tmp_path / "work", env=environment, timeout=200,
        capture_output=True, text=True, check=False, umask=0o022,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    new = files_below(tmp_path) - before
    assert len(new) > 10
    assert any(path.suffix == ".wandb" for path in new)
    assert [path for path in new if CANARY.encode() in path.read_bytes()] == []
    assert CANARY not in done.stdout + done.stderr
    assert [path for path in new if not path.is_relative_to(root.parent / "runs") and not is_a_cache(path)] == []
    assert [path for path in new if path.stat().st_mode & stat.S_IWOTH] == []
    assert [path for path in new if path.suffix == ".py"] == [], "save_code=False"


def is_a_cache(path: Path) -> bool:
    """Folders that libraries keep in a home."""
    return ".cache" in path.parts or ".config" in path.parts


@pytest.mark.parametrize(
    "override",
    ["data.data_root=https://user:{}@host/data", "model.discriminative.checkpoint=https://user:{}@host/model",
     "logging.wandb.entity=https://user:{}@host", "data.severity='ftp://user:{}@host'",
     "data.corruptions=['http://user:{}@host']", "+model.sha256={{generative: 'http://user:{}@host'}}"],
)  # fmt: skip
def test_a_password_in_a_setting_is_refused_and_not_repeated(segadapt, root, overrides_of, override):
    status, stdout, stderr = segadapt("adapt", *overrides_of(override.format(CANARY)))
    assert status == 2
    name = override.partition("=")[0].lstrip("+")
    assert_says(stderr, where=name, got="an address with a password", expected="expected none", cure="environment")
    assert CANARY not in stdout + stderr
    assert not (root.parent / "runs").exists()


@pytest.mark.parametrize("value", ["${oc.env:SECRET}", "${data.${oc.env:SECRET}}", "a ${oc.decode:SECRET}"])
def test_the_environment_cannot_be_read_into_a_setting(segadapt, root, overrides_of, monkeypatch, value):
    monkeypatch.setenv("SECRET", CANARY)
    status, stdout, stderr = segadapt("adapt", *overrides_of(f"data.name='{value}'"))
    assert status == 2
    assert_says(stderr, where="a setting holds", got="${", expected="expected a plain value", cure="Write the value")
    assert CANARY not in stdout + stderr
    assert not (root.parent / "runs").exists()


def test_a_secret_in_a_message_of_wandb_is_struck_out(tmp_path, monkeypatch, caplog):
    class Leaky:
        def finish(self):
            raise OSError(f"cannot reach https://user:{CANARY}@wandb.example with key {CANARY}")

    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    Wandb(Leaky(), tmp_path / "noted.json", lambda: None).finish()
    assert CANARY not in caplog.text
    assert "copy lost" in caplog.text
