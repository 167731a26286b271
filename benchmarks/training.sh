#!/usr/bin/env bash
# Supervised training on CamVid (480x360): networks from random weights beside a frozen DINOv2-S, and losses on SegFormer-B0.
# Each run is trained on `training` and scored on all of `validation`; the test split is scored with its last weights.
# Usage: CAMVID=... DINOV2=FILE benchmarks/training.sh OUTPUT_FOLDER train|test|table|all
# Environment: SEEDS, ITERS (steps of every run but DINOv2's), PER_GPU, WORKERS, ONLY (regular expression of jobs), EXTRA (overrides)
set -euo pipefail
shopt -s inherit_errexit
here=$(dirname "$0") out=$1 stage=${2:-all}
mkdir -p "$out"
: "${SEEDS:=0 1 2}" "${ITERS:=1000}" "${PER_GPU:=4}" "${WORKERS:=3}" "${ONLY:=.}" "${EXTRA:=}"
steps() { echo "train.iters=$1 train.schedule.warmup_iters=$2 train.validate_every=$1"; }
length=$(steps "$ITERS" $((ITERS / 10)))
contrast="train.losses.contrast.warmup_iters=$((ITERS / 8))" # 12.5 % of the steps
scratch="experiment=camvid_segmenter"

# name | seeds | overrides; every loss is on SegFormer-B0
rows() {
  echo "hrnet-w48|0|$scratch model/discriminative=hrnet_w48_scratch"
  echo "deeplabv3-r50|0|$scratch model/discriminative=deeplabv3_r50_scratch train/losses=auxiliary"
  echo "dinov2-s|$SEEDS|experiment=dinov2_s_linear_camvid model.discriminative.backbone=${DINOV2:-} $(steps 2000 200)"
  echo "b0-lovasz|$SEEDS|$scratch train/losses=lovasz"
  echo "b0-contrast-memory|$SEEDS|$scratch train/losses=contrast_memory $contrast"
  echo "b0-contrast|$SEEDS|$scratch train/losses=contrast $contrast"
  echo "b0-weighted|$SEEDS|$scratch train/losses=weighted"
  echo "b0|$SEEDS|$scratch"
}
each() { # each FUNCTION, for each run: name, seed, overrides
  rows | while IFS='|' read -r name seeds overrides; do
    for seed in $seeds; do "$1" "$name" "$seed" "$overrides"; done
  done
}
job() { echo "$1 logging.root=$out experiment.name=$2 experiment.id=$3 ${*:4}"; }
train_job() { # of two overrides of one setting the later counts
  job train "camvid-train-$1" "s$2" "$length" "$3" data.data_root="$CAMVID" data.cache=true train.validation_images=null \
    experiment.seed="$2" "$EXTRA"
}
test_job() {
  job evaluate "camvid-test-$1" "s$2" data=camvid data.data_root="$CAMVID" data.split=test model/discriminative=local \
    model.discriminative.checkpoint="$out/camvid-train-$1/s$2/model"
}
sweep() {
  { grep -E -e "$ONLY" || true; } |
    python3 "$here"/sweep.py - --logs "$out/logs" --jobs-per-gpu "$PER_GPU" --common "data.workers=$WORKERS" --keep-going
}
has() { [[ $stage == "$1" || $stage == all ]]; }
case $stage in train | test | table | all) ;; *) echo "$stage: train, test, table or all" >&2; exit 2 ;; esac
if has train; then each train_job | sweep; fi
if has test; then each test_job | sweep; fi
if has table; then rows | cut -d'|' -f1 | xargs python3 "$here"/training.py "$out" --json "$out"/training.json; fi
