#!/usr/bin/env bash
# CamVid-C from nothing: segmenters and teachers trained on `training`, settings chosen on `validation` under the four
# extra corruptions, then source and adapted over the 15 corruptions, severity 5, on `test`, and the tables.
# Usage: CAMVID=... TAESD3=... benchmarks/camvid.sh OUTPUT_FOLDER train|search|run|tables|all
# Environment: LIMIT (images a task), SEARCH (the same, of the search), SEEDS, PER_GPU, WORKERS, OPTIONS; see stages.sh
set -euo pipefail
world=camvid
segmenter="experiment=camvid_segmenter data.data_root=$CAMVID"
wide=""
teacher="experiment=camvid_teacher data.data_root=$CAMVID model.generative.autoencoder=$TAESD3"
narrow=""
clean="data=camvid data.data_root=$CAMVID model/discriminative=local"
# not experiment=camvid_c, which may hold the outcome of this search
adapt="data=camvid_c data.data_root=$CAMVID model/discriminative=local model/generative=local
model.generative.window_px=352 model.generative.stride_px=176 model.generative.max_pairs=32"
adapt=${adapt//$'\n'/ }
LIMIT=${LIMIT:-233} # the test split
source "$(dirname "$0")/stages.sh" "$@"
