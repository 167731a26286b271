#!/usr/bin/env bash
# ToyTown-C from nothing: segmenters and teachers trained, settings chosen on `validation` under the four extra
# corruptions, then source and adapted over the 15 corruptions, severity 5, on `test`, and the tables.
# Usage: benchmarks/toytown.sh OUTPUT_FOLDER train|search|run|tables|all
# Environment: LIMIT (images a task), SEARCH (the same, of the search), SEEDS, PER_GPU, WORKERS, OPTIONS; see stages.sh
set -euo pipefail
world=toytown
segmenter="train.save_dtype=bfloat16"
wide="data.weather=all data.count=6000" # the control sees what the broad teacher sees
teacher="train.save_dtype=bfloat16"
narrow="data.weather=clear data.count=4000" # exactly the segmenter's images
clean="data=toytown model/discriminative=toytown"
# not experiment=toytown_c, which holds the outcome of this search
adapt="data=toytown_c model/discriminative=toytown model/generative=toytown"
LIMIT=${LIMIT:-100}
LR_DISCRIMINATIVE=${LR_DISCRIMINATIVE:-1e-5 1e-4 2e-4}
known="model.loss.temperature=0.1 model.trust.max_agreement=0.7"
OPTIONS=${OPTIONS-"$known
$known model.trust.restore=0.1
$known model.trust.restore=0.1 tta.optimizer.warmup=10
$known model.trust.restore=0.1 tta.optimizer.warmup=20
$known model.trust.restore=0.2 tta.optimizer.warmup=10"}
source "$(dirname "$0")/stages.sh" "$@"
