#!/usr/bin/env bash
# Supervised training on CamVid (480x360): networks, from random weights but for a frozen DINOv2-S, and losses on
# SegFormer-B0; each network then adapted on three tasks of CamVid-C, with its FLOPs and its speed.
# Each run is trained on `training` and scored on all of `validation`; the test split is scored with its last weights.
# Usage: CAMVID=... DINOV2=FILE TAESD3=FOLDER benchmarks/training.sh OUTPUT_FOLDER STAGE[,STAGE...]|all
#   train, teacher  the rows, and the generative model of `adapt`: one pool of jobs
#   test, adapt     clean test split of all runs, and methods on CamVid-C of each network's first seed: one pool
#   cost            FLOPs, and images per second of inference, one network after the other on one device
#   table           Markdown, and all figures as JSON
# A failed job or stage leaves "-" in the table, and an exit status of 1 at the end. What is finished is not run again.
# Environment: ROWS (of networks and losses; without networks no teacher, adapt and cost), SEEDS (of rows with several),
# ITERS (steps; DINOv2's a third more), TEACHER_ITERS, METHODS (source among them), LIMIT (images a task of adapt),
# IMAGES (of cost), PER_GPU, WORKERS, ONLY (regular expression of jobs), and overrides: EXTRA_SEGMENTER, EXTRA_TEACHER,
# EXTRA (test, adapt)
set -euo pipefail
shopt -s inherit_errexit
trap 'exit 143' TERM # once the running jobs have saved where they are
here=$(dirname "$0") out=$1 stages=${2:-all} status=0
mkdir -p "$out"
: "${CAMVID:?the data set folder}" "${DINOV2:=}" "${TAESD3:=}"
: "${ROWS:=networks losses}" "${SEEDS:=0 1 2}" "${ITERS:=1000}" "${TEACHER_ITERS:=2600}" "${LIMIT:=40}" "${IMAGES:=50}"
: "${METHODS:=source bn tent generative}" "${PER_GPU:=4}" "${WORKERS:=3}" "${ONLY:=.}"
: "${EXTRA_SEGMENTER:=}" "${EXTRA_TEACHER:=}" "${EXTRA:=}"
steps() { echo "train.iters=$1 train.schedule.warmup_iters=$(($1 / 10)) train.validate_every=$1"; }
length=$(steps "$ITERS")
contrast="train.losses.contrast.warmup_iters=$((ITERS / 8))" # 12.5 % of the steps
scratch="experiment=camvid_segmenter"
network="$scratch model/discriminative"
frozen="experiment=dinov2_s_linear_camvid"
# as the authors of Swin, T2T-ViT and K-Net train, at a rate for random weights; drop path for many epochs is too much
adamw="train.optimizer.lr=3e-4 train.optimizer.weight_decay=0.05 train.optimizer.undecayed=norms_and_embeddings
train.optimizer.clip_norm=1.0"
adamw=${adamw//$'\n'/ }
swin="$adamw model.discriminative.backbone=null model.discriminative.config.backbone_config.drop_path_rate=0.1"
one_rate="train.optimizer.head_lr_factor=1.0" # transformers in the head
mask2former="$swin $one_rate train.optimizer.clip_norm=0.01"

# name | seeds | overrides; the slowest first
networks() {
  echo "mask2former-swin-t|0|$network=mask2former_swin_t_scratch train/losses=masks $mask2former"
  echo "hrnet-w48|$SEEDS|$network=hrnet_w48_scratch"
  echo "knet-swin-t|0|$network=knet_swin_t train/losses=knet $swin $one_rate"
  echo "deeplabv3-r50|$SEEDS|$network=deeplabv3_r50_scratch train/losses=auxiliary"
  echo "upernet-swin-t|0|$network=upernet_swin_t train/losses=auxiliary $swin"
  echo "t2t-vit-19|0|$network=t2t_vit_19_scratch $adamw"
  echo "t2t-vit-14|0|$network=t2t_vit_14_scratch $adamw"
  echo "dinov2-s|$SEEDS|$frozen model.discriminative.backbone=$DINOV2 $(steps $((ITERS * 4 / 3)))"
  echo "segformer-b0|0|$scratch"
}
losses() { # on SegFormer-B0
  echo "b0-lovasz|$SEEDS|$scratch train/losses=lovasz"
  echo "b0-contrast-memory|$SEEDS|$scratch train/losses=contrast_memory $contrast"
  echo "b0-contrast|$SEEDS|$scratch train/losses=contrast $contrast"
  echo "b0-weighted|$SEEDS|$scratch train/losses=weighted"
  echo "b0|$SEEDS|$scratch"
}
rows() { for kind in $ROWS; do "$kind"; done; }
names() { "$1" | cut -d'|' -f1; }
firsts() { networks | tr '|' ' ' | while read -r name seed _; do echo "$name $seed"; done; } # of several seeds
each() { # each FUNCTION, for each run: name, seed, overrides
  rows | while IFS='|' read -r name seeds overrides; do
    for seed in $seeds; do "$1" "$name" "$seed" "$overrides"; done
  done
}
job() { echo "$1 logging.root=$out experiment.name=$2 experiment.id=$3 data.data_root=$CAMVID ${*:4}"; }
model() { echo "model.discriminative.checkpoint=$out/camvid-train-$1/s$2/model"; }
train_job() { # of two overrides of one setting the later counts
  job train "camvid-train-$1" "s$2" "$length" "$3" data.cache=true train.validation_images=null experiment.seed="$2" \
    "$EXTRA_SEGMENTER"
}
teacher_job() {
  job train-generative camvid-teacher s0 experiment=camvid_teacher model.generative.autoencoder="$TAESD3" \
    train.iters="$TEACHER_ITERS" train.warmup_iters=$((TEACHER_ITERS / 9)) train.validate_every="$TEACHER_ITERS" \
    "$EXTRA_TEACHER"
}
test_job() {
  job evaluate "camvid-test-$1" "s$2" data=camvid data.split=test model/discriminative=local "$(model "$1" "$2")" \
    "$EXTRA"
}
adapt_jobs() { # the slowest method first; the settings of camvid_c were searched on a SegFormer-B0
  tasks="data.corruptions=[gaussian_noise,fog,pixelate] data.severity=5 data.limit=$LIMIT"
  for method in $(printf '%s\n' $METHODS | tac); do
    firsts | while read -r name seed; do
      if [[ $method == bn && $name == mask2former* ]]; then continue; fi # it has no BatchNorm
      job adapt "camvid-adapt-$name-$method" "s$seed" experiment=camvid_c tta.method="$method" "$(model "$name" "$seed")" \
        model.generative.checkpoint="$out/camvid-teacher/s0/model" "$tasks" "$EXTRA"
    done
  done
}
sweep() {
  { grep -E -e "$ONLY" || true; } |
    python3 "$here"/sweep.py - --logs "$out/logs" --jobs-per-gpu "$PER_GPU" --common "data.workers=$WORKERS" --keep-going
}
cost() {
  firsts | while read -r name seed; do echo "$name=$out/camvid-train-$name/s$seed/model"; done |
    xargs python3 "$here"/cost.py --size 360 480 --images "$IMAGES" --json "$out"/cost.json
}
table() {
  for kind in $ROWS; do
    if [[ $kind == networks ]]; then more="--methods $METHODS --cost $out/cost.json"; else more=""; fi
    python3 "$here"/training.py "$out" $(names "$kind") --json "$out/$kind.json" $more | tee "$out/$kind.md"
  done
}
has() { [[ ,$stages, == *,$1,* || ,$stages, == *,all,* ]]; }
for stage in ${stages//,/ }; do
  case $stage in train | teacher | test | adapt | cost | table | all) ;; *)
    echo "$stage: train, teacher, test, adapt, cost, table or all" >&2; exit 2 ;;
  esac
done
if ! printf '%s\n' $METHODS | grep -qx source; then
  echo "METHODS=$METHODS: expected source among them: the gains of the others are over it" >&2; exit 2
fi
on_networks() { [[ $ROWS == *networks* ]] && has "$1"; }
{ if on_networks teacher; then teacher_job; fi; if has train; then each train_job; fi; } | sweep || status=1
{ if on_networks adapt; then adapt_jobs; fi; if has test; then each test_job; fi; } | sweep || status=1
if on_networks cost; then cost || status=1; fi
if has table; then table || status=1; fi
exit $status
