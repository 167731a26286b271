"""A run that works: three labelled images on disk, three classes, tiny models; each test breaks one thing of it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from image_files import save

from segadapt.methods import METHODS
from segadapt.models.combined import Combined
from segadapt.models.source import Source

CLASSES = ("sky", "tree", "road")


@pytest.fixture(scope="session")
def models(saved_models) -> tuple[str, str]:
    """Folders of the segmenter and of the teacher."""
    segmenter, teacher = (override.partition("=")[2] for override in saved_models(CLASSES))
    return segmenter, teacher


@pytest.fixture
def root(tmp_path) -> Path:
    """images/KEY.png of 40 x 48 px, labels/KEY.png with ids 0..2 and 255, names.txt."""
    rng = np.random.default_rng(0)
    for key in "abc":
        save(tmp_path / f"data/images/{key}.png", rng.integers(0, 256, (40, 48, 3), np.uint8))
        ids_HW = rng.integers(0, 3, (40, 48)).astype(np.uint8)
        ids_HW[0] = 255
        save(tmp_path / f"data/labels/{key}.png", ids_HW)
    (tmp_path / "data/names.txt").write_text("\n".join(CLASSES))
    return tmp_path / "data"


@pytest.fixture
def overrides_of(root, models) -> Callable[..., list[str]]:
    """overrides_of(*more): a run of all three images on the CPU; `more` wins."""

    def build(*more: str) -> list[str]:
        overrides = [
            "data=folder", "runtime=cpu", "model/discriminative=local", "model/generative=local",
            f"data.data_root={root}", f"data.classes={root / 'names.txt'}", "data.workers=0", "data.short_side_px=32",
            "data.label_path='{data_root}/labels/{key}.png'", "model.generative.window_px=32",
            "model.generative.stride_px=16", "model.generative.max_pairs=16", f"logging.root={root.parent / 'runs'}",
            f"model.discriminative.checkpoint={models[0]}", f"model.generative.checkpoint={models[1]}",
        ]  # fmt: skip
        given = {text.partition("=")[0] for text in more}
        return [text for text in overrides if text.partition("=")[0] not in given] + list(more)

    return build


@pytest.fixture
def steps_taken(monkeypatch) -> list[str]:
    """Names of the images on which any method took a step."""
    taken: list[str] = []
    for kind in {Source, Combined, *METHODS.values()}:
        if "step" in vars(kind):

            def step(self, image_3HW, *, task, key, own=kind.step):
                taken.append(key)
                return own(self, image_3HW, task=task, key=key)

            monkeypatch.setattr(kind, "step", step)
    return taken
