#!/usr/bin/env bash
# First run with real weights: look at the files, clean mIoU of 50 images, ask the teacher, then adapt and compare.
# Each step stops the script if it fails; the same call goes on. docs/first-run.md says what to expect.
set -euo pipefail

ADE20K=${ADE20K:-/data/ade20k}          # images/validation/*.jpg, annotations/validation/*.png
ADE20K_C=${ADE20K_C:-/data/ade20k_c}    # ADE20K_val-c/{corruption}/5/validation/*.jpg, annotations/validation/*.png
SEGFORMER=${SEGFORMER:-weights/segformer-b5-finetuned-ade-640-640}
SD3=${SD3:-weights/stable-diffusion-3-medium-diffusers}
OUT=${OUT:-outputs}
CORRUPTIONS=${CORRUPTIONS:-[gaussian_noise,fog]}
IMAGES=${IMAGES:-50}
ASKED=${ASKED:-20}                      # images of step 3, each 150 classes x windows x noise levels through SD3
SIGMAS=${SIGMAS:-[0.1,0.25,0.5,0.75]}   # its noise levels
LEAST_MIOU=${LEAST_MIOU:-0.4}           # SegFormer-B5 has about 0.5 on all 2,000 clean images

segmenter=("model.discriminative.checkpoint=$SEGFORMER" "logging.root=$OUT")
both=("${segmenter[@]}" "model.generative.checkpoint=$SD3")
shifted=("data.data_root=$ADE20K_C" "data.corruptions=$CORRUPTIONS" "data.limit=$IMAGES" experiment.name=first-run)

# 1. The files: every image is read, both models are loaded and take a step, pictures show labels and windows.
segadapt check "${both[@]}" "${shifted[@]}" check.samples=2 check.load_models=true

# 2. The segmenter on clean images. Far below the published score: wrong checkpoint, classes or label ids.
segadapt evaluate "${segmenter[@]}" "data.data_root=$ADE20K" "data.limit=$IMAGES" \
  experiment.name=first-run-clean experiment.id=clean
python - "$OUT/first-run-clean/clean/results.json" "$LEAST_MIOU" <<'PYTHON'
import json, sys

miou = json.load(open(sys.argv[1]))["mean"]["miou"]
if miou < float(sys.argv[2]):
    sys.exit(f"clean mIoU {100 * miou:.1f} %: expected {100 * float(sys.argv[2]):.0f} or more. Look at the pictures of step 1.")
PYTHON

# 3. Can this teacher teach? Under corruptions that the test does not hold, since it reads labels.
segadapt diagnose "${both[@]}" data=ade20k "data.data_root=$ADE20K" "data.limit=$ASKED" \
  "diagnose.sigmas=$SIGMAS" 'data.corruptions=[speckle_noise,gaussian_blur]' experiment.name=first-run-asked

# 4. The source row and the adapted row over the same images, and their table.
segadapt adapt "${both[@]}" "${shifted[@]}" tta.forward_mode=discriminative_only
segadapt adapt "${both[@]}" "${shifted[@]}" logging.predictions=sample
segadapt results "$OUT/first-run"
