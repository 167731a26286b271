#!/usr/bin/env bash
# CamVid-C from nothing: segmenter and teacher trained on `training`, settings chosen on `validation` under the four
# extra corruptions, then source and adapted over the 15 corruptions, severity 5, on `test`. About 18 minutes on one H200.
# Usage: CAMVID=... TAESD3=... benchmarks/camvid.sh OUTPUT_FOLDER train|run|all
set -euo pipefail
out=$1 what=${2:-all}
run="python3 -m segadapt"
common="data.data_root=$CAMVID logging.root=$out"
models="model.discriminative.checkpoint=$out/camvid-segmenter/v1/model model.generative.checkpoint=$out/camvid-teacher/v1/model"
adapt="experiment=camvid_c $common $models"
mkdir -p "$out"
if [ "$what" != run ]; then
  $run train experiment=camvid_segmenter experiment.id=v1 $common ${EXTRA:-} >"$out/segmenter.log" 2>&1 &
  $run train-generative experiment=camvid_teacher experiment.id=v1 $common model.generative.autoencoder="$TAESD3" \
    ${EXTRA_TEACHER:-} >"$out/teacher.log" 2>&1 &
  wait %1 && wait %2
fi
if [ "$what" != train ]; then
  $run adapt $adapt tta.forward_mode=discriminative_only experiment.name=camvid-c-source data.workers=4 ${LIMIT:-} \
    >"$out/source.log" 2>&1 &
  held_out="data.split=validation data.corruptions=[speckle_noise,gaussian_blur,spatter,saturate] data.limit=${SWEEP:-25}"
  $run evaluate data=camvid model/discriminative=local ${models% *} $common experiment.name=clean ${LIMIT:-} >"$out/clean.log"
  $run adapt $adapt $held_out tta.forward_mode=discriminative_only experiment.name=sweep >"$out/sweep0.log"
  pids=()
  for lr in 3e-6 1e-5 3e-5 1e-4; do
    $run adapt $adapt $held_out data.workers=2 tta.optimizer.lr_discriminative=$lr experiment.name=sweep >"$out/sweep$lr.log" 2>&1 &
    pids+=($!)
  done
  python3 benchmarks/teacher.py $adapt data.workers=2 data.limit=20 ${LIMIT:-} "+sigmas=[0.25,0.5]" >"$out/judged.jsonl" 2>/dev/null
  wait "${pids[@]}"
  best=$(python3 - "$out/sweep" <<'P'
import json, pathlib, sys
runs = [json.loads(path.read_text()) for path in pathlib.Path(sys.argv[1]).glob("*/results.json")]
runs = [(r["mean"]["miou"], r["protocol"].split("on discriminative ")[1].split()[0]) for r in runs if r["method"] == "generative"]
print(max(runs)[1])
P
  )
  echo "learning rate chosen on validation: $best" | tee "$out/chosen.log"
  $run adapt $adapt tta.optimizer.lr_discriminative="$best" experiment.name=camvid-c-adapted data.workers=8 ${LIMIT:-} >"$out/adapted.log" 2>&1
  wait
  grep -h -e "^protocol" -e "mIoU %:" "$out"/clean.log "$out"/source.log "$out"/sweep*.log "$out"/adapted.log
fi
