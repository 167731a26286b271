#!/usr/bin/env bash
# Does a pretrained encoder help? A small SegFormer on 100 images of ToyTown, from random weights and from an encoder that
# was pretrained as a classifier of ten drawn shapes (image_folder.py), which show nothing of ToyTown. Validation mIoU.
# Usage: benchmarks/pretraining.sh OUTPUT_FOLDER
# Environment: SEEDS (of the fine-tuning), PRETRAIN_ITERS, ITERS, IMAGES (of ToyTown), SIDE_PX, PER_GPU, EXTRA (overrides of all)
set -euo pipefail
here=$(dirname "$0") out=$1
mkdir -p "$out"
: "${SEEDS:=0 1 2}" "${PRETRAIN_ITERS:=1200}" "${ITERS:=400}" "${IMAGES:=100}" "${SIDE_PX:=120}" "${PER_GPU:=1}" "${EXTRA:=}"
shapes=$out/shapes net="model/discriminative=toytown_scratch" square=64
steps() { echo "train.iters=$1 train.schedule.warmup_iters=$(($1 / 10)) train.validate_every=$1"; }
job() { echo "$1 logging.root=$out experiment.name=$2 experiment.id=$3 ${*:4} $net $EXTRA"; }
sweep() { python3 "$here"/sweep.py - --logs "$out/logs" --jobs-per-gpu "$PER_GPU"; }
python3 "$here"/image_folder.py "$shapes" --train 400 --val 50 --side-px 72
# too short for the strong changes of the recipe
weak="train.transforms.mixing=0 train.transforms.erasing=0 train.transforms.randaugment.operations=0 train.transforms.area_low=0.5"
job pretrain pretrain shapes "$(steps "$PRETRAIN_ITERS")" data.data_root="$shapes" $weak train.batch_size=64 data.workers=1 \
  train.optimizer.lr=1e-3 train.transforms.image_px=$square train.transforms.validation_short_side_px=72 | sweep
tune="data.count=$IMAGES data.short_side_px=$SIDE_PX data.workers=0 train.batch_size=8 train.transforms.crop_px=96 $(steps "$ITERS")"
for seed in $SEEDS; do
  job train pretrained "s$seed" "$tune" experiment.seed="$seed" model.discriminative.backbone="$out/pretrain/shapes/mit.safetensors"
  job train scratch "s$seed" "$tune" experiment.seed="$seed"
done | sweep
python3 - "$out" <<'PYTHON'
import json, statistics, sys
from pathlib import Path

from segadapt.tables import markdown

out = Path(sys.argv[1])
top1 = json.loads((out / "pretrain/shapes/results.json").read_text())["validation"]["top1"]
rows = []
for name in ("scratch", "pretrained"):
    scores = [100 * json.loads(path.read_text())["validation"]["miou"] for path in sorted((out / name).glob("s*/results.json"))]
    spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    rows.append([name, f"{statistics.mean(scores):.2f}{spread}", ", ".join(f"{score:.2f}" for score in scores)])
print(f"top-1 of the classifier: {100 * top1:.1f} %\n\n{markdown(['encoder', 'validation mIoU', 'by seed'], rows)}")
PYTHON
