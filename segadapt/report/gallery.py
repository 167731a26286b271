"""The pictures of a report: most improved and most harmed samples, and what the teacher said of them, as data URIs.

N classes asked about   h w px of a kept picture   Y X latent grid of the image
"""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib import colormaps
from PIL import Image

from segadapt import samples
from segadapt.datasets.labels import IGNORE
from segadapt.finished import miou
from segadapt.models.generative.witness import Maps
from segadapt.report import data
from segadapt.report.data import Method, Pair, Report, Seed
from segadapt.samples import Kept

MOST_SHOWN = 8  # improved, and as many harmed, of each method
MOST_HEATS = 3  # likewise, of those with maps of the teacher
MOST_WEIGHTS = 4  # classes whose weights are shown of an image
MOST_BYTES = 9_000_000  # of all pictures as text; with the charts' code a page stays below 15 MB
CLIP = 99  # percentile of the error at which its colours end


@dataclass
class Pictures:
    """Data URIs by name, each once, up to MOST_BYTES in all."""

    uris: dict[str, str] = field(default_factory=dict)

    @property
    def is_full(self) -> bool:
        """No further image is begun."""
        return sum(map(len, self.uris.values())) > 0.97 * MOST_BYTES

    def add(self, name: str, image: Image.Image, *, kind: str = "png", **options: Any) -> str:
        """Its name; of an image that is there already nothing else."""
        if name not in self.uris:
            buffer = io.BytesIO()
            image.save(buffer, format=kind, **options)
            self.uris[name] = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
        return name


@dataclass(frozen=True)
class Gallery:
    """Of all methods; `items` and `heats` are JSON values, see `_item` and `_heat`."""

    pictures: Pictures
    items: list[dict[str, Any]]
    heats: list[dict[str, Any]]
    left_out: int  # items beyond MOST_BYTES


def build(report: Report, pairs_of: dict[int, list[Pair]]) -> Gallery:
    """Choose among the samples that the runs kept.

    Args:
        pairs_of: of each compared method; without a source the images alone, whose `source` is NaN.
    """
    pictures, items, heats, left_out = Pictures(), [], [], 0
    theirs = {} if report.source is None else _kept(report.methods[report.source])
    for index, pairs in pairs_of.items():
        mine = _kept(report.methods[index])
        for group, chosen in _groups(pair for pair in pairs if _name(pair) in mine).items():
            for place, pair in enumerate(chosen):
                if pictures.is_full:
                    left_out += len(chosen) - place
                    break
                found = mine[_name(pair)]
                other = None if np.isnan(pair.source) else theirs.get(_name(pair))
                items.append(_item(report, index, pair, found, other, pictures) | {"group": group})
                maps = found.maps() if place < MOST_HEATS else None
                if maps is not None:
                    heats.append(_heat(report, index, pair, found, maps, pictures) | {"group": group})
    return Gallery(pictures, items, heats, left_out)


def _kept(method: Method) -> dict[tuple[str, str, Seed], Kept]:
    """All samples of a method."""
    return {
        (task, key, seed): found
        for seed, one in method.runs.items()
        for task, folder in zip(one.tasks, one.folders, strict=True)
        for key, found in samples.kept(folder, data.slug(one, task)).items()
    }


def _name(pair: Pair) -> tuple[str, str, Seed]:
    return pair.task, pair.key, pair.seed


def _groups(pairs: Iterable[Pair]) -> dict[str, list[Pair]]:
    """Most improved first, most harmed first; without a source the best first."""
    gains = sorted(pairs, key=lambda pair: pair.source - pair.adapted)
    groups = {
        "improved": [pair for pair in gains if pair.adapted > pair.source],
        "harmed": [pair for pair in reversed(gains) if pair.adapted < pair.source],
        "alone": sorted(
            (pair for pair in gains if np.isnan(pair.source) and not np.isnan(pair.adapted)),
            key=lambda pair: -pair.adapted,
        ),
    }
    return {name: chosen[:MOST_SHOWN] for name, chosen in groups.items()}


def _item(
    report: Report, index: int, pair: Pair, mine: Kept, theirs: Kept | None, pictures: Pictures
) -> dict[str, Any]:
    """One image with its pictures by name, and each of its classes with both IoUs."""
    name = f"{pair.task}/{pair.key}/{pair.seed}"
    photo, label = mine.image, mine.ids("label")
    shown = {"image": _photo(pictures, pair, photo), "label": _ids(pictures, f"label {name}", label),
             "adapted": _ids(pictures, f"{index} {name}", mine.ids("prediction"))}  # fmt: skip
    if theirs is not None:
        shown["source"] = _ids(pictures, f"source {name}", theirs.ids("prediction"))
    counts = {"adapted": data.image_counts(report.methods[index].runs[pair.seed], pair.task)[pair.key]}
    if report.source is not None and theirs is not None:
        counts["source"] = data.image_counts(report.methods[report.source].runs[pair.seed], pair.task)[pair.key]
    present = np.flatnonzero(np.sum([each_C3[:, 1:].sum(axis=1) for each_C3 in counts.values()], axis=0)).tolist()
    colours = _palette(label)
    labelled_C = counts["adapted"][:, 1]
    legend = [
        {"name": report.classes[c], "colour": colours[c], "share": float(labelled_C[c] / max(1, labelled_C.sum()))}
        | {of: _number(miou(each_C3[c : c + 1])) for of, each_C3 in counts.items()}
        for c in sorted(present, key=lambda c: -labelled_C[c])
    ]
    scores = {"source": _number(pair.source), "adapted": _number(pair.adapted)}
    place = {"method": index, "task": pair.task, "key": pair.key, "seed": pair.seed[0], "size": photo.size}
    return place | scores | {"pictures": shown, "legend": legend}


def _heat(report: Report, index: int, pair: Pair, mine: Kept, maps: Maps, pictures: Pictures) -> dict[str, Any]:
    """Maps of the teacher on the latent grid, each with its range."""
    name = f"{index} {pair.task}/{pair.key}/{pair.seed}"
    error_YX = maps.error_YX.float().numpy()
    top = float(np.nanpercentile(error_YX, CLIP))
    weight_NYX, classes = maps.weight_NYX.float().numpy(), [report.classes[c] for c in maps.classes_N.tolist()]
    means = np.nanmean(weight_NYX, axis=(1, 2))
    decision = Image.fromarray(maps.decision_YX.numpy())
    decision.putpalette(mine.ids("label").getpalette() or [])
    panels = []
    for title, span, picture in (
        ("velocity error", f"0 to {top:.3g}", _scaled(pictures, f"error {name}", error_YX / (top or 1))),
        ("teacher's decision", "", _ids(pictures, f"decision {name}", decision)),
    ):
        panels.append({"title": title, "range": span, "picture": picture})
    for n in np.argsort(-means)[:MOST_WEIGHTS]:
        picture = _scaled(pictures, f"weight {n} {name}", weight_NYX[n])
        panels.append({"title": f"weight of {classes[n]}", "range": f"mean {means[n]:.2f}", "picture": picture})
    photo = _photo(pictures, pair, mine.image)
    place = {"method": index, "task": pair.task, "key": pair.key, "seed": pair.seed[0]}
    gain = {"gain": _number(pair.adapted - pair.source)}
    return place | gain | {"asked": len(classes), "image": photo, "panels": panels}


def _photo(pictures: Pictures, pair: Pair, photo: Image.Image) -> str:
    """The test image, the same under all methods."""
    return pictures.add(f"image {pair.task}/{pair.key}/{pair.seed}", photo, kind="webp", quality=78)


def _ids(pictures: Pictures, name: str, ids: Image.Image) -> str:
    """Class ids with their colours; what is ignored is transparent."""
    return pictures.add(name, ids, transparency=IGNORE, optimize=True)


def _scaled(pictures: Pictures, name: str, values_YX: np.ndarray) -> str:
    """0..1 in the colours of cividis; NaN is transparent."""
    levels_YX = np.where(np.isnan(values_YX), 255, np.clip(np.nan_to_num(values_YX), 0, 1) * 254).astype(np.uint8)
    image = Image.fromarray(levels_YX)
    colours = colormaps["cividis"](np.linspace(0, 1, 255))[:, :3]
    image.putpalette(np.vstack([np.round(255 * colours), [[0, 0, 0]]]).astype(np.uint8).tobytes())
    return pictures.add(name, image, transparency=255)


def _palette(ids: Image.Image) -> Sequence[str]:
    """'#rrggbb' of each id."""
    values = np.reshape(ids.getpalette() or [], (-1, 3)).astype(int)
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in values]


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)
