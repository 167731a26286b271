"""Write lists of keys that split a labelled set: groups stay together, classes and sub-categories are in every part.

{output}/settings.json   what must not change between starts
{output}/{part}.txt      the keys, sorted, one a line; for data.keys_file
{output}/split.json      images of each class and sub-category in each part, SHA-256 of every list; written last

N images   G groups   T traits: classes and sub-categories   P parts
"""

import hashlib
import math
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from segadapt import stream
from segadapt.config_data import SplitConfig, SplitSettings
from segadapt.datasets import Dataset, Task
from segadapt.datasets.build import build_dataset
from segadapt.datasets.labels import IGNORE
from segadapt.errors import UserError
from segadapt.seeds import numpy_generator
from segadapt.terminal import results_table
from segadapt.written_set import as_json, claim, write_whole


def assign(shows_GT: np.ndarray, images_G: np.ndarray, shares_P: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The part of each group, int64 [G].

    Greedy, after iterative stratification (Sechidis et al. 2011), with groups in place of samples: the trait that the
    fewest groups left can still give comes first; of these groups the largest goes to the part that misses most of that
    trait, then of images. A part without the trait, or without any image, goes first where no more groups are left than
    such parts.

    Args:
        shows_GT: int64, images of a group that show a trait.
        images_G: int64, >= 1.
        shares_P: of all images, sum 1.
        rng: for the order of groups that are alike.
    """
    traits_GT = np.column_stack([shows_GT, images_G])  # the last is every image's, and what is left when no other is
    wants_PT = shares_P[:, None] * traits_GT.sum(axis=0)
    has_PT = np.zeros(wants_PT.shape, bool)
    order_G = rng.permutation(len(images_G))
    order_G = order_G[np.argsort(-images_G[order_G], kind="stable")]
    givers_T = (traits_GT > 0).sum(axis=0)  # groups without a part
    queues = [iter(order_G[traits_GT[order_G, trait] > 0].tolist()) for trait in range(traits_GT.shape[1])]
    part_G = np.full(len(images_G), -1)
    for left in range(len(images_G), 0, -1):
        trait = int(np.where(givers_T > 0, givers_T, len(images_G) + 1).argmin())
        group = next(group for group in queues[trait] if part_G[group] < 0)
        empty_P, lacking_P = ~has_PT[:, -1], ~has_PT[:, trait]
        allowed_P = np.ones(len(shares_P), bool)
        if left <= empty_P.sum():
            allowed_P = empty_P
        elif givers_T[trait] <= lacking_P.sum():
            allowed_P = lacking_P
        part = max(np.flatnonzero(allowed_P), key=lambda part: (wants_PT[part, trait], wants_PT[part, -1]))
        part_G[group] = part
        wants_PT[part] -= traits_GT[group]
        has_PT[part] |= traits_GT[group] > 0
        givers_T -= traits_GT[group] > 0
    return part_G


def texts_of(pattern: str, keys: Sequence[str], setting: str) -> list[str]:
    """What the (...) of a regular expression finds in each key. UserError: not an expression with one, or no match."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"{setting}={pattern}: {error}; expected a regular expression. Correct it.") from error
    if compiled.groups != 1:
        raise UserError(f"{setting}={pattern}: {compiled.groups} (...); expected one, around the text that keys share.")
    found = [compiled.search(key) for key in keys]
    if missing := [key for key, match in zip(keys, found, strict=True) if match is None]:
        raise UserError(f"{setting}={pattern}: {len(missing)} of {len(keys)} keys do not match (first: {missing[0]}). "
                        "Correct the expression.")  # fmt: skip
    return [str(match[1]) for match in found if match is not None]


def _shown(dataset: Dataset, key: str) -> np.ndarray:
    """Whether the label of a key shows each class: bool [C]."""
    label_HW = dataset.load(Task(0), key).label_HW
    assert label_HW is not None
    return np.bincount(label_HW.ravel(), minlength=IGNORE + 1)[: len(dataset.classes)] > 0


def check_settings(settings: SplitConfig) -> np.ndarray:
    """The shares, float64 [P]. UserError: settings without effect, no labels, or parts and shares that do not fit."""
    data, chosen = settings.data, settings.split
    if data.limit is not None or data.corruptions:
        raise UserError(f"data.limit={data.limit} and data.corruptions={data.corruptions}: all clean images are split, "
                        "so they would have no effect. Set data.limit=null and data.corruptions=[].")  # fmt: skip
    if data.kind == "files" and data.label_path is None:
        raise UserError("data.label_path=null: a split spreads the classes of labels. Set data.label_path.")
    for part in chosen.parts:
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", part):
            raise UserError(
                f"split.parts: {part!r} names a file; expected letters, digits, '.', '_' and '-'. Rename it."
            )
    if len(chosen.parts) < 2 or not len(set(chosen.parts)) == len(chosen.parts) == len(chosen.shares):
        raise UserError(f"split.parts={chosen.parts} and split.shares={chosen.shares}: expected two different names or "
                        "more, and a share for each. Correct them.")  # fmt: skip
    if min(chosen.shares) <= 0 or not math.isclose(sum(chosen.shares), 1, abs_tol=1e-6):
        raise UserError(f"split.shares={chosen.shares}: their sum is {sum(chosen.shares):g}; expected shares above 0 "
                        "with sum 1. Correct them.")  # fmt: skip
    return np.array(chosen.shares)


def run(settings: SplitConfig) -> None:
    """The verb; the same command gives the same lists.

    Raises:
        UserError: as `check_settings`, `texts_of`; a label that cannot be read; fewer groups than parts; an output of
            another split.
    """
    chosen, shares_P = settings.split, check_settings(settings)
    dataset = build_dataset(settings.data)
    keys, output = dataset.keys(Task(0)), Path(chosen.output).expanduser()
    groups = keys if chosen.group is None else texts_of(chosen.group, keys, "split.group")
    kinds = [] if chosen.kind is None else texts_of(chosen.kind, keys, "split.kind")
    names, group_N = np.unique(groups, return_inverse=True)
    if len(names) < len(shares_P):
        raise UserError(f"split.group={chosen.group}: {len(names)} groups of {len(keys)} images; expected one for each "
                        f"of {len(shares_P)} parts. Let the expression tell more apart.")  # fmt: skip
    claim(output, {"keys": _sha256(keys), "parts": chosen.parts, "shares": chosen.shares, "group": chosen.group,
                   "kind": chosen.kind, "seed": chosen.seed, "classes": list(dataset.classes)})  # fmt: skip
    shown_NC = np.stack(list(stream.ahead(partial(_shown, dataset), keys, workers=settings.data.workers)))
    kind_names, kind_N = np.unique(np.array(kinds, dtype=str), return_inverse=True)
    is_kind_NK = np.arange(len(kind_names)) == kind_N[:, None] if kinds else np.zeros((len(keys), 0), bool)
    shows_NT = np.concatenate([shown_NC, is_kind_NK], axis=1)
    shows_GT = np.zeros((len(names), shows_NT.shape[1]), np.int64)
    np.add.at(shows_GT, group_N, shows_NT)
    rng = numpy_generator(chosen.seed, "split")
    part_N = assign(shows_GT, np.bincount(group_N), shares_P, rng)[group_N]
    traits = [*dataset.classes, *kind_names.tolist()]
    write(output, chosen, np.array(keys), part_N, shows_NT, traits)


def write(
    output: Path, chosen: SplitSettings, keys_N: np.ndarray, part_N: np.ndarray, shows_NT: np.ndarray, traits: list[str]
) -> None:
    """The lists and split.json; says what each part shows, and what it does not."""
    images_PT = np.stack([shows_NT[part_N == part].sum(axis=0) for part in range(len(chosen.parts))])
    parts = []
    for part, name in enumerate(chosen.parts):
        keys = keys_N[part_N == part].tolist()
        write_whole(output / f"{name}.txt", "".join(f"{key}\n" for key in keys).encode())
        shown = dict(zip(traits, images_PT[part].tolist(), strict=True))
        parts.append({"part": name, "images": len(keys), "sha256": _sha256(keys), "images_that_show": shown})
    write_whole(output / "split.json", as_json({"parts": parts}))
    console = Console(highlight=False, soft_wrap=True, markup=False)
    rows = [
        ["all", *(one["images"] for one in parts)],
        *([name, *images_PT[:, t].tolist()] for t, name in enumerate(traits)),
    ]
    console.print(results_table(rows, ["images that show", *chosen.parts]))
    for part, name in enumerate(chosen.parts):
        if absent := [trait for t, trait in enumerate(traits) if images_PT[:, t].any() and not images_PT[part, t]]:
            console.print(f"{name} shows none of: {', '.join(absent)}; too few groups have them")
    console.print(
        f"wrote {output / 'split.json'}; read a part with data.keys_file='{output}/{{split}}.txt' and data.split"
    )


def _sha256(keys: Sequence[str]) -> str:
    return hashlib.sha256("".join(f"{key}\n" for key in keys).encode()).hexdigest()
