"""Light and weather over a sketch of ToyTown: surfaces become pixels. Labels are out of reach from here.

These are the natural appearances of our own town, seen by a decent camera; none is one of ImageNet-C's corruptions.
Arithmetic is + - * / in float32 or in integers, so that an image is the same on every processor.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import cv2
import numpy as np

from segadapt.datasets.toytown_scene import FARTHEST_M, Dice, Facing, Sketch, Surface, Texture, Thing
from segadapt.seeds import numpy_generator

# H W image px  N surfaces  K textures  U V texture px (a tile repeats in both)  3 RGB

TILE_PX = 256
Gain = tuple[float, float, float]  # RGB


@dataclass(frozen=True)
class Weather:
    """How the town looks. Gains multiply RGB; colours are RGB 0..255; the rest is 0..1 but for the distance."""

    light: Gain
    sun: float  # depth of cast shadows and contrast between lit and turned-away walls
    zenith: Gain
    horizon: Gain  # also the colour of haze
    cloud: float
    visibility_m: float  # at this distance half of the light is haze
    wet: float = 0.0  # how much road and pavement mirror
    snow: float = 0.0  # white on whatever looks up, and flakes
    rain: float = 0.0
    lamps: float = 0.0  # lamps, lit windows and car lights
    vignette: float = 0.1  # darkening at the corners
    grain: float = 2.0  # levels


WEATHERS = {
    "clear": Weather((1.24, 1.19, 1.11), 0.85, (104, 156, 218), (204, 220, 232), 0.55, 700.0),
    "overcast": Weather((0.80, 0.82, 0.86), 0.1, (164, 170, 178), (206, 208, 210), 0.8, 320.0),
    "dusk": Weather((0.78, 0.56, 0.50), 0.6, (72, 74, 122), (234, 150, 98), 0.7, 260.0, lamps=0.7, grain=4.0),
    "haze": Weather((0.86, 0.84, 0.80), 0.3, (186, 188, 186), (206, 204, 196), 0.2, 34.0),
    "drizzle": Weather((0.62, 0.66, 0.72), 0.05, (128, 134, 142), (168, 174, 180), 0.8, 90.0, wet=0.3, rain=1.0,
                       lamps=0.3, grain=4.0),
    "snowfall": Weather((0.80, 0.83, 0.90), 0.05, (176, 180, 188), (206, 208, 214), 0.5, 80.0, snow=1.0),
    "night": Weather((0.26, 0.28, 0.37), 0.0, (12, 16, 34), (38, 40, 58), 0.4, 240.0, lamps=1.0, vignette=0.3,
                     grain=6.0),
}  # fmt: skip

# wall brightness in full sun from the left (shadows fall to +x), by Facing; sun from the right swaps LEFT and RIGHT
SUNLIT = {Facing.GROUND: 1.0, Facing.FRONT: 0.86, Facing.LEFT: 1.12, Facing.RIGHT: 0.62}

TEXELS_PER_M = {Texture.PLAIN: 16, Texture.PLASTER: 24, Texture.BRICK: 32, Texture.ROOF: 24, Texture.ASPHALT: 40,
                Texture.PAVING: 32, Texture.GRASS: 32, Texture.LEAVES: 36, Texture.RIPPLES: 24, Texture.PLANKS: 32,
                Texture.METAL: 16}  # fmt: skip


def cloud_noise(generator: np.random.Generator, *, octaves: tuple[int, ...]) -> np.ndarray:
    """Periodic value noise, int32 (TILE_PX, TILE_PX) about -128..127; one octave per cell size, coarse ones weigh more.

    The grid is interpolated linearly in whole numbers.
    """
    total_VU, weights = np.zeros((TILE_PX, TILE_PX), np.int64), 0
    for cell_px in octaves:
        cells = TILE_PX // cell_px
        values_VU = generator.integers(-128, 128, (cells, cells))
        ramp_V1 = np.tile(np.arange(cell_px), cells)[:, None]
        for _ in ("down", "across"):
            low_VU, high_VU = (np.repeat(side, cell_px, axis=0) for side in (values_VU, np.roll(values_VU, -1, axis=0)))
            values_VU = ((low_VU * (cell_px - ramp_V1) + high_VU * ramp_V1) // cell_px).T
        total_VU += values_VU * cell_px
        weights += cell_px
    return (total_VU // weights).astype(np.int32)


@lru_cache(maxsize=1)
def texture_tiles() -> np.ndarray:
    """float32 (K, TILE_PX, TILE_PX): what a texture adds to brightness, as a factor about -0.4..0.4."""
    generator = numpy_generator(0, "toytown", "textures")
    v_VU, u_VU = np.mgrid[0:TILE_PX, 0:TILE_PX]

    def noise(*octaves: int) -> np.ndarray:
        return cloud_noise(generator, octaves=octaves)

    row_VU = v_VU // 8
    brick_VU = (u_VU + 8 * (row_VU % 2)) // 16 % 16
    mortar_VU = (v_VU % 8 == 0) | ((u_VU + 8 * (row_VU % 2)) % 16 == 0)
    tone_VU = generator.integers(-30, 31, (32, 16))[row_VU, brick_VU]
    slabs_VU = (v_VU % 32 < 2) | (u_VU % 32 < 2)
    slab_tone_VU = generator.integers(-24, 25, (8, 8))[v_VU // 32, u_VU // 32]
    plank_VU = generator.integers(-34, 35, 32)[u_VU // 8]
    tiles = {
        Texture.PLAIN: noise(8, 32) // 4,
        Texture.PLASTER: noise(2, 16, 64) // 2,
        Texture.BRICK: np.where(mortar_VU, 36, tone_VU) + noise(1, 4) // 4,
        Texture.ROOF: np.where(v_VU % 8 < 2, -44, 10) + noise(2, 8) // 3,
        Texture.ASPHALT: noise(1, 2) // 2 + noise(32, 64) // 3,
        Texture.PAVING: np.where(slabs_VU, -50, slab_tone_VU) + noise(1, 8) // 4,
        Texture.GRASS: noise(1, 2, 4) + noise(16, 64) // 3,
        Texture.LEAVES: noise(2, 4, 8) * 5 // 4,
        Texture.RIPPLES: noise(16, 32) // 3 + np.where(v_VU % 16 < 3, 14, -3),
        Texture.PLANKS: np.where(u_VU % 8 == 0, -70, plank_VU) + noise(2, 32) // 4,
        Texture.METAL: noise(16, 64) // 4,
    }
    return np.stack([tiles[texture] for texture in Texture]).astype(np.float32) / np.float32(256.0)


@lru_cache(maxsize=1)
def sky_tile() -> np.ndarray:
    """float32 (TILE_PX, TILE_PX), 0 blue .. 1 cloud."""
    cloud_VU = cloud_noise(numpy_generator(0, "toytown", "clouds"), octaves=(8, 16, 32, 64))
    return np.clip((cloud_VU + 16).astype(np.float32) / np.float32(56.0), 0.0, 1.0)


def of_the_day(weather: Weather, dice: Dice) -> Weather:
    """The weather with the small differences between one day and the next."""
    warmth, bright = dice.between(-0.05, 0.05), dice.between(0.86, 1.1)
    red, green, blue = weather.light
    return replace(
        weather,
        light=(red * bright * (1.0 + warmth), green * bright, blue * bright * (1.0 - warmth)),
        sun=weather.sun * dice.between(0.55, 1.0),
        cloud=weather.cloud * dice.between(0.2, 1.3),
        visibility_m=weather.visibility_m * dice.between(0.7, 1.4),
        grain=weather.grain * dice.between(0.6, 1.4),
    )


def light_up(sketch: Sketch, weather: Weather, *, dice: Dice) -> np.ndarray:
    """Turn a sketch into a uint8 RGB image (H, W, 3) under a weather; the dice draw clouds, flakes and grain."""
    camera, weather = sketch.camera, of_the_day(weather, dice)
    table = Surface(*np.array(sketch.surfaces, np.float32).T)  # each field an array (N,)
    rows_H1 = np.arange(camera.height_px, dtype=np.float32)[:, None]
    cols_1W = np.arange(camera.width_px, dtype=np.float32)[None, :]

    def per_pixel(column_N: np.ndarray) -> np.ndarray:
        return np.take(column_N, sketch.surface_HW)

    thing_HW, texture_HW, facing_HW = (
        per_pixel(column_N.astype(np.int32)) for column_N in (table.thing, table.texture, table.facing)
    )
    nearness_HW = per_pixel(table.a) + per_pixel(table.b) * cols_1W  # 1/m
    nearness_HW += per_pixel(table.c) * rows_H1
    np.clip(nearness_HW, 1.0 / (2.0 * FARTHEST_M), 1.4, out=nearness_HW)
    depth_HW = 1.0 / nearness_HW
    is_ground_HW, is_sky_HW = facing_HW == Facing.GROUND, thing_HW == Thing.SKY
    x_HW = (cols_1W - np.float32(camera.centre_px)) * depth_HW * np.float32(1.0 / camera.focal_px)
    y_HW = (np.float32(camera.horizon_px) - rows_H1) * depth_HW * np.float32(1.0 / camera.focal_px)

    grain_HW = texture_at(texture_HW, x_HW, y_HW, depth_HW, is_ground_HW=is_ground_HW)
    brightness_HW = sunlight(sketch, weather, facing_HW, is_ground_HW=is_ground_HW)
    brightness_HW *= 1.0 + grain_HW * np.minimum(1.0, 0.3 + 9.0 * nearness_HW)
    gain_HW3 = brightness_HW[..., None] * np.array(weather.light, np.float32)
    if weather.lamps:
        gain_HW3 += lamp_light(sketch, weather, x_HW, depth_HW)
    colours_N3 = np.stack([table.red, table.green, table.blue], axis=1)
    if weather.snow:
        lay_snow(colours_N3, table.texture)
    image_HW3 = np.take(colours_N3, sketch.surface_HW, axis=0)
    if weather.snow:
        image_HW3[is_ground_HW & (thing_HW != Thing.WATER) & (grain_HW > -0.14)] = (214.0, 218.0, 224.0)
    glow_HW = per_pixel(table.glow) * np.float32(weather.lamps)
    image_HW3 *= gain_HW3
    image_HW3 += glow_HW[..., None] * np.array((210.0, 170.0, 100.0), np.float32)

    haze_HW = depth_HW / (depth_HW + np.float32(weather.visibility_m))
    horizon_3 = np.array(weather.horizon, np.float32)
    image_HW3 += haze_HW[..., None] * (horizon_3 - image_HW3)
    image_HW3[is_sky_HW] = sky(sketch, weather, dice)[is_sky_HW]
    mirror(image_HW3, thing_HW, grain_HW, sketch=sketch, weather=weather)
    return develop(image_HW3, weather, dice=dice)


def texture_at(texture_HW: np.ndarray, x_HW: np.ndarray, y_HW: np.ndarray, depth_HW: np.ndarray, *,
               is_ground_HW: np.ndarray) -> np.ndarray:  # fmt: skip
    """Look up each pixel's texture at its place in the world: (x, z) on the ground, (x + z, y) on what stands."""
    texels_K = np.array([TEXELS_PER_M[texture] for texture in Texture], np.float32)
    texels_HW = np.take(texels_K, texture_HW)
    u_HW = (np.where(is_ground_HW, x_HW, x_HW + depth_HW) * texels_HW).astype(np.int32) & (TILE_PX - 1)
    v_HW = (np.where(is_ground_HW, depth_HW, 64.0 - y_HW) * texels_HW).astype(np.int32) & (TILE_PX - 1)
    return np.take(texture_tiles(), (texture_HW * TILE_PX + v_HW) * TILE_PX + u_HW)


def sunlight(sketch: Sketch, weather: Weather, facing_HW: np.ndarray, *, is_ground_HW: np.ndarray) -> np.ndarray:
    """Brightness from the sun's side and shadows, float32 (H, W), about 0.3..1.1."""
    walls = dict(SUNLIT)
    if sketch.sun[0] < 0.0:
        walls[Facing.LEFT], walls[Facing.RIGHT] = walls[Facing.RIGHT], walls[Facing.LEFT]
    overcast = 0.94
    levels_N = np.array([overcast + (walls[facing] - overcast) * weather.sun for facing in Facing], np.float32)
    cast_HW, contact_HW = (cv2.blur(mask_HW, (3, 3)).astype(np.float32) * np.float32(1.0 / 255.0)
                           for mask_HW in (sketch.cast_HW, sketch.contact_HW))  # fmt: skip
    shade_HW = (1.0 - np.float32(0.62 * weather.sun) * cast_HW) * (1.0 - np.float32(0.4) * contact_HW)
    return np.take(levels_N, facing_HW) * np.where(is_ground_HW, shade_HW, np.float32(1.0))


def lamp_light(sketch: Sketch, weather: Weather, x_HW: np.ndarray, depth_HW: np.ndarray) -> np.ndarray:
    """Gain (H, W, 3) from street lamps, warm, falling with the square of the distance on the ground."""
    camera = sketch.camera
    glow_HW = np.zeros_like(depth_HW)
    for x, _, z in sorted(sketch.lamps, key=lambda lamp: lamp[2])[:5]:
        bent = x + camera.bend * z * z
        off_x_HW, off_z_HW = x_HW - np.float32(bent), depth_HW - np.float32(z)
        glow_HW += 9.0 / (12.0 + off_x_HW * off_x_HW + off_z_HW * off_z_HW)
    glow_HW = np.minimum(glow_HW, 1.0) * np.float32(0.8 * weather.lamps)
    return glow_HW[..., None] * np.array((1.0, 0.8, 0.5), np.float32)


def lay_snow(colours_N3: np.ndarray, texture_N: np.ndarray) -> None:
    """Whiten roofs and trees (in place)."""
    for texture, cover in ((Texture.ROOF, 0.8), (Texture.LEAVES, 0.35)):
        is_under_N = texture_N == texture
        colours_N3[is_under_N] += np.float32(cover) * (216.0 - colours_N3[is_under_N])


def sky(sketch: Sketch, weather: Weather, dice: Dice) -> np.ndarray:
    """Zenith to horizon, with clouds that shrink towards the horizon; float32 (H, W, 3)."""
    camera = sketch.camera
    above_H1 = np.maximum(np.float32(camera.horizon_px) - np.arange(camera.height_px, dtype=np.float32), 0.0)[:, None]
    part_H1 = above_H1 / (above_H1 + 70.0)
    zenith_3, horizon_3 = np.array(weather.zenith, np.float32), np.array(weather.horizon, np.float32)
    far_H1 = 9000.0 / (above_H1 + 40.0)
    cols_1W = np.arange(camera.width_px, dtype=np.float32)[None, :] - np.float32(camera.centre_px)
    u_HW = (cols_1W * far_H1 * np.float32(0.008)).astype(np.int32) + dice.count(0, TILE_PX)
    v_H1 = far_H1.astype(np.int32) + dice.count(0, TILE_PX)
    cloud_HW = np.take(sky_tile(), (v_H1 & (TILE_PX - 1)) * TILE_PX + (u_HW & (TILE_PX - 1)))
    cloud_HW *= np.float32(weather.cloud)
    clear_H13 = horizon_3 + part_H1[..., None] * (1.4 * (zenith_3 - horizon_3))
    white_3 = np.minimum(
        np.float32(0.45) * horizon_3 + np.float32(0.55 * 236.0) * np.array(weather.light, np.float32), 250.0
    )
    return clear_H13 + cloud_HW[..., None] * (white_3 - clear_H13)


def mirror(image_HW3: np.ndarray, thing_HW: np.ndarray, grain_HW: np.ndarray, *, sketch: Sketch,
           weather: Weather) -> None:  # fmt: skip
    """Let water, and wet streets, show what stands as high over the horizon as they lie below it (in place)."""
    share_N = np.zeros(len(Thing), np.float32)
    share_N[Thing.WATER] = 0.45
    share_N[[Thing.ROAD, Thing.PAVEMENT]] = weather.wet
    rows_K, cols_K = np.nonzero(share_N[thing_HW] > 0.0)
    ripple_K = (grain_HW[rows_K, cols_K] * 24.0).astype(np.int32)
    above_K = np.clip(int(2.0 * sketch.camera.horizon_px) - rows_K + ripple_K, 0, image_HW3.shape[0] - 1)
    share_K1 = share_N[thing_HW[rows_K, cols_K]][:, None]
    here_K3 = image_HW3[rows_K, cols_K]
    image_HW3[rows_K, cols_K] = here_K3 + share_K1 * (image_HW3[above_K, cols_K] - here_K3)


def develop(image_HW3: np.ndarray, weather: Weather, *, dice: Dice) -> np.ndarray:
    """What falls before the lens, then the camera: vignette, grain, 8 bits."""
    height, width, _ = image_HW3.shape
    if weather.rain or weather.snow:
        veil_HW = np.zeros((height, width), np.uint8)
        slant = dice.count(-4, 4)
        for _ in range(dice.count(60, 110)):
            col, row, size = dice.count(0, width), dice.count(0, height), dice.count(0, 2)
            if weather.snow:
                cv2.circle(veil_HW, (col, row), size, 255, -1)
            else:
                cv2.line(veil_HW, (col, row), (col + slant, row + 8 + 4 * size), 70, 1)
        image_HW3 += (veil_HW.astype(np.float32) * np.float32(0.8 / 255.0))[..., None] * (232.0 - image_HW3)
    rows_H1 = np.arange(height, dtype=np.float32)[:, None] * np.float32(2.0 / height) - 1.0
    cols_1W = np.arange(width, dtype=np.float32)[None, :] * np.float32(2.0 / width) - 1.0
    image_HW3 *= (1.0 - np.float32(0.7 * weather.vignette) * (rows_H1 * rows_H1 + cols_1W * cols_1W))[..., None]
    draws_2HW = dice.generator.integers(0, 256, (2, height, width), dtype=np.uint8).astype(np.float32)
    image_HW3 += ((draws_2HW[0] - draws_2HW[1]) * np.float32(weather.grain / 104.0))[..., None]
    return np.clip(image_HW3, 0.0, 255.0).astype(np.uint8)
