"""From the settings to a method that needs no teacher."""

from typing import Any

from segadapt import stream
from segadapt.config import AdaptConfig, DataSettings
from segadapt.datasets import Task
from segadapt.datasets.build import build_dataset
from segadapt.methods import METHODS
from segadapt.models.discriminative import Segmenter
from segadapt.models.recording import Memory
from segadapt.models.source import Source
from segadapt.parse import options_of
from segadapt.protocol import method_of


def build_method(settings: Any, segmenter: Segmenter, *, memory: Memory | None) -> Source:
    """Of a RunConfig the segmenter as it is, of an AdaptConfig its method, which has seen the source images that
    it asks for.

    Raises:
        UserError: source images are not where the options say.
    """  # fmt: skip
    how = {"seed": settings.experiment.seed, "precision": settings.runtime.precision, "memory": memory}
    kind: Any = METHODS[method_of(settings)]
    if kind is Source:
        return Source(segmenter, **how)
    assert isinstance(settings, AdaptConfig)
    method = kind(segmenter, options_of(settings.tta), settings.tta.optimizer, **how)
    data: DataSettings | None = method.source_data(settings.data)
    if data is not None:
        dataset = build_dataset(data)
        entries = stream.order(dataset, Task(0), seed=settings.experiment.seed, shuffle=True, limit=data.limit)
        samples = stream.read(dataset, entries, short_side_px=data.short_side_px, workers=data.workers)
        method.see_source(sample.image_3HW for sample in samples)
    return method
