"""Corruptions: as strong as the reference package says, functions of (seed, name, severity, key) alone, any size."""

import colorsys
import hashlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segadapt.corruption_fields import plasma, scatter, smear, zoom_in
from segadapt.corruptions import COMMON, CORRUPTIONS, EXTRA, corrupt
from segadapt.errors import UserError
from segadapt.seeds import numpy_generator

TESTS = Path(__file__).parent
SEVERITIES = range(1, 6)
UNRANDOM = ("defocus_blur", "zoom_blur", "gaussian_blur", "brightness", "contrast", "saturate", "pixelate")
DETERMINISTIC = (*UNRANDOM, "jpeg_compression")
PIXELWISE = ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "glass_blur")  # draws: 0.03 dB apart
NUM_DRAWS = 4  # of our randomness elsewhere; the reference has 16
TOLERANCE_DB = {"fog": 1.0, "frost": 2.0}  # otherwise 0.5: how far two sets of draws lie apart, frost's ice being ours


def _load_tool():
    spec = importlib.util.spec_from_file_location(
        "corruption_reference", TESTS.parent / "tools/corruption_reference.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOL = _load_tool()
REFERENCE = json.loads((TESTS / "golden/corruption_reference.json").read_text(encoding="ascii"))
IMAGES = TOOL.fixed_images()


@pytest.fixture(scope="module")
def psnr_db() -> dict[str, np.ndarray]:
    """Name -> mean PSNR at severities 1..5 over all fixed images and draws."""

    def mean(name: str, severity: int) -> float:
        draws = 1 if name in (*DETERMINISTIC, *PIXELWISE) else NUM_DRAWS
        return float(
            np.mean(
                [
                    TOOL.psnr_db(image, corrupt(image, name, severity=severity, seed=seed, key=str(index)))
                    for seed in range(draws)
                    for index, image in enumerate(IMAGES)
                ]
            )
        )

    return {name: np.array([mean(name, severity) for severity in SEVERITIES]) for name in CORRUPTIONS}


def test_fixed_images_are_those_of_the_reference():
    assert TOOL.images_sha256(IMAGES) == REFERENCE["images_sha256"]


def test_names_are_the_fifteen_common_and_four_extra():
    assert COMMON[0] == "gaussian_noise"
    assert COMMON[-1] == "jpeg_compression"
    assert len(COMMON) == 15
    assert set(EXTRA) == {"speckle_noise", "gaussian_blur", "spatter", "saturate"}
    assert {*COMMON, *EXTRA} == set(REFERENCE["table"])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_strength_equals_the_reference_package(name, psnr_db):
    difference = psnr_db[name] - REFERENCE["table"][name]["psnr_db"]
    assert np.abs(difference).max() <= TOLERANCE_DB.get(name, 0.5), difference.round(2)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_strength_grows_wherever_the_reference_grows_beyond_its_own_noise(name, psnr_db):
    assert psnr_db[name][0] > psnr_db[name][4]
    if name in ("glass_blur", "frost"):  # standard parameters are not monotone
        return
    fall = -np.diff(REFERENCE["table"][name]["psnr_db"])
    deviation = np.array(REFERENCE["table"][name]["deviation_db"])
    is_clear = fall > 3 * np.hypot(deviation[1:], deviation[:-1])
    assert (np.diff(psnr_db[name])[is_clear] < 0).all()


def _digest(names: list[str]) -> str:
    """Hash of one small image under the named corruptions, sorted by name afterwards."""
    image = IMAGES[0][:48, :64]
    corrupted = {name: corrupt(image, name, severity=4, seed=7, key="a/b") for name in names}
    return hashlib.sha256(b"".join(corrupted[name].tobytes() for name in sorted(corrupted))).hexdigest()


def test_order_of_calls_and_global_generators_change_nothing():
    names = list(CORRUPTIONS)
    expected = _digest(names)
    np.random.seed(3)
    cv2.setRNGSeed(3)
    assert _digest(names[::-1]) == expected


def test_threads_of_opencv_change_nothing():
    image = np.kron(IMAGES[1], np.ones((3, 3, 1), np.uint8))
    threads = cv2.getNumThreads()
    try:
        for name in CORRUPTIONS:
            results = []
            for count in (1, 4):
                cv2.setNumThreads(count)
                results.append(corrupt(image, name, severity=5, seed=0, key="k"))
            assert np.array_equal(*results), name
    finally:
        cv2.setNumThreads(threads)


def test_another_process_gives_the_same_bytes():
    program = "from test_corruptions import _digest, CORRUPTIONS; print(_digest(list(CORRUPTIONS)[::-1]))"
    environment = {"PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    other = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == _digest(list(CORRUPTIONS))


def test_generator_is_that_of_seed_name_severity_and_key():
    for name, function in CORRUPTIONS.items():
        expected = function(IMAGES[2], 3, numpy_generator(5, name, 3, "a/b"))
        assert np.array_equal(corrupt(IMAGES[2], name, severity=3, seed=5, key="a/b"), expected)


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name not in DETERMINISTIC])
def test_seed_severity_and_key_each_change_random_corruptions(name):
    first = corrupt(IMAGES[0], name, severity=3, seed=0, key="a")
    assert not np.array_equal(first, corrupt(IMAGES[0], name, severity=3, seed=0, key="b"))
    assert not np.array_equal(first, corrupt(IMAGES[0], name, severity=3, seed=1, key="a"))
    assert not np.array_equal(first, corrupt(IMAGES[0], name, severity=4, seed=0, key="a"))


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(33, 47), (47, 33), (32, 32), (32, 300), (400, 353)])
def test_any_shape_is_kept_and_the_input_stays_unmodified(name, shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    before = image.copy()
    image.setflags(write=False)
    for severity in (1, 3, 5):
        result = corrupt(image, name, severity=severity, seed=0, key="k")
        assert (result.shape, result.dtype) == (image.shape, np.uint8)
        assert not np.shares_memory(result, image)
        assert np.array_equal(image, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("value", [0, 255])
def test_black_and_white_images_are_corrupted_without_dividing_by_zero(name, value):
    image = np.full((40, 60, 3), value, np.uint8)
    with np.errstate(divide="raise", invalid="raise"):
        assert corrupt(image, name, severity=1, seed=0, key="k").shape == image.shape


def test_mirrored_view_is_treated_as_its_copy():
    view = IMAGES[0][:, ::-1]
    for name in CORRUPTIONS:
        expected = corrupt(view.copy(), name, severity=2, seed=0, key="k")
        assert np.array_equal(corrupt(view, name, severity=2, seed=0, key="k"), expected)


@pytest.mark.parametrize(
    ("name", "severity", "image", "message"),
    [
        ("gausian_noise", 1, IMAGES[0], "'gausian_noise' is not known. Did you mean gaussian_noise?"),
        ("fog", 0, IMAGES[0], "corruption fog: severity 0; expected 1..5"),
        ("fog", 6, IMAGES[0], "corruption fog: severity 6; expected 1..5"),
        ("fog", 1, IMAGES[0].astype(np.float32), r"image k: got float32 of shape \(120, 160, 3\)"),
        ("fog", 1, IMAGES[0][..., 0], r"image k: got uint8 of shape \(120, 160\)"),
        ("fog", 1, IMAGES[0][:31], "image k: got 160 x 31 px; corruptions need 32 px"),
    ],
)
def test_wrong_input_is_named_with_its_remedy(name, severity, image, message):
    with pytest.raises(UserError, match=message):
        corrupt(image, name, severity=severity, seed=0, key="k")


# Oracles of the parts


def _scatter_by_loop(image: np.ndarray, rng: np.random.Generator, *, reach: int, passes: int) -> np.ndarray:
    """The double loop of ImageNet-C, with the offsets drawn in ascending order of pixels."""
    image = image.copy()
    height, width = image.shape[:2]
    rows, columns = range(reach + 1, height - reach + 1), range(reach + 1, width - reach + 1)
    for _ in range(passes):
        dx, dy = rng.integers(-reach, reach, size=(2, len(rows) * len(columns))).reshape(2, len(rows), len(columns))
        for y in reversed(rows):
            for x in reversed(columns):
                draw = y - rows.start, x - columns.start
                there = y + dy[draw], x + dx[draw]
                image[y, x], image[there] = image[there], image[y, x]
    return image


@given(height=st.integers(32, 40), width=st.integers(32, 40), reach=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_scatter_equals_the_sequential_loop(height, width, reach, seed):
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    fast = scatter(image, np.random.default_rng(seed), reach=reach, passes=2)
    assert np.array_equal(fast, _scatter_by_loop(image, np.random.default_rng(seed), reach=reach, passes=2))


@given(degrees=st.floats(-180, 180), radius=st.integers(1, 12))
@settings(max_examples=20, deadline=None)
def test_smear_leaves_a_half_gaussian_trail_along_its_angle(degrees, radius):
    point = np.zeros((61, 61), np.float32)
    point[30, 30] = 1
    trail = smear(point, degrees, radius=radius, sigma=5)
    expected = np.exp(-(np.arange(2 * radius + 1) ** 2) / 50)
    assert trail.sum() == pytest.approx(1, abs=1e-5)
    assert trail[30, 30] == pytest.approx(expected[0] / expected.sum(), abs=1e-6)
    ys, xs = np.nonzero(trail)
    off_line = (ys - 30) * math.cos(math.radians(degrees)) - (xs - 30) * math.sin(math.radians(degrees))
    along = -(ys - 30) * math.sin(math.radians(degrees)) - (xs - 30) * math.cos(math.radians(degrees))
    assert np.abs(off_line).max() <= 0.75  # both coordinates are rounded
    assert along.min() >= -0.75
    assert along.max() == pytest.approx(2 * radius, abs=0.75)


@given(side=st.integers(32, 90), factor=st.floats(1, 4.5))
@settings(max_examples=20, deadline=None)
def test_zoom_maps_a_ramp_to_a_ramp_that_starts_at_the_cut(side, factor):
    ramp = np.tile(np.arange(side, dtype=np.float32), (side, 1))
    zoomed = zoom_in(ramp, factor)
    cut = math.ceil(side / factor)
    slope = (cut - 1) / (round(cut * factor) - 1)
    assert np.allclose(zoomed, (side - cut) // 2 + slope * np.arange(side), atol=0.02)  # older OpenCV: 1/32 px steps


def _plasma_by_loop(side: int, rng: np.random.Generator, *, decay: float) -> np.ndarray:
    """Diamond-square as in the textbook: square centres, then the edges above and left of them, point by point."""
    cloud = np.zeros((side, side))
    step, wobble = side, 100.0
    while step > 1:
        half, cells = step // 2, side // step
        for offset_y, offset_x in ((half, half), (0, half), (half, 0)):
            is_centre = offset_y == offset_x
            around = [(-1, -1), (-1, 1), (1, -1), (1, 1)] if is_centre else [(-1, 0), (1, 0), (0, -1), (0, 1)]
            noise = wobble * rng.uniform(-wobble, wobble, (cells, cells))
            for row, column in np.ndindex(cells, cells):
                y, x = row * step + offset_y, column * step + offset_x
                near = [cloud[(y + half * dy) % side, (x + half * dx) % side] for dy, dx in around]
                cloud[y, x] = sum(near) / 4 + noise[row, column]
        step, wobble = half, wobble / decay
    return (cloud - cloud.min()) / (cloud.max() - cloud.min())


def test_plasma_is_diamond_square_on_a_torus():
    fast = plasma(32, np.random.default_rng(0), decay=1.7)
    assert np.allclose(fast, _plasma_by_loop(32, np.random.default_rng(0), decay=1.7), atol=1e-12)


@pytest.mark.parametrize(("severity", "density"), [(1, 1.5), (2, 2), (3, 2.5), (4, 2.5), (5, 3)])
def test_fog_over_grey_reaches_from_the_dimmed_to_the_full_grey(severity, density):
    foggy = corrupt(np.full((64, 64, 3), 200, np.uint8), "fog", severity=severity, seed=0, key="k")
    assert int(foggy.min()) == pytest.approx(200 * 200 / (200 + 255 * density), abs=1)
    assert int(foggy.max()) == pytest.approx(200, abs=1)


@given(rgb=st.tuples(*[st.integers(0, 255)] * 3), severity=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_brightness_and_saturate_are_what_they_are_in_hsv(rgb, severity):
    image = np.full((32, 32, 3), rgb, np.uint8)
    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in rgb))
    rise = (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1]
    gain, offset = ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))[severity - 1]
    expected = {
        "brightness": colorsys.hsv_to_rgb(hue, saturation, min(value + rise, 1)),
        "saturate": colorsys.hsv_to_rgb(hue, min(saturation * gain + offset, 1), value),
    }
    for name, colour in expected.items():
        got = corrupt(image, name, severity=severity, seed=0, key="k")[0, 0]
        assert np.abs(got - 255 * np.array(colour)).max() <= 1.001, name  # fractions are cut off


def test_impulses_are_black_and_white_in_equal_numbers():
    grey = np.full((300, 400, 3), 128, np.uint8)
    noisy = corrupt(grey, "impulse_noise", severity=5, seed=0, key="k")
    values, counts = np.unique(noisy, return_counts=True)
    assert values.tolist() == [0, 128, 255]
    assert counts / grey.size == pytest.approx([0.135, 0.73, 0.135], abs=0.003)
