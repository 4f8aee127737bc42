#!/usr/bin/env bash
# Evaluate formats, rivals and plans on three models, as decision 0017 reports them: one `homkv eval` after the other per
# model, models side by side (45 GB of GPU memory, no timing). Records are appended one by one, so the script may be cut
# anywhere and started again. The first lines are the decision's tables; the last were not measured yet.
#
#   benchmarks/eval_models.sh                                    # all, on a GPU
#   MODELS=smollm2 DEVICE=cpu OUT=runs/eval benchmarks/eval_models.sh
#   MODEL_DIR=folder                                             # takes folder/NAME.gguf instead of installed packages
set -eu
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/eval}; DEVICE=${DEVICE:-cuda}; PYTHON=${PYTHON:-python3}
MODELS=${MODELS:-smollm2 qwen2.5-coder-0.5b qwen2.5-coder-1.5b}
export OMP_NUM_THREADS=2 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
mkdir -p "$OUT"

formats() { printf -- '--kv-cache-dtype %s ' "$@"; }
measure() {  # MODEL NAME OPTIONS...
    local model=$1 name=$2; shift 2
    "$PYTHON" -m homkv.cli eval --model "${MODEL_DIR:+$MODEL_DIR/}$model${MODEL_DIR:+.gguf}" --device "$DEVICE" --impl reference \
        --no-speed --num-threads 2 --json "$OUT/$model-$name.jsonl" "$@" >> "$OUT/$model-$name.txt" 2>&1 \
        || echo "$model $name failed: see $OUT/$model-$name.txt"
}

evaluate() {
    local model=$1
    local plans=(benchmarks/plans/"$model"-2.25.json benchmarks/plans/"$model"-2.6.json)
    local ours; ours=$(formats near-lossless quality balanced-long balanced small-long small "${plans[@]}")
    local rivals; rivals=$(formats fp8 turbo decoquant kvquant:bits=3 kvquant cachegen cachegen:as=published)
    local serial; serial=$(formats kivi:bits=4 kivi hack-2026 hack)  # token by token: slow
    measure "$model" text --task text --texts 6 --prefix 1792 --scored 384 $ours $rivals
    measure "$model" find --task passkey --task copy --passkeys 8 --passkey-length 1900 --copies 2 --prefix 1792 $ours $rivals $serial
    measure "$model" greedy --task greedy --greedy 16 --greedy-tokens 128 --prefix 1792 $ours
    measure "$model" long --task text --texts 3 --prefix 6016 --scored 256 $ours $(formats fp8 kvquant:bits=3)
    [[ $model == smollm2 ]] || measure "$model" long --task text --texts 3 --prefix 16000 --scored 256 $ours $(formats fp8)
    measure "$model" code --task code --problems 16 --code-tokens 96 $ours $(formats fp8)
    measure "$model" serial --task text --texts 3 --prefix 1792 --scored 384 $serial
    measure "$model" drift --task text --texts 3 --prefix 1024 --scored 1024 $ours $(formats fp8 kvquant:bits=3)
    measure "$model" prefill --prefill quantized --task text --texts 3 --prefix 1792 --scored 256 $ours
}

for model in $MODELS; do evaluate "$model" & done
wait
