"""ToyTown is frozen, exact and varied. A changed hash here means that scores on ToyTown no longer compare."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segadapt.corruptions import corrupt
from segadapt.datasets import Task
from segadapt.datasets.toytown import CLASSES, PALETTE_C3, SPLITS, Scene, ToyTown, render
from segadapt.datasets.toytown_light import WEATHERS, light_up
from segadapt.datasets.toytown_scene import Camera, Dice, Sketch, Texture, Thing, Wall
from segadapt.datasets.toytown_street import backdrop
from segadapt.errors import UserError
from segadapt.seeds import numpy_generator

CLEAN = Task(index=0)

PINNED = {
    ("training", 0, 0, "clear"): "2e4d3da693f064e2",
    ("training", 101, 0, "clear"): "979a376c6fc788b8",
    ("validation", 5, 3, "clear"): "e2faf8d6547fd992",
    ("test", 1, 0, "overcast"): "ae85c45ea242a613",
    ("test", 2, 0, "dusk"): "db959b20e8f84f9b",
    ("test", 3, 0, "haze"): "a6a945409da4ae73",
    ("test", 4, 0, "drizzle"): "8c7def7a103c22fb",
    ("test", 5, 0, "snowfall"): "ffdcdee0cfa9a314",
    ("test", 6, 0, "night"): "b16b41fc9c4cb997",
    ("test", 12, 0, "all"): "eb61c3dabd44309c",
}


def digest(scene: Scene) -> str:
    """First 16 hex digits of SHA-256 over image and label bytes."""
    return hashlib.sha256(scene.image_HW3.tobytes() + scene.label_HW.tobytes()).hexdigest()[:16]


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [render("validation", index) for index in range(40)]


@pytest.mark.parametrize(("split", "index", "seed", "weather"), PINNED)
def test_world_is_frozen(split, index, seed, weather):
    assert digest(render(split, index, seed=seed, weather=weather)) == PINNED[split, index, seed, weather]


def test_every_weather_is_pinned():
    assert {weather for _, _, _, weather in PINNED} == {*WEATHERS, "all"}


def test_scene_does_not_depend_on_what_was_drawn_before_it(scenes):
    assert [digest(render("validation", index)) for index in (7, 3, 0)] == [digest(scenes[i]) for i in (7, 3, 0)]


def test_scene_is_the_same_in_a_fresh_process():
    program = (
        "import hashlib; from segadapt.datasets.toytown import render; scene = render('test', 4, weather='night');"
        "print(hashlib.sha256(scene.image_HW3.tobytes() + scene.label_HW.tobytes()).hexdigest()[:16])"
    )
    fresh = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert fresh.stdout.strip() == digest(render("test", 4, weather="night"))


def test_global_random_state_is_neither_read_nor_moved():
    np.random.seed(5)
    first, following = digest(render("training", 1, weather="snowfall")), np.random.random()
    np.random.seed(5)
    assert np.random.random() == following
    np.random.seed(6)
    assert digest(render("training", 1, weather="snowfall")) == first


def test_images_and_labels_are_bytes_of_the_two_sizes(scenes):
    for scene in scenes:
        assert scene.image_HW3.dtype == scene.label_HW.dtype == np.uint8
        assert scene.image_HW3.shape == (*scene.label_HW.shape, 3)
        assert scene.label_HW.shape in {(240, 320), (320, 240)}
        assert scene.label_HW.max() < len(CLASSES)


def test_about_one_scene_in_five_is_portrait(scenes):
    assert 0.1 <= np.mean([scene.label_HW.shape == (320, 240) for scene in scenes]) <= 0.35


def test_every_class_has_its_share_of_the_pixels(scenes):
    counts_C = np.sum([np.bincount(scene.label_HW.ravel(), minlength=len(CLASSES)) for scene in scenes], axis=0)
    assert (counts_C / counts_C.sum()).min() >= 0.003
    assert counts_C.argmax() in {CLASSES.index("sky"), CLASSES.index("building"), CLASSES.index("road")}


def test_no_class_is_one_colour(scenes):
    """A lookup from coarse colour to the likeliest class, fitted on the very pixels, must leave much unexplained."""
    colours_P = np.concatenate([(scene.image_HW3 // 32).reshape(-1, 3) @ (64, 8, 1) for scene in scenes])
    labels_P = np.concatenate([scene.label_HW.ravel() for scene in scenes])
    table = np.zeros((512, len(CLASSES)), int)
    np.add.at(table, (colours_P, labels_P), 1)
    recall_C = np.array([table[table.argmax(1) == c, c].sum() for c in range(len(CLASSES))]) / table.sum(0)
    assert recall_C.mean() < 0.5


def test_weather_moves_no_label_and_changes_the_image():
    scenes = [render("test", 3, weather=weather) for weather in WEATHERS]
    assert all(np.array_equal(scene.label_HW, scenes[0].label_HW) for scene in scenes)
    assert len({scene.image_HW3.tobytes() for scene in scenes}) == len(WEATHERS)


def test_all_weathers_are_drawn_and_each_is_the_weather_it_says():
    drawn = [render("training", index, weather="all") for index in range(30)]
    assert {scene.weather for scene in drawn} == set(WEATHERS)
    for index in (0, 1):
        assert digest(drawn[index]) == digest(render("training", index, weather=drawn[index].weather))


def test_weathers_look_as_they_are_called():
    mean = {weather: render("test", 0, weather=weather).image_HW3.mean() for weather in WEATHERS}
    assert min(mean, key=mean.__getitem__) == "night"
    assert mean["clear"] > mean["drizzle"]
    spread = {weather: render("test", 0, weather=weather).image_HW3.std() for weather in ("clear", "haze")}
    assert spread["haze"] < spread["clear"]


def test_split_index_and_seed_each_give_another_scene():
    assert len({render(split, 0).label_HW.tobytes() for split in SPLITS}) == len(SPLITS)
    assert not np.array_equal(render("test", 1).label_HW, render("test", 2).label_HW)
    assert not np.array_equal(render("test", 1).label_HW, render("test", 1, seed=1).label_HW)


def test_image_changes_exactly_where_a_thing_is_added():
    """Image and label share their geometry: a thing that throws no shadow alters its own pixels and no others."""
    pictures = []
    for is_there in (False, True):
        camera = Camera(240, 320, focal_px=250.0, horizon_px=110.0, centre_px=160.0, height_m=1.8, bend=0.001)
        sketch = Sketch(camera, sun=(1.0, 0.2))
        backdrop(sketch, Dice(numpy_generator(0, "test")))
        if is_there:
            sketch.fill([[(-1.0, 0.0, 6.0), (0.3, 3.0, 6.0), (1.5, 0.4, 6.0)]], Thing.CAR, (255, 0, 255))
        thing_N = np.array([surface.thing for surface in sketch.surfaces])
        image_HW3 = light_up(sketch, WEATHERS["clear"], dice=Dice(numpy_generator(0, "sky")))
        pictures.append((image_HW3.astype(int), thing_N[sketch.surface_HW]))
    (before_HW3, _), (after_HW3, label_HW) = pictures
    assert np.array_equal((before_HW3 != after_HW3).any(-1), label_HW == Thing.CAR)
    assert (label_HW == Thing.CAR).sum() > 2000


@given(x=st.floats(-5.0, 5.0), z=st.floats(1.0, 40.0), height_m=st.floats(1.5, 3.0))
def test_ground_plane_gives_back_the_distance_of_a_projected_point(x, z, height_m):
    camera = Camera(240, 320, focal_px=250.0, horizon_px=110.0, centre_px=160.0, height_m=height_m, bend=0.0)
    col, row = camera.project((x, 0.0, z))
    a, b, c = camera.ground_plane()
    assert a + b * col + c * row == pytest.approx(1.0 / z, abs=0.51 * c)  # the row is rounded by up to 0.5 px


@given(along=st.floats(0.0, 20.0))
def test_wall_points_keep_their_distance_along_it(along):
    wall = Wall(3.0, 4.0, 3.0, 24.0)
    assert wall.length == 20.0
    assert wall.at(along, 2.0) == pytest.approx((3.0, 2.0, 4.0 + along))


def test_nearer_wall_hides_the_farther_one():
    camera = Camera(240, 320, focal_px=250.0, horizon_px=110.0, centre_px=160.0, height_m=1.8, bend=0.0)
    sketch = Sketch(camera, sun=(1.0, 0.0))
    for z, thing in ((20.0, Thing.BUILDING), (10.0, Thing.FENCE)):
        wall = Wall(-2.0, z, 2.0, z)
        sketch.on_wall(wall, [wall.box(0.0, 0.0, 4.0, 2.0)], thing, (90, 90, 90), texture=Texture.PLASTER)
    assert sketch.surfaces[sketch.surface_HW[112, 160]].thing == Thing.FENCE


def test_classes_palette_and_things_agree():
    assert tuple(thing.name.lower() for thing in Thing) == CLASSES
    assert PALETTE_C3.shape == (len(CLASSES), 3)
    assert len({tuple(colour) for colour in PALETTE_C3.tolist()}) == len(CLASSES)


def test_dataset_serves_the_rendered_scenes_under_sorted_keys():
    town = ToyTown(split="validation", count=12, world_seed=2, weather="dusk")
    keys = town.keys(CLEAN)
    assert keys == sorted(set(keys))
    assert len(keys) == 12
    sample, scene = town.load(CLEAN, keys[11]), render("validation", 11, seed=2, weather="dusk")
    assert sample.key == "00011"
    assert np.array_equal(sample.image_HW3, scene.image_HW3)
    np.testing.assert_array_equal(sample.label_HW, scene.label_HW)


def test_corruption_of_a_task_reaches_the_image_and_not_the_label():
    town = ToyTown(split="test", count=3, tasks_seed=9)
    clean, task = town.load(CLEAN, "00002"), Task(index=1, corruption="gaussian_noise", severity=5)
    corrupted = town.load(task, "00002")
    expected_HW3 = corrupt(clean.image_HW3, "gaussian_noise", severity=5, seed=9, key="00002")
    assert np.array_equal(corrupted.image_HW3, expected_HW3)
    assert not np.array_equal(corrupted.image_HW3, clean.image_HW3)
    np.testing.assert_array_equal(corrupted.label_HW, clean.label_HW)


@pytest.mark.parametrize(
    ("split", "weather", "count", "message"),
    [
        ("valdation", "clear", 1, r"data.split=valdation .* Did you mean validation\?"),
        ("test", "hazy", 1, r"data.weather=hazy .* Did you mean haze\?"),
        ("test", "quartz", 1, r"Choose from: all, clear"),
        ("test", "clear", 0, r"data.count=0 .* Raise data.count"),
    ],
)
def test_user_mistake_is_named_when_the_dataset_is_built(split, weather, count, message):
    with pytest.raises(UserError, match=message):
        ToyTown(split=split, count=count, weather=weather)
