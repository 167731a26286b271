#!/usr/bin/env bash
# "One step at full size" on all visible GPUs: against the public implementations' form, one card against several,
# cards held to 24 GiB, and the cost of an image against classes, windows and cards. About 15 minutes on two H200.
# Usage: benchmarks/full_size.sh OUTPUT_FOLDER [further options of step.py and curve.py, such as --tiny --device cpu]
set -uo pipefail
out=$1 && shift
here=$(dirname "$0")
mkdir -p "$out"
gpus=$(python3 -c "import torch; print(torch.cuda.device_count() or 2)") # a CPU imitates two
several=""
for count in $(seq 2 2 "$gpus"); do several+=",dispatch-$count,replicate-$count"; done

# name, script, options: one JSON and one log each; a row that does not fit is null, and the next one follows
measure() {
  name=$1 script=$2 && shift 2
  echo "$name: $*"
  python3 "$here/$script.py" "$@" >"$out/$name.json" 2>"$out/$name.log" || tail -n 3 "$out/$name.log"
}

measure public step --rows windows,classes,segadapt --compile "$@"
measure cards step --rows "segadapt$several" --compile --images 8 "$@"
for parts in 4 6; do
  for stages in 1 2 3; do
    measure "split-$parts-$stages" step --rows dispatch-2 --parts $parts --virtual-stages $stages --compile "$@"
  done
done
measure fp32 step --rows "windows,segadapt$several" --precision fp32 --classes 4 --images 2 "$@"
measure small-lora step --rows segadapt --gib 24 --checkpointing --lora 8 --images 2 "$@"
measure small-split step --rows dispatch-2 --gib 24 --checkpointing --images 2 --warmup 1 "$@"
measure curve curve --rows "segadapt$several" --compile --images 3 --plot "$out/cost.svg" "$@"
