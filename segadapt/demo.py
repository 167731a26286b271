"""The main job on the bundled world: source and adapted over the same stream, one table."""

import copy
from pathlib import Path

from segadapt.adapt import run
from segadapt.config import AdaptConfig
from segadapt.record import write_json
from segadapt.terminal import comparison_table, open_terminal


def demo(settings: AdaptConfig) -> None:
    """Run both forward modes and write {logging.root}/{experiment.name}/summary.json."""
    terminal = open_terminal(settings.logging.terminal)
    modes = {}
    for mode in ("discriminative_only", "tta"):
        chosen = copy.deepcopy(settings)
        chosen.tta.forward_mode = mode
        if chosen.experiment.id is not None:
            chosen.experiment.id += f"-{mode}"
        modes[mode] = run(chosen)
    tasks = [
        {"task": source["task"], "source_miou": source["miou"], "adapted_miou": adapted["miou"]}
        for source, adapted in zip(modes["discriminative_only"]["tasks"], modes["tta"]["tasks"], strict=True)
    ]
    mean = {
        "source_miou": modes["discriminative_only"]["mean"]["miou"],
        "adapted_miou": modes["tta"]["mean"]["miou"],
    }
    path = Path(settings.logging.root, settings.experiment.name, "summary.json")
    write_json(path, {"tasks": tasks, "mean": mean})
    terminal.event("comparison", file=path, tasks=tasks, mean=mean)
    terminal.console.print(comparison_table(tasks, mean))
    terminal.console.print(f"summary {path}", highlight=False)
    folders = " ".join(modes[mode]["folder"] for mode in ("tta", "discriminative_only"))
    look = f"to look at it: segadapt report {folders}"
    terminal.console.print(look, highlight=False, soft_wrap=True, markup=False)
