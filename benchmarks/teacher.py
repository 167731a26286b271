"""Is the teacher a better judge than the segmenter? Pixel accuracy of both on the latent grid, task by task.

python benchmarks/teacher.py data=toytown_c model/discriminative=toytown model/generative=toytown data.limit=20

Uses labels, so it is a diagnostic: never choose settings by it on a test split. Takes adapt's settings and adds one,
+sigmas=[0.1,0.25,0.5]; prints one JSON line a task.
"""

import json
import sys

import torch

from segadapt import config, stream
from segadapt.datasets.build import build_dataset, build_tasks
from segadapt.models.build import build_models
from segadapt.models.generative import windows
from segadapt.models.generative.teacher import classify, true_classes
from segadapt.parse import from_overrides


def main(overrides: list[str]) -> None:
    """Compose as `segadapt adapt` does, then compare the two models without any update."""
    sigmas = [float(s) for o in overrides if o.startswith("+sigmas=") for s in o.split("[")[1].rstrip("]").split(",")]
    overrides = [override for override in overrides if not override.startswith("+sigmas=")]
    settings = from_overrides("adapt", overrides, config.AdaptConfig)
    dataset, data, seed = build_dataset(settings.data), settings.data, settings.experiment.seed
    combined = build_models(settings, dataset.classes).combined
    teacher, generative = combined.generative, settings.model.generative
    assert teacher is not None
    for task in build_tasks(data):
        hits: dict[str, int] = {}
        pixels = 0
        entries = stream.order(dataset, task, seed=seed, shuffle=data.shuffle, limit=data.limit)
        for sample in stream.read(dataset, entries, short_side_px=data.short_side_px, workers=data.workers):
            assert sample.label_HW is not None
            image_3HW, size = sample.image_3HW.to(teacher.device), sample.image_3HW.shape[1:]
            boxes_K2 = windows.plan(*size, window_px=generative.window_px, stride_px=generative.stride_px)
            windows_K3ss = windows.cut(image_3HW, boxes_K2, window_px=generative.window_px) * 2 - 1
            label_1HW = torch.nn.functional.interpolate(sample.label_HW[None, None].float(), size=size)[0]
            label_Kss = windows.cut(label_1HW, boxes_K2, window_px=generative.window_px)[:, 0].long().to(teacher.device)
            grid = generative.window_px // 8
            classes_Kyx = true_classes(label_Kss, grid)
            with torch.no_grad():
                logits_Chw = combined.segmenter.logits(image_3HW[None])[0]
            q_KCyx = windows.logits_on_grid(
                logits_Chw, boxes_K2, image_px=tuple(size), window_px=generative.window_px, grid=grid
            )
            judged = {"segmenter": q_KCyx.argmax(dim=1)}
            for sigma in sigmas or [generative.sigma]:
                judged[f"teacher at sigma {sigma:g}"] = classify(teacher, windows_K3ss, sigma=sigma, seed=seed)
            valid_Kyx = classes_Kyx != 255
            pixels += int(valid_Kyx.sum())
            for name, predicted_Kyx in judged.items():
                hits[name] = hits.get(name, 0) + int(((predicted_Kyx == classes_Kyx) & valid_Kyx).sum())
        print(json.dumps({"task": task.name} | {name: round(count / pixels, 4) for name, count in hits.items()}))


if __name__ == "__main__":
    main(sys.argv[1:])
