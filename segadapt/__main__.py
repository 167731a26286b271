"""The command: `segadapt VERB [key=value ...]`; each verb is a Hydra app over the config tree of the package."""

import importlib
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from typing import NoReturn

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin stall a busy machine

import hydra
import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError

from segadapt import __version__, config, config_data, config_pretraining, config_training, config_verbs
from segadapt.errors import UserError, did_you_mean
from segadapt.explain import explained
from segadapt.machine import check_versions, fault_of
from segadapt.parse import methods_as_files, parse
from segadapt.signals import Stopped

# verb: (primary config, schema, function as module:name, what it does)
VERBS: dict[str, tuple[str, type, str, str]] = {
    "adapt": ("adapt", config.AdaptConfig, "segadapt.adapt:run", "adapt a segmenter at test time, image by image"),
    "evaluate": ("evaluate", config.EvaluateConfig, "segadapt.adapt:run", "score a segmenter, forward only"),
    "corrupt": ("corrupt", config_data.CorruptConfig, "segadapt.corrupt:run", "write a corrupted set from a clean one"),
    "convert": ("convert", config_data.ConvertConfig, "segadapt.convert:run", "labels of colours or greys to ids"),
    "split": ("split", config_data.SplitConfig, "segadapt.split:run", "lists of keys for training and validation"),
    "train": ("train", config_training.TrainConfig, "segadapt.train:run", "train a segmenter"),
    "pretrain": ("pretrain", config_pretraining.PretrainConfig, "segadapt.pretrain:run",
                 "train the encoder of a SegFormer as a classifier"),
    "train-generative": (
        "train_generative", config_training.TrainGenerativeConfig, "segadapt.train_generative:run",
        "train a small teacher"),
    "diagnose": ("diagnose", config_verbs.DiagnoseConfig, "segadapt.diagnose:run",
                 "ask whether the teacher can teach; reads labels: never choose settings by it on a test split"),
    "check": ("check", config_verbs.CheckConfig, "segadapt.check:run", "read data and models before a run"),
    "align": ("align", config_verbs.AlignConfig, "segadapt.align:run",
              "compare a checkpoint with stored logits, and save it as a folder"),
    "grid": ("grid", config_verbs.GridConfig, "segadapt.grid:run",
             "adapt: methods x streams x seeds, on GPUs or a cluster"),
    "results": ("results", config_verbs.ResultsConfig, "segadapt.results:run",
                "run folders to tables: results FOLDER ..."),
    "report": ("report", config_verbs.ReportConfig, "segadapt.report.page:run",
               "run folders to one page: report FOLDER ..."),
    "demo": ("demo", config.AdaptConfig, "segadapt.demo:demo", "source against adapted on the bundled world"),
}  # fmt: skip
# Options of Hydra that are followed by a value.
TAKE_VALUE = ("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--cfg", "-c", "--package", "-p")
# Verbs whose arguments may stand by themselves: the setting that they become, and which they are.
GATHERED: dict[str, tuple[str, Callable[[str], bool]]] = {
    "grid": ("grid.given", lambda text: is_of_a_cell(text)),
    "results": ("runs", lambda text: "=" not in text),
    "report": ("runs", lambda text: "=" not in text),
}
FIRST_S = 10  # a process's time to end, after which torchrun ends the others
USAGE = "usage: segadapt VERB [key=value ...]   (segadapt VERB --help; --cfg job; --multirun; --config-dir DIR)\n"


def _function(path: str) -> Callable:
    """Import late: `--help` and `--cfg job` need no torch."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def gathered(arguments: list[str], setting: str, belongs: Callable[[str], bool]) -> list[str]:
    """`results A B format=csv`: the words that belong to a list setting stand by themselves; they become runs=[A,B]."""
    values = {index + 1 for index, text in enumerate(arguments) if text in TAKE_VALUE}
    words = [index for index, text in enumerate(arguments)
             if index not in values and not text.startswith("-") and belongs(text)]  # fmt: skip
    quoted = ",".join("'" + arguments[index].replace("'", "\\'") + "'" for index in words)
    rest = [text for index, text in enumerate(arguments) if index not in words]
    return rest + ([f"{setting}=[{quoted}]"] if words else [])


def is_of_a_cell(override: str) -> bool:
    """`grid experiment=mine grid.seeds=[0,1]`: what is not the grid's own is an override of its cells."""
    return re.split(r"[.=/]", override.lstrip("+~"), maxsplit=1)[0] != "grid"


def options_first(arguments: list[str]) -> list[str]:
    """Hydra's parser takes overrides in one block only: `experiment=mine --multirun lr=1,2` needs its options first."""
    options, overrides, rest = [], [], iter(arguments)
    for argument in rest:
        if argument.startswith("-"):
            options.append(argument)
            options += [value for value in [next(rest, None)] if value is not None] if argument in TAKE_VALUE else []
        else:
            overrides.append(argument)
    return options + overrides


def _is_first() -> bool:
    """This process is the first of those of torchrun, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def _refuse(verb: str, error: UserError) -> NoReturn:
    """Mostly all processes find the same, and the first one says it; what another alone has found it says later."""
    if not _is_first():
        time.sleep(FIRST_S)
    sys.stderr.write(f"segadapt {verb}: {error}\n")
    sys.exit(2)


def main() -> None:
    """Exit status 0; 2 for a user's mistake or what the machine did, 128 + signal for a stop, each in one line."""
    verb, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if verb in ("--help", "-h", "help"):
        sys.stdout.write(USAGE + "".join(f"  {name:<17} {row[3]}\n" for name, row in VERBS.items()))
        return
    if verb == "--version":
        sys.stdout.write(f"segadapt {__version__}\n")
        return
    try:
        if verb not in VERBS:
            raise UserError(f"{verb} is not a verb.{did_you_mean(verb, VERBS)}")
        check_versions(platform.python_version())
        _start(verb, arguments)
    except UserError as error:
        _refuse(verb, error)
    except KeyboardInterrupt:
        if _is_first():
            sys.stderr.write(f"segadapt {verb}: interrupted; give the same command again\n")
        sys.exit(130)


def _start(verb: str, arguments: list[str]) -> None:
    """Hand over to Hydra; its errors about the command line become UserErrors."""
    primary, schema, path, _ = VERBS[verb]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise instead of printing and exiting with 1
    if verb in GATHERED:
        arguments = gathered(arguments, *GATHERED[verb])
    arguments = methods_as_files(arguments)
    sys.argv = [f"segadapt {verb}", *options_first(arguments)]

    @hydra.main(version_base="1.3", config_path="pkg://segadapt.conf", config_name=primary)
    def job(composed: DictConfig) -> None:
        try:
            settings = parse(composed, schema)  # before torch is imported
            _function(path)(settings)
        except UserError as error:
            _refuse(verb, error)  # here: Hydra would put a line of its own in front
        except Stopped as stopped:
            if _is_first():
                sys.stderr.write(f"segadapt {verb}: {stopped}\n")
            sys.exit(128 + stopped.signum)
        except (HydraException, OmegaConfBaseException, RecursionError) as error:
            raise RuntimeError("a run must not raise Hydra's errors") from error  # not the user's mistake
        except (OSError, RuntimeError, SafetensorError) as error:
            if (line := fault_of(error)) is None:
                raise
            sys.stderr.write(f"segadapt {verb}: {line}\n")  # of this process's device or host: at once
            sys.exit(2)

    try:
        with explained(schema, arguments):
            job()
    except UnicodeDecodeError as error:
        raise UserError(f"a YAML file is not UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8: an "
                        "experiment file, or one of --config-dir.") from error  # fmt: skip
    except yaml.MarkedYAMLError as error:
        place = f"{error.problem_mark.name}, line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"{place}{error.problem}. Correct the YAML.") from error
    except RecursionError as error:
        raise UserError("a value is nested too deep to be read; expected a few levels of lists and keys. Correct the "
                        "arguments, or the experiment file.") from error  # fmt: skip


if __name__ == "__main__":
    main()
