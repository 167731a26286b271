"""The command line: a mistake is one line and status 2; help, composition and sweeps are Hydra's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from segadapt import __main__ as command
from segadapt.__main__ import VERBS, options_first
from segadapt.datasets.toytown import CLASSES


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("adpt", "segadapt adpt: adpt is not a verb. Did you mean adapt?"),
        ("adapt data.severty=3", "segadapt adapt: data.severty is not a setting. Did you mean data.severity?"),
        ("adapt +data.severty=3 data.data_root=.", "data.severty is not a setting. Did you mean data.severity?"),
        ("adapt dta.severity=3", "dta.severity is not a setting. Did you mean data.severity?"),
        ("adapt lr=3", "lr is not a setting. Did you mean tta.optimizer.lr?"),
        ("adapt foo.bar=3", "segadapt adapt: foo.bar is not a setting. Choose from: data, experiment, logging, model"),
        ("train model/discriminative=segformer_b0", "is not a choice. Did you mean segformer_b0_scratch?"),
        ("train model/discriminative=resnet50", "toytown_scratch, upernet_swin_b"),
        ("train ~foo", "segadapt train: foo is not a setting. Choose from: data, evaluate, experiment"),
        ("train trian.iters=5", "trian.iters is not a setting. Did you mean train.iters?"),
        ("train model.foo.bar=1", "model.foo.bar is not a setting. Choose from: model.discriminative, model.sha256."),
        ("train train/trnsforms=mmseg", "train/trnsforms is not a setting. Did you mean train/transforms?"),
        (
            "adapt data=toytown_c data.corruptions=[{a:1}]",
            "data.corruptions=[{'a': 1}]: expected a list of texts (",
        ),
        ("convert convert.ignored={a:1}", "convert.ignored='{a:1}': expected a list of texts (names of colours"),
        (
            "convert convert.colours={a:[x,1,2]}",
            "colours={'a': ['x', 1, 2]}: expected a mapping {name: value} of lists of whole numbers, or null (",
        ),
        ("convert convert.colours={a:5}", "convert.colours={'a': 5}: expected a mapping {name: value} of lists of"),
        ("convert convert.colours=[5]", "convert.colours=[5]: expected a mapping {name: value} of lists of whole"),
        ("convert convert.grey=[nan]", "convert.grey=[nan]: expected a list of whole numbers (instead"),
        ("train train.transforms.sizes_px=[1]", "sizes_px=[1]: expected a list of lists of whole numbers ("),
        ("train train.optimizer.lr=inf", "train.optimizer.lr=inf: expected finite numbers (learning rate"),
        ("evaluate data=toytown evaluate.scales=[inf]", "evaluate.scales=[inf]: expected finite numbers (factors"),
        ("adapt model.sha256.a=x", "model.sha256.a=x adds a name to model.sha256; expected a plus in front of it. W"),
        ("adapt tta.method=cotta tta.options.restoree=1", "tta.options.restoree is not a setting. Did you mean tta.op"),
        ("adapt tta.method=cotta tta.options.foo=1", "foo is not a setting. Choose from: average, confidence, flip, r"),
        ("adapt tta.method=cotta ~tta.options.flip tta.options.flip=true", "in front of it. Write +tta.options.flip=t"),
        (
            "train model.discriminative.config.depth=3",
            "depth is not a setting. Did you mean model.discriminative.confi",
        ),
        ("train model.discriminative.config.depth=3", "? A new name has a plus in front of it: +model.discriminative"),
        (
            "train ~train.optimizer",
            "segadapt train: train.optimizer is missing; expected its settings. Leave ~train.op",
        ),
        ("train train=null", "segadapt train: train=null: train holds settings; expected the name of one of its choic"),
        ("train train/losses=[1]", "train/losses=[1]: train.losses holds settings; expected the name of one of its ch"),
        ("train train.optimizer=[1]", "train.optimizer=[1]: train.optimizer holds settings; expected the name of one "),
        ("train train.optimizer={a:1}", "train.optimizer={a:1}: train.optimizer holds settings; expected the name"),
        (f"train train.optimizer.lr=1{'0' * 400}", "train.optimizer.lr: a whole number beyond 1.8e+308; expected a"),
        (f"train train.iters=1{'0' * 400}", "train.iters: a whole number beyond 1.8e+308; expected a smaller one."),
        ("train train.losses=default", "train.losses is not a setting. Did you mean train/losses=default?"),
        ("adapt datta=toytown", "datta is not a setting. Did you mean data?"),
        ("adapt data=ade20kc", "data=ade20kc is not a choice. Did you mean ade20k_c?"),
        ("adapt model/generative=sd3_mediun", "model/generative=sd3_mediun is not a choice. Did you mean sd3_medium?"),
        ("adapt runtime=gpu", "runtime=gpu is not a choice. Did you mean cpu?"),
        ("adapt experiment=toytown", "experiment=toytown is not a choice. Did you mean toytown_c?"),
        ("adapt data.severity=x", "data.severity='x'"),
        ("adapt data=toytown_c data.severity=6", "data.severity=6: expected at least 1 and at most 5"),
        ("adapt data.severity", "data.severity cannot be read; expected key=value."),
        ("adapt data.corruptions=[fog", "data.corruptions=[fog cannot be read"),
        ("adapt", "data.data_root has no value: folder of the data set. Set data.data_root=VALUE."),
        ("adapt data=folder", "data.classes has no value"),
        ("corrupt data.data_root=.", "corrupt.output has no value"),
        ("adapt data.data_root=no-such-folder", "no-such-folder/ADE20K_val-c"),
        ("evaluate data=toytown data.corruptions=[fogg]", "corruption 'fogg' is not known. Did you mean fog?"),
        ("evaluate data=toytown model.discriminative.checkpoint=segadapt:toytown/segfomer", "is not a bundled model"),
        (
            "diagnose data=toytown_c model/generative=toytown diagnose.sigmas=[2]",
            "diagnose.sigmas=[2.0]: expected one or more noise levels",
        ),
        ("train data=toytown_c", "data.corruptions=['gaussian_noise',"),
        (
            "train-generative model/generative=toytown",
            "train.autoencoder_iters=2000 beside model.generative.checkpoint=segadapt:toytown/sd3",
        ),
        (
            "train-generative train.broad.probability=2",
            "train.broad.probability=2.0: expected at least 0",
        ),
        ("adapt --config-dir no-such-folder", "no-such-folder' not found"),
        ("adapt --multirun data=toytown_c data.severity=6,7", "data.severity=6: expected"),
    ],
)
def test_a_mistake_is_one_line_with_its_cure_and_status_2(segadapt, arguments, expected):
    status, _, stderr = segadapt(*arguments.split())
    assert status == 2
    assert stderr.startswith(f"segadapt {arguments.split()[0]}: ")
    assert stderr.count("\n") == 1
    assert stderr.endswith("\n")
    assert expected in stderr


def test_no_verb_lists_the_verbs(segadapt):
    status, stdout, stderr = segadapt()
    assert (status, stderr) == (0, "")
    assert [verb for verb in VERBS if f"  {verb} " not in stdout] == []


@pytest.mark.parametrize("verb", VERBS)
def test_help_and_configuration_are_shown_without_a_run(segadapt, verb):
    own = {"grid": "methods:", "results": "runs:", "report": "runs:", "convert": "source:", "align": "reference:"}
    setting = own.get(verb, "data:")
    for arguments, word in ((("--help",), "Powered by Hydra"), (("--cfg", "job"), setting)):
        status, stdout, stderr = segadapt(verb, *arguments)
        assert (status, stderr) == (0, "")
        assert word in stdout
    assert os.listdir() == []


def test_help_needs_no_torch():
    code = ("import sys; sys.argv = ['segadapt', 'adapt', '--cfg', 'job']; import segadapt.__main__ as m; m.main(); "
            "sys.exit('torch' in sys.modules)")  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0


@pytest.fixture(scope="module")
def toytown_on_cpu(saved_models) -> list[str]:
    """Overrides for two images of ToyTown and tiny models that know its classes."""
    return [
        "data=toytown_c", "data.corruptions=[fog]", "data.limit=2", "data.workers=0", "runtime=cpu",
        "data.short_side_px=32", "model.generative.window_px=32", "model.generative.stride_px=32",
        *saved_models(CLASSES),
    ]  # fmt: skip


def test_a_sweep_over_two_learning_rates_leaves_two_run_folders(segadapt, toytown_on_cpu):
    status, _, stderr = segadapt("adapt", "--multirun", *toytown_on_cpu, "tta.optimizer.lr=0.001,0.01")
    assert status == 0, stderr
    settings = [json.loads(path.read_text()) for path in Path("outputs/adapt").glob("*/settings.json")]
    assert sorted(run["tta"]["optimizer"]["lr"] for run in settings) == [0.001, 0.01]
    assert len(list(Path("outputs/adapt").glob("*/results.json"))) == 2


def test_an_experiment_file_of_ones_own_sets_everything(segadapt, toytown_on_cpu, tmp_path):
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n  - override /data: toytown_c\n  - override /runtime: cpu\n"
        "experiment: {name: mine, id: one}\n"
        "data: {corruptions: [snow], severity: 2}\n"
        "tta: {forward_mode: discriminative_only}\n"
    )
    rest = [text for text in toytown_on_cpu if not text.startswith(("data=", "data.corruptions", "runtime="))]
    status, stdout, stderr = segadapt("adapt", "--config-dir", "mine", "experiment=mine", *rest)
    assert status == 0, stderr
    results = json.loads(Path("outputs/mine/one/results.json").read_text())
    assert [task["task"] for task in results["tasks"]] == ["snow/2"]
    assert results["method"] == "source"
    assert "protocol: method source" in stdout


@pytest.mark.parametrize(
    ("given", "ordered"),
    [
        (["a=1", "--multirun", "b=1,2"], ["--multirun", "a=1", "b=1,2"]),
        (["experiment=x", "--config-dir", "d", "b=1"], ["--config-dir", "d", "experiment=x", "b=1"]),
        (["a=1", "--cfg", "job", "~b"], ["--cfg", "job", "a=1", "~b"]),
        (["a=1", "--config-dir=d", "b=1"], ["--config-dir=d", "a=1", "b=1"]),
        (["a=1", "--config-dir"], ["--config-dir", "a=1"]),
    ],
)
def test_options_may_stand_between_overrides(given, ordered):
    assert options_first(given) == ordered


def test_yaml_slip_in_an_experiment_file_is_one_line_with_its_place(tmp_path, segadapt):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "bad.yaml").write_text("# @package _global_\ndata:\n  corruptions: [fog\n")
    status, _, stderr = segadapt("demo", "--config-dir", str(tmp_path), "experiment=bad")
    assert (status, stderr.count("\n")) == (2, 1)
    assert "bad.yaml, line" in stderr
    assert stderr.endswith("Correct the YAML.\n")


def test_an_experiment_file_of_other_characters_is_one_line(tmp_path, segadapt):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "bad.yaml").write_bytes(b"\xff\xfe")
    status, _, stderr = segadapt("demo", "--config-dir", str(tmp_path), "experiment=bad")
    assert (status, stderr.count("\n")) == (2, 1)
    assert "a YAML file is not UTF-8" in stderr


def test_output_folder_that_cannot_be_written_is_one_line(tmp_path, segadapt):
    (tmp_path / "file").write_text("")
    status, _, stderr = segadapt("demo", f"logging.root={tmp_path / 'file'}", "data.limit=1", "data.corruptions=[fog]")
    assert (status, stderr.count("\n")) == (2, 1)
    assert "cannot be written (Not a directory). Choose a folder of your own." in stderr


@pytest.mark.parametrize(("rank", "waits"), [("0", []), ("1", [command.FIRST_S])])
def test_a_refusal_is_left_to_the_first_process_of_torchrun(monkeypatch, capsys, rank, waits):
    waited = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "argv", ["segadapt", "trian"])
    monkeypatch.setattr(command.time, "sleep", waited.append)
    with pytest.raises(SystemExit, match=r"^2$"):
        command.main()
    assert waited == waits
    assert capsys.readouterr().err == "segadapt trian: trian is not a verb. Did you mean train?\n"
