# shellcheck shell=bash
# Read by toytown.sh and camvid.sh, which set: world, segmenter, wide, teacher, narrow, clean and adapt (overrides),
# LIMIT, and may set what has a default below. Every finished job is skipped; a job whose settings have changed is
# refused until its folder is removed.

shopt -s inherit_errexit
here=$(dirname "$0") out=$1 stage=${2:-all}
mkdir -p "$out"
: "${LR_DISCRIMINATIVE:=1e-5 3e-5 6e-5 1e-4}" "${LR_GENERATIVE:=1e-5}"
# beside the defaults, which are always searched: one bundle of overrides a line
OPTIONS=${OPTIONS-"model.loss.temperature=0.1 model.trust.max_agreement=0.7
model.loss.temperature=0.1 model.trust.max_agreement=0.7 model.trust.restore=0.05
model.loss.temperature=0.1 model.trust.max_agreement=0.7 model.trust.restore=0.1
model.loss.temperature=0.1 model.trust.max_agreement=0.8 model.trust.restore=0.2"}
: "${MOST_LOSS:=0.2}"                      # points of mIoU that a chosen candidate may lose on a task of validation
: "${SEEDS:=0 1 2}"                        # of stream, noise and corruption
: "${SEARCH:=$LIMIT}" "${DIAGNOSE:=20}"    # images a task
: "${PER_GPU:=4}" "${WORKERS:=2}"          # processes a GPU, and of each for reading
: "${CHOSEN_BROAD:=}" "${CHOSEN_NARROW:=}" "${CHOSEN_PLAIN:=}" # overrides found by an earlier search: run takes these
: "${ONLY:=.}"                             # regular expression of the jobs to run, to share them out by hand
: "${EXTRA_SEGMENTER:=}" "${EXTRA_TEACHER:=}" "${EXTRA:=}"  # more overrides: segmenters, teachers, all the rest
source_only="tta.forward_mode=discriminative_only"
held_out="data.split=validation data.corruptions=[speckle_noise,gaussian_blur,spatter,saturate] data.limit=$SEARCH"
severities="5 3 1" # the milder ones show harm where the segmenter is right

# job VERB NAME ID OVERRIDES...: one line for sweep.py
job() { echo "$1 logging.root=$out experiment.name=$world-$2 experiment.id=$3 ${*:4}"; }

sweep() {
  { grep -E "$ONLY" || true; } |
    python3 "$here"/sweep.py - --logs "$out/logs" --jobs-per-gpu "$PER_GPU" --common "data.workers=$WORKERS"
}

# models SEGMENTER TEACHER: folders below $out
models() {
  echo "model.discriminative.checkpoint=$out/$world-$1/model model.generative.checkpoint=$out/$world-$2/model"
}

# The second training seed (1) serves the main row; narrow teacher and control segmenter have one.
train_jobs() {
  for seed in 0 1; do
    job train-generative teacher-broad s$seed "$teacher" train/broad=wide experiment.seed=$seed "$EXTRA_TEACHER"
  done
  job train-generative teacher-narrow s0 "$teacher" train/broad=none "$narrow" "$EXTRA_TEACHER"
  for seed in 0 1; do
    job train segmenter s$seed "$segmenter" experiment.seed=$seed "$EXTRA_SEGMENTER"
  done
  job train segmenter-wide s0 "$segmenter" train/transforms/broad=wide "$wide" "$EXTRA_SEGMENTER"
}

# grid KIND: one point a line, an id, then its overrides. KIND is a teacher, or plain: the broad one, default options.
grid() {
  local bundles=""
  if [ "$1" != plain ]; then bundles=$'\n'$OPTIONS; fi
  while IFS= read -r options; do
    for discriminative in $LR_DISCRIMINATIVE; do
      for generative in $LR_GENERATIVE; do
        point="tta.optimizer.lr_discriminative=$discriminative tta.optimizer.lr_generative=$generative $options"
        echo "$discriminative-$generative-$(sha1sum <<<"$options" | cut -c1-6) $point"
      done
    done
  done <<<"$bundles" | sort -u
}

search_jobs() {
  for severity in $severities; do
    held="$adapt $held_out data.severity=$severity"
    job adapt search-source s0-$severity "$held" $source_only "$(models segmenter/s0 teacher-broad/s0)" "$EXTRA"
    for kind in broad narrow; do
      grid $kind | while read -r id point; do
        job adapt search-$kind "$id-$severity" "$held" "$point" "$(models segmenter/s0 teacher-$kind/s0)" "$EXTRA"
      done
    done
  done
}

# joined FOLDER: its runs of all severities, with commas between
joined() { for severity in $severities; do echo "$1-$severity"; done | paste -sd,; }

# searched KIND [OPTION]: its grid as search.py reads it
searched() {
  { joined "$out/$world-search-source/s0"; grid "$1" | while read -r id _; do joined "$out/$world-search-${1/plain/broad}/$id"; done; } |
    xargs python3 "$here"/search.py --most-loss "$MOST_LOSS" ${2:+"$2"}
}

# chosen KIND: its overrides
chosen() {
  best=$(searched "$1" --best)
  grid "$1" | while read -r id point; do if [[ $best == *"/$id-"* ]]; then echo "$point"; fi; done
}

run_jobs() {
  test="$adapt data.limit=$LIMIT $EXTRA"
  for seed in $SEEDS; do
    seeded="$test experiment.seed=$seed data.corruption_seed=$seed"
    job adapt source s$seed "$seeded" $source_only "$(models segmenter/s0 teacher-broad/s0)"
    job adapt broad s$seed "$seeded" "$chosen_broad" "$(models segmenter/s0 teacher-broad/s0)"
    job adapt narrow s$seed "$seeded" "$chosen_narrow" "$(models segmenter/s0 teacher-narrow/s0)"
    job adapt source-second s$seed "$seeded" $source_only "$(models segmenter/s1 teacher-broad/s1)"
    job adapt broad-second s$seed "$seeded" "$chosen_broad" "$(models segmenter/s1 teacher-broad/s1)"
  done
  # on the test split and with labels, so only now that the settings are fixed
  for kind in broad narrow; do
    chosen_of_kind=chosen_$kind
    job diagnose diagnose $kind "$adapt" data.limit="$DIAGNOSE" "${!chosen_of_kind}" \
      "$(models segmenter/s0 teacher-$kind/s0)" "$EXTRA"
  done
  for trained in segmenter/s0 segmenter/s1 segmenter-wide/s0; do
    job evaluate clean "${trained/\//-}" "$clean" "model.discriminative.checkpoint=$out/$world-$trained/model" "$EXTRA"
  done
  for seed in $SEEDS; do
    seeded="$test experiment.seed=$seed data.corruption_seed=$seed"
    job adapt source-wide s$seed "$seeded" $source_only "$(models segmenter-wide/s0 teacher-broad/s0)"
    job adapt plain s$seed "$seeded" "$chosen_plain" "$(models segmenter/s0 teacher-broad/s0)"
    job adapt shuffled s$seed "$seeded" "$chosen_broad" model.generative.shuffle_classes=true \
      "$(models segmenter/s0 teacher-broad/s0)"
  done
}

tables() {
  of="$out/$world"
  if [ -d "$of-search-source" ]; then # not where CHOSEN_... were given
    for kind in broad narrow; do
      echo "Search on validation, $kind teacher, the chosen one after the source:"
      searched $kind
    done
  fi
  echo "Test:"
  python3 "$here"/results.py --source "source=$of-source/s*" --source "source, second training seed=$of-source-second/s*" \
    --row "adapted, broad teacher=$of-broad/s*" --row "adapted, broad, second training seed=$of-broad-second/s*" \
    --row "adapted, broad, both training seeds=$of-broad*/s*" --row "adapted, narrow teacher=$of-narrow/s*" \
    --row "adapted, broad, default options=$of-plain/s*" \
    --row "adapted, broad, classes shuffled=$of-shuffled/s*" \
    --control "source, segmenter trained with the broad operations=$of-source-wide/s*" \
    --diagnosis "broad teacher=$of-diagnose/broad/diagnosis.json" \
    --diagnosis "narrow teacher=$of-diagnose/narrow/diagnosis.json" --json "$of-results.json"
}

has() { [[ $stage == "$1" || $stage == all ]]; }
case $stage in train | search | run | tables | all) ;; *) echo "$stage: train, search, run, tables or all" >&2; exit 2 ;; esac
if has train; then train_jobs | sweep; fi
if has search; then search_jobs | sweep; fi
if has run; then
  chosen_broad=${CHOSEN_BROAD:-$(chosen broad)}
  chosen_narrow=${CHOSEN_NARROW:-$(chosen narrow)}
  chosen_plain=${CHOSEN_PLAIN:-$(chosen plain)}
  none="the best run is none of this grid"
  : "${chosen_broad:?$none}" "${chosen_narrow:?$none}" "${chosen_plain:?$none}"
  printf 'chosen, %s\n' "broad teacher: $chosen_broad" "narrow teacher: $chosen_narrow" \
    "broad teacher, default options: $chosen_plain" | tee "$out/$world-chosen.txt"
  run_jobs | sweep
fi
if has tables; then tables | tee "$out/$world-tables.md"; fi
