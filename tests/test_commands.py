"""Every command of README and docs: its settings are read; and, slow, it runs and leaves what its verb leaves.

Paths lead to tiny substitutes for weights and data; of ToyTown and of grids, which need none, a small part is run.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from documents import (
    PAGES,
    ROOT,
    Command,
    anchors,
    commands,
    inline_commands,
    links,
    name_of,
    write_configs,
    write_world,
)
from hydra.core.global_hydra import GlobalHydra

from segadapt import __main__ as command_line

NO_NETWORK = "needs the network"
NO_SLURM = "needs Slurm and Hydra's launcher for it"
OWN_TEST = "the Makefile's own rules: .ci/run calls them"
PROCESSES = "test_parallel_training.py"
PRETRAINED = "test_pretrain.py"
SUBSETS = "more images than the stand-in has: test_subsets.py"
LAYOUTS = "test_parallel_layouts.py"
NOT_RUN = {
    "git clone <URL of this repository> segadapt && cd segadapt": NO_NETWORK,
    "pip install -c constraints.txt -e '.[sd3,wandb]'": NO_NETWORK,
    "hf auth login": NO_NETWORK,
    "hf download stabilityai/stable-diffusion-3-medium-diffusers "
    "--local-dir weights/stable-diffusion-3-medium-diffusers": NO_NETWORK,
    "hf download nvidia/segformer-b5-finetuned-ade-640-640 "
    "--local-dir weights/segformer-b5-finetuned-ade-640-640": NO_NETWORK,
    "torchrun --nproc-per-node 4 -m segadapt train data=ade20k data.data_root=/data/ade20k "
    "data.cache=false train.parallel=ddp": PROCESSES,
    "torchrun --nproc-per-node 2 -m segadapt train data=ade20k data.data_root=/data/ade20k data.cache=false "
    "train.parallel=pipeline train.accumulate=2": LAYOUTS,
    "torchrun --nproc-per-node 2 -m segadapt train runtime=cpu data.count=200 train.iters=300 "
    "train.schedule.warmup_iters=20 train.validate_every=100 train.parallel=ddp experiment.name=two": PROCESSES,
    "torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m segadapt train "
    "data=ade20k data.data_root=/data/ade20k logging.root=/shared/outputs experiment.id=b5 train.parallel=2d "
    "train.tensor_parallel=4": LAYOUTS,
    "torchrun --nproc-per-node 4 -m segadapt pretrain data.data_root=/data/imagenet train.parallel=ddp": PRETRAINED,
    "segadapt train experiment=segformer_b0_ade20k data.data_root=/data/ade20k experiment.name=curve --multirun "
    "data.subset=1,2,4,8,16 experiment.seed=0,1,2": SUBSETS,
    "segadapt results outputs/curve table=subsets plot=curve.svg": SUBSETS,
    "make demo": OWN_TEST,
    "make test": OWN_TEST,
    "segadapt demo data.limit=2 'data.corruptions=[posterise]'": "the name is added on that page: test_extending.py",
    "sbatch --array=1-$(wc -l < cells.txt)%32 --gres=gpu:1 --cpus-per-task=4 --wrap "
    "'eval \"$(sed -n \"${SLURM_ARRAY_TASK_ID}p\" cells.txt)\"'": NO_SLURM,
    "segadapt adapt --multirun hydra/launcher=submitit_slurm hydra.launcher.partition=gpu "
    "hydra.launcher.gpus_per_node=1 hydra.launcher.cpus_per_task=4 hydra.launcher.timeout_min=1440 "
    "hydra.launcher.array_parallelism=32 experiment=toytown_c runtime.threads=1 tta.method=source,bn,generative "
    "experiment.seed=0,1,2 'data.corruptions=[fog],[snow]'": NO_SLURM,
}  # fmt: skip
SD3 = "model.generative.checkpoint=weights/stable-diffusion-3-medium-diffusers"
SEGFORMER = "model.discriminative.checkpoint=weights/segformer-b5-finetuned-ade-640-640"
ONE = ["data.corruptions=[fog]", "data.limit=1"]
FEW_STEPS = ["train.iters=2", "train.schedule.warmup_iters=0", "train.batch_size=1", "data.count=4",
             "train.validation_images=1", "runtime=cpu"]  # fmt: skip
# Beginning of a command: what stands behind it here, the first that fits.
BEHIND = {
    "segadapt demo": ["data.limit=1"],
    "segadapt grid experiment=toytown_c": [*ONE, "grid.seeds=[0]"],
    "segadapt grid --config-dir configs grid=mine": [*ONE, "grid.methods=[source]", "grid.seeds=[0]"],
    "segadapt grid --config-dir configs experiment=dusa": [*ONE, "grid.methods=[source,generative]", "grid.seeds=[0]"],
    "segadapt check experiment=toytown_c": ["data.limit=1", "data.corruptions=[fog]"],
    "segadapt adapt experiment=toytown_c": ["data.limit=1"],
    "segadapt diagnose experiment=toytown_c": ["data.limit=1", "diagnose.sigmas=[0.25]"],
    "segadapt train --config-dir configs data=own": [
        "train.iters=1",
        "train.schedule.warmup_iters=0",
        "train.batch_size=2",
        "runtime=cpu",
    ],
    "segadapt adapt data=folder": [SEGFORMER, SD3, "data.limit=1"],
    "segadapt train train/losses=lovasz": FEW_STEPS,
    "segadapt train train/losses=contrast_memory": [*FEW_STEPS, "train.losses.contrast.warmup_iters=1"],
    "segadapt train-generative data=ade20k": [SD3, "train.iters=1", "train.validation_images=1"],
    "segadapt train experiment=segformer_b0_ade20k": [
        "model.discriminative.backbone=null",
        "train.iters=1",
        "train.schedule.warmup_iters=0",
        "train.batch_size=2",
        "train.transforms.crop_px=64",
        "train.validation_images=1",
        "data.workers=0",
    ],
    "segadapt train data.count=200": [
        "data.count=2",
        "train.batch_size=1",
        "train.iters=2",
        "train.validate_every=1",
        "train.schedule.warmup_iters=1",
        "train.validation_images=1",
    ],
    "segadapt train data=ade20k": [
        "train.transforms.crop_px=64",
        "train.batch_size=1",
        "train.iters=1",
        "train.schedule.warmup_iters=0",
        "data.workers=0",
    ],
    "segadapt pretrain data.data_root=/data/imagenet": [
        "train.transforms.image_px=32",
        "train.transforms.validation_short_side_px=32",
        "train.batch_size=2",
        "train.iters=1",
        "train.schedule.warmup_iters=0",
        "data.workers=0",
        "runtime=cpu",
    ],
    "segadapt pretrain data.data_root=things": [
        "train.iters=2",
        "train.schedule.warmup_iters=1",
        "train.validate_every=1",
    ],
    "segadapt adapt --config-dir configs experiment=mine --multirun": ["data.corruptions=[fog]", "data.limit=1"],
}
LEAVES = {  # file that a verb writes last
    "adapt": "results.json",
    "evaluate": "results.json",
    "diagnose": "diagnosis.json",
    "train": "results.json",
    "train-generative": "results.json",
    "pretrain": "results.json",
    "corrupt": "manifest.json",
    "convert": "manifest.json",
    "split": "split.json",
    "check": "check.json",
    "demo": "summary.json",
    "grid": "table.md",
    "report": "report.html",
}
SHOWN = [command for page in PAGES if page.name != "README.zh-CN.md" for command in commands(page)]
RUN = [command for command in {command.text: command for command in SHOWN}.values() if command.text not in NOT_RUN]
INLINE = [
    command for page in PAGES if page.name != "extending.md" for command in inline_commands(page)
]  # own names there


def name(command: Command) -> str:
    return f"{command.page}: {command.text[:60]}"


def test_what_is_not_run_is_shown_somewhere():
    assert sorted(set(NOT_RUN) - {command.text for command in SHOWN}) == []


def test_what_stands_behind_a_command_stands_behind_one():
    assert [start for start in BEHIND if not any(command.text.startswith(start) for command in RUN)] == []


def test_both_readmes_show_the_same_commands():
    english, chinese = (commands(page) for page in PAGES[:2])
    assert len(english) > 5
    texts = [
        [command.text for command in each if not command.text.startswith("git clone")] for each in (english, chinese)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page):
    for file, anchor in links(page):
        assert file.exists(), file
        assert not anchor or anchor in anchors(file), f"{file.name}#{anchor}"


def test_every_page_is_in_the_index():
    index = ROOT / "docs" / "README.md"
    linked = {file for file, _ in links(index)}
    assert [page.name for page in PAGES[2:] if page not in linked | {index}] == []


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("world")
    write_configs(path)
    return path


@pytest.fixture
def segadapt(world, monkeypatch):
    """segadapt(words): the command in this process, in the world's folder; the exit status."""
    monkeypatch.chdir(world)
    monkeypatch.setenv("HOME", str(world))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # `main` sets it: undo that after the test

    def call(words: list[str]) -> object:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", words)
        try:
            command_line.main()
        except SystemExit as error:
            return error.code or 0
        return 0

    return call


def in_world(command: Command, world: Path) -> list[str]:
    """The words of a command, /data being the world's."""
    return [word.replace("/data/", f"{world}/data/") for word in command.words]


@pytest.mark.parametrize("command", [c for c in SHOWN + INLINE if c.verb and NOT_RUN.get(c.text) != NO_SLURM], ids=name)
def test_settings_of_every_command_are_read(command, world, segadapt, monkeypatch, capsys):
    """No value, key, option or file of a command is wrong; models and data are not looked at."""
    read = []
    monkeypatch.setattr(command_line, "_function", lambda _: read.append)
    words = in_world(command, world)
    words = words[: words.index(">")] if ">" in words else words
    schema = command_line.VERBS[str(command.verb)][1]
    asked_for = "--cfg" in words
    assert segadapt(words) == 0, capsys.readouterr().err
    assert [type(settings) for settings in read] == [schema] * len(read)
    assert bool(read) != asked_for


@pytest.fixture(scope="module")
def tiny(world) -> Path:
    write_world(world)
    return world


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN, ids=name)
def test_every_command_runs(command, tiny, segadapt, monkeypatch, capfd):
    """In the order of the pages: some read what the one before has left."""
    words = in_world(command, tiny)
    words, into = (words[: words.index(">")], words[-1]) if ">" in words else (words, None)
    words += next((more for start, more in BEHIND.items() if command.text.startswith(start)), [])
    before = found(command.verb)
    status = run_elsewhere(command, words, tiny) if command.verb is None else segadapt(words)
    said = capfd.readouterr()
    assert status == 0, said.err[-2000:]
    if into is not None:
        Path(into).write_text(said.out)
        assert all(shlex.split(line)[0] for line in said.out.splitlines())
    if command.verb in LEAVES and into is None and "--cfg" not in words:
        assert found(command.verb) != before or "is finished" in said.out  # by another page
    elif command.verb == "results":
        assert "| source" in said.out or "source &" in said.out


def found(verb: str | None) -> dict[Path, int]:
    """Files that the verb writes last, and when."""
    return {path: path.stat().st_mtime_ns for path in Path().rglob(LEAVES.get(str(verb), "-"))}


def run_elsewhere(command: Command, words: list[str], world: Path) -> int:
    """A script, in a process of its own; its variables lead into the world."""
    small = {"IMAGES": "1", "CORRUPTIONS": "[fog]", "ASKED": "1", "SIGMAS": "[0.25]", "LEAST_MIOU": "0"}
    environment = {name: value.replace("/data/", f"{world}/data/") for name, value in command.variables.items()} | small
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    words = [str(ROOT / word) if word.startswith(("examples/", "benchmarks/")) else word for word in words]
    return subprocess.run(
        words, env=os.environ | environment | {"PATH": path, "PYTHONPATH": str(ROOT)}, check=False
    ).returncode
