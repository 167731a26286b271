"""What stands in ToyTown's streets: houses, trees, cars, persons, poles, signs and fences.

Each thing draws itself from its ground position (x, z), in metres, with the dice of its scene. Sizes are a toy's: poles
are thick and signs are large, so that a segmenter with logits at 1/4 size can see them.
"""

from collections.abc import Sequence

from segadapt.datasets.toytown_scene import (
    CIRCLE,
    CLOTHES,
    FACADES,
    FENCES,
    GREYS,
    LEAVES,
    PAINTS,
    ROOFS,
    SKINS,
    STEELS,
    Colour,
    Dice,
    Point,
    Sketch,
    Texture,
    Thing,
    Wall,
    oval,
)  # fmt: skip

CAR_BODY = ((0.0, 0.3), (0.0, 0.85), (0.25, 0.98), (3.15, 0.98), (4.1, 0.82), (4.2, 0.3))  # metres from the tail, up
CAR_CABIN = ((0.25, 0.96), (0.65, 1.5), (2.2, 1.5), (3.15, 0.96))
CAR_WINDOWS = (((0.6, 1.0), (0.85, 1.4), (1.4, 1.4), (1.4, 1.0)), ((1.52, 1.0), (1.52, 1.4), (2.1, 1.4), (2.75, 1.0)))
VAN_BODY = ((0.0, 0.3), (0.0, 1.95), (0.15, 2.05), (3.3, 2.05), (3.9, 1.2), (4.4, 1.0), (4.45, 0.3))
VAN_CABIN = ((2.6, 1.2), (2.6, 1.9), (3.25, 1.9), (3.75, 1.2))
AXLES = (0.85, 3.35)
SIGN_COLOURS = ((200, 40, 40), (36, 84, 168), (230, 190, 40), (40, 120, 84), (226, 226, 222), (60, 62, 70))
GLASS = ((52, 62, 76), (78, 92, 108), (112, 128, 142), (40, 44, 52))
BARK = ((92, 72, 54), (112, 94, 76), (74, 62, 52))


def building(sketch: Sketch, dice: Dice, wall: Wall, *, inward: tuple[float, float]) -> None:
    """A house on `wall` with the given (x, z) depth vector behind it: gable end or flat side, roof, windows, door."""
    height = dice.between(3.2, 5.0) + 2.7 * dice.count(0, 3)
    colour, texture = dice.colour(FACADES), dice.pick((Texture.BRICK, Texture.PLASTER, Texture.PLASTER, Texture.PLAIN))
    roof = dice.colour(ROOFS)
    deep_x, deep_z = inward
    rise = dice.between(1.5, 3.4) if dice.chance(0.65) else 0.0
    far_end = wall.z0 == wall.z1 and wall.x1 < 0.0  # seen from the right, the right end shows
    foot_x, _, foot_z = wall.at(wall.length if far_end else 0.0, 0.0)
    end = Wall(foot_x, foot_z, foot_x + deep_x, foot_z + deep_z)
    ridge_shift_x, ridge_shift_z = deep_x / 2, deep_z / 2
    ridge = [(x + ridge_shift_x, y + rise, z + ridge_shift_z) for x, y, z in
             (wall.at(wall.length, height), wall.at(0.0, height))]  # fmt: skip

    gable = [end.at(0.0, height), end.at(end.length / 2, height + rise), end.at(end.length, height)]
    outline = [end.at(0.0, 0.0), *gable, end.at(end.length, 0.0)]
    sketch.on_wall(end, [outline], Thing.BUILDING, colour, texture=texture)
    windows(sketch, dice, end, height=height)
    if rise:
        slope = [wall.at(0.0, height), wall.at(wall.length, height), *ridge]
        sketch.on_wall(wall, [slope], Thing.BUILDING, roof, texture=Texture.ROOF)
    sketch.on_wall(wall, [wall.box(0.0, 0.0, wall.length, height)], Thing.BUILDING, colour, texture=texture)
    trim = dice.colour(GREYS)
    sketch.on_wall(wall, [wall.box(0.0, height - 0.3, wall.length, height)], Thing.BUILDING, trim)
    if dice.chance(0.5):
        sketch.on_wall(wall, [wall.box(0.0, 0.0, wall.length, 0.6)], Thing.BUILDING, trim, texture=Texture.PLASTER)
    windows(sketch, dice, wall, height=height)
    door = dice.between(0.5, max(0.6, wall.length - 2.0))
    sketch.on_wall(wall, [wall.box(door, 0.0, door + 1.3, 2.3)], Thing.BUILDING, dice.colour(PAINTS))
    if dice.chance(0.4) and wall.length > 5.0:
        left = dice.between(0.5, wall.length - 4.2)
        right = left + dice.between(2.5, 3.6)
        board = dice.pick(SIGN_COLOURS)
        sketch.on_wall(wall, [wall.box(left, 2.5, right, 3.4)], Thing.SIGN, board, texture=Texture.METAL, glow=0.5)
        letters = [wall.box(left + 0.3 + 0.5 * n, 2.75, left + 0.6 + 0.5 * n, 3.15) for n in range(4)]
        ink = (240, 238, 226) if sum(board) < 500 else (50, 50, 60)
        sketch.on_wall(wall, letters, Thing.SIGN, ink, glow=0.5)
    sketch.shade([wall.at(0.0, 0.0), wall.at(wall.length, 0.0)], height_m=height)


def windows(sketch: Sketch, dice: Dice, wall: Wall, *, height: float) -> None:
    """Rows of windows that keep clear of the wall's edges; some are lit after dark."""
    pitch, wide, tall = dice.between(1.9, 2.9), dice.between(0.9, 1.3), dice.between(1.1, 1.6)
    frame, glass = dice.colour(((232, 230, 224), (96, 80, 66), (150, 152, 150))), dice.colour(GLASS)
    columns = int((wall.length - 0.8) / pitch)
    floors = int((height - 0.6) / 2.7)
    if columns < 1 or floors < 1 or min(wall.z0, wall.z1) > 70.0:
        return
    margin = (wall.length - columns * pitch + pitch - wide) / 2
    places = [(margin + pitch * column, 1.0 + 2.7 * floor) for floor in range(floors) for column in range(columns)]
    sketch.on_wall(wall, [wall.box(s - 0.12, y - 0.12, s + wide + 0.12, y + tall + 0.12) for s, y in places],
                   Thing.BUILDING, frame)  # fmt: skip
    lit = [dice.chance(0.4) for _ in places]
    for is_lit in (False, True):
        panes = [wall.box(s, y, s + wide, y + tall) for (s, y), on in zip(places, lit, strict=True) if on == is_lit]
        if panes:
            sketch.on_wall(wall, panes, Thing.BUILDING, glass, glow=0.9 if is_lit else 0.0)


def tree(sketch: Sketch, dice: Dice, x: float, z: float) -> None:
    """A trunk under a crown of leaves: a dark crown first, then lighter discs up and to the left of it."""
    height, spread = dice.between(3.5, 8.0), dice.between(0.9, 2.0)
    stem = dice.between(0.14, 0.26)
    leaf = dice.colour(LEAVES, spread=20)
    trunk = [(x - stem, 0.0, z), (x - stem, height - spread, z), (x + stem, height - spread, z), (x + stem, 0.0, z)]
    sketch.shade(oval(x, z, 0.5 * spread, 0.3 * spread), height_m=height - spread)
    sketch.fill([trunk], Thing.TREE, dice.colour(BARK), texture=Texture.PLANKS)
    crown = [(dice.between(-0.8, 0.8), dice.between(-0.8, 0.8), dice.between(0.45, 0.8)) for _ in range(8)]
    if dice.chance(0.2):  # a conifer: discs that shrink upwards
        crown = [(0.0, -1.0 + 0.3 * step, 0.8 - 0.09 * step) for step in range(8)]
    for shift, light, size in ((0.0, 0.72, 1.0), (-0.1, 0.95, 0.8), (-0.22, 1.18, 0.5)):
        discs = [((x + spread * (right + shift), height - spread * (0.3 - up + shift), z), spread * radius * size)
                 for right, up, radius in crown]  # fmt: skip
        shade = min(255, int(leaf[0] * light)), min(255, int(leaf[1] * light)), min(255, int(leaf[2] * light))
        sketch.discs(discs, Thing.TREE, shade, texture=Texture.LEAVES)


def bush(sketch: Sketch, dice: Dice, x: float, z: float) -> None:
    """A low crown without a trunk; counts as a tree."""
    size, leaf = dice.between(0.4, 0.9), dice.colour(LEAVES, spread=20)
    discs = [((x + dice.between(-0.9, 0.9), dice.between(0.1, 0.8) * size, z), size * 0.6) for _ in range(5)]
    sketch.discs(discs, Thing.TREE, leaf, texture=Texture.LEAVES)


def car(sketch: Sketch, dice: Dice, x: float, z: float, *, crosswise: bool) -> None:
    """A car or van with its near end at z; crosswise, seen from the side, else from the back or front."""
    is_van, paint = dice.chance(0.2), dice.colour(PAINTS, spread=20)
    glass, faces_camera = dice.colour(GLASS, spread=8), dice.chance(0.4)
    half_x, half_z = (2.1, 0.9) if crosswise else (0.9, 2.1)
    foot = [(x + dx * half_x, 0.0, z + half_z + dz * half_z) for dx, dz in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    sketch.shade(foot, height_m=1.3)
    if crosswise:
        turn = -2.2 if faces_camera else 2.2
        car_side(sketch, Wall(x - turn, z, x + turn, z), paint, glass=glass, is_van=is_van)
        return
    flank = x - 0.9 if x + sketch.camera.bend * z * z > 0.0 else x + 0.9
    tail_z, nose_z = (z + 4.3, z) if faces_camera else (z, z + 4.3)
    car_end(sketch, x, z, paint, glass=glass, is_van=is_van, faces_camera=faces_camera, flank=Wall(
        flank, tail_z, flank, nose_z))  # fmt: skip


def car_side(sketch: Sketch, side: Wall, paint: Colour, *, glass: Colour, is_van: bool) -> None:
    """Body, windows and wheels of a car whose tail is at the start of the wall `side`."""

    def profile(shape: Sequence[tuple[float, float]]) -> list[Point]:
        return [side.at(along, y) for along, y in shape]

    sketch.fill([profile(VAN_BODY if is_van else CAR_BODY)], Thing.CAR, paint, texture=Texture.METAL)
    if not is_van:
        sketch.fill([profile(CAR_CABIN)], Thing.CAR, paint, texture=Texture.METAL)
    sketch.fill([profile(pane) for pane in ((VAN_CABIN,) if is_van else CAR_WINDOWS)], Thing.CAR, glass)
    for radius, colour in ((0.36, (28, 28, 30)), (0.17, (150, 152, 156))):
        wheels = [[(hub + radius * cosine, 0.36 + radius * sine) for cosine, sine in CIRCLE] for hub in AXLES]
        sketch.fill([profile(wheel) for wheel in wheels], Thing.CAR, colour)


def car_end(
    sketch: Sketch, x: float, z: float, paint: Colour, *, glass: Colour, is_van: bool, faces_camera: bool, flank: Wall
) -> None:
    """The back or front of a car that stands along the view, with its roof, deck and the flank that shows."""
    top, foot_z, brow_z, roof_z = (2.0, 0.0, 0.0, 3.3) if is_van else (1.5, 0.25, 0.65, 2.2)
    if faces_camera:
        foot_z, brow_z, roof_z = (0.5, 1.1, 4.4) if is_van else (1.15, 2.1, 3.65)
    shaded = paint[0] * 3 // 4, paint[1] * 3 // 4, paint[2] * 3 // 4
    bright = min(255, paint[0] * 9 // 8), min(255, paint[1] * 9 // 8), min(255, paint[2] * 9 // 8)

    def level(y: float, start: float, stop: float) -> list[Point]:
        return [(x - 0.86, y, z + start), (x + 0.86, y, z + start), (x + 0.86, y, z + stop), (x - 0.86, y, z + stop)]

    def end(left: float, low: float, right: float, high: float) -> list[Point]:
        return [(x + left, low, z), (x + left, high, z), (x + right, high, z), (x + right, low, z)]

    def screen(inset: float, low: float, high: float) -> list[Point]:
        """Part low..high (0..1) of the sloping window frame."""
        heights = 0.93 + (top - 0.93) * low, 0.93 + (top - 0.93) * high
        depths = z + foot_z + (brow_z - foot_z) * low, z + foot_z + (brow_z - foot_z) * high
        return [(x - 0.88 + inset, heights[0], depths[0]), (x - 0.82 + inset, heights[1], depths[1]),
                (x + 0.82 - inset, heights[1], depths[1]), (x + 0.88 - inset, heights[0], depths[0])]  # fmt: skip

    sketch.fill([level(0.95, 0.0, 4.2)], Thing.CAR, bright, texture=Texture.METAL)
    car_side(sketch, flank, shaded, glass=glass, is_van=is_van)
    sketch.fill([level(top, brow_z, roof_z)], Thing.CAR, bright, texture=Texture.METAL)
    sketch.fill([screen(0.0, 0.0, 1.0)], Thing.CAR, paint)
    sketch.fill([screen(0.12, 0.4 if is_van else 0.1, 0.88)], Thing.CAR, glass)
    sketch.fill([end(-0.9, 0.3, 0.9, 0.95)], Thing.CAR, paint, texture=Texture.METAL)
    sketch.fill([end(-0.86, 0.0, -0.62, 0.4), end(0.62, 0.0, 0.86, 0.4)], Thing.CAR, (28, 28, 30))
    lamps = (244, 238, 210) if faces_camera else (176, 28, 26)
    sketch.fill([end(-0.84, 0.62, -0.58, 0.8), end(0.58, 0.62, 0.84, 0.8)], Thing.CAR, lamps, glow=0.8)
    sketch.fill([end(-0.26, 0.45, 0.26, 0.58)], Thing.CAR, (224, 222, 206))


def person(sketch: Sketch, dice: Dice, x: float, z: float) -> None:
    """Somebody on foot: legs, coat, arms, head and hair."""
    tall, stride = dice.between(0.92, 1.1), dice.between(0.05, 0.3)
    trousers, coat, skin = dice.colour(CLOTHES), dice.colour(CLOTHES, spread=24), dice.colour(SKINS)

    def body(*shapes: tuple[tuple[float, float], ...]) -> list[list[Point]]:
        return [[(x + right * tall, y * tall, z) for right, y in shape] for shape in shapes]

    sketch.shade(oval(x, z, 0.3, 0.2), height_m=1.7 * tall)
    sketch.fill(body(((-stride - 0.13, 0.0), (-0.19, 0.9), (0.0, 0.9), (-stride + 0.08, 0.0))), Thing.PERSON, trousers)
    sketch.fill(body(((stride - 0.08, 0.0), (0.0, 0.9), (0.19, 0.9), (stride + 0.13, 0.0))), Thing.PERSON, trousers)
    sketch.fill(body(((-0.23, 0.75), (-0.27, 1.42), (0.27, 1.42), (0.23, 0.75))), Thing.PERSON, coat)
    swing = dice.between(-0.1, 0.25)
    arms = body(((-0.33 - swing, 0.75), (-0.3, 1.42), (-0.16, 1.42), (-0.17 - swing, 0.75)),
                ((0.17 + swing, 0.75), (0.16, 1.42), (0.3, 1.42), (0.33 + swing, 0.75)))  # fmt: skip
    sleeve = coat[0] * 4 // 5, coat[1] * 4 // 5, coat[2] * 4 // 5
    for arm in arms:
        sketch.fill([arm], Thing.PERSON, sleeve)
    sketch.discs([((x, 1.62 * tall, z), 0.17 * tall)], Thing.PERSON, dice.pick(((50, 40, 34), (120, 84, 50), coat)),
                 texture=Texture.PLAIN)  # fmt: skip
    sketch.discs([((x, 1.56 * tall, z), 0.13 * tall)], Thing.PERSON, skin, texture=Texture.PLAIN)


def post(sketch: Sketch, dice: Dice, x: float, z: float, *, height: float, thick: float = 0.22) -> None:
    """An upright post, at least 3 px wide."""
    thick = max(thick, 3.0 * z / sketch.camera.focal_px)
    column = [(x - thick / 2, 0.0, z), (x - thick / 2, height, z), (x + thick / 2, height, z), (x + thick / 2, 0.0, z)]
    sketch.shade([column[0], column[3]], height_m=height)
    sketch.fill([column], Thing.POLE, dice.colour(STEELS), texture=Texture.METAL)


def lamp(sketch: Sketch, dice: Dice, x: float, z: float) -> None:
    """A street lamp whose arm reaches over the road."""
    height, reach = dice.between(4.2, 6.0), 1.3 if x < 0.0 else -1.3
    post(sketch, dice, x, z, height=height)
    arm = [(x, height - 0.2, z), (x, height, z), (x + reach, height + 0.25, z), (x + reach, height + 0.05, z)]
    sketch.fill([arm], Thing.POLE, dice.colour(STEELS), texture=Texture.METAL)
    trapezoid = ((0.6, -0.1), (0.7, 0.25), (1.2, 0.25), (1.3, -0.1))
    head = [(x + reach * out, height + up, z) for out, up in trapezoid]
    sketch.fill([head], Thing.POLE, (236, 228, 196), glow=1.0)
    sketch.lamps.append((x + reach, height, z))


def signal(sketch: Sketch, dice: Dice, x: float, z: float) -> None:
    """A traffic light; all of it counts as a pole."""
    post(sketch, dice, x, z, height=2.6)
    case = [(x - 0.25, 2.3, z), (x - 0.25, 3.5, z), (x + 0.25, 3.5, z), (x + 0.25, 2.3, z)]
    sketch.fill([case], Thing.POLE, (42, 44, 46), texture=Texture.METAL)
    lit = dice.count(0, 2)
    for number, colour in enumerate(((214, 48, 40), (226, 170, 44), (50, 178, 96))):
        shown = colour if number == lit else (colour[0] // 3, colour[1] // 3, colour[2] // 3)
        sketch.discs([((x, 3.25 - 0.36 * number, z), 0.14)], Thing.POLE, shown, texture=Texture.PLAIN,
                     glow=1.0 if number == lit else 0.0)  # fmt: skip


def sign(sketch: Sketch, dice: Dice, x: float, z: float) -> None:
    """A traffic sign or name board on a post: disc, triangle, diamond or rectangle with a field inside."""
    middle, radius = dice.between(2.1, 2.6), max(dice.between(0.42, 0.62), 4.5 * z / sketch.camera.focal_px)
    post(sketch, dice, x, z, height=middle, thick=0.2)
    outlines = {
        "disc": CIRCLE,
        "triangle": ((0.0, 1.0), (0.95, -0.7), (-0.95, -0.7)),
        "diamond": ((0.0, 1.0), (1.0, 0.0), (0.0, -1.0), (-1.0, 0.0)),
        "board": ((-1.3, -0.7), (-1.3, 0.7), (1.3, 0.7), (1.3, -0.7)),
    }
    outline, rim = outlines[dice.pick(tuple(outlines))], dice.pick(SIGN_COLOURS)
    inner = dice.pick([colour for colour in SIGN_COLOURS if colour != rim])
    for size, colour in ((1.0, rim), (0.68, inner)):
        plate = [(x + radius * size * right, middle + radius * size * up, z) for right, up in outline]
        sketch.fill([plate], Thing.SIGN, colour, texture=Texture.PLAIN, glow=0.15)


def fence(sketch: Sketch, dice: Dice, wall: Wall) -> None:
    """Planks edge to edge, or two rails between posts with the scene behind showing through."""
    height, colour = dice.between(0.9, 1.7), dice.colour(FENCES)
    if dice.chance(0.7):
        sketch.on_wall(wall, [wall.box(0.0, 0.0, wall.length, height)], Thing.FENCE, colour, texture=Texture.PLANKS)
        sketch.on_wall(wall, [wall.box(0.0, height - 0.14, wall.length, height)], Thing.FENCE, dice.colour(FENCES))
    else:
        rails = [wall.box(0.0, height * low, wall.length, height * high) for low, high in ((0.25, 0.55), (0.75, 1.0))]
        sketch.on_wall(wall, rails, Thing.FENCE, colour, texture=Texture.PLASTER)
        posts = [wall.box(s, 0.0, s + 0.25, height * 1.08) for s in range(0, int(wall.length), 2)]
        sketch.on_wall(wall, posts, Thing.FENCE, colour, texture=Texture.PLANKS)
    sketch.shade([wall.at(0.0, 0.0), wall.at(wall.length, 0.0)], height_m=height)
