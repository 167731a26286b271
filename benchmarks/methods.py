"""Every method of test-time adaptation under one protocol: rates searched on validation, then the tables.

python benchmarks/methods.py OUT toytown all
python benchmarks/methods.py OUT camvid all --models SEGMENTER_FOLDER TEACHER_FOLDER --overrides data.data_root=$CAMVID

    search     each method at RATES times its published rate, and where published constants stop it early on pixels with
               others beside them (VARIANTS), on validation images under the four extra corruptions at --severities
    run        at what search.py's rule chose: 15 corruptions, severity 5, 40 test images each, seed 0
    best       source, generative and the best three others of `run`: the whole test split, seeds 0, 1, 2
    continual  ten rounds over four conditions without a reset, and the clean test split after each round
    tables     of what is there, as Markdown and JSON

Images under a corruption are the same for all seeds; a seed moves order and random draws. --full: all images, three
seeds and the published number of augmentations everywhere. What is finished is not run again. `tables` writes what was
chosen to OUT/WORLD-chosen.json; with --chosen FILE another OUT needs no search of those methods, nor `run` for `best`.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import results
import search
import sweep
from omegaconf import OmegaConf

import segadapt
from segadapt.corruptions import COMMON
from segadapt.errors import UserError
from segadapt.finished import read_json
from segadapt.methods import METHODS
from segadapt.methods.learner import Learner
from segadapt.models.combined import Combined
from segadapt.record import write_json
from segadapt.tables import markdown
from segadapt.terminal import percent

RATES = (0.1, 1, 10, 100)
# slow ones first, so that no process works alone at the end
SLOW_FIRST = ("memo", "cotta", "generative", "generative-bn", "dusa-u", "rotta")
VARIANTS = {  # beside the published constants, which were chosen for whole images of 1,000 classes
    "eata": ("tta.options.distance=1",),
    "rdumb": ("tta.options.distance=1",),
    "sar": ("tta.options.reset_below=0",),
}
NEEDED = {"rotta": "tta.options.every=8"}  # 64 images, as published, are more than a task has
QUICK = {"memo": "tta.options.augmentations=8", "eata": "tta.options.fisher_images=100"}  # published: 32, 2000
HELD_OUT = "data.split=validation data.corruptions=[speckle_noise,gaussian_blur,spatter,saturate]"
CONTINUAL = ("source", "tent", "cotta", "generative", "generative-bn")
CONDITIONS = ("gaussian_noise", "defocus_blur", "snow", "contrast")  # one of each family
ROUNDS = 10
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class World:
    """Where methods are compared."""

    name: str
    out: Path
    given: str  # overrides of every command
    models: tuple[str, str] | None  # folders; None: the experiment's own
    methods: tuple[str, ...]  # without the source, slow ones first
    severities: tuple[int, ...]  # of the search
    limit: int | None  # images a task of search and run
    is_full: bool
    known: Mapping[str, Any]  # "chosen" and "best" of an earlier search and run; {}: none

    def job(self, kind: str, identity: str, *overrides: str, verb: str = "adapt") -> str:
        """One line for sweep.py."""
        experiment = f"experiment={self.name}_c" if verb == "adapt" else f"data={self.name}"
        parts = [verb, f"logging.root={self.out}", experiment, f"experiment.name={self.name}-{kind}",
                 f"experiment.id={identity}", self.given, *overrides]  # fmt: skip
        if self.models and verb == "adapt":
            names = ("model.discriminative.checkpoint", "model.generative.checkpoint")
            parts += [f"{name}={folder}" for name, folder in zip(names, self.models, strict=True)]
        return " ".join(part for part in parts if part)

    def folder(self, kind: str, identity: str) -> Path:
        """Of that job's results."""
        return self.out / f"{self.name}-{kind}" / identity

    def method(self, name: str) -> str:
        """Overrides of a method at its published values."""
        quick = "" if self.is_full else QUICK.get(name, "")
        return " ".join(part for part in (f"tta.method={name}", NEEDED.get(name, ""), quick) if part)

    @property
    def continual(self) -> list[str]:
        """The methods of that table."""
        return [name for name in CONTINUAL if name in ("source", *self.methods)]

    @property
    def images(self) -> str:
        return f"data.limit={self.limit or 'null'}"


# --- the search ---


def published_rate(name: str) -> float:
    """Of conf/tta/NAME.yaml, or what all share."""
    folder = Path(segadapt.__file__).parent / "conf/tta"
    own, shared = (OmegaConf.load(folder / f"{stem}.yaml") for stem in (name, "_base"))
    return float(OmegaConf.select(own, "optimizer.lr") or OmegaConf.select(shared, "optimizer.lr"))


def grid(name: str) -> dict[str, str]:
    """Points of a method's search, id -> overrides; none where nothing is learned."""
    if not issubclass(METHODS[name], Learner | Combined):
        return {}
    setting = "lr_discriminative" if METHODS[name].has_teacher else "lr"
    points = {}
    for number, variant in enumerate(("", *VARIANTS.get(name, ()))):
        for factor in RATES:
            rate = f"{published_rate(name) * factor:.4g}"
            points[f"{name}-{number}-{rate}"] = f"tta.optimizer.{setting}={rate} {variant}".strip()
    return points


def search_jobs(world: World) -> Iterator[str]:
    """The source and every point, at each severity."""
    for name in ["source", *world.methods]:
        points = {"source": ""} if name == "source" else grid(name)
        for (identity, point), severity in itertools.product(points.items(), world.severities):
            held_out = (HELD_OUT, f"data.severity={severity}", world.images)
            yield world.job("search", f"{identity}-{severity}", world.method(name), point, *held_out)


def searched(world: World, name: str) -> list[search.Tried]:
    """The source, then a method's points, the chosen one first. UserError: unfinished."""

    def joined(identity: str) -> str:
        return ",".join(str(world.folder("search", f"{identity}-{severity}")) for severity in world.severities)

    return search.ranked([joined("source"), *map(joined, grid(name))], most_loss=0.2, equal=0.5)


def chosen(world: World, name: str) -> str:
    """Overrides of a method as it is tested."""
    if name in world.known.get("chosen", {}):
        return world.known["chosen"][name]
    points = grid(name)
    if not points:
        return world.method(name)
    first = Path(searched(world, name)[1].folder.split(",")[0]).name
    return f"{world.method(name)} {points[first.removesuffix(f'-{world.severities[0]}')]}"


# --- the tests ---


def tested_jobs(
    world: World, kind: str, names: list[str], seeds: tuple[int, ...], images: str, *, tasks_a_job: int
) -> Iterator[str]:
    """Methods at what was chosen, a seed after the other; the corrupted pixels are the same for all seeds."""
    for seed, name, first in itertools.product(seeds, names, range(0, len(COMMON), tasks_a_job)):
        part = COMMON[first : first + tasks_a_job]
        identity, tasks = f"s{seed}", ""
        if part != COMMON:
            identity, tasks = f"s{seed}-{first:02d}", f"data.corruptions=[{','.join(part)}]"
        yield world.job(f"{kind}-{name}", identity, chosen(world, name), images, f"experiment.seed={seed}", tasks)


def best(world: World) -> list[str]:
    """The generative method and the best three others of `run`, by mean mIoU."""
    if "best" in world.known:
        return world.known["best"]
    mean = {name: read(world.folder(f"run-{name}", "s0"))["mean"]["miou"] for name in world.methods}
    others = sorted((name for name in mean if name != "generative"), key=lambda name: -mean[name])
    return [name for name in ("generative", *others[:3]) if name in mean]


def continual_jobs(world: World) -> Iterator[str]:
    """One stream a method."""
    stream = (f"data.corruptions=[{','.join(CONDITIONS)}]", f"data.rounds={ROUNDS}", "tta.continual=true",
              f"data.limit={'null' if world.is_full else 50}")  # fmt: skip
    for name in world.continual[::-1]:
        yield world.job("continual", name, chosen(world, name), *stream, f"tta.save_adapted={name != 'source'}".lower())


def clean_jobs(world: World) -> Iterator[str]:
    """The clean test split before the first round, and after each."""
    own = world.models[0] if world.models else f"segadapt:{world.name}/segformer"
    for identity, folder in {"source": own, **{
        f"{name}-{number}": path
        for name in world.continual[1:]
        for number, path in enumerate(after_rounds(world.folder("continual", name)), start=1)
    }}.items():  # fmt: skip
        model = f"model/discriminative=local model.discriminative.checkpoint={folder}"
        yield world.job("clean", identity, model, verb="evaluate")


def after_rounds(folder: Path) -> list[Path]:
    """The segmenter as it was saved at the last task of each round."""
    saved = sorted((folder / "adapted").iterdir(), key=lambda path: int(path.name.split("_")[0]))
    assert len(saved) == ROUNDS * len(CONDITIONS), folder
    return saved[len(CONDITIONS) - 1 :: len(CONDITIONS)]


# --- tables ---


def read(folder: Path) -> dict[str, Any]:
    return read_json(folder / "results.json")


def continual_table(world: World) -> str:
    """Mean mIoU of the conditions in each round, and of the clean test split after it."""
    clean = read(world.folder("clean", "source"))["mean"]["miou"]
    lines = []
    for name in world.continual:
        tasks = [task["miou"] for task in read(world.folder("continual", name))["tasks"]]
        width = len(CONDITIONS)
        rounds = [sum(tasks[start : start + width]) / width for start in range(0, len(tasks), width)]
        after = [read(world.folder("clean", f"{name}-{number}"))["mean"]["miou"] if name != "source" else clean
                 for number in range(1, ROUNDS + 1)]  # fmt: skip
        for what, values in ((name, rounds), (f"{name}: clean after it", after)):
            lines.append([what, *map(percent, values), percent(sum(values) / len(values))])
    return markdown(["", *(f"round {number}" for number in range(1, ROUNDS + 1)), "mean"], lines)


def rates_table(world: World) -> str:
    """What the search chose for each method, and what it scored there."""
    lines = []
    for name in (name for name in world.methods if grid(name)):
        source, first, *_ = searched(world, name)
        scores = [percent(one.results["mean"]["miou"]) for one in (source, first)]
        lines.append([name, chosen(world, name).partition(" ")[2], *scores, f"{100 * first.worst(source):+.2f}"])
    return markdown(["method", "chosen", "source, validation", "chosen, validation", "worst task"], lines)


def gains_table(world: World, kind: str, names: Iterable[str]) -> str:
    """Of the runs of that kind, the source first; all numbers also as JSON."""
    rows = [word for name in names for word in ("--row", f"{name}={world.folder(f'{kind}-{name}', 's*')}")]
    file = str(world.out / f"{world.name}-{kind}.json")
    return results.main(["--source", str(world.folder(f"{kind}-source", "s*")), *rows, "--json", file])


def tables(world: World) -> Iterator[str]:
    """What is there; a table whose runs are not finished says which one is missing."""
    for what, make in (
        ("search", lambda: rates_table(world)),
        ("run", lambda: gains_table(world, "run", world.methods)),
        ("best", lambda: gains_table(world, "best", best(world))),
        ("continual", lambda: continual_table(world)),
    ):
        try:
            yield make()
        except UserError as error:
            yield f"{what}: {error}"


def choices(world: World) -> dict[str, Any]:
    """What --chosen reads: of the methods whose search is finished, and the best where all have run."""
    found: dict[str, Any] = {"chosen": {}}
    for name in world.methods:
        with suppress(UserError):
            found["chosen"][name] = chosen(world, name)
    with suppress(UserError):
        found["best"] = best(world)
    return found


def severities_of(text: str) -> tuple[int, ...]:
    """'5,2'. ValueError, which argparse explains: not of 1..5."""
    severities = tuple(int(part) for part in text.split(","))
    if not set(severities) <= {1, 2, 3, 4, 5}:
        raise ValueError(text)
    return severities


STAGES = ("search", "run", "best", "continual", "tables")


def main(arguments: list[str]) -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("world", choices=("toytown", "camvid"))
    parser.add_argument("stages", help=f"{', '.join(STAGES)}, or all; commas between")
    parser.add_argument(
        "--models", nargs=2, metavar=("SEGMENTER", "TEACHER"), help="folders; camvid has none of its own"
    )
    parser.add_argument("--overrides", default="", help="of every command")
    parser.add_argument("--common", default="", help="of every command, such as cannot change results")
    parser.add_argument("--methods", help="commas between; all")
    parser.add_argument("--severities", type=severities_of, default="5,2", help="of the search, commas between")
    parser.add_argument("--chosen", type=argparse.FileType("r"), help="WORLD-chosen.json of an earlier OUT")
    parser.add_argument("--full", action="store_true")
    parser.add_argument(
        "--tasks-a-job", type=int, default=len(COMMON), choices=range(1, len(COMMON) + 1), metavar="N",
        help="of `best`, corruptions of one process; all 15. Fewer: shorter processes, and less is lost with one",
    )  # fmt: skip
    parser.add_argument("--jobs-per-gpu", type=int, default=1)
    parser.add_argument("--seconds-limit", type=float, default=float("inf"))
    a = parser.parse_args(arguments)
    stages = STAGES if a.stages == "all" else a.stages.split(",")
    if unknown := set(stages) - set(STAGES):
        parser.error(f"no such stage: {', '.join(unknown)}; choose from {', '.join(STAGES)}, all")
    if a.world == "camvid" and not a.models:
        parser.error("camvid needs --models: camvid.sh OUT train makes them")
    rest = [name for name in METHODS if name not in (*SLOW_FIRST, "source")]
    asked = a.methods.split(",") if a.methods else [*SLOW_FIRST, *rest]
    if unknown := set(asked) - {*SLOW_FIRST, *rest}:
        parser.error(f"no such method: {', '.join(unknown)}; choose from {', '.join([*SLOW_FIRST, *rest])}")
    models = tuple(a.models) if a.models else None
    limit = None if a.full else 40
    known = json.load(a.chosen) if a.chosen else {}
    world = World(a.world, a.out, a.overrides, models, tuple(asked), a.severities, limit, a.full, known)
    plans = {
        "search": [lambda: search_jobs(world)],
        "run": [lambda: tested_jobs(world, "run", ["source", *world.methods], SEEDS if a.full else (0,), world.images,
                                    tasks_a_job=len(COMMON))],
        "best": [lambda: tested_jobs(world, "best", ["source", *best(world)], SEEDS, "data.limit=null",
                                     tasks_a_job=a.tasks_a_job)],
        "continual": [lambda: continual_jobs(world), lambda: clean_jobs(world)],
    }  # fmt: skip
    how = {"jobs_per_gpu": a.jobs_per_gpu, "seconds_limit": a.seconds_limit, "common": a.common}
    for stage in stages:
        for plan in plans.get(stage, []):
            if not sweep.run(list(plan()), a.out / "logs", **how):
                return 1
        if stage == "tables":
            text = "\n\n".join(tables(world))
            (a.out / f"{a.world}-methods.md").write_text(text + "\n")
            write_json(a.out / f"{a.world}-chosen.json", choices(world))
            print(text)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.stderr.write(f"methods.py: {error}\n")
        sys.exit(2)
