"""Run many segadapt commands, N at a time on each visible GPU; on the CPU where there is none.

python benchmarks/sweep.py JOBS --logs FOLDER --jobs-per-gpu 4 --seconds-limit 3000 --common data.workers=2

JOBS: a file, or - for stdin; one line a job, `VERB logging.root=A experiment.name=B experiment.id=C key=value ...`.
Each process sees one GPU and its share of the cores. Skipped: a job whose run folder is finished and whose log begins
with the same line. After a failure no further job starts (--keep-going: they do), those that run are awaited, and the
exit status is 1.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from segadapt.engines import visible_gpus

FINISHED = "sweep: finished"  # begins the last line of a log


def is_done(job: str, log: Path, folder: Path) -> bool:
    """The run folder holds results, and they are those of this very line."""
    has_results = any((folder / name).is_file() for name in ("results.json", "diagnosis.json"))
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else [""]
    return has_results and lines[0] == job and lines[-1].startswith(FINISHED)


def run(
    jobs: list[str], logs: Path, *, jobs_per_gpu: int, seconds_limit: float, common: str, keep_going: bool = False
) -> bool:
    """Run what is not done yet; True if all succeeded. No process outlives the call."""
    given = {job: dict(part.split("=", 1) for part in shlex.split(job)[1:]) for job in jobs}
    log_of = {job: logs / f"{g['experiment.name']}-{g['experiment.id']}.log" for job, g in given.items()}
    folder_of = {j: Path(g["logging.root"], g["experiment.name"], g["experiment.id"]) for j, g in given.items()}
    assert len(set(log_of.values())) == len(log_of), "two jobs of one experiment.name and experiment.id"
    pending = [job for job in given if not is_done(job, log_of[job], folder_of[job])]
    free, began, is_well = (visible_gpus() or [""]) * jobs_per_gpu, time.monotonic(), True
    threads = str(max(1, len(os.sched_getaffinity(0)) // len(free)))
    print(f"{len(pending)} of {len(given)} jobs to run, {len(free)} at a time", flush=True)
    logs.mkdir(parents=True, exist_ok=True)
    running: dict[subprocess.Popen, tuple[str, str, float]] = {}
    try:
        while running or (pending and (is_well or keep_going)):
            while pending and free and (is_well or keep_going):
                job, gpu = pending.pop(0), free.pop(0)
                log_of[job].write_text(f"{job}\n")
                command = [sys.executable, "-m", "segadapt", *shlex.split(job), *shlex.split(common)]
                environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": threads}
                with log_of[job].open("a") as log:  # a session of its own: its workers end with it
                    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
                running[process] = job, gpu, time.monotonic()
            time.sleep(0.1)
            if time.monotonic() - began > seconds_limit:
                print(f"--seconds-limit={seconds_limit:g}: {len(running)} jobs ended, {len(pending)} not begun")
                return False
            for process in [process for process in running if process.poll() is not None]:
                job, gpu, started = running.pop(process)
                free.append(gpu)
                end = f"{FINISHED} with status {process.returncode} after {time.monotonic() - started:.0f} s"
                if process.returncode == 0:
                    with log_of[job].open("a") as log:
                        log.write(f"{end}\n")
                else:
                    is_well = False
                    print(log_of[job], *log_of[job].read_text(errors="replace").splitlines()[-15:], sep="\n  ")
                print(f"{log_of[job].stem}: {end} ({len(running) + len(pending)} left)", flush=True)
    finally:
        for process in running:  # all at once: each saves where it is
            os.killpg(process.pid, signal.SIGTERM)
        for process in running:
            process.wait()
    return is_well


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally`
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", type=argparse.FileType("r"))
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("--jobs-per-gpu", type=int, default=1)
    parser.add_argument("--seconds-limit", type=float, default=float("inf"))
    parser.add_argument("--common", default="", help="overrides of every job that cannot change results")
    parser.add_argument("--keep-going", action="store_true")
    a = parser.parse_args()
    lines = [line.strip() for line in a.jobs if line.strip()]
    limits = {"jobs_per_gpu": a.jobs_per_gpu, "seconds_limit": a.seconds_limit, "keep_going": a.keep_going}
    sys.exit(0 if run(lines, a.logs, common=a.common, **limits) else 1)
