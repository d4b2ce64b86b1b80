#!/usr/bin/env bash
# What one GPU would show, and has not yet: precision, speed and memory; then the study on real text
# with a T5 ten times as large; some 12 minutes. Every line is in $OUT/gpu.txt once it is measured,
# so that a run that is cut off has what came before. The last of the steps needs peft.
#
#   bash figures/gpu.sh precision steps
#   INPUTS=real bash figures/gpu.sh t5 study    # INPUTS has what offline/README.md's first commands make:
#                                               # the three corpora, tasks/ and pseudo/
#   DEVICE=cpu SHAPES="tiny tiny" bash figures/gpu.sh precision steps           # to try it

set -u
here=$(cd "$(dirname "$0")/.." && pwd)
OUT=${OUT:-gpu} INPUTS=${INPUTS:-.} DEVICE=${DEVICE:-cuda}
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
    speed 60 --shape "$base" $sst --compare loop --tasks-per-pass 1 4 10 --matmul high
    speed 60 --shape "$base" $sst --compare loop --tasks-per-pass 1 4 10 --dtype bfloat16
    speed 60 --shape "$large" $sst --compare --tasks-per-pass 4 --matmul high
    speed 60 --shape "$base" --sst --rounds 3 --only downstream --texts 1000
}

# 3. A T5 of 31 million parameters, as deep as the study's and ten times its size.
t5() {
    within 300 python "$here/offline/small_t5.py" --corpus imdb-unlabelled.txt* amazon-unlabelled.jsonl* \
        --task tasks/stars tasks/amazon-two tasks/snippets --out "$OUT/t5" --device "$DEVICE" --excerpts 0 ${T5:-\
        --d-model 704 --d-ff 2816 --heads 11 --max-steps 1000 --eval-every 100 --batch-size 64 --labelled 128}
}

# 4. Three trainings of three prompts at once, the inner step at each, then five tasks of three draws.
study() {
    local run="--model $OUT/t5 --max-length 64 --device $DEVICE --matmul high" seed task
    for seed in 1 2 3; do
        local train="python $here/train_meta.py --source pseudo/kmeans10.jsonl $run --validation 600 --seed $seed"
        local long="--max-steps ${STEPS:-500} --eval-every 100 --patience 15 --learning-rate 0.008 --tasks-per-pass 10"
        within 200 $train $long --out "$OUT/prompts/maml-$seed" &
        within 200 $train $long --out "$OUT/prompts/plain-$seed" --alpha 0 &
        within 200 $train --method ppt --max-steps 3000 --eval-every 500 --out "$OUT/prompts/ppt-$seed" &
    done
    wait
    for seed in 1 2 3; do
        within 60 python "$here/offline/inner_step.py" --source pseudo/kmeans10.jsonl $run \
            --validation 600 --seed $seed --prompt random "$OUT"/prompts/{maml,plain,ppt}-$seed &
        for task in sst5 sst2 sentihood semeval_restaurant amazon5; do
            {
                local tune="python $here/finetune.py --task tasks/$task $run --max-test 1000 --seeds $seed --shots 40 0"
                within 150 $tune --prompt random "$OUT"/prompts/{maml,plain,ppt}-[123] --out "$OUT/results.jsonl"
                within 60 $tune --method ft --learning-rate 3e-4 --out "$OUT/results.jsonl"
            } &
        done
    done
    wait
    within 20 python "$here/figures/report.py" "$OUT/results.jsonl"
}

{
    cd "$INPUTS" || exit
    for part in ${@:-precision steps t5 study}; do $part; done
    printf '\n%s has all of it, made in %s seconds\n' "$OUT/gpu.txt" $SECONDS
} 2>&1 | tee "$OUT/gpu.txt"
