"""The command: `segadapt VERB [key=value ...]`; each verb is a Hydra app over the config tree of the package."""

import importlib
import os
import sys
from collections.abc import Callable

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from segadapt import __version__, config
from segadapt.errors import UserError, did_you_mean

# verb: (primary config, schema, function as module:name, what it does)
VERBS: dict[str, tuple[str, type, str, str]] = {
    "adapt": ("adapt", config.AdaptConfig, "segadapt.adapt:run", "adapt a segmenter at test time, image by image"),
    "evaluate": ("evaluate", config.EvaluateConfig, "segadapt.adapt:run", "score a segmenter, forward only"),
    "corrupt": ("corrupt", config.CorruptConfig, "segadapt.corrupt:run", "write a corrupted set from a clean one"),
    "train": ("train", config.TrainConfig, "segadapt.train:run", "train a segmenter"),
    "train-generative": (
        "train_generative", config.TrainGenerativeConfig, "segadapt.train_generative:run", "train a small teacher"),
    "check": ("check", config.CheckConfig, "segadapt.check:run", "read data and models before a run"),
    "demo": ("demo", config.AdaptConfig, "segadapt.demo:demo", "source against adapted on the bundled world"),
}  # fmt: skip
USAGE = "usage: segadapt VERB [key=value ...]   (segadapt VERB --help; --cfg job; --multirun; --config-dir DIR)\n"


def _function(path: str) -> Callable:
    """Import late: `--help` and `--cfg job` need no torch."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _explain(error: Exception, schema: type, arguments: list[str]) -> str:
    """One line for what Hydra found wrong with the command line, with the nearest right name."""
    text = " ".join(str(error).split())
    names = config.fields_of(schema)
    for argument in arguments:
        key = argument.split("=", 1)[0].lstrip("+~").split("@")[0]
        if not argument.startswith("-") and "=" in argument and "/" not in key and key not in names:
            is_prefix = any(name.startswith(f"{key}.") for name in names)
            if f"'{key}'" in text or (not is_prefix and key.rpartition(".")[2] in text):
                return f"{key} is not a setting.{did_you_mean(key, names)}"
    if "Could not find" in text and "Available options" in text:
        what, _, options = text.partition("Available options in")
        valid = [word for word in options.replace("'", " ").split()[1:] if not word.startswith("_")]
        wrong = what.split("'")[1] if "'" in what else what
        valid = [word for word in valid if word.isidentifier()]
        return f"{wrong} is not a choice.{did_you_mean(wrong.rpartition('/')[2], valid)}"
    return text


def main() -> None:
    """Exit status 0; 2 for a user's mistake, in one line."""
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
        _start(verb, arguments)
    except UserError as error:
        sys.stderr.write(f"segadapt {verb}: {error}\n".replace("segadapt --", "segadapt --"))
        sys.exit(2)


def _start(verb: str, arguments: list[str]) -> None:
    """Hand over to Hydra; its errors about the command line become UserErrors."""
    primary, schema, path, _ = VERBS[verb]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise instead of printing and exiting with 1
    sys.argv = [f"segadapt {verb}", *arguments]

    @hydra.main(version_base="1.3", config_path="pkg://segadapt.conf", config_name=primary)
    def job(composed: DictConfig) -> None:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # ours is the only bar
        _function(path)(config.parse(OmegaConf.create(OmegaConf.to_container(composed, resolve=True)), schema))

    try:
        job()
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error, schema, arguments)) from error


if __name__ == "__main__":
    main()
