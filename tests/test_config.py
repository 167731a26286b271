"""The config tree and its schema say the same; every mistake is named before a run."""

import copy
import dataclasses
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import SETTINGS
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf
from quick_settings import quick_settings
from training_runs import TINY, TINY_SD3, TINY_SEGFORMER, TINY_VAE

from segadapt import config, config_training
from segadapt.__main__ import VERBS
from segadapt.datasets.build import build_files, class_names
from segadapt.errors import UserError
from segadapt.parse import from_overrides, parse

CONF = Path(config.__file__).parent / "conf"
ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden" / "settings.txt"
FILES = sorted(CONF.rglob("*.yaml"))
SCHEMAS = {primary: schema for primary, schema, _, _ in VERBS.values()}
GROUPS = ("data", "model/discriminative", "model/generative", "tta", "logging", "runtime")
USED_BY = {  # groups of each primary config
    "adapt": GROUPS,
    "check": GROUPS,
    "demo": GROUPS,
    "grid": ("grid",),
    "evaluate": ("data", "model/discriminative", "evaluate", "logging", "runtime"),
    "train": ("data", "model/discriminative", "train/losses", "evaluate", "logging", "runtime"),
    "train_generative": ("data", "model/generative", "logging", "runtime"),
    "corrupt": ("data",),
    "split": ("data",),
    "align": ("model/discriminative",),
}
REQUIRED = {  # what the shipped files leave to the user
    "data.name": "own", "data.classes": "toytown", "data.data_root": "folder", "data.image_path": "{data_root}/{key}.*",
    "model.discriminative.checkpoint": "folder", "model.generative.checkpoint": "folder",
    "model.generative.autoencoder": "folder", "corrupt.output": "folder", "data.count": 3,
    "convert.source": "masks", "convert.output": "folder", "split.output": "folder",
    "runs": ["folder"],
}  # fmt: skip
CROSS_FIELD = {"model.generative.window_px", "model.generative.stride_px", "data.short_side_px"}


@functools.cache
def composed(primary: str, *overrides: str) -> DictConfig:
    with initialize_config_module("segadapt.conf", version_base="1.3"):
        return compose(primary, list(overrides))


def completed(primary: str, *overrides: str) -> DictConfig:
    """The composed config with a value for everything that only the user can know."""
    whole = copy.deepcopy(composed(primary, *overrides))
    for name in OmegaConf.missing_keys(whole):
        OmegaConf.update(whole, name, REQUIRED[name])
    return whole


def is_internal(path: Path) -> bool:
    return path.stem.startswith("_") or path.parent.name in ("base", "hydra_setup")


def keys_of(node, prefix: str, known) -> list[str]:
    """Dotted names of the leaves; a dict setting is one leaf."""
    if not isinstance(node, dict) or prefix in known:
        return [prefix]
    return [name for key, value in node.items() for name in keys_of(value, f"{prefix}.{key}" if prefix else key, known)]


def prefix_of(path: Path) -> str:
    """Where Hydra puts a file's content."""
    return "" if "@package _global_" in path.read_text() else ".".join(path.parent.relative_to(CONF).parts)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CONF).as_posix())
def test_every_key_of_the_tree_is_a_setting(path):
    known = set().union(*(config.fields_of(schema) for schema in SCHEMAS.values()))
    content = {k: v for k, v in (yaml.safe_load(path.read_text()) or {}).items() if k not in ("defaults", "hydra")}
    assert [name for name in keys_of(content, prefix_of(path), known) if content and name not in known] == []


@pytest.mark.parametrize("primary", SCHEMAS)
def test_every_setting_is_in_the_tree(primary):
    known = config.fields_of(SCHEMAS[primary])
    names = keys_of(OmegaConf.to_container(completed(primary)), "", known)
    assert sorted(names) == sorted(known)


def test_comments_of_the_tree_are_the_help_of_the_schema():
    command = [sys.executable, "tools/config_comments.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_tables_of_the_page_are_those_of_the_schema():
    command = [sys.executable, "tools/config_page.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_names_every_option_of_every_group():
    page = (ROOT / "docs" / "configuration.md").read_text()
    rows = dict(re.findall(r"^\| `([\w/]+)` \| (.+) \|$", page.split("## An experiment")[0], re.MULTILINE))
    groups = {path.parent.relative_to(CONF).as_posix() for path in FILES if not is_internal(path)} - {".", "tuned"}
    assert sorted(rows) == sorted(groups)
    for group in groups - {"tta"}:  # that one is the table of methods
        options = {path.stem for path in (CONF / group).glob("*.yaml") if not is_internal(path)}
        assert options <= set(re.findall(r"`(\w+)`", rows[group])), group


@pytest.mark.parametrize("primary", SCHEMAS)
def test_dataclasses_hold_no_values(primary):
    for name, item in config.fields_of(SCHEMAS[primary]).items():
        assert item.default == "???", name
        assert item.default_factory is dataclasses.MISSING, name
        assert item.metadata["help"], name


def test_no_file_names_code():
    """The one interpolation that there is chooses a file by the names of two others."""
    texts = {path: re.sub(r"optional tuned: (demo|\$\{experiment\})_\$\{tta\}", "", path.read_text()) for path in FILES}
    assert [path for path, text in texts.items() if "_target_" in text or "${" in text] == []


def choices_together(primary: str) -> list[tuple[str, ...]]:
    """Each option of each group of a primary config at least once: one option of every group at a time."""
    options = [
        [f"{group}={path.stem}" for path in sorted((CONF / group).glob("*.yaml")) if not is_internal(path)]
        for group in USED_BY[primary]
    ]
    return [tuple(each[turn % len(each)] for each in options) for turn in range(max(map(len, options)))]


@pytest.mark.parametrize(
    ("primary", "choices"),
    [(primary, choices) for primary in USED_BY for choices in choices_together(primary)],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_every_group_option_composes_and_parses(primary, choices):
    sizes = ("model.generative.window_px=240", "model.generative.stride_px=120", "data.short_side_px=352")
    has_windows = "model/generative" in USED_BY[primary]
    parsed = parse(completed(primary, *choices, *(sizes if has_windows else ())), SCHEMAS[primary])
    assert isinstance(parsed, SCHEMAS[primary])


QUICK = {
    "adapt": (
        (*SETTINGS, "model.loss.topk=2", "tta.optimizer.lr_discriminative=null", "data.corruptions=[fog,snow]"),
        (
            "data=folder",
            "data.classes=camvid",
            "logging.root=/tmp/a-1/b.c",
            "data.data_root='/my data'",
            "data.image_path='{data_root}/{key}.*'",
        ),
        ("experiment=toytown_c", "experiment.name=other", "tta.optimizer.lr=1e-3"),
    ),
    "train": (
        (
            *TINY,
            TINY_SEGFORMER,
            "train/transforms/broad=wide",
            "train.transforms.broad.probability=0.5",
            "train.optimizer.lr=1e30",
        ),
    ),
    "train_generative": (
        ("model.generative.window_px=48", "model.generative.stride_px=48", *TINY, TINY_SD3, TINY_VAE, "runtime=cpu"),
    ),
}


@pytest.mark.parametrize(("primary", "overrides"), [(primary, each) for primary in QUICK for each in QUICK[primary]])
def test_settings_of_the_tests_are_those_of_the_command_line(primary, overrides):
    """Other tests get theirs by a shorter way."""
    schema = SCHEMAS[primary]
    assert quick_settings(primary, overrides, schema) == from_overrides(primary, overrides, schema)


def test_settings_of_a_test_are_its_own():
    first, second = (quick_settings("train", TINY, config_training.TrainConfig) for _ in range(2))
    first.train.iters += 1
    assert quick_settings("train", TINY, config_training.TrainConfig) == second != first


@pytest.mark.parametrize("path", sorted((CONF / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_parses_with_the_verb_that_its_comment_names(path):
    verb = re.findall(rf"segadapt (\S+) experiment={path.stem}\b", path.read_text())[0]
    primary, schema, _, _ = VERBS[verb]
    assert isinstance(parse(completed(primary, f"experiment={path.stem}"), schema), schema)


def test_a_new_setting_or_default_shows_in_review():
    """Update with: python tests/test_config.py > tests/golden/settings.txt"""
    assert settings_text() == GOLDEN.read_text()


def settings_text() -> str:
    """Every setting of every verb with its default."""
    parts = []
    for verb, (primary, schema, _, _) in VERBS.items():
        known = config.fields_of(schema)
        whole = OmegaConf.to_container(composed(primary))
        values = dict.fromkeys(known, whole)
        for name in known:
            for part in name.split("."):
                values[name] = values[name][part]  # type: ignore[index]
        parts.append("".join([f"[{verb}]\n", *(f"{name} = {value!r}\n" for name, value in values.items())]))
    return "\n".join(parts)


def raised(whole, schema) -> str:
    with pytest.raises(UserError) as caught:
        parse(whole, schema)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("primary", SCHEMAS)
def test_a_letter_too_few_or_too_many_names_the_right_setting(primary):
    schema = SCHEMAS[primary]
    for name in config.fields_of(schema):
        *folders, last = name.split(".")
        for typo in (last[1:], last + last[-1]):
            wrong = ".".join([*folders, typo])
            alone = OmegaConf.create()  # nothing else is looked at before the names are
            OmegaConf.update(alone, wrong, 0)
            assert raised(alone, schema) == f"{wrong} is not a setting. Did you mean {name}?"
    assert isinstance(parse(completed(primary), schema), schema)


BOUNDED = {  # each rule once: verbs share the fields of their sections
    (name, id(item)): (primary, name)
    for primary, schema in SCHEMAS.items()
    for name, item in config.fields_of(schema).items()
    if item.metadata["choices"] or item.metadata["low"] > -float("inf") or item.metadata["high"] < float("inf")
}.values()


@pytest.mark.parametrize(("primary", "name"), BOUNDED)
def test_a_value_outside_its_choices_or_range_is_refused(primary, name):
    rule = config.fields_of(SCHEMAS[primary])[name].metadata
    bad = [f"{rule['choices'][0]}x"] if rule["choices"] else []
    bad += [rule["low"] - 1] if rule["low"] > -float("inf") else []
    bad += [rule["high"] + 1] if rule["high"] < float("inf") else []
    whole = completed(primary)
    for value in bad:
        OmegaConf.update(whole, name, value)
        message = raised(whole, SCHEMAS[primary])
        assert message.startswith(name)
        assert str(value) in message
        assert rule["help"] in message


@pytest.mark.parametrize(
    ("name", "value"),
    [("data.limit", "many"), ("data.shuffle", "perhaps"), ("data.corruptions", "fog"), ("tta.optimizer.lr", None)],
)
def test_a_value_of_another_type_is_refused(name, value):
    whole = completed("adapt")
    OmegaConf.update(whole, name, value)
    message = raised(whole, config.AdaptConfig)
    assert message.startswith(f"{name}={value!r}: ")
    assert config.fields_of(config.AdaptConfig)[name].metadata["help"] in message


def test_a_value_that_only_the_user_knows_is_asked_for():
    assert raised(composed("adapt", "data=folder"), config.AdaptConfig).startswith("data.classes has no value")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"model.generative.window_px": 500}, ["model.generative.window_px=500", "multiple of 16", "Use 496"]),
        ({"model.generative.stride_px": 640}, ["stride_px=640", "window_px=512", "strips of 128 px"]),
        ({"data.short_side_px": 256}, ["data.short_side_px=256", "model.generative.window_px=512"]),
        ({"model.generative.sigma": 0.5, "model.generative.sigma_high": 0.25}, ["sigma_high=0.25", "sigma=0.5"]),
    ],
)
def test_two_settings_that_contradict_each_other_are_both_named(overrides, named):
    whole = completed("adapt")
    for name, value in overrides.items():
        OmegaConf.update(whole, name, value)
    message = raised(whole, config.AdaptConfig)
    assert [part for part in named if part not in message] == []


@pytest.mark.parametrize("name", ["beta1", "beta2"])
def test_a_beta_of_one_is_refused(name):
    """AdamW would divide by 1 - beta = 0."""
    whole = completed("adapt")
    OmegaConf.update(whole, f"tta.optimizer.{name}", 1.0)
    assert f"tta.optimizer.{name}=1.0: expected at least 0 and at most 0.999999" in raised(whole, config.AdaptConfig)


@pytest.fixture
def class_file(tmp_path):
    def write(count: int) -> str:
        path = tmp_path / "classes.txt"
        path.write_text("".join(f"class {index}\n" for index in range(count)))
        return str(path)

    return write


def test_a_class_file_holds_as_many_names_as_a_label_byte(class_file):
    assert len(class_names(class_file(254))) == 254
    with pytest.raises(UserError, match=r"data\.classes=.*classes\.txt: 255 names; expected at most 254"):
        class_names(class_file(255))


def test_a_list_of_too_many_classes_is_the_users_mistake_in_a_data_set_too(class_file):
    """The palette of 256 classes once failed first, with our own traceback."""
    overrides = ("data=folder", "data.data_root=.", f"data.classes={class_file(300)}")
    settings = parse(completed("evaluate", *overrides), config.EvaluateConfig)
    with pytest.raises(UserError, match="300 names; expected at most 254"):
        build_files(settings.data)


if __name__ == "__main__":
    sys.stdout.write(settings_text())
