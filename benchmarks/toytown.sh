#!/usr/bin/env bash
# The bundled miniatures from scratch, then what they do: training, the teacher judged, learning rates on validation.
# Usage: benchmarks/toytown.sh OUTPUT_FOLDER [WORKERS]
set -euo pipefail
out=$1 workers=${2:-6}
mkdir -p "$out"
run="python3 -m segadapt"
both="logging.root=$out data.workers=$workers train.save_dtype=bfloat16"
$run train experiment.name=toytown-segmenter experiment.id=v1 $both >"$out/segmenter.log" 2>&1 &
$run train-generative experiment.name=toytown-teacher experiment.id=v1 $both >"$out/teacher.log" 2>&1 &
wait %1 && wait %2
models="model.discriminative.checkpoint=$out/toytown-segmenter/v1/model model.generative.checkpoint=$out/toytown-teacher/v1/model"
toytown="model/discriminative=toytown model/generative=toytown data.workers=$workers logging.root=$out $models"
python3 benchmarks/teacher.py data=toytown_c $toytown data.limit=20 "+sigmas=[0.1,0.25,0.5]" | tee "$out/judged.jsonl"
# settings are chosen on the validation split under the four extra corruptions
held_out="data=toytown_c data.split=validation data.corruptions=[speckle_noise,gaussian_blur,spatter,saturate] data.limit=40"
$run evaluate data=toytown model/discriminative=toytown ${models% *} logging.root=$out experiment.name=clean >"$out/clean.log"
$run adapt $toytown $held_out tta.forward_mode=discriminative_only experiment.name=source >"$out/source.log"
$run adapt --multirun $toytown $held_out experiment.name=sweep \
  tta.optimizer.lr_discriminative=0.00001,0.00003,0.0001,0.0003 tta.optimizer.lr_generative=0.00001,0.0001 >"$out/sweep.log"
grep -h -e "^protocol" -e "mIoU %:" "$out"/clean.log "$out"/source.log "$out"/sweep.log
