"""The geometry of ToyTown: a street is sketched, far to near, as flat surfaces seen by one pinhole camera.

Every pixel stores the number of the surface that it shows and nothing else. Class, colour, texture and distance are
looked up by that number, so image and label cannot disagree. Weather has no say here; toytown.py lights the sketch.

World axes in metres: x to the right of the camera, y up from the ground, z ahead. Screen: col to the right, row down.
Only + - * / and whole pixels are used, so that a sketch is the same on every processor.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple, TypeVar

import cv2
import numpy as np

Thing = IntEnum("Thing", "SKY BUILDING ROAD PAVEMENT TREE GRASS WATER CAR PERSON POLE SIGN FENCE", start=0)
Texture = IntEnum("Texture", "PLAIN PLASTER BRICK ROOF ASPHALT PAVING GRASS LEAVES RIPPLES PLANKS METAL", start=0)
Facing = IntEnum("Facing", "GROUND FRONT LEFT RIGHT", start=0)  # where a surface looks: up, at the camera, to -x, to +x

Point = tuple[float, float, float]  # x, y, z
Colour = tuple[int, int, int]  # RGB, 0..255
T = TypeVar("T")

NEAREST_M = 0.7  # closer points are drawn as if they were here
FARTHEST_M = 160.0
CIRCLE = ((1.0, 0.0), (0.924, 0.383), (0.707, 0.707), (0.383, 0.924), (0.0, 1.0), (-0.383, 0.924), (-0.707, 0.707),
          (-0.924, 0.383), (-1.0, 0.0), (-0.924, -0.383), (-0.707, -0.707), (-0.383, -0.924), (0.0, -1.0),
          (0.383, -0.924), (0.707, -0.707), (0.924, -0.383))  # fmt: skip

GREYS = ((205, 204, 200), (168, 170, 172), (138, 140, 142), (112, 114, 118), (88, 90, 94))
FACADES = ((206, 190, 158), (182, 96, 76), (146, 78, 64), (226, 222, 212), (158, 174, 190), (168, 180, 150),
           (214, 180, 112), (196, 152, 132), (120, 100, 84), *GREYS)  # fmt: skip
ROOFS = ((150, 76, 58), (120, 62, 52), (92, 94, 102), (74, 78, 84), (132, 110, 92), (96, 112, 100))
LEAVES = ((74, 112, 50), (92, 128, 58), (58, 94, 56), (112, 128, 56), (150, 118, 52), (64, 104, 74))
LAWNS = ((104, 142, 66), (92, 128, 70), (126, 142, 78), (84, 122, 54), (138, 136, 80))
WATERS = ((84, 122, 146), (78, 112, 118), (96, 116, 104), (110, 138, 158), (70, 98, 120))
PAINTS = ((226, 228, 230), (186, 190, 194), (44, 46, 52), (160, 34, 36), (44, 78, 140), (96, 128, 160), (48, 92, 66),
          (206, 164, 50), (112, 116, 122), (170, 120, 86))  # fmt: skip
CLOTHES = ((40, 44, 60), (150, 44, 50), (60, 96, 150), (214, 210, 200), (86, 110, 70), (206, 160, 60), (92, 84, 100),
           (180, 120, 130), (70, 60, 52), (130, 136, 140))  # fmt: skip
SKINS = ((232, 190, 160), (206, 156, 120), (160, 112, 82), (106, 74, 56))
STEELS = ((96, 100, 104), (132, 136, 138), (58, 66, 62), (44, 46, 50), (150, 140, 122))
FENCES = ((136, 104, 74), (108, 86, 66), (84, 118, 72), (216, 214, 206), (132, 134, 134), (96, 72, 60), (70, 96, 84))


class Dice:
    """The draws of one scene. `between` is spelt out because Generator.uniform may round differently per processor."""

    def __init__(self, generator: np.random.Generator) -> None:
        self.generator = generator

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.generator.random())

    def count(self, low: int, high: int) -> int:
        """Whole number in low..high, both included."""
        return int(self.generator.integers(low, high + 1))

    def chance(self, probability: float) -> bool:
        return float(self.generator.random()) < probability

    def pick(self, choices: Sequence[T]) -> T:
        return choices[int(self.generator.integers(len(choices)))]

    def colour(self, choices: Sequence[Colour], *, spread: int = 14) -> Colour:
        """One of the colours, every channel moved by up to `spread` levels, half of it in common."""
        common, half = self.count(-spread, spread), spread // 2
        red, green, blue = (min(255, max(0, level + common + self.count(-half, half))) for level in self.pick(choices))
        return red, green, blue


@dataclass(frozen=True)
class Camera:
    """A pinhole camera that looks along +z; the street may bend away from it."""

    height_px: int
    width_px: int
    focal_px: float
    horizon_px: float  # row
    centre_px: float  # column of the vanishing point
    height_m: float
    bend: float  # 1/m: everything at distance z is moved to the right by bend * z**2 metres

    def project(self, point: Point) -> tuple[int, int]:
        """World point -> (col, row), rounded half up."""
        x, y, z = point
        scale = self.focal_px / max(z, NEAREST_M)
        col = self.centre_px + scale * (x + self.bend * z * z)
        row = self.horizon_px + scale * (self.height_m - y)
        return int(col + 16384.5) - 16384, int(row + 16384.5) - 16384

    def ground_plane(self) -> tuple[float, float, float]:
        """(a, b, c) of the ground: inverse depth 1/z = a + b col + c row, as for every plane."""
        slope = 1.0 / (self.focal_px * self.height_m)
        return -self.horizon_px * slope, 0.0, slope


@dataclass(frozen=True)
class Wall:
    """An upright plane over the ground line (x0, z0) to (x1, z1), which runs along x or along z."""

    x0: float
    z0: float
    x1: float
    z1: float

    @property
    def length(self) -> float:
        return abs(self.x1 - self.x0) + abs(self.z1 - self.z0)

    @property
    def facing(self) -> Facing:
        if self.z0 == self.z1:
            return Facing.FRONT
        return Facing.LEFT if self.x0 > 0 else Facing.RIGHT

    def at(self, along: float, y: float) -> Point:
        """The point `along` metres from the start, y metres above the ground."""
        part = along / self.length
        return self.x0 + part * (self.x1 - self.x0), y, self.z0 + part * (self.z1 - self.z0)

    def box(self, low: float, bottom: float, high: float, top: float) -> list[Point]:
        """Corners of the rectangle low..high along the wall, bottom..top above the ground."""
        return [self.at(low, bottom), self.at(low, top), self.at(high, top), self.at(high, bottom)]


class Surface(NamedTuple):
    """A flat piece of the scene; with arrays in place of numbers, a table of them."""

    thing: Any  # Thing
    red: Any
    green: Any
    blue: Any
    texture: Any  # Texture
    facing: Any  # Facing
    a: Any  # inverse depth 1/z = a + b col + c row, in 1/m
    b: Any
    c: Any
    glow: Any  # light of its own when lamps are on, 0..1


@dataclass
class Sketch:
    """A scene without light: which surface each pixel shows, what each surface is, where shadows lie on the ground."""

    camera: Camera
    sun: tuple[float, float]  # where the shadow of a point 1 m up falls: (x, z) offset in metres
    surface_HW: np.ndarray = field(init=False)  # uint16, row of `surfaces`
    cast_HW: np.ndarray = field(init=False)  # uint8, 255 where something keeps the sun from the ground
    contact_HW: np.ndarray = field(init=False)  # uint8, 255 under things, where the ground is dark in any weather
    surfaces: list[Surface] = field(default_factory=list)
    lamps: list[Point] = field(default_factory=list)

    def __post_init__(self) -> None:
        size = self.camera.height_px, self.camera.width_px
        self.surface_HW = np.zeros(size, np.uint16)
        self.cast_HW, self.contact_HW = np.zeros(size, np.uint8), np.zeros(size, np.uint8)

    def add(
        self,
        thing: Thing,
        colour: Colour,
        *,
        texture: Texture,
        facing: Facing,
        plane: tuple[float, float, float],
        glow: float = 0.0,
    ) -> int:
        """Register a surface (glow: 0 dark .. 1 a lamp of its own at night); return its number."""
        self.surfaces.append(Surface(thing, *colour, texture, facing, *plane, glow))
        return len(self.surfaces) - 1

    def fill(
        self, shapes: Sequence[Sequence[Point]], thing: Thing, colour: Colour, *, texture: Texture = Texture.PLAIN,
        facing: Facing = Facing.FRONT, wall: Wall | None = None, glow: float = 0.0,
    ) -> None:  # fmt: skip
        """Draw polygons that do not overlap each other as one surface, over all that was drawn before."""
        if facing == Facing.GROUND:
            plane = self.camera.ground_plane()
        elif wall is None:
            plane = (1.0 / max(NEAREST_M, min(point[2] for point in shapes[0])), 0.0, 0.0)
        else:
            plane = self._wall_plane(wall)
        number = self.add(thing, colour, texture=texture, facing=facing, plane=plane, glow=glow)
        cv2.fillPoly(self.surface_HW, [self._pixels(shape) for shape in shapes], number)

    def on_wall(
        self, wall: Wall, shapes: Sequence[Sequence[Point]], thing: Thing, colour: Colour, *,
        texture: Texture = Texture.PLAIN, glow: float = 0.0,
    ) -> None:  # fmt: skip
        """Draw polygons whose points lie on the wall."""
        self.fill(shapes, thing, colour, texture=texture, facing=wall.facing, wall=wall, glow=glow)

    def discs(self, centres: Sequence[tuple[Point, float]], thing: Thing, colour: Colour, *, texture: Texture,
              glow: float = 0.0) -> None:  # fmt: skip
        """Draw (centre, radius in metres) discs that face the camera, all as one surface."""
        near = max(NEAREST_M, min(centre[2] for centre, _ in centres))
        plane = (1.0 / near, 0.0, 0.0)
        number = self.add(thing, colour, texture=texture, facing=Facing.FRONT, plane=plane, glow=glow)
        for centre, radius_m in centres:
            radius_px = max(1, int(self.camera.focal_px * radius_m / near + 0.5))
            cv2.circle(self.surface_HW, self.camera.project(centre), radius_px, number, -1)

    def shade(self, outline: Sequence[Point], *, height_m: float) -> None:
        """Darken the ground under an outline, and let the sun throw the outline's shadow from height_m."""
        east, north = self.sun
        away = [(x + east * height_m, y, z + north * height_m) for x, y, z in outline]
        cv2.fillConvexPoly(self.cast_HW, cv2.convexHull(self._pixels([*outline, *away])), 255)
        cv2.fillConvexPoly(self.contact_HW, cv2.convexHull(self._pixels(outline)), 255)

    def _pixels(self, shape: Sequence[Point]) -> np.ndarray:
        return np.array([self.camera.project(point) for point in shape], np.int32)

    def _wall_plane(self, wall: Wall) -> tuple[float, float, float]:
        start_px, end_px = (self.camera.project(wall.at(along, 0.0))[0] for along in (0.0, wall.length))
        near, far = 1.0 / max(wall.z0, NEAREST_M), 1.0 / max(wall.z1, NEAREST_M)
        slope = (far - near) / (end_px - start_px) if end_px != start_px else 0.0
        return near - slope * start_px, slope, 0.0


def oval(x: float, z: float, radius_x: float, radius_z: float) -> list[Point]:
    """An ellipse on the ground."""
    return [(x + radius_x * cosine, 0.0, z + radius_z * sine) for cosine, sine in CIRCLE]


def strip(sketch: Sketch, thing: Thing, colour: Colour, texture: Texture, *, x: tuple[float, float],
          z: tuple[float, float] = (NEAREST_M, FARTHEST_M)) -> None:  # fmt: skip
    """Cover the ground between x[0] and x[1], from z[0] to z[1]; follows the bend of the street."""
    near, far = 1.0 / z[0], 1.0 / z[1]
    depths = [1.0 / (near + (far - near) * step / 12) for step in range(13)]
    outline = [(x[0], 0.0, depth) for depth in depths] + [(x[1], 0.0, depth) for depth in reversed(depths)]
    sketch.fill([outline], thing, colour, texture=texture, facing=Facing.GROUND)
