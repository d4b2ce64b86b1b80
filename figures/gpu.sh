#!/usr/bin/env bash
# What is to be measured on one GPU, in 12 minutes: precision, speed, memory, and with INPUTS the
# study on real text with a T5 ten times as large. Every line is in $OUT/gpu.txt once it is measured,
# so that a run that is cut off has what came before. peft is optional: pip install peft.
#
#   OUT=gpu INPUTS=real bash figures/gpu.sh     # INPUTS has what offline/README.md's first commands make:
#                                               # the three corpora, tasks/ and pseudo/
#   DEVICE=cpu SHAPES="tiny tiny" bash figures/gpu.sh                           # to try it

set -u
here=$(cd "$(dirname "$0")/.." && pwd)
OUT=${OUT:-gpu} INPUTS=${INPUTS:-} DEVICE=${DEVICE:-cuda}
read -r base large <<< "${SHAPES:-base large}"
small=${base/base/small}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export PYTHONUNBUFFERED=1

# Runs a command for so many seconds at most; Ctrl-C is what our scripts save their work at.
within() {
    local seconds=$1
    shift
    printf '\n$ %s\n' "${*/#$here\//}"
    timeout --signal INT --kill-after 20 "$seconds" "$@"
}

speed() {
    within "$1" python "$here/figures/speed.py" --device "$DEVICE" "${@:2}"
}

# 1. The gradient in each precision against float64 on the CPU.
precision() {
    speed 60 --shape "$small" --sst --only precision
}

# 2. The meta-step, a training step, prompt tuning and an evaluation, at two public shapes.
steps() {
    local sst="--sst --rounds 3 --only step"
    speed 60 --shape "$base" $sst --compare loop --tasks-per-pass 1 4 10
    speed 40 --shape "$base" $sst --compare loop --tasks-per-pass 1 4 10 --matmul high
    speed 40 --shape "$base" $sst --compare loop --tasks-per-pass 1 4 10 --dtype bfloat16
    speed 60 --shape "$large" $sst --compare --tasks-per-pass 4 --matmul high
    speed 40 --shape "$base" --sst --rounds 3 --only downstream --texts 1000
}

# 3. Pre-training, then three trainings of three prompts at once, then five tasks.
study() {
    cd "$INPUTS" || return
    local run="--model $OUT/t5 --max-length 64 --device $DEVICE" seed
    within 300 python "$here/offline/small_t5.py" --corpus imdb-unlabelled.txt* amazon-unlabelled.jsonl* \
        --task tasks/stars tasks/amazon-two tasks/snippets --out "$OUT/t5" --device "$DEVICE" ${T5:-\
        --d-model 512 --d-ff 2048 --heads 8 --layers 6 --decoder-layers 2 --max-steps 2500 --batch-size 64 --labelled 128}
    for seed in 1 2 3; do
        local train="python $here/train_meta.py --source pseudo/kmeans10.jsonl $run --validation 600 --seed $seed"
        local long="--max-steps ${STEPS:-1500} --eval-every 100 --patience 15 --learning-rate 0.008 --tasks-per-pass 10"
        within 160 $train $long --out "$OUT/prompts/maml-$seed" &
        within 160 $train $long --out "$OUT/prompts/plain-$seed" --alpha 0 &
        within 160 $train --method ppt --max-steps 5000 --eval-every 500 --out "$OUT/prompts/ppt-$seed" &
    done
    wait
    for seed in 1 2 3 4 5; do
        within 150 python "$here/finetune.py" --task tasks/{sst5,sst2,sentihood,semeval_restaurant,amazon5} $run \
            --method pt ft --prompt random "$OUT"/prompts/*-[123] --max-test 1000 --seeds $seed --out "$OUT/results.jsonl" &
    done
    wait
    within 20 python "$here/figures/report.py" "$OUT/results.jsonl"
}

{
    precision
    steps
    if [ -n "$INPUTS" ]; then study; fi
    printf '\n%s has all of it, made in %s seconds\n' "$OUT/gpu.txt" $SECONDS
} 2>&1 | tee "$OUT/gpu.txt"
