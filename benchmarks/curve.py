"""What an image costs: seconds against classes of a window, windows, and GPUs; a table, and a plot.

CUDA_VISIBLE_DEVICES=0,1 python benchmarks/curve.py --rows segadapt,dispatch-2,replicate-2 --parts 8 --plot cost.svg
python benchmarks/curve.py --tiny --device cpu --rows segadapt --count 1,3 --windows 1,2

Rows, shapes and options are those of step.py. The transformer's share is that of a step with the same pairs.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from shapes import CLASSES
from step import assemble, clear, devices_of, draw_image, free, options, seconds, set_up, transformer_part

from segadapt.models.combined import Combined


def plot(rows: list[dict[str, Any]], file: str) -> None:
    """Seconds against pairs: a colour for each row, a marker for each number of windows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    names, widths = (list(dict.fromkeys(row[key] for row in rows)) for key in ("row", "windows"))
    for index, name in enumerate(names):
        for windows, marker in zip(widths, "os^Dv<>p", strict=False):
            own = [row for row in rows if (row["row"], row["windows"]) == (name, windows)]
            points = [row["pairs"] for row in own], [row["seconds_per_image"] for row in own]
            label = f"{name}, {windows} window{'s' * (windows > 1)}"
            axes.plot(*points, color=f"C{index}", marker=marker, markersize=4, linewidth=1, label=label)
    axes.set(xlabel="(window, class) pairs of an image", ylabel="seconds an image", xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(file)


def step_of(combined: Combined, image_3HW: torch.Tensor, pairs: int) -> Callable[[str], None]:
    """A whole step, which must ask about so many pairs."""

    def step(key: str) -> None:
        prediction = combined.step(image_3HW, task="curve", key=key)
        assert sum(prediction.candidates) == pairs, (prediction.candidates, pairs)

    return step


def main() -> None:
    """For each row the models are built once."""
    parser = options(__doc__, "segadapt")
    parser.add_argument("--count", default="1,2,5,10,20", help="candidates of a window")
    parser.add_argument("--windows", default="1,2,3,4")
    parser.add_argument("--plot", help="file")
    a = parser.parse_args()
    counts, windows = ([int(number) for number in text.split(",")] for text in (a.count, a.windows))
    assert max(counts) <= CLASSES, counts
    gpus, settings = set_up(a, max(counts))
    g, times, rows = settings.model.generative, {"warmup": a.warmup, "images": a.images}, []
    for name, names in {name: devices_of(name, gpus) for name in a.rows.split(",")}.items():
        combined = assemble(a, settings, name=name, names=names)
        devices = list(combined.parallel.devices)
        for number in windows:
            image_3HW = draw_image(settings, g.window_px + (number - 1) * g.stride_px, combined.device)
            for count in counts:
                combined.loss.classes_threshold, pairs = count, number * count
                whole = seconds(step_of(combined, image_3HW, pairs), devices, **times)
                part = seconds(transformer_part(combined, image_3HW, classes=count), devices, **times)
                clear(combined)
                rows.append({"row": name, "windows": number, "classes": count, "pairs": pairs,
                             "seconds_per_image": whole, "outside_transformer": 1 - part / whole})  # fmt: skip
                sys.stderr.write(f"{json.dumps(rows[-1])}\n")
        del combined
        free()
    if a.plot:
        plot(rows, a.plot)
    print(json.dumps({"device": torch.cuda.get_device_name() if gpus else "cpu", "torch": torch.__version__} | vars(a)
                     | {"rows": rows}, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
