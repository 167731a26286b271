"""ToyTown's two views: along a street that runs away from the camera, and across one that passes by."""

from collections.abc import Callable
from functools import partial

from segadapt.datasets.toytown_scene import (
    FACADES,
    FARTHEST_M,
    LAWNS,
    LEAVES,
    NEAREST_M,
    WATERS,
    Camera,
    Colour,
    Dice,
    Facing,
    Sketch,
    Texture,
    Thing,
    Wall,
    oval,
    strip,
)  # fmt: skip
from segadapt.datasets.toytown_things import building, bush, car, fence, lamp, person, sign, signal, tree

Job = tuple[float, Callable[[], None]]  # distance in metres, and what draws the thing that stands there

LONG_PX, SHORT_PX = 320, 240
PORTRAIT_SHARE = 0.2
ASPHALTS = ((96, 96, 100), (118, 118, 120), (78, 80, 86), (128, 122, 114), (104, 108, 118))
PAVINGS = ((172, 168, 160), (150, 146, 140), (186, 172, 152), (136, 136, 140), (164, 140, 124))


def sketch_street(dice: Dice) -> Sketch:
    """Draw one scene of ToyTown, all of it from the dice."""
    is_portrait, is_along = dice.chance(PORTRAIT_SHARE), dice.chance(0.68)
    height_px, width_px = (LONG_PX, SHORT_PX) if is_portrait else (SHORT_PX, LONG_PX)
    camera = Camera(
        height_px=height_px,
        width_px=width_px,
        focal_px=dice.between(215.0, 290.0),
        horizon_px=height_px * dice.between(0.40, 0.54),
        centre_px=width_px * (dice.between(0.3, 0.7) if is_along else 0.5),
        height_m=dice.between(1.6, 2.7),
        bend=dice.between(-0.004, 0.004) if is_along and dice.chance(0.6) else 0.0,
    )
    east = dice.between(0.5, 1.5) * dice.pick((-1.0, 1.0))
    sketch = Sketch(camera, sun=(east, dice.between(-0.5, 0.5)))
    backdrop(sketch, dice)
    (along_the_street if is_along else across_the_street)(sketch, dice)
    return sketch


def backdrop(sketch: Sketch, dice: Dice) -> None:
    """Sky, a meadow to the horizon, and far woods or roofs on it."""
    sketch.add(Thing.SKY, (0, 0, 0), texture=Texture.PLAIN, facing=Facing.FRONT, plane=(0.0, 0.0, 0.0))
    strip(sketch, Thing.GRASS, dice.colour(LAWNS), Texture.GRASS, x=(-900.0, 900.0))
    z = FARTHEST_M
    if dice.chance(0.7):
        crowns = [((x * 9.0 + dice.between(-4.0, 4.0), dice.between(0.0, 6.0), z), dice.between(5.0, 12.0))
                  for x in range(-14, 15)]  # fmt: skip
        sketch.discs(crowns, Thing.TREE, dice.colour(LEAVES), texture=Texture.LEAVES)
    for _ in range(dice.count(0, 7)):
        left, width = dice.between(-90.0, 80.0), dice.between(8.0, 20.0)
        block = Wall(left, z, left + width, z)
        sketch.on_wall(block, [block.box(0.0, 0.0, width, dice.between(8.0, 34.0))], Thing.BUILDING,
                       dice.colour(FACADES), texture=Texture.PLASTER)  # fmt: skip


def draw_far_to_near(jobs: list[Job]) -> None:
    for _, draw in sorted(jobs, key=lambda job: -job[0]):
        draw()


def road(sketch: Sketch, dice: Dice, *, x: tuple[float, float], z: tuple[float, float]) -> None:
    """Asphalt with a broken centre line, perhaps with a puddle; it runs along its longer side."""
    asphalt = dice.colour(ASPHALTS)
    strip(sketch, Thing.ROAD, asphalt, Texture.ASPHALT, x=x, z=z)
    white = dice.colour(((222, 222, 216), (206, 190, 120)))
    has_lines, middle_x, middle_z = dice.chance(0.75), (x[0] + x[1]) / 2, (z[0] + z[1]) / 2
    for step in range(14):
        if has_lines and z[1] - z[0] > 50.0:
            start = 2.0 + 5.0 * step
            dash, gap = (middle_x - 0.1, middle_x + 0.1), (start, start + 2.4)
        elif has_lines:
            dash, gap = (-35.0 + 5.0 * step, -32.6 + 5.0 * step), (middle_z - 0.1, middle_z + 0.1)
        else:
            break
        strip(sketch, Thing.ROAD, white, Texture.ASPHALT, x=dash, z=gap)
    if dice.chance(0.2):
        patch = oval(dice.between(x[0], x[1]) * 0.4, dice.between(max(z[0], 4.0), min(z[1], 22.0)), 1.0, 1.4)
        sketch.fill([patch], Thing.ROAD, dice.colour(ASPHALTS), texture=Texture.ASPHALT, facing=Facing.GROUND)
    if dice.chance(0.3):
        near, far = max(z[0] + 1.5, 5.0), min(z[1] - 1.5, 16.0)
        pool_x = dice.between(max(x[0] + 1.0, -5.0), min(x[1] - 1.0, 5.0))
        pool = oval(pool_x, dice.between(near, far), dice.between(0.7, 1.6), dice.between(0.6, 1.4))
        sketch.fill([pool], Thing.WATER, dice.colour(WATERS), texture=Texture.RIPPLES, facing=Facing.GROUND)


def along_the_street(sketch: Sketch, dice: Dice) -> None:
    """The vanishing-point view: road, verges, pavements, and on each side houses, a park or a canal."""
    half, centre = dice.between(2.6, 4.2), dice.between(-2.6, 2.6)
    paving, lawn = dice.colour(PAVINGS), dice.colour(LAWNS)
    lots: list[Job] = []
    things: list[Job] = []
    edges: list[tuple[float, float, float]] = []  # side (-1 left, 1 right), kerb x, lot x
    for side in (-1.0, 1.0):
        kerb = centre + side * half
        verge = dice.between(0.8, 1.8) if dice.chance(0.3) else 0.0
        outer = kerb + side * (verge + dice.between(1.6, 3.4))
        strip(sketch, Thing.PAVEMENT, paving, Texture.PAVING, x=(kerb, outer))
        if verge:
            strip(sketch, Thing.GRASS, lawn, Texture.GRASS, x=(kerb, kerb + side * verge))
        edges.append((side, kerb, outer))
        if dice.chance(0.27):
            lots += canal_side(sketch, dice, side=side, edge=outer)
        else:
            lots += lot_side(sketch, dice, side=side, edge=outer, house_share=dice.pick((0.1, 0.5, 0.9)))
    road(sketch, dice, x=(centre - half, centre + half), z=(NEAREST_M, FARTHEST_M))
    for side, kerb, outer in edges:
        if dice.chance(0.6):
            first = dice.between(4.0, 14.0)
            for number in range(dice.count(1, 4)):
                z = first + 6.2 * number
                things.append((z, partial(car, sketch, dice, kerb - side * 1.0, z, crosswise=False)))
        things += furniture(sketch, dice, curb=kerb + side * 0.35, back=outer - side * 0.3)
    if dice.chance(0.6):
        z = dice.between(8.0, 40.0)
        things.append((z, partial(car, sketch, dice, centre + dice.pick((-0.4, 0.4)) * half, z, crosswise=False)))
    if dice.chance(0.3):
        z = dice.between(7.0, 18.0)
        things.append((z, partial(person, sketch, dice, centre + dice.between(-half, half), z)))
    draw_far_to_near(lots)
    draw_far_to_near(things)


def furniture(sketch: Sketch, dice: Dice, *, curb: float, back: float) -> list[Job]:
    """Lamps, signs, trees and persons of one pavement that runs along the view."""
    jobs: list[Job] = []
    first, step = dice.between(5.5, 13.0), dice.between(13.0, 22.0)
    street_tree, has_lamps = dice.chance(0.45), dice.chance(0.7)
    for number in range(3):
        z = first + step * number
        if has_lamps:
            jobs.append((z, partial(lamp, sketch, dice, curb, z)))
        if street_tree and dice.chance(0.8):
            jobs.append((z + step / 2, partial(tree, sketch, dice, curb, z + step / 2)))
    for draw in [sign] * dice.count(0, 2) + [signal] * dice.count(0, 1):
        z = dice.between(5.5, 20.0)
        jobs.append((z, partial(draw, sketch, dice, curb, z)))
    for _ in range(dice.count(0, 4)):
        z = dice.between(4.5, 20.0)
        jobs.append((z, partial(person, sketch, dice, dice.between(curb, back), z)))
    return jobs


def lot_side(sketch: Sketch, dice: Dice, *, side: float, edge: float, house_share: float) -> list[Job]:
    """Houses, and gardens behind fences, from near to far along one side."""
    jobs: list[Job] = []
    z = dice.between(1.5, 4.0)
    while z < 95.0:
        length = dice.between(6.0, 13.0)
        if dice.chance(house_share):
            wall = Wall(edge, z, edge, z + length)
            jobs.append((z, partial(building, sketch, dice, wall, inward=(side * dice.between(6.0, 9.0), 0.0))))
        else:
            if dice.chance(0.75):
                jobs.append((z, partial(fence, sketch, dice, Wall(edge, z, edge, z + length))))
            for _ in range(dice.count(1, 3)):
                depth = z + 0.5 + dice.between(0.0, length - 1.0)
                plant = tree if dice.chance(0.6) else bush
                jobs.append((depth, partial(plant, sketch, dice, edge + side * dice.between(1.6, 9.0), depth)))
        z += length + (dice.between(1.5, 4.0) if dice.chance(0.4) else 0.0)
    return jobs


def canal_side(sketch: Sketch, dice: Dice, *, side: float, edge: float) -> list[Job]:
    """A canal behind a railing or a grass bank; trees and houses on the far shore."""
    bank, width = dice.between(0.3, 1.5), dice.between(6.0, 22.0)
    shore = edge + side * (bank + width)
    strip(sketch, Thing.WATER, dice.colour(WATERS), Texture.RIPPLES, x=(edge + side * bank, shore))
    jobs = lot_side(sketch, dice, side=side, edge=shore + side * 1.5, house_share=0.5)
    if dice.chance(0.6):
        start = dice.between(2.0, 9.0)
        jobs.append((0.0, partial(fence, sketch, dice, Wall(edge, start, edge, start + dice.between(12.0, 40.0)))))
    return jobs


def across_the_street(sketch: Sketch, dice: Dice) -> None:
    """The side view: bands of grass, water, pavement and road before a row of houses or a park."""
    wide = (-60.0, 60.0)
    paving, lawn = dice.colour(PAVINGS), dice.colour(LAWNS)
    z, bands = NEAREST_M, [Thing.PAVEMENT, Thing.ROAD, Thing.PAVEMENT]
    if dice.chance(0.45):
        bands.insert(dice.pick((0, 0, 3)), dice.pick((Thing.WATER, Thing.GRASS)))
    jobs: list[Job] = []
    for number, thing in enumerate(bands):
        start = dice.between(3.6, 6.5) if number == 0 else 0.0  # the first band reaches the bottom of the image
        depth = start + {Thing.ROAD: dice.between(5.0, 8.0)}.get(thing, dice.between(1.8, 4.0))
        if thing == Thing.ROAD:
            road(sketch, dice, x=wide, z=(z, z + depth))
            lanes = (z + depth - 2.4, z + 0.5)
            for lane, most in ((lanes[0], 3), (max(lanes[1], 5.5), 1)):
                x = dice.between(-9.0, -2.0)
                for _ in range(dice.count(0, most)):
                    jobs.append((lane, partial(car, sketch, dice, x, lane, crosswise=True)))
                    x += dice.between(5.2, 8.0)
        else:
            looks: dict[Thing, tuple[Colour, Texture]] = {
                Thing.PAVEMENT: (paving, Texture.PAVING),
                Thing.GRASS: (lawn, Texture.GRASS),
                Thing.WATER: (dice.colour(WATERS), Texture.RIPPLES),
            }
            colour, texture = looks[thing]
            strip(sketch, thing, colour, texture, x=wide, z=(z, z + depth))
        z += depth
        near = max(z - depth, 4.5)
        if thing == Thing.WATER:
            jobs.append((z, partial(fence, sketch, dice, Wall(-30.0, z, 30.0, z))))
        elif thing == Thing.PAVEMENT and z > near + 0.5:
            for draw, most in ((person, 4), (lamp, 1), (sign, 2), (tree, 1), (signal, 1)):
                for _ in range(dice.count(0, most)):
                    spot = dice.between(max(near, 5.5), max(z - 0.4, 5.8))
                    x = dice.between(-0.55, 0.55) * spot
                    jobs.append((spot, partial(draw, sketch, dice, x, spot)))
    jobs += frontage(sketch, dice, z=z, house_share=dice.pick((0.2, 0.7, 1.0)))
    draw_far_to_near(jobs)


def frontage(sketch: Sketch, dice: Dice, *, z: float, house_share: float) -> list[Job]:
    """Houses side by side, seen from the front, with gardens, fences and ponds between them."""
    jobs: list[Job] = []
    x, reach = -0.75 * z - 8.0, 0.75 * z + 2.0
    while x < reach:
        width = dice.between(6.0, 12.0)
        if dice.chance(house_share):
            back = z + dice.between(0.2, 2.5)
            jobs.append((back, partial(building, sketch, dice, Wall(x, back, x + width, back), inward=(0.0, 7.0))))
        else:
            if dice.chance(0.4):
                pond = oval(x + width / 2, z + 7.0, width * 0.45, dice.between(2.5, 4.5))
                sketch.fill([pond], Thing.WATER, dice.colour(WATERS), texture=Texture.RIPPLES, facing=Facing.GROUND)
            if dice.chance(0.7):
                jobs.append((z + 0.2, partial(fence, sketch, dice, Wall(x, z + 0.2, x + width, z + 0.2))))
            for _ in range(dice.count(1, 4)):
                depth = z + dice.between(1.0, 14.0)
                plant = tree if dice.chance(0.7) else bush
                jobs.append((depth, partial(plant, sketch, dice, x + dice.between(0.0, width), depth)))
        x += width + (dice.between(1.0, 4.0) if dice.chance(0.4) else 0.0)
    return jobs
