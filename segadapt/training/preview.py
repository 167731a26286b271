"""What the net sees in training: its first crops, drawn with their labels before the first step.

B images of a batch   H W image px   3 RGB
"""

from itertools import islice
from pathlib import Path

import numpy as np

from segadapt.pictures import overlay, write_panels
from segadapt.stream import batches
from segadapt.training.samples import TrainingSamples


def write_preview(folder: Path, samples: TrainingSamples, *, count: int) -> None:
    """{folder}/00000.png ...: `count` crops, or all, in the order of training, with their padding; right under labels.

    UserError: see stream.batches.
    """
    dataset = samples.dataset
    count = min(count, len(samples))
    stretches = [range(item, item + samples.batch_size) for item in range(0, count, samples.batch_size)]
    read = batches(samples, stretches, workers=0)
    crops = (crop for batch in read for crop in zip(*batch.to("cpu"), strict=True))
    for index, (image_3HW, label_HW) in enumerate(islice(crops, count)):
        image_HW3 = np.ascontiguousarray((image_3HW * 255).round().byte().permute(1, 2, 0).numpy())
        label = label_HW.numpy()
        panels = [image_HW3, overlay(image_HW3, label, dataset.palette_C3)]
        write_panels(folder / f"{index:05d}.png", panels, label, classes=dataset.classes, palette_C3=dataset.palette_C3)
