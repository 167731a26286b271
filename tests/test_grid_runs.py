"""Grids of real runs on the bundled world: both engines, what is lost on the way, and the task inside a whole run."""

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
TOY = ("experiment=toytown_c", "runtime=cpu", "data.limit=2", "data.workers=0")
AXES = ("grid.methods=[source,bn,generative]", "grid.seeds=[0,1]", "data.corruptions=[fog,contrast]")


def segadapt(*words: str, cwd: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "segadapt", *words]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, status: int = 0) -> str:
    """Its output."""
    said = process.communicate(timeout=400)[0]
    assert process.returncode == status, said
    return said


def wait_for(condition: Callable[[], Any], process: subprocess.Popen) -> Any:
    """What the condition gives as soon as it is true, while the process runs."""
    while not (found := condition()):
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.02)
    return found


def results_of(root: Path) -> dict[str, Any]:
    """id -> records as bytes, and results without times and memory, of every finished run."""
    out = {}
    for path in sorted(root.glob("outputs/toytown-c/*/results.json")):
        results = json.loads(path.read_text())
        for row in results["tasks"]:
            del row["seconds"]
        del results["started"], results["peak_memory_gib"]
        out[path.parent.name] = (path.parent / "records.jsonl").read_bytes(), results
    return out


def times(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in root.glob("outputs/toytown-c/*/**/*") if path.is_file()}


def processes() -> dict[int, tuple[int, str]]:
    """pid -> (parent, command line) of all processes that run."""
    out = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue  # it has ended
        if state not in "ZX":
            out[int(folder.name)] = int(parent), command
    return out


def cells_below(pid: int) -> dict[int, str]:
    """pid -> command line of the cells that a process or its children run."""
    alive, below = processes(), {pid}
    for _ in range(6):
        below |= {child for child, (parent, _) in alive.items() if parent in below}
    return {child: alive[child][1] for child in below if child in alive and " -m segadapt adapt " in alive[child][1]}


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> tuple[Path, str]:
    """A grid of 12 cells by the local engine: its folder, and what it said."""
    root = tmp_path_factory.mktemp("local")
    return root, finish(segadapt("grid", *TOY, *AXES, "grid.cells_per_gpu=2", cwd=root))


def test_a_finished_grid_runs_nothing_again_and_a_new_axis_only_what_is_new(local):
    root, said = local
    assert "12/12 done, 0 running, 0 failed: " in said
    before = times(root)
    assert len(results_of(root)) == 12
    assert "12 cells, 12 finished before" in finish(segadapt("grid", *TOY, *AXES, cwd=root))
    assert times(root) == before
    assert finish(segadapt("grid", *TOY, *AXES, "grid.engine=print", cwd=root)) == ""
    more = ("grid", *TOY, *AXES[1:], "grid.methods=[bn]", "logging.root=more", "grid.engine=print")
    printed = finish(segadapt(*more, cwd=root)).splitlines()
    assert len(printed) == 4
    finish(segadapt(*shlex.split(printed[0])[1:], cwd=root))  # a cell is nothing but its command
    assert finish(segadapt(*more, cwd=root)).splitlines() == printed[1:]
    assert times(root) == before


def test_a_cell_of_one_task_equals_the_task_inside_a_whole_run_bit_for_bit(local):
    root, _ = local
    words = (*TOY, "data.corruptions=[fog,contrast]", "experiment.seed=1", "runtime.threads=1")
    finish(segadapt("adapt", *words, "logging.root=whole", cwd=root))
    (whole,) = (root / "whole/toytown-c").iterdir()
    settings, records = json.loads((whole / "settings.json").read_text()), (whole / "records.jsonl").read_text()
    parts = []
    for name in ("fog", "contrast"):
        settings["data"]["corruptions"] = [name]
        (cell,) = [path.parent for path in root.glob("outputs/toytown-c/*/settings.json")
                   if json.loads(path.read_text()) == settings]  # fmt: skip
        parts.append((cell / "records.jsonl").read_text())
        inside, alone = (row_of(folder, f"{name}/5") for folder in (whole, cell))
        assert inside == alone
    assert "".join(parts) == records


def row_of(folder: Path, task: str) -> dict[str, Any]:
    """A task in results.json, without its time."""
    (row,) = [row for row in json.loads((folder / "results.json").read_text())["tasks"] if row["task"] == task]
    del row["seconds"]
    return row


def test_results_of_the_grid_have_gains_and_no_cell_missing(local):
    root, said = local
    (table,) = json.loads(finish(segadapt("results", "outputs", "format=json", "resamples=20", cwd=root)))
    assert [row["name"] for row in table["rows"]] == ["source", "bn", "generative"]
    assert [len(row["miou_ST"]) for row in table["rows"]] == [2, 2, 2]
    assert all(row["gain_ST"] is not None for row in table["rows"][1:])
    assert table["missing"] == []
    assert table["tasks"] == ["fog/5", "contrast/5"]
    assert (root / "outputs/toytown-c/table.md").read_text() in said


def test_a_cell_that_cannot_run_fails_alone_and_a_rerun_does_only_it(tmp_path):
    words = ("grid", *TOY, "grid.methods=[source,bn]", "data.corruptions=[fog]", "grid.cells_per_gpu=2")
    (tmp_path / "mine/grid").mkdir(parents=True)
    (tmp_path / "mine/grid/own.yaml").write_text("defaults: [default, _self_]\nlog_lines: 1\n")
    words = (*words, "--config-dir", "mine", "grid=own")
    first = finish(segadapt(*words, "grid.engine=print", cwd=tmp_path)).splitlines()
    assert all(f"--config-dir {tmp_path}/mine" in line for line in first)
    wrong = next(line for line in first if "tta=bn" in line)
    finish(segadapt(*shlex.split(wrong)[1:], cwd=tmp_path))
    (folder,) = (tmp_path / "outputs/toytown-c").iterdir()
    (folder / "results.json").unlink()
    stored = (folder / "settings.json").read_text()
    (folder / "settings.json").write_text("torn")
    said = finish(segadapt(*words, cwd=tmp_path), status=1)
    how = r"failed: bn fog/5 seed 0, failed with exit status 2; its log is .*\.log\n"
    assert re.search(how + "  segadapt adapt: .*not JSON", said)
    assert "done, 0 running, 1 failed" in said
    assert "1 of 2 cells failed; the same command runs what is missing" in said
    assert "1 cells are missing (-): bn fog/5 seed 0" in said
    (folder / "settings.json").write_text(stored)
    logs = str(tmp_path / "outputs/toytown-c/logs")
    before = {path: at for path, at in times(tmp_path).items() if not path.startswith((str(folder), logs))}
    assert len(before) > 4
    assert "2 cells, 1 finished before" in finish(segadapt(*words, cwd=tmp_path))
    assert before.items() <= times(tmp_path).items()


def test_a_grid_that_is_stopped_leaves_no_process_and_goes_on(tmp_path):
    words = ("grid", *TOY, "grid.methods=[bn]", "data.corruptions=[fog,contrast,snow]", "grid.cells_per_gpu=2")
    process = segadapt(*words, cwd=tmp_path)
    done = wait_for(lambda: list(tmp_path.glob("outputs/toytown-c/*/results.json")), process)
    cells = wait_for(lambda: cells_below(process.pid), process)
    before = {path: path.stat().st_mtime_ns for path in done}
    process.send_signal(signal.SIGTERM)
    finish(process, 128 + signal.SIGTERM)
    assert [pid for pid in cells if pid in processes()] == []
    said = finish(segadapt(*words, cwd=tmp_path))
    assert "3/3 done, 0 running, 0 failed" in said
    assert {path: path.stat().st_mtime_ns for path in done} == before
    assert len(results_of(tmp_path)) == 3


@pytest.fixture
def cluster(monkeypatch) -> Iterator[Any]:
    """A Ray cluster of 3 nodes of one CPU each on this machine."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    own = {"num_cpus": 1, "include_dashboard": False}
    quick = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    made = Cluster(initialize_head=True, head_node_args=own | {"_system_config": quick})
    made.add_node(num_cpus=1)
    made.add_node(num_cpus=1)
    made.wait_for_nodes()
    yield made
    made.shutdown()


def test_a_cluster_that_loses_a_node_finishes_all_cells_as_the_local_engine_does(local, cluster, tmp_path):
    root, _ = local
    address = (f"grid.ray_address='{cluster.address}'", "grid.engine=ray")
    driver = segadapt("grid", *TOY, *AXES, *address, cwd=tmp_path)
    victim = cluster.worker_nodes and sorted(cluster.worker_nodes, key=lambda node: node.raylet_socket_name)[-1]
    raylet = victim.all_processes["raylet"][0].process.pid
    wait_for(lambda: len(results_of(tmp_path)) >= 2, driver)
    (pid, command), *_ = wait_for(lambda: cells_below(raylet), driver).items()
    done = len(results_of(tmp_path))
    cluster.remove_node(victim, allow_graceful=False)
    said = finish(driver)
    assert 2 <= done < 12
    assert pid not in processes(), command
    assert "12/12 done, 0 running, 0 failed" in said
    ray_results, local_results = results_of(tmp_path), results_of(root)
    assert len(ray_results) == 12
    assert ray_results == {name: local_results[name] for name in ray_results}
