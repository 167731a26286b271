"""Random settings and random files: a valid result or one line, never another exception."""

import io
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from segadapt import config
from segadapt.datasets.decode import image_size, read_ids, read_image
from segadapt.datasets.files import Template
from segadapt.datasets.labels import id_table, map_ids
from segadapt.errors import UserError
from segadapt.explain import explained
from segadapt.parse import parse

MOST_PX = 10_000
KNOWN = sorted(config.fields_of(config.AdaptConfig))

# -- settings ---------------------------------------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(
        ["auto", "cuda", "bf16", "topk", "adamw", "tent", "toytown", "???", "${data.name}", "${oops", "1e999", "-0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
names = st.sampled_from(KNOWN) | st.sampled_from(KNOWN).flatmap(
    lambda name: st.sampled_from([name[:-1], f"{name}.more", name.rpartition(".")[0], f"{name}x", name.upper()])
)


@pytest.fixture(scope="module")
def whole():
    with initialize_config_module("segadapt.conf", version_base="1.3"):
        return compose("adapt", ["data=toytown_c", "model/discriminative=toytown", "model/generative=toytown"])


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(changes=st.dictionaries(names, values, min_size=1, max_size=3))
@example(changes={"data": None})
@example(changes={"tta.options": {"a": {"b": [1]}}})
@example(changes={"model.sha256": {"": "x"}})
@example(changes={"data.name": "${oc.env:HOME}"})
@example(changes={"data.name": "${data.nam}"})
@example(changes={"data.name": "${data.name}"})
def test_any_values_are_settings_or_one_line(whole, changes):
    changed = OmegaConf.to_container(whole)
    assert isinstance(changed, dict)
    for name, value in changes.items():
        place, parts = changed, name.split(".")
        for part in parts[:-1]:
            if not isinstance(place.get(part), dict):
                place[part] = {}
            place = place[part]
        place[parts[-1]] = value

    def read():
        with explained(config.AdaptConfig, []):  # Hydra's, where a file holds it; __main__ puts it like this
            composed = OmegaConf.create(changed)
        parse(composed, config.AdaptConfig)

    said_of(read)


def said_of(read) -> str | None:
    """The one line of a UserError, or None: it was read. Any other exception is a failure."""
    try:
        read()
    except UserError as error:
        said = str(error)
    else:
        return None
    assert "\n" not in said
    assert len(said) > 10
    return said


@settings(max_examples=200)
@given(text=st.text(max_size=40) | st.tuples(names, st.text("{}[](),:='\"\\$~+@.a0 \n", max_size=12)).map("=".join))
@example(text="[" * 500)
@example(text="a=" + "[" * 500)
@example(text="data.name=" + "{a:" * 300)
def test_any_argument_is_parsed_or_explained_in_one_line(text):
    """As __main__ does it: what Hydra says becomes one line."""
    said = ""
    try:
        with explained(config.AdaptConfig, [text]):
            OverridesParser.create().parse_overrides([text])
    except UserError as error:
        said = str(error)
    assert "\n" not in said


@pytest.mark.parametrize("depth", [30, 100, 300, 3000])
@pytest.mark.parametrize("is_in_a_file", [False, True])
def test_a_deep_value_is_one_line(segadapt, tmp_path, depth, is_in_a_file):
    deep = "[" * depth + "]" * depth
    arguments = [f"data.name={deep}"]
    if is_in_a_file:
        (tmp_path / "experiment").mkdir()
        (tmp_path / "experiment/deep.yaml").write_text(f"# @package _global_\ndata:\n  name: {deep}\n")
        arguments = ["--config-dir", str(tmp_path), "experiment=deep"]
    status, _, stderr = segadapt("adapt", *arguments, "data=toytown_c")
    assert (status, stderr.count("\n")) == (2, 1)
    assert "Traceback" not in stderr
    assert len(stderr) < 10 * depth + 1000


# -- path templates ---------------------------------------------------------------------------------------------------


@given(text=st.text("{}/.*keydat_root", max_size=30), name=st.text("abc/.pngjPG", max_size=12))
def test_any_template_is_one_or_one_line(text, name):
    def read():
        key = Template("data.image_path", text).key_of(name)
        assert key is None or ".." not in text.split("/")

    said_of(read)


# -- images and labels ------------------------------------------------------------------------------------------------


def encoded(kind: str, mode: str) -> bytes:
    pixels_HW3 = np.random.default_rng(0).integers(0, 256, (12, 14, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels_HW3).convert(mode).save(file, kind)
    return file.getvalue()


WHOLE = [encoded("PNG", "RGB"), encoded("PNG", "L"), encoded("PNG", "P"), encoded("JPEG", "RGB"), encoded("JPEG", "L"),
         encoded("BMP", "RGB"), encoded("TIFF", "RGB"), encoded("WEBP", "RGB"), encoded("GIF", "P")]  # fmt: skip


@st.composite
def damaged(draw) -> bytes:
    """A whole file, cut somewhere, with some bytes changed, doubled or left out."""
    content = bytearray(draw(st.sampled_from(WHOLE)))
    for _ in range(draw(st.integers(0, 6))):
        place = draw(st.integers(0, len(content) - 1))
        content[place] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        place = draw(st.integers(0, len(content)))
        content[place:place] = content[place : place + draw(st.integers(0, 20))]
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)


def file_of(content: bytes) -> Path:
    with tempfile.NamedTemporaryFile(suffix=".png", delete=False) as file:
        file.write(content)
    return Path(file.name)


@settings(max_examples=300)
@given(content=damaged() | st.binary(max_size=200))
@example(content=b"")
@example(content=b"\x89PNG\r\n\x1a\n")
@example(content=b"\xff\xd8\xff")
def test_any_bytes_are_an_image_or_one_line_with_the_path(content):
    path = file_of(content)

    def read():
        image_HW3 = read_image(path, max_pixels=MOST_PX)
        assert (image_HW3.dtype, image_HW3.ndim) == (np.uint8, 3)
        assert 0 < image_HW3.shape[0] * image_HW3.shape[1] <= MOST_PX
        assert image_size(path, max_pixels=MOST_PX) == image_HW3.shape[:2]

    said = said_of(read)
    assert said is None or said.startswith(f"{path}: ")
    path.unlink()


@settings(max_examples=300)
@given(content=damaged() | st.binary(max_size=200), id_map=st.sampled_from(["zero_is_ignore", "as_is"]))
def test_any_bytes_are_a_label_or_one_line_with_the_path(content, id_map):
    path, table_256 = file_of(content), id_table(id_map, 5)

    def read():
        label_HW = map_ids(read_ids(path, max_pixels=MOST_PX), table_256, path=path)
        assert set(np.unique(label_HW)) <= {0, 1, 2, 3, 4, 255}

    said = said_of(read)
    assert said is None or said.startswith(f"{path}: ")
    path.unlink()
