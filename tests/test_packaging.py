"""What a user installs: the wheel holds everything, and the demo runs from an empty folder."""

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

import segadapt

ROOT = Path(__file__).parent.parent
HAS_WEIGHTS = (Path(segadapt.__file__).parent / "weights" / "toytown").is_dir()
needs_weights = pytest.mark.skipif(not HAS_WEIGHTS, reason="segadapt/weights/toytown is not there: nothing to run")

pytestmark = pytest.mark.slow


def succeed(*command: str | Path, cwd: Path) -> str:
    """Run to the end and return stdout; without this process's Python settings and without a hub."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the sources: setuptools leaves its build folder beside them, and reads an old one."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "segadapt", folder / "segadapt", ignore=shutil.ignore_patterns("__pycache__"))
    succeed(sys.executable, "-m", "build", "--wheel", "--outdir", folder, folder, cwd=folder)
    (path,) = folder.glob("segadapt-*.whl")
    return path


def test_wheel_holds_every_file_of_the_package(wheel):
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "segadapt").rglob("*") if path.is_file()}
    with zipfile.ZipFile(wheel) as archive:
        assert sorted(name for name in files - set(archive.namelist()) if "__pycache__" not in name) == []


@needs_weights
def test_wheel_in_an_empty_environment_runs_the_demo(wheel, tmp_path):
    succeed(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    succeed(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel, cwd=tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    corruptions = "data.corruptions=[gaussian_noise,fog]"
    succeed(tmp_path / "venv" / "bin" / "segadapt", "demo", "data.limit=2", corruptions, cwd=empty)
    summary = json.loads((empty / "outputs" / "demo" / "summary.json").read_text())
    assert [task["task"] for task in summary["tasks"]] == ["gaussian_noise/5", "fog/5"]
    assert set(summary["mean"]) == {"source_miou", "adapted_miou"}
    assert [path.name for path in empty.iterdir()] == ["outputs"]


@needs_weights
def test_the_whole_demo_adapts_better_than_the_source(tmp_path, capsys):
    began = time.perf_counter()
    out = succeed(sys.executable, "-m", "segadapt", "demo", cwd=tmp_path)
    seconds = time.perf_counter() - began
    mean = json.loads((tmp_path / "outputs" / "demo" / "summary.json").read_text())["mean"]
    with capsys.disabled():
        print(f"\ndemo: {seconds:.0f} s, mIoU {100 * mean['source_miou']:.2f} -> {100 * mean['adapted_miou']:.2f} %")
    assert "summary outputs/demo/summary.json" in out
    assert mean["adapted_miou"] > mean["source_miou"]
