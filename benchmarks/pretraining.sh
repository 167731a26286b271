#!/usr/bin/env bash
# Does a pretrained encoder help? A small SegFormer on 100 images of ToyTown, from random weights and from an encoder that
# was pretrained as a classifier of ten drawn materials and things (image_folder.py), no image of ToyTown among them.
# Validation mIoU of both at each rate of encoder x factor of the head. The same call goes on where one was stopped.
# Usage: benchmarks/pretraining.sh OUTPUT_FOLDER
# Environment: DRAWN (a class), PRETRAIN_ITERS, PRETRAIN_BATCH, PRETRAIN_WORKERS, IMAGE_PX; SEEDS and RATES (of the
# fine-tuning), ITERS, IMAGES (of ToyTown), SIDE_PX, CROP_PX, BATCH, PER_GPU; NET, EXTRA (overrides of all)
set -euo pipefail
here=$(dirname "$0") out=$1
mkdir -p "$out"
: "${DRAWN:=800}" "${PRETRAIN_ITERS:=3500}" "${PRETRAIN_BATCH:=32}" "${PRETRAIN_WORKERS:=0}" "${IMAGE_PX:=64}"
: "${SEEDS:=0 1 2}" "${RATES:=3e-4x10 1e-3x3 3e-3x1}" "${ITERS:=200}" "${IMAGES:=100}" "${SIDE_PX:=120}" "${CROP_PX:=96}" "${BATCH:=8}"
: "${PER_GPU:=1}" "${NET:=toytown_scratch}" "${EXTRA:=}"
side=$((IMAGE_PX * 5 / 4)) short=$((IMAGE_PX * 9 / 8))
drawn=$out/drawn-$DRAWN-$side
steps() { echo "train.iters=$1 train.schedule.warmup_iters=$2 train.validate_every=$3"; }
job() { echo "$1 logging.root=$out experiment.name=$2 experiment.id=$3 ${*:4} model/discriminative=$NET $EXTRA"; }
sweep() { python3 "$here"/sweep.py - --logs "$out/logs" --jobs-per-gpu "$1"; }
if ! [ -e "$drawn.done" ]; then
  python3 "$here"/image_folder.py "$drawn" --train "$DRAWN" --val 40 --side-px "$side"
  touch "$drawn.done"
fi
# too short for the strong changes of the recipe
weak="train.transforms.mixing=0 train.transforms.erasing=0 train.transforms.randaugment.operations=0 train.transforms.area_low=0.3"
job pretrain pretrain drawn "$(steps "$PRETRAIN_ITERS" $((PRETRAIN_ITERS * 2 / 35)) $((PRETRAIN_ITERS / 7)))" data.data_root="$drawn" $weak \
  data.workers="$PRETRAIN_WORKERS" train.batch_size="$PRETRAIN_BATCH" train.optimizer.lr=2e-3 \
  train.transforms.image_px="$IMAGE_PX" train.transforms.validation_short_side_px="$short" runtime.checkpoint_seconds=30 | sweep 1
tune="data.count=$IMAGES data.short_side_px=$SIDE_PX data.workers=0 train.batch_size=$BATCH train.transforms.crop_px=$CROP_PX"
tune="$tune $(steps "$ITERS" $((ITERS / 10)) "$ITERS") runtime.checkpoint_seconds=30"
for rate in $RATES; do
  for seed in $SEEDS; do
    own="$tune train.optimizer.lr=${rate%x*} train.optimizer.head_lr_factor=${rate#*x} experiment.seed=$seed"
    job train pretrained "$rate-s$seed" "$own" model.discriminative.backbone="$out/pretrain/drawn/mit.safetensors"
    job train scratch "$rate-s$seed" "$own"
  done
done | sweep "$PER_GPU"
python3 - "$out" $RATES <<'PYTHON'
import json, statistics, sys
from pathlib import Path

from segadapt.tables import markdown

out, rates = Path(sys.argv[1]), sys.argv[2:]
top1 = json.loads((out / "pretrain/drawn/results.json").read_text())["validation"]["top1"]
rows = []
for rate in rates:
    for name in ("scratch", "pretrained"):
        paths = sorted((out / name).glob(f"{rate}-s*/results.json"))
        scores = [100 * json.loads(path.read_text())["validation"]["miou"] for path in paths]
        spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        by_seed = ", ".join(f"{score:.2f}" for score in scores)
        rows.append([rate, name, f"{statistics.mean(scores):.2f}{spread}", by_seed])
print(f"top-1 of the classifier: {100 * top1:.1f} %\n\n{markdown(['rate of encoder x of head', 'encoder', 'validation mIoU', 'by seed'], rows)}")
PYTHON
