"""What each switch of `segadapt train-generative` does to a ToyTown teacher: one run a lever, one table.

python benchmarks/levers.py OUT --dinov2 FILE_OR_FOLDER [--only base,narrow] [--iters 5000] [--jobs-per-gpu 4]

Every run differs from `base` in the overrides shown. All use the bundled autoencoder, so that latents agree. The
teachers are judged by `segadapt diagnose` on validation, clean and under the four extra corruptions (severity 5):
no test image is read. Finished jobs are skipped.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from sweep import run

import segadapt
from segadapt.tables import markdown

AUTOENCODER = Path(segadapt.__file__).parent / "weights/toytown/sd3/vae"
BASE = "train.flow_mask=true train.comparing_weight=0.3 train.sigma_low=0.1 train.sigma_high=0.9"
NARROW = "train/broad=none data.weather=clear data.count=4000"
LEVERS = {
    "base": "",
    "narrow source training": NARROW,
    "flow loss not masked": "train.flow_mask=false",
    "no class-comparing term": "train.comparing_weight=0",
    "class-comparing term 2": "train.comparing_weight=2",
    "8 prompts a window": "train.prompts_per_window=8",
    "balanced classes": "train.balanced=true",
    "no EMA": "train.ema_decay=0",
    "t in 0.05..0.5": "train.sigma_low=0.05 train.sigma_high=0.5",
    "t logit-normal": "train.sigma_distribution=logit_normal",
    "aligned to DINOv2": "train.align.weight=0.5 train.align.checkpoint={dinov2}",
}
LORA = "LoRA on the narrow teacher"
EXTRA = "data.split=validation data.corruptions=[speckle_noise,gaussian_blur,spatter,saturate] data.limit=12"


def slug(name: str) -> str:
    """'8 prompts a window' to '8-prompts-a-window'."""
    return "".join(character if character.isalnum() else "-" for character in name)


def train_job(out: Path, name: str, overrides: str, *, iters: int) -> str:
    """One line for sweep.run."""
    head = f"train-generative logging.root={out} experiment.name=lever experiment.id={slug(name)}"
    own = f"model.generative.autoencoder={AUTOENCODER} train.autoencoder_iters=0 train.save_dtype=bfloat16"
    return f"{head} {own} train.iters={iters} {BASE} {overrides}"


def lora_job(out: Path, *, iters: int) -> str:
    """Adapters of rank 16 on the frozen narrow teacher, trained broadly."""
    narrow = out / "lever" / slug("narrow source training") / "model"
    own = f"model/generative=toytown model.generative.checkpoint={narrow} train.lora_rank=16 train.autoencoder_iters=0"
    head = f"train-generative logging.root={out} experiment.name=lever experiment.id={slug(LORA)}"
    return f"{head} {own} train.iters={iters} train.save_dtype=bfloat16 {BASE}"


def judge_job(out: Path, name: str) -> str:
    """The diagnosis of one teacher on validation."""
    teacher = out / "lever" / slug(name) / "model"
    models = f"model/discriminative=toytown model/generative=toytown model.generative.checkpoint={teacher}"
    head = f"diagnose logging.root={out} experiment.name=lever-judged experiment.id={slug(name)}"
    return f"{head} data=toytown_c {models} {EXTRA} diagnose.sigmas=[0.25]"


def mean(levels: list[dict[str, Any]], asked: str) -> float:
    """Mean accuracy of the teacher over tasks."""
    return sum(level[asked]["accuracy"] for level in levels) / len(levels)


def table(out: Path, names: list[str]) -> str:
    """Pixel accuracy of each teacher, of its answer among the step's candidates, and the gradient cosine."""
    lines = []
    for name in names:
        tasks = json.loads((out / "lever-judged" / slug(name) / "diagnosis.json").read_text())["tasks"]
        clean, *shifted = [task["levels"][0] for task in tasks]
        known, asked = clean["teacher"], [mean(shifted, "teacher"), mean(shifted, "candidates")]
        cells = [known["accuracy"], known["miou"], *asked]
        cosine = sum(level["cosine"] for level in shifted) / len(shifted)
        lines.append([name, *(f"{100 * cell:.1f}" for cell in cells), f"{cosine:+.3f}"])
    return markdown(["lever", "clean acc", "clean mIoU", "shifted acc", "among candidates", "cosine"], lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dinov2", required=True, help="DINOv2: a folder that from_pretrained reads, or a file")
    parser.add_argument("--only", type=lambda text: text.split(","), default=None)
    parser.add_argument("--iters", type=int, default=5000)
    parser.add_argument("--jobs-per-gpu", type=int, default=4)
    parser.add_argument("--workers", type=int, default=3)
    a = parser.parse_args()
    chosen = [name for name in [*LEVERS, LORA] if a.only is None or slug(name) in a.only]
    common = {"jobs_per_gpu": a.jobs_per_gpu, "seconds_limit": float("inf"), "common": f"data.workers={a.workers}"}
    jobs = [train_job(a.out, n, LEVERS[n].format(dinov2=a.dinov2), iters=a.iters) for n in chosen if n != LORA]
    is_well = run(jobs, a.out / "logs", **common)
    if is_well and LORA in chosen:
        is_well = run([lora_job(a.out, iters=a.iters // 2)], a.out / "logs", **common)
    if is_well and run([judge_job(a.out, name) for name in chosen], a.out / "logs", **common):
        sys.stdout.write(table(a.out, chosen) + "\n")
    else:
        sys.exit(1)
