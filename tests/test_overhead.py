"""benchmarks/overhead.py on tiny models: its parts add up, and recording is off where it says so."""

import pytest

from segadapt.datasets.toytown import CLASSES


def test_shares_follow_from_the_times_beside_them(script, compose_settings, saved_models, tmp_path, monkeypatch):
    overhead = script("overhead")
    settings = compose_settings(*saved_models(CLASSES), "data.corruptions=[fog]", "data.workers=0")
    found = overhead.measure(settings, tmp_path, images=6, saves=2)
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 4  # of eight, of which two warm up
    assert found["checkpoint_percent"] == pytest.approx(100 * found["checkpoint_s"] / found["interval_s"])
    assert found["interval_s"] == max(600, 50 * found["checkpoint_s"])
    assert found["total_percent"] == found["recording_percent"] + found["checkpoint_percent"]
    assert 0 < found["recording_percent"] < 100
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["00000001", "00000002"]
