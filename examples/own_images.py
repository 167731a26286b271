# %% [markdown]
# # A model of your own on images of your own
# Any `torch` module that labels pixels, any iterable of images, no data set on disk. The cells run from top to bottom:
# `python examples/own_images.py` takes half a minute on a CPU, and editors show them as a notebook.

# %% A segmenter: here a small net, trained for some seconds on clear weather
import copy
from pathlib import Path

import matplotlib.pyplot as plt
from own_segmenter import trained

import segadapt
from segadapt.corruptions import corrupt
from segadapt.datasets.toytown import CLASSES, render

net = trained()

# %% Images that it was not trained for: fog. The labels only tell afterwards how well it went
scenes = {f"scene {index}": render("test", index) for index in range(6)}
images = {key: corrupt(scene.image_HW3, "fog", severity=3, seed=0, key=key) for key, scene in scenes.items()}

# %% [markdown]
# `load` takes what `segadapt adapt` takes on the command line, and the module. `experiment=toytown_c` brings the
# bundled teacher; `bn`, `tent` and most other methods have none. The module's own weights change: it gets a copy.


# %% Adapt: one step an image
def accuracy(method: str) -> tuple[float, dict]:
    adapter = segadapt.load(
        ["experiment=toytown_c", f"tta.method={method}", "runtime=cpu"],
        segmenter=copy.deepcopy(net), classes=CLASSES, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
    )  # fmt: skip
    ids = {key: adapter.step(image, key=key).ids_HW for key, image in images.items()}
    right = [(ids[key] == scene.label_HW).mean() for key, scene in scenes.items()]
    return sum(right) / len(right), ids


found = {method: accuracy(method) for method in ("source", "bn", "generative-bn")}
for method, (share, _) in found.items():
    print(f"{method:14} {100 * share:.1f} % of the pixels right")

# %% Stop and go on: what the next image depends on is in a folder
settings = ["tta.method=tent", "runtime=cpu", "data.short_side_px=240", "tta.optimizer.lr=1e-3"]
half, whole = list(images.items())[:3], list(images.items())
first = segadapt.load(settings, segmenter=copy.deepcopy(net), classes=CLASSES)
for key, image in half:
    first.step(image, key=key)
state = Path("outputs", "own-images", f"after-{first.count}-images")
if not state.exists():
    first.save(state)

second = segadapt.load(settings, segmenter=copy.deepcopy(net), classes=CLASSES)
second.restore(state)
for key, image in whole[3:]:
    same = (first.step(image, key=key).ids_HW == second.step(image, key=key).ids_HW).all()
    print(f"{key}: {'the same' if same else 'another'} prediction after going on")
second.reset()  # the source model again

# %% Look
figure, axes = plt.subplots(len(found) + 1, 3, figsize=(9, 9), layout="constrained")
for column, (key, image) in enumerate(half):
    axes[0, column].imshow(image)
    axes[0, column].set_title(key)
    for row, (method, (_, ids)) in enumerate(found.items(), start=1):
        axes[row, column].imshow(ids[key], cmap="tab20", vmin=0, vmax=19, interpolation="nearest")
        axes[row, column].set_title(method)
for axis in axes.flat:
    axis.set_axis_off()
figure.savefig("outputs/own-images/predictions.png")
