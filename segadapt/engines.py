"""Where cells run: processes of this machine, or tasks of a Ray cluster. Both start the same command, threads and all.

An engine yields (cell, None) when a cell begins and (cell, Outcome) when it has ended. Closing it ends what runs:
SIGTERM, so that a cell can save where it is, and a wait; SIGKILL if a second signal comes.
"""

import ctypes
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segadapt.errors import UserError
from segadapt.record import write_bytes

if TYPE_CHECKING:
    from segadapt.cells import Cell
    from segadapt.config_verbs import GridSettings

RETURNED = ("settings.json", "config.yaml", "records.jsonl", "timings.jsonl", "tasks/*.json", "results.json")
KILL_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux' prctl


@dataclass(frozen=True)
class Outcome:
    """How a cell ended."""

    status: int  # of the process; negative: killed by that signal
    log: str
    files: dict[str, bytes] = field(default_factory=dict)  # of its run folder, where another machine may not see it


Event = tuple["Cell", Outcome | None]


# --- one process ---


def start(
    arguments: Sequence[str], *, log: Path, threads: int, gpus: str | None, folder: Path | None = None
) -> subprocess.Popen:
    """Begin a `segadapt` command in a session of its own; if this process dies, however, so does it (on Linux).

    Args:
        log: gets its output, below the command.
        gpus: as CUDA_VISIBLE_DEVICES has them, '' for none; None: as they are.
        folder: it runs there; None: here.
    """
    environment = (
        os.environ | {"OMP_NUM_THREADS": str(threads)} | ({} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus})
    )
    log.parent.mkdir(parents=True, exist_ok=True)
    die = partial(ctypes.CDLL(None).prctl, KILL_WITH_PARENT, signal.SIGKILL) if sys.platform == "linux" else None
    with log.open("w") as file:
        file.write(f"$ {shlex.join(['segadapt', *arguments])}\n")
        file.flush()
        return subprocess.Popen(
            [sys.executable, "-m", "segadapt", *arguments], stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            env=environment, cwd=folder, start_new_session=True, preexec_fn=die,
        )  # fmt: skip


def end(processes: Iterable[subprocess.Popen]) -> None:
    """SIGTERM to each and a wait; on another signal or error SIGKILL. Nothing of their sessions is left."""
    processes = list(processes)
    try:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


# --- this machine ---


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them."""
    import torch

    count, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return (visible.split(",") if visible else [str(gpu) for gpu in range(count)])[:count]


def gpu_sets(gpus_per_cell: int, *, is_on_cpu: bool) -> list[str]:
    """Values of CUDA_VISIBLE_DEVICES; [''] on the CPU. UserError: fewer GPUs than a cell needs."""
    gpus = [] if is_on_cpu or not gpus_per_cell else visible_gpus()
    if not gpus:
        return [""]
    if len(gpus) < gpus_per_cell:
        raise UserError(f"grid.gpus_per_cell={gpus_per_cell}: {len(gpus)} GPUs are visible; expected as many. Make "
                        "more visible, or lower it.")  # fmt: skip
    return [",".join(gpus[first : first + gpus_per_cell])
            for first in range(0, len(gpus) - gpus_per_cell + 1, gpus_per_cell)]  # fmt: skip


def local(cells: Sequence["Cell"], grid: "GridSettings") -> Generator[Event, None, None]:
    """grid.cells_per_gpu cells at a time on each set of GPUs; on the CPU in all. UserError: see gpu_sets."""
    is_on_cpu = all(cell.is_on_cpu for cell in cells)
    free = gpu_sets(grid.gpus_per_cell, is_on_cpu=is_on_cpu) * grid.cells_per_gpu
    waiting, running = list(cells), {}
    try:
        while waiting or running:
            while waiting and free:
                cell, gpus = waiting.pop(0), free.pop(0)
                process = start(cell.arguments, log=cell.log, threads=grid.threads, gpus=gpus)
                running[process] = cell, gpus
                yield cell, None
            time.sleep(0.1)
            for process in [process for process in running if process.poll() is not None]:
                cell, gpus = running.pop(process)
                end([process])  # what it left behind
                free.append(gpus)
                yield cell, Outcome(process.returncode, cell.log.read_text(errors="replace"))
    finally:
        end(running)


# --- a Ray cluster ---


def run_cell(arguments: Sequence[str], *, here: Path, folder: Path, log: Path, threads: int, has_gpus: bool) -> Outcome:
    """One cell on a node of the cluster; no exception for one that fails, so that Ray repeats what a node lost alone.

    Args:
        here: the folder that the driver runs in; made where the node lacks it.
        folder: of the run.
        has_gpus: Ray has set CUDA_VISIBLE_DEVICES; else there are none.
    """
    status = 0
    if not (folder / "results.json").is_file():  # else an earlier try ended just as its node died
        here.mkdir(parents=True, exist_ok=True)
        process = start(arguments, log=log, threads=threads, gpus=None if has_gpus else "", folder=here)
        try:
            while process.poll() is None:  # ray.cancel is an exception here, but does not wake up a wait()
                time.sleep(0.1)
        finally:
            end([process])
        status = process.returncode
    paths = [path for name in RETURNED for path in sorted(folder.glob(name))] if status == 0 else []
    files = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    return Outcome(status, log.read_text(errors="replace"), files)


def ray_cluster(cells: Sequence["Cell"], grid: "GridSettings") -> Generator[Event, None, None]:
    """A task a cell; one whose node dies is run again on another.

    UserError: Ray is not installed, no cluster answers, or no node can take a cell.
    """
    if find_spec("ray") is None:
        raise UserError(
            "grid.engine=ray: Ray is not installed. Run pip install 'segadapt[ray]', or use grid.engine=local."
        )
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    before = signal.getsignal(signal.SIGTERM)
    address = grid.ray_address or "local"
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise UserError(f"grid.ray_address={address}: no Ray cluster answers ({str(error).splitlines()[0]}). Begin one "
                        "with `ray start --head`, or correct the address.") from error  # fmt: skip
    signal.signal(signal.SIGTERM, before)  # Ray's own would end this process with another status
    waiting: dict[Any, Cell] = {}
    try:
        gpus = _gpus_of_a_task(ray.nodes(), cells, grid)
        resources: Any = ray.remote(num_cpus=grid.threads, num_gpus=gpus, max_retries=grid.retries)
        remote = resources(run_cell)
        for cell in cells:
            cell.log.unlink(missing_ok=True)
            task = remote.remote(cell.arguments, here=Path.cwd(), folder=cell.folder, log=cell.log,
                                 threads=grid.threads, has_gpus=gpus > 0)  # fmt: skip
            waiting[task] = cell
        not_begun = {cell.folder: cell for cell in cells}
        while waiting:
            time.sleep(0.2)  # not in ray.wait, which turns a signal's exit status into 1
            ready, _ = ray.wait(list(waiting), timeout=0)
            for cell in [cell for cell in not_begun.values() if cell.log.exists()]:
                yield not_begun.pop(cell.folder), None
            for task in ready:
                cell = waiting.pop(task)
                not_begun.pop(cell.folder, None)
                yield cell, _fetched(task, cell)
    finally:
        for task in waiting:
            ray.cancel(task)
        if waiting:
            ray.wait(list(waiting), num_returns=len(waiting))
        ray.shutdown()


def _gpus_of_a_task(nodes: Sequence[dict[str, Any]], cells: Sequence["Cell"], grid: "GridSettings") -> float:
    """num_gpus; 0 on a cluster without GPUs. UserError: no node has what a cell needs, and it would wait forever."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    is_on_cpu = all(cell.is_on_cpu for cell in cells) or not any(node.get("GPU") for node in alive)
    if not is_on_cpu and grid.gpus_per_cell > 1 and grid.cells_per_gpu > 1:
        raise UserError(f"grid.gpus_per_cell={grid.gpus_per_cell} and grid.cells_per_gpu={grid.cells_per_gpu}: Ray "
                        "shares one GPU, not several. Set one of the two to 1.")  # fmt: skip
    gpus = 0 if is_on_cpu else grid.gpus_per_cell / grid.cells_per_gpu
    if not any(node.get("GPU", 0) >= gpus and node.get("CPU", 0) >= grid.threads for node in alive):
        raise UserError(f"grid.threads={grid.threads}, grid.gpus_per_cell={grid.gpus_per_cell}: no node of the cluster "
                        f"has as many CPUs and GPUs; the nodes have {alive}. Lower them, or add a node.")  # fmt: skip
    return gpus


def _fetched(task: Any, cell: "Cell") -> Outcome:
    """The outcome of a task that has ended."""
    import ray
    from ray.exceptions import RayError

    try:
        outcome: Outcome = ray.get(task)
    except RayError as error:  # its node died more often than grid.retries, or the worker
        return Outcome(-signal.SIGKILL, str(error))
    keep(outcome, cell)
    return outcome


def keep(outcome: Outcome, cell: "Cell") -> None:
    """Write here what a cell left where this machine cannot see it; results.json last."""
    if outcome.status == 0 and not cell.is_done:
        for name, data in outcome.files.items():
            write_bytes(cell.folder / name, data)


ENGINES: dict[str, Callable[[Sequence["Cell"], "GridSettings"], Generator[Event, None, None]]] = {
    "local": local,
    "ray": ray_cluster,
}
