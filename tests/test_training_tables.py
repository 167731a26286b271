"""benchmarks/training.sh, training.py and cost.py: jobs that can run, the table of what is there, published FLOPs."""

import json
import os
import shlex
import subprocess

import pytest
import torch
from conftest import BENCHMARKS
from quick_settings import quick_settings
from safetensors.torch import save_file

from segadapt.__main__ import VERBS
from segadapt.models.discriminative.make import make_segmenter

PYTHON_STUB = """#!/bin/bash
case $1 in
  *sweep.py) cat >>"$OUTPUT/jobs"; [[ -z $FAIL ]] ;;
  *) echo "$@" >>"$OUTPUT/others" ;;
esac
"""


def run_script(folder, *stages: str, **given: str) -> int:
    """training.sh with a stub in place of python3, which keeps what it is asked for."""
    (folder / "python3").write_text(PYTHON_STUB)
    (folder / "python3").chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "OUTPUT": str(folder), "CAMVID": str(folder),
                   "DINOV2": "/d.safetensors", "TAESD3": str(folder), "SEEDS": "0 1", "FAIL": ""} | given  # fmt: skip
    command = ["bash", str(BENCHMARKS / "training.sh"), str(folder / "out"), *stages]
    return subprocess.run(command, env=environment, capture_output=True).returncode


def pairs(line: str) -> dict[str, str]:
    """Overrides of a job; of two of one setting the later."""
    return dict(part.split("=", 1) for part in shlex.split(line)[1:])


def settings_of(line: str):
    """UserError: the job cannot run."""
    verb, *overrides = shlex.split(line)
    primary, schema, *_ = VERBS[verb]
    return quick_settings(primary, overrides, schema)


def test_every_network_is_trained_tested_and_adapted(tmp_path):
    assert run_script(tmp_path, "all", ROWS="networks", ITERS="90") == 0
    lines = (tmp_path / "jobs").read_text().splitlines()
    named = {f"{given['experiment.name']}/{given['experiment.id']}": line for line in lines for given in [pairs(line)]}
    trained = {name: settings_of(line) for name, line in named.items() if "-train-" in name}
    assert len(trained) == 9 + 3  # a second seed of three networks
    assert {(job.train.iters, job.train.schedule.warmup_iters) for job in trained.values()} == {(90, 9), (120, 12)}
    for name, job in trained.items():
        own = job.model.discriminative
        assert own.backbone == ("/d.safetensors" if "dinov2" in name else None)
        assert own.checkpoint is None
    assert settings_of(named["camvid-teacher/s0"]).train.iters == 2600
    tested = {name.replace("-train-", "-test-") for name in trained}
    assert tested == {name for name in named if "-test-" in name}
    methods = [name.rsplit("-", 1)[1] for name in named if "-adapt-knet" in name]
    assert methods == ["generative/s0", "tent/s0", "bn/s0", "source/s0"]
    assert len([name for name in named if "-adapt-" in name]) == 9 * 4 - 1  # Mask2Former has no BatchNorm
    adapted = settings_of(named["camvid-adapt-knet-swin-t-generative/s0"])
    assert (adapted.data.severity, adapted.data.limit) == (5, 40)
    assert adapted.data.corruptions == ["gaussian_noise", "fog", "pixelate"]
    assert adapted.model.discriminative.checkpoint == str(tmp_path / "out/camvid-train-knet-swin-t/s0/model")
    cost, table = (tmp_path / "others").read_text().splitlines()
    assert "t2t-vit-19=" in cost
    assert "--methods source bn tent generative" in table


def test_a_failed_stage_stops_no_other_and_is_told_at_the_end(tmp_path):
    assert run_script(tmp_path, "test,table", FAIL="yes") == 1
    assert (tmp_path / "others").is_file()
    assert run_script(tmp_path, "tests") == 2
    assert run_script(tmp_path, "all", METHODS="bn tent") == 2  # gains over nothing


def test_a_network_is_adapted_and_measured_from_the_first_seed_that_it_has(tmp_path):
    assert run_script(tmp_path, "cost,all", ROWS="networks", SEEDS="1 2", METHODS="source") == 0
    jobs, others = ((tmp_path / name).read_text() for name in ("jobs", "others"))
    named = {(given["experiment.name"], given["experiment.id"]): given for given in map(pairs, jobs.splitlines())}
    for name, seed in (("knet-swin-t", "s0"), ("deeplabv3-r50", "s1")):
        model = f"{tmp_path}/out/camvid-train-{name}/{seed}/model"
        assert (f"camvid-train-{name}", seed) in named
        assert named[f"camvid-adapt-{name}-source", seed]["model.discriminative.checkpoint"] == model
        assert f" {name}={model} " in others


def write(path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def test_table_has_a_gain_for_each_method_and_a_dash_for_what_failed(script, tmp_path):
    training = script("training")
    folder = tmp_path / "camvid-train-a" / "s1"
    scores = {"miou": 0.5, "macc": 0.6, "aacc": 0.7}
    write(folder / "results.json", {"steps": 2, "seconds": 31.4, "peak_memory_gib": [1.0], "validation": scores,
                                    "per_class": {"sky": 0.5}, "versions": {}})  # fmt: skip
    speeds = [{"images_per_second": speed} for speed in (1, 20, 40)]
    (folder / "timings.jsonl").write_text("\n".join(map(json.dumps, speeds)))
    (folder / "model").mkdir()
    save_file({"w": torch.zeros(100, 200), "b.running_mean": torch.zeros(7)}, folder / "model" / "model.safetensors")
    for method, values in (("source", (0.1, 0.3)), ("tent", (0.2, 0.25))):
        tasks = [{"task": name, "miou": miou} for name, miou in zip(("fog/5", "pixelate/5"), values, strict=True)]
        results = {"tasks": tasks, "mean": {"miou": sum(values) / 2}}
        write(tmp_path / f"camvid-adapt-a-{method}/s1/results.json", results)
    cost = {"networks": {"a": {"parameters": 30_000, "gflops": 9.87, "images_per_second": 51.23}}}
    methods = ["source", "bn", "tent"]
    networks = {name: training.network(tmp_path, name, cost, methods) for name in ("a", "b")}
    rows = [training.row(name, own, methods) for name, own in networks.items()]
    assert rows[0] == ["a", "0.03 M", "50.00 (1)", "-", "30", "31", "9.9", "51.2", "20.00 (10.00, 30.00)", "-",
                       "+2.50 (+10.00, -5.00)"]  # fmt: skip
    assert rows[1] == ["b", *["-"] * 10]
    assert training.header(networks, methods)[-1] == "tent, mean (fog, pixel)"


def test_a_segformer_has_twice_the_published_multiply_adds(script):
    sizes = {"depths": [2, 2, 2, 2], "hidden_sizes": [32, 64, 160, 256], "num_attention_heads": [1, 2, 5, 8],
             "decoder_hidden_size": 256}  # fmt: skip
    segmenter = make_segmenter("segformer", sizes, 150)
    found = script("cost").gflops(segmenter, torch.zeros(1, 3, 512, 512))
    assert found == pytest.approx(2 * 8.4, rel=0.003)  # Xie et al. 2021, table 1


def test_costs_are_added_only_to_those_of_the_same_machine_and_size(script, tmp_path):
    begun, machine = script("cost").begun, {"device": "CPU", "size_px": [360, 480]}
    assert begun(tmp_path / "cost.json", machine) == machine | {"networks": {}}
    write(tmp_path / "cost.json", machine | {"networks": {"a": {"gflops": 1.5}}})
    assert begun(tmp_path / "cost.json", machine)["networks"] == {"a": {"gflops": 1.5}}
    assert begun(tmp_path / "cost.json", machine | {"device": "GPU"}) == {
        "device": "GPU",
        "size_px": [360, 480],
        "networks": {},
    }
