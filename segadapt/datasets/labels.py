"""Class names, id maps and palettes of the data sets; nothing else.

A class name is the word that goes into a prompt, so it has spaces, not underscores, and no space at either end.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from segadapt.errors import UserError, did_you_mean

IGNORE = 255  # the label id that is never scored
MAX_CLASSES = 254  # ids 1..C of a file and 255 = ignore must fit in a byte

# The first synonym of ADE20K's objectInfo150.csv. That file has ";" for every space ("chest;of;drawers;chest;..."), so
# its first field alone would name two classes "screen". "television receiver" follows the models trained on ADE20K.
_ADE20K_NAMES = (
    "wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door, "
    "table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, "
    "armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, "
    "chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, "
    "case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, "
    "book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, "
    "hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, "
    "dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, "
    "fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, "
    "minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, "
    "screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, "
    "monitor, bulletin board, shower, radiator, glass, clock, flag"
)
ADE20K = tuple(_ADE20K_NAMES.split(", "))
CAMVID = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign symbol",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
# The 19 evaluated classes of Cityscapes and ACDC, in the order of their train ids, and the label ids that become them.
CITYSCAPES_IDS = {
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}
CITYSCAPES = tuple(CITYSCAPES_IDS)
MOST_CITYSCAPES_ID = 33
# The labels of COCO-Stuff in the order of their ids 1..182, as in its labels.txt; its PNGs hold the id - 1, and 255.
_COCO_STUFF_LABELS = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, street sign, "
    "stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, hat, "
    "backpack, umbrella, shoe, eye glasses, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, "
    "baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, plate, wine glass, cup, fork, knife, "
    "spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, "
    "potted plant, bed, mirror, dining table, window, desk, toilet, door, tv, laptop, mouse, remote, keyboard, "
    "cell phone, microwave, oven, toaster, sink, refrigerator, blender, book, clock, vase, scissors, teddy bear, "
    "hair drier, toothbrush, hair brush, banner, blanket, branch, bridge, building-other, bush, cabinet, cage, "
    "cardboard, carpet, ceiling-other, ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, "
    "dirt, door-stuff, fence, floor-marble, floor-other, floor-stone, floor-tile, floor-wood, flower, fog, "
    "food-other, fruit, furniture-other, grass, gravel, ground-other, hill, house, leaves, light, mat, metal, "
    "mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement, pillow, plant-other, plastic, platform, "
    "playingfield, railing, railroad, river, road, rock, roof, rug, salad, sand, sea, shelf, sky-other, skyscraper, "
    "snow, solid-other, stairs, stone, straw, structural-other, table, tent, textile-other, towel, tree, vegetable, "
    "wall-brick, wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood, water-other, waterdrops, "
    "window-blind, window-other, wood"
)
_IN_NO_LABEL = "street sign, hat, shoe, eye glasses, plate, mirror, window, desk, door, blender, hair brush"
COCO_STUFF_IDS = {
    name: file_id for file_id, name in enumerate(_COCO_STUFF_LABELS.split(", ")) if name not in _IN_NO_LABEL.split(", ")
}
COCO_STUFF = tuple(COCO_STUFF_IDS)
_PASCAL_VOC_NAMES = (
    "background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, dining table, dog, horse, "
    "motorbike, person, potted plant, sheep, sofa, train, tv monitor"
)
PASCAL_VOC = tuple(_PASCAL_VOC_NAMES.split(", "))
CLASS_SETS: dict[str, tuple[str, ...]] = {
    "ade20k": ADE20K,
    "camvid": CAMVID,
    "cityscapes": CITYSCAPES,
    "coco_stuff": COCO_STUFF,
    "pascal_voc": PASCAL_VOC,
}


def _from_hex(colours: str) -> np.ndarray:
    """'787878 b47878 ...' to uint8 [C, 3] RGB."""
    return np.frombuffer(bytes.fromhex(colours), np.uint8).reshape(-1, 3)


def palette(num_classes: int) -> np.ndarray:
    """Return uint8 [num_classes, 3] RGB: distinct, none black, and class c keeps its colour whatever num_classes is.

    The rule of the PASCAL VOC colour map: the bits of c + 1 are dealt to R, G, B in turn, lowest to the highest bit.
    """
    if not 1 <= num_classes <= 255:
        raise ValueError(f"num_classes={num_classes}; expected 1..255, for 255 colours besides black.")
    number_C = np.arange(1, num_classes + 1)
    colour_C3 = np.zeros((num_classes, 3), np.uint8)
    for bit in range(8):
        colour_C3[:, bit % 3] |= ((number_C >> bit & 1) << (7 - bit // 3)).astype(np.uint8)
    return colour_C3


# As published with each data set (ADE20K: color150 of the scene parsing challenge, which paints road and skyscraper
# alike; CamVid: the 11 classes of the SegNet split; Cityscapes: its labels.py; VOC: its colour map).
PALETTES: dict[str, np.ndarray] = {
    "ade20k": _from_hex(
        """
        787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d 787846 08ff33
        ff0652 8fff8c ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0 0907e6 dcdcdc ff095c 7009ff
        08ffd6 07ffe0 ffb806 0aff47 ff290a 07ffff e0ff08 6608ff ff3d06 ffc207 ff7a08 00ff14 ff0829 ff0599 0633ff
        eb0cff a09614 00a3ff 8c8c8c fa0a0f 14ff00 1fff00 ff1f00 ffe000 99ff00 0000ff ff4700 00ebff 00adff 1f00ff
        0bc8c8 ff5200 00fff5 003dff 00ff70 00ff85 ff0000 ffa300 ff6600 c2ff00 008fff 33ff00 0052ff 00ff29 00ffad
        0a00ff adff00 00ff99 ff5c00 ff00ff ff00f5 ff0066 ffad00 ff0014 ffb8b8 001fff 00ff3d 0047ff ff00cc 00ffc2
        00ff52 000aff 0070ff 3300ff 00c2ff 007aff 00ffa3 ff9900 00ff0a ff7000 8fff00 5200ff a3ff00 ffeb00 08b8aa
        8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070 5cff00 00e0ff 70e0ff 46b8a0 a300ff 9900ff 47ff00 ff00a3
        ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff ff007a fff500 0abed4 d6ff00 00ccff 1400ff ffff00 0099ff 0029ff
        00ffcc 2900ff 29ff00 ad00ff 00f5ff 4700ff 7a00ff 00ffb8 005cff b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff
        """
    ),
    "cityscapes": _from_hex(
        "804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c ff0000 00008e 000046 "
        "003c64 005064 0000e6 770b20"
    ),
    "camvid": _from_hex("808080 800000 c0c080 804080 3c28de 808000 c08080 404080 400080 404000 0080c0"),
    "pascal_voc": np.concatenate([np.zeros((1, 3), np.uint8), palette(len(PASCAL_VOC) - 1)]),
}


def _zero_is_ignore(num_classes: int) -> np.ndarray:
    """File id 0 is ignore, k is class k - 1 (ADE20K, CamVid)."""
    table_256 = np.full(256, -1, np.int16)
    table_256[1 : num_classes + 1] = np.arange(num_classes)
    table_256[[0, IGNORE]] = IGNORE
    return table_256


def _as_is(num_classes: int) -> np.ndarray:
    """File id k is class k."""
    table_256 = np.full(256, -1, np.int16)
    table_256[:num_classes] = np.arange(num_classes)
    table_256[IGNORE] = IGNORE
    return table_256


def _cityscapes_label_ids(num_classes: int) -> np.ndarray:
    """File ids are Cityscapes' label ids: 19 of 0..33 are classes, the rest is ignore."""
    if num_classes != len(CITYSCAPES):
        raise UserError(f"data.id_map=cityscapes_label_ids is for the {len(CITYSCAPES)} classes of Cityscapes; "
                        f"data.classes has {num_classes}. Set data.classes=cityscapes.")  # fmt: skip
    table_256 = np.full(256, -1, np.int16)
    table_256[: MOST_CITYSCAPES_ID + 1] = IGNORE
    table_256[list(CITYSCAPES_IDS.values())] = np.arange(num_classes)
    table_256[IGNORE] = IGNORE
    return table_256


def _coco_stuff_ids(num_classes: int) -> np.ndarray:
    """File ids are COCO-Stuff's, 0..181 less the 11 that are in no label."""
    if num_classes != len(COCO_STUFF):
        raise UserError(f"data.id_map=coco_stuff_ids is for the {len(COCO_STUFF)} classes of COCO-Stuff; data.classes "
                        f"has {num_classes}. Set data.classes=coco_stuff.")  # fmt: skip
    return _table_of(list(COCO_STUFF_IDS.values()))


def _table_of(class_ids: Sequence[int]) -> np.ndarray:
    """The file id class_ids[c] is class c, 255 is ignore."""
    table_256 = np.full(256, -1, np.int16)
    table_256[list(class_ids)] = np.arange(len(class_ids))
    table_256[IGNORE] = IGNORE
    return table_256


# Number of classes -> int16 [256]: the class (0..C-1, or 255 = ignore) of every file id, -1 where the id is unknown.
ID_MAPS: dict[str, Callable[[int], np.ndarray]] = {
    "zero_is_ignore": _zero_is_ignore,
    "as_is": _as_is,
    "cityscapes_label_ids": _cityscapes_label_ids,
    "coco_stuff_ids": _coco_stuff_ids,
}


def id_table(id_map: str, num_classes: int, *, class_ids: Sequence[int] = (), unknown_ids: str = "error") -> np.ndarray:
    """The class of every file id: int16 [256], 0..C-1, 255 = ignore, -1 = an error where it is met.

    Args:
        id_map: a name of ID_MAPS.
        class_ids: data.label_class_ids, the file id of each class in label order, 0..254; empty: ID_MAPS[id_map].
        unknown_ids: data.unknown_ids, error or ignore; ids that neither of the two names.
    Raises:
        UserError: unknown map, more classes than a byte holds; class_ids beside a map, or not one id a class.
    """
    if id_map not in ID_MAPS:
        raise UserError(f"data.id_map={id_map} is not an id map.{did_you_mean(id_map, ID_MAPS)}")
    if not 1 <= num_classes <= MAX_CLASSES:
        raise UserError(
            f"data.classes has {num_classes} names; expected 1..{MAX_CLASSES}, as label ids are bytes and 255 is "
            f"ignore. Merge classes."
        )
    if class_ids:
        _check_class_ids(class_ids, num_classes, id_map)
    table_256 = _table_of(class_ids) if class_ids else ID_MAPS[id_map](num_classes)
    return np.where(table_256 < 0, IGNORE, table_256).astype(np.int16) if unknown_ids == "ignore" else table_256


def _check_class_ids(class_ids: Sequence[int], num_classes: int, id_map: str) -> None:
    """UserError: see `id_table`."""
    given = f"data.label_class_ids={list(class_ids)}"
    if id_map != "as_is":
        raise UserError(f"{given} and data.id_map={id_map}: two rules for the same ids. Set data.id_map=as_is; ids "
                        "that the list leaves out are refused, or with data.unknown_ids=ignore ignored.")  # fmt: skip
    if len(class_ids) != num_classes or len(set(class_ids)) != num_classes:
        raise UserError(f"{given}: {len(set(class_ids))} different ids; expected {num_classes}, one for each name of "
                        "data.classes, in that order. Correct the list.")  # fmt: skip
    if not all(0 <= file_id < IGNORE for file_id in class_ids):
        raise UserError(f"{given}: expected ids of 0..254, as 255 is ignore. Where 255 is a class, let `segadapt "
                        f"convert convert.grey={list(class_ids)}` write the labels anew.")  # fmt: skip


def map_ids(ids_HW: np.ndarray, table_256: np.ndarray, *, path: Path) -> np.ndarray:
    """Turn the ids of a label file into classes: uint8 [H, W], 0..C-1 or 255 = ignore. Never wraps.

    Args:
        ids_HW: uint8, as in the file.
        table_256: int16, from `id_table`.
        path: the label file, for the message.
    Raises:
        UserError: an id that the table does not know; names the first such pixel, and the table.
    """
    label_HW = table_256[ids_HW]
    if label_HW.min(initial=0) < 0:
        row, column = np.argwhere(label_HW < 0)[0]
        known = np.flatnonzero((table_256 >= 0) & (np.arange(256) != IGNORE))
        raise UserError(
            f"{path}: label id {ids_HW[row, column]} at row {row}, column {column}; expected {_runs(known)} or 255 "
            f"(ignore). Set data.id_map or data.label_class_ids, and data.classes, to the folder's ids, correct the "
            f"file, or set data.unknown_ids=ignore."
        )
    return label_HW.astype(np.uint8)


def _runs(ids: np.ndarray) -> str:
    """[0, 1, 2, 50] to '0..2, 50'."""
    runs = np.split(ids, np.flatnonzero(np.diff(ids) > 1) + 1)
    return ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)
