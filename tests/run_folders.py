"""Run folders of random confusion matrices, as a run leaves them."""

import json
from pathlib import Path

import numpy as np

from segadapt import metrics

TASKS = ("fog/5", "contrast/5")


def confusions(rng: np.random.Generator, images: int, *, right: float, num_classes: int = 4) -> np.ndarray:
    """[n, C, C] of random images of 60 px; the last class is never there, and seldom predicted."""
    out = np.zeros((images, num_classes, num_classes), np.int64)
    for image_CC in out:
        label = rng.choice(rng.integers(0, num_classes - 1, 2), 60)
        guess = rng.choice(num_classes, 60, p=[0.4, 0.3, 0.29, 0.01])
        np.add.at(image_CC, (label, np.where(rng.random(60) < right, label, guess)), 1)
    return out


def columns(image_CC: np.ndarray) -> dict[str, list[int]]:
    """As records.jsonl holds an image's counts: the classes that are there or predicted."""
    label_C, predicted_C = image_CC.sum(axis=1), image_CC.sum(axis=0)
    return {str(c): [int(image_CC[c, c]), int(label_C[c]), int(predicted_C[c])]
            for c in range(len(image_CC)) if label_C[c] + predicted_C[c]}  # fmt: skip


def write_run(
    folder: Path,
    of_task: dict[str, np.ndarray],
    *,
    seed: int = 0,
    keys: list[str] | None = None,
    segmenter: str = "first",
    method: str = "generative",
    lr: float = 1e-5,
    data: str = "",
    more: dict[str, dict[str, object]] | None = None,
) -> Path:
    """A run folder with these confusion matrices, [n, C, C] a task; more: sections of its settings."""
    folder.mkdir(parents=True)
    tasks, records = [], []
    for task, confusion_nCC in of_task.items():
        names = keys or [f"{index:03d}" for index in range(len(confusion_nCC))]
        records += [{"task": task, "key": key, "classes": columns(image_CC)}
                    for key, image_CC in zip(names, confusion_nCC, strict=True)]  # fmt: skip
        score = metrics.scores(confusion_nCC.sum(axis=0)).miou
        tasks.append({"task": task, "miou": score, "per_class": dict.fromkeys("abcd"),
                      "data_sha256": f"data{seed}{data}"})  # fmt: skip
    results = {"tasks": tasks,
               "mean": {"miou": float(np.mean([task["miou"] for task in tasks]))},
               "weights_sha256": {"discriminative": segmenter}}  # fmt: skip
    settings = {"experiment": {"seed": seed}, "method": method}
    settings |= {} if method == "source" else {"tta": {"optimizer": {"lr": lr}}}
    settings |= more or {}
    timings = [{"started": "now"}, {"seconds": 0.1}, {"seconds": 0.2}, {"seconds": 0.9}]
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    (folder / "timings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in timings))
    return folder


def write_pairs(root: Path, seeds: int = 2, images: int = 12) -> None:
    """source/s0 ... and adapted/s0 ...: the adapted ones are right more often."""
    rng = np.random.default_rng(5)
    for seed in range(seeds):
        source = {task: confusions(rng, images, right=0.4) for task in TASKS}
        write_run(root / f"source/s{seed}", source, seed=seed, method="source")
        write_run(root / f"adapted/s{seed}", {t: confusions(rng, images, right=0.6) for t in TASKS}, seed=seed)
