"""A grid's plan: which cells, in which folders; and the local engine with a program that stands in for segadapt."""

import io
import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from segadapt import engines
from segadapt.__main__ import GATHERED, gathered
from segadapt.cells import Cell, plan
from segadapt.config import AdaptConfig
from segadapt.config_verbs import GridConfig, GridSettings
from segadapt.errors import UserError
from segadapt.grid import Board
from segadapt.parse import from_overrides, methods_as_files, parse
from segadapt.protocol import identity
from segadapt.record import RunFolder, settings_id

ROOT = Path(__file__).parents[1]
TOY = ("experiment=toytown_c", "runtime=cpu", "data.limit=2")


def planned(*overrides: str) -> list[Cell]:
    """The cells of `segadapt grid OVERRIDES`."""
    with initialize_config_module("segadapt.conf", version_base="1.3"):
        given = methods_as_files(gathered(list(overrides), *GATHERED["grid"]))
        return plan(parse(compose("grid", given), GridConfig).grid, [])


# --- the plan ---


def test_every_task_is_a_cell_with_a_reset_and_else_the_stream_is_one():
    axes = ("grid.methods=[source,bn]", "grid.seeds=[0,1]", "data.corruptions=[fog,snow,contrast]")
    cells = planned(*TOY, *axes)
    assert len(cells) == 2 * 2 * 3
    assert [(cell.method, cell.stream, cell.seed) for cell in cells[:4]] == [
        ("source", "fog/5", 0), ("source", "snow/5", 0), ("source", "contrast/5", 0), ("bn", "fog/5", 0),
    ]  # fmt: skip
    assert [cell.seed for cell in cells] == [0] * 6 + [1] * 6
    for rule in ("tta.continual=true", "data.order=mixed", "data.order=gradual", "data.rounds=2"):
        cells = planned(*TOY, *axes, rule)
        assert len(cells) == 2 * 2
        assert cells[0].settings["data"]["corruptions"] == ["fog", "snow", "contrast"]
    assert len(planned(*TOY, *axes, "tta.episodic=true")) == 12
    assert [cell.stream for cell in planned(*TOY, *axes[:1], "data.corruptions=[]")] == ["clean", "clean"]


def test_streams_and_overrides_of_a_method_make_their_cells():
    cells = planned(
        *TOY, "grid.methods=[source,bn,'rotta tta.options.every=8']", "data.corruptions=[fog]", "data.severity=1",
        "grid.streams=['data.severity=3','data.severity=4 tta.continual=true']",
        "grid.overrides=['data.limit=9','data.workers=1']",
    )  # fmt: skip
    assert [(cell.method, cell.stream) for cell in cells] == [
        (method, f"fog/{severity}") for severity in (3, 4) for method in ("source", "bn", "rotta tta.options.every=8")
    ]
    assert {cell.settings["data"]["limit"] for cell in cells} == {2}  # the command line comes after the grid's file
    assert [cell.settings["tta"]["options"]["every"] for cell in cells if cell.method[:5] == "rotta"] == [8, 8]


def test_a_cell_is_the_run_that_its_command_line_is(tmp_path):
    cells = planned(*TOY, "grid.methods=[bn,generative]", "grid.seeds=[3]", "data.corruptions=[fog,snow]",
                    f"logging.root={tmp_path}", "tta.optimizer.lr=1e-4")  # fmt: skip
    for cell in cells:
        run = from_overrides("adapt", cell.arguments[1:], AdaptConfig)
        folder = RunFolder.open(run.logging.root, run.experiment.name, run_id=None, settings=identity(run))
        assert folder.path == cell.folder
        assert (run.tta.method, run.experiment.seed, run.runtime.threads) == (cell.method, 3, 1)
    tuned = next(cell for cell in cells if cell.method == "generative").settings  # conf/tuned: its own for each method
    assert tuned["tta"]["optimizer"]["warmup"] == 10


CORRUPTIONS = ("fog", "snow", "contrast", "zoom_blur")


@settings(max_examples=8)
@given(
    st.lists(st.sampled_from(("source", "bn", "tent")), min_size=1, unique=True),
    st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True),
    st.lists(st.sampled_from(CORRUPTIONS), min_size=1, unique=True),
)
def test_folders_are_the_content_whatever_else_is_in_the_grid(methods, seeds, corruptions):
    def cells(methods, seeds, corruptions):
        return planned(*TOY, f"grid.methods=[{','.join(methods)}]", f"grid.seeds=[{','.join(map(str, seeds))}]",
                       f"data.corruptions=[{','.join(corruptions)}]", "grid.cells_per_gpu=3")  # fmt: skip

    some = cells(methods, seeds, corruptions)
    assert len({cell.folder for cell in some}) == len(some) == len(methods) * len(seeds) * len(corruptions)
    assert all(cell.folder.name == settings_id(cell.settings) for cell in some)
    whole = {cell.folder: (cell.method, cell.stream, cell.seed)
             for cell in cells(("tent", "bn", "source"), [9, *seeds], ["frost", *corruptions])}  # fmt: skip
    assert {cell.folder: (cell.method, cell.stream, cell.seed) for cell in some}.items() <= whole.items()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("grid.methods=[sorce]",), "grid.methods: sorce is not a method. Did you mean source?"),
        (("grid.methods=[bn,bn]",), "grid.methods=['bn', 'bn']: expected one or more, each once"),
        (("grid.methods=['']",), "grid.methods:  is not a method. Choose from: bn"),
        (("grid.seeds=[]",), "grid.seeds=[]: expected one or more"),
        (("experiment.seed=3",), "experiment.seed=3: the grid sets experiment.seed itself, by grid.seeds"),
        (("tta.method=bn",), "tta.method=bn: the grid sets tta.method itself, by grid.methods"),
        (("experiment.id=mine",), "experiment.id=mine: the grid sets experiment.id itself"),
        (("grid.streams=['runtime.threads=4']",), "runtime.threads=4: the grid sets runtime.threads itself"),
        (("tta.forward_mode=discriminative_only", "grid.methods=[bn,tent]"), "are the same run"),
        (("grid.streams=['experiment.name=a','experiment.name=b']",), "expected one logging.root and experiment.name"),
        (("data.severty=3",), "data.severty is not a setting. Did you mean data.severity?"),
        (("grid.streams=['data.severty=3']",), "data.severty is not a setting. Did you mean data.severity?"),
        (("data.severity",), "data.severity cannot be read; expected key=value"),
        (("data.corruptions=[fogg]",), "corruption 'fogg' is not known. Did you mean fog?"),
        (("data.severity=9",), "data.severity=9: expected at least 1"),
        (("model.generative.window_px=100",), "model.generative.window_px=100: expected a multiple of 16"),
    ],
)  # fmt: skip
def test_a_mistake_is_found_before_any_cell_runs(overrides, said):
    with pytest.raises(UserError) as caught:
        planned(*TOY, *overrides)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "cells"), [("toytown_c", 5 * 15 * 3), ("ade20k_c", 7 * 15 * 5 * 3)])
def test_the_shipped_grids_have_the_cells_that_they_say(name, cells):
    assert len({cell.folder for cell in planned(f"grid={name}", "data.data_root=/data/ade20k")}) == cells


# --- the local engine ---

STAND_IN = """import json, os, pathlib, signal, sys, time
folder, seconds, status = pathlib.Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
def stop(*_):
    (folder.parent / f"{folder.name}.saved").touch()
    if status != 99:  # which goes on
        sys.exit(143)
signal.signal(signal.SIGTERM, stop)
print("begun", flush=True)
(folder.parent / f"{folder.name}.begun").write_text(str(os.getpid()))
end = time.monotonic() + seconds
while time.monotonic() < end:
    time.sleep(0.02)
print("the cause is rain")
if status:
    sys.exit(status)
folder.mkdir()
(folder / "results.json").write_text(json.dumps([os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"]]))
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """stand_in(name, seconds, status): a cell of a program that stands in for segadapt, in tmp_path/out."""
    (tmp_path / "segadapt").mkdir()
    (tmp_path / "segadapt/__init__.py").touch()
    (tmp_path / "segadapt/__main__.py").write_text(STAND_IN)
    monkeypatch.chdir(tmp_path)

    def cell(name: str, seconds: float = 0, status: int = 0) -> Cell:
        folder = tmp_path / "out" / name
        return Cell("bn", name, 0, ("adapt", str(folder), str(seconds), str(status)), folder, {}, (), False)

    return cell


def grid_settings(**values) -> GridSettings:
    return GridSettings(**({"gpus_per_cell": 1, "cells_per_gpu": 1, "threads": 2} | values))


def test_cells_run_side_by_side_each_with_its_gpus_and_threads(stand_in, monkeypatch):
    monkeypatch.setattr(engines, "visible_gpus", lambda: ["2", "3", "5", "7", "8"])
    cells = [stand_in(f"c{number}", seconds=0.3) for number in range(6)]
    at_once, most, ended = 0, 0, []
    for cell, outcome in engines.local(cells, grid_settings(gpus_per_cell=2)):
        at_once += 1 if outcome is None else -1
        most = max(most, at_once)
        ended += [] if outcome is None else [(cell, outcome)]
    assert most == 2
    assert [outcome.status for _, outcome in ended] == [0] * 6
    seen = [json.loads((cell.folder / "results.json").read_text()) for cell in cells]
    assert {gpus for gpus, _ in seen} == {"2,3", "5,7"}
    assert {threads for _, threads in seen} == {"2"}


def test_a_cell_that_fails_shows_its_log_and_the_others_go_on(stand_in):
    cells = [stand_in("bad", status=3), stand_in("good"), stand_in("too")]
    console = Console(file=io.StringIO(), width=200)
    with Board(console, 3, 0, log_lines=1) as board:
        for cell, outcome in engines.local(cells, grid_settings(gpus_per_cell=0)):
            if cell.stream == "bad" or outcome is None:
                board.tell(cell, outcome)
    assert (board.failed, board.running) == (1, 2)
    assert [cell.is_done for cell in cells] == [False, True, True]
    said = console.file.getvalue()
    assert "0/3 done, 0 running, 1 failed: bn bad seed 0, failed with exit status 3; its log is " in said
    assert "  the cause is rain\n" in said
    assert "begun" not in said.split("its log is")[1]  # log_lines=1
    assert cells[0].log.read_text().splitlines()[0].startswith("$ segadapt adapt ")


def test_cells_are_ended_and_awaited_when_the_engine_is_closed(stand_in):
    cells = [stand_in(f"c{number}", seconds=60) for number in range(3)]
    began = time.monotonic()
    with closing(engines.local(cells, grid_settings(cells_per_gpu=2, gpus_per_cell=0))) as events:
        assert [next(events)[1], next(events)[1]] == [None, None]
        wait_for(lambda: len(list(Path("out").glob("*.begun"))) == 2)
    assert time.monotonic() - began < 30
    assert sorted(path.name for path in Path("out").glob("*.saved")) == ["c0.saved", "c1.saved"]
    assert not any(is_alive(int(path.read_text())) for path in Path("out").glob("*.begun"))


def test_a_second_signal_ends_the_wait(stand_in):
    cell = stand_in("c0", seconds=60, status=99)
    events = engines.local([cell], grid_settings(gpus_per_cell=0))
    next(events)
    wait_for(Path("out/c0.begun").exists)
    wait_for(lambda: Path("out/c0.begun").read_text() != "")

    def second(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, second)
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        with pytest.raises(KeyboardInterrupt):
            events.close()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert Path("out/c0.saved").exists()
    assert not is_alive(int(Path("out/c0.begun").read_text()))


def test_results_of_a_node_without_the_drivers_disk_are_written_here(stand_in, tmp_path):
    cell = stand_in("c0")
    where = {"here": tmp_path, "folder": cell.folder, "log": cell.log, "threads": 1, "has_gpus": False}
    outcome = engines.run_cell(cell.arguments, **where)
    assert outcome.status == 0
    assert engines.run_cell(cell.arguments, **where) == outcome  # as it is there, nothing runs
    stored = (cell.folder / "results.json").read_bytes()
    assert outcome.files == {"results.json": stored}
    before = (cell.folder / "results.json").stat().st_mtime_ns
    engines.keep(outcome, cell)
    assert (cell.folder / "results.json").stat().st_mtime_ns == before
    shutil.rmtree(cell.folder)
    engines.keep(outcome, cell)
    assert (cell.folder / "results.json").read_bytes() == stored
    bad = stand_in("bad", status=3)
    outcome = engines.run_cell(bad.arguments, **where | {"folder": bad.folder})
    assert (outcome.status, outcome.files) == (3, {})
    assert outcome.log.endswith("the cause is rain\n")


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_no_cell_outlives_a_parent_that_is_killed(stand_in):
    cell = stand_in("c0", seconds=60)
    code = """
import sys
from pathlib import Path
from segadapt.engines import start
here, log, *words = sys.argv[1:]
start(words, log=Path(log), threads=1, gpus="", folder=Path(here)).wait()
"""
    command = [sys.executable, "-c", code, str(Path.cwd()), str(cell.log), *cell.arguments]
    parent = subprocess.Popen(command, cwd=ROOT)
    begun = Path("out/c0.begun")
    wait_for(begun.exists)
    wait_for(lambda: begun.read_text() != "")
    assert is_alive(int(begun.read_text()))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_for(lambda: not is_alive(int(begun.read_text())))
    assert not Path("out/c0.saved").exists()


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Not ended, nor ended and not yet awaited by init."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("gpus", "per_cell", "is_on_cpu", "expected"),
    [
        ([], 1, False, [""]),
        (["0", "1"], 1, True, [""]),
        (["0", "1"], 0, False, [""]),
        (["0", "1", "4"], 1, False, ["0", "1", "4"]),
        (["0", "1", "4"], 2, False, ["0,1"]),
    ],
)
def test_gpus_are_shared_out_in_sets(monkeypatch, gpus, per_cell, is_on_cpu, expected):
    monkeypatch.setattr(engines, "visible_gpus", lambda: gpus)
    assert engines.gpu_sets(per_cell, is_on_cpu=is_on_cpu) == expected


def test_fewer_gpus_than_a_cell_needs_are_refused(monkeypatch):
    monkeypatch.setattr(engines, "visible_gpus", lambda: ["0"])
    with pytest.raises(UserError, match=r"grid\.gpus_per_cell=2: 1 GPUs are visible; expected as many"):
        engines.gpu_sets(2, is_on_cpu=False)


def node(**resources: float) -> dict:
    return {"Alive": True, "Resources": resources}


@pytest.mark.parametrize(
    ("values", "nodes", "expected"),
    [
        ({}, [node(CPU=4)], 0),
        ({}, [node(CPU=4), node(CPU=8, GPU=2)], 1),
        ({"cells_per_gpu": 4}, [node(CPU=8, GPU=2)], 0.25),
        ({"gpus_per_cell": 2}, [node(CPU=8, GPU=2)], 2),
    ],
)
def test_a_task_of_ray_asks_for_its_share_of_gpus(stand_in, values, nodes, expected):
    assert engines._gpus_of_a_task(nodes, [stand_in("c0")], grid_settings(**values)) == expected


def test_what_no_node_of_a_cluster_has_is_refused_and_not_waited_for(stand_in):
    cells = [stand_in("c0")]
    with pytest.raises(UserError, match="no node of the cluster has as many CPUs and GPUs"):
        engines._gpus_of_a_task([node(CPU=1)], cells, grid_settings())
    with pytest.raises(UserError, match="no node of the cluster"):
        engines._gpus_of_a_task([node(CPU=8, GPU=1)], cells, grid_settings(gpus_per_cell=2))
    with pytest.raises(UserError, match="Ray shares one GPU"):
        engines._gpus_of_a_task([node(CPU=8, GPU=4)], cells, grid_settings(gpus_per_cell=2, cells_per_gpu=2))
