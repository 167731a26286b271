"""The bundled miniatures on a fixed part of ToyTown-C: adapting must beat predicting."""

import json

import pytest

from segadapt import config
from segadapt.demo import demo
from segadapt.parse import from_overrides


@pytest.mark.slow
def test_adaptation_beats_source_on_40_images(tmp_path):
    """10 test images under each of 4 corruptions; a gradient of the wrong sign or of noise gains nothing."""
    demo(from_overrides("demo", ["data.limit=10", f"logging.root={tmp_path}"], config.AdaptConfig))
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    gains = {row["task"]: 100 * (row["adapted_miou"] - row["source_miou"]) for row in summary["tasks"]}
    assert len(gains) == 4
    assert sum(gains.values()) / 4 > 1.5, gains
    assert min(gains.values()) > -1, gains
