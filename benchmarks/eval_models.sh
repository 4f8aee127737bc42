#!/usr/bin/env bash
# Evaluate formats, rivals and plans on three models, as decision 0017 reports them. Parts of a model run one after the
# other, models side by side. Records are appended one by one, so the script may be cut anywhere and started again.
#
#   benchmarks/eval_models.sh                                          # all, on a GPU of 45 GB
#   benchmarks/eval_models.sh "smollm2 text find" "smollm2 greedy"     # some parts, in two processes
#   DEVICE=cpu OUT=runs/eval benchmarks/eval_models.sh "smollm2 text"
#   MODEL_DIR=folder                                                   # takes folder/NAME.gguf, not installed packages
#   SHORT=1                                                            # one text, few tokens: does every line work?
set -eu
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/eval}; DEVICE=${DEVICE:-cuda}; SHORT=${SHORT:-}; BASES=runs/bases
PYTHON=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
IMPL=$([[ $DEVICE == cpu ]] || echo "--impl reference")  # on a GPU: the stored codes, pages from the CPU; compiles nothing
PARTS="text find greedy search 6k drift prefill gate code serial keys6k basis hack"
export OMP_NUM_THREADS=2 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
mkdir -p "$OUT"

formats() { printf -- '--kv-cache-dtype %s ' "$@"; }
logged() {  # NAME COMMAND...
    local name=$1 start=$SECONDS; shift
    "$@" >> "$OUT/$name.txt" 2>&1 || echo "$(date +%T) $name failed: see $OUT/$name.txt"
    echo "$(date +%T) $name: $((SECONDS - start)) s"
}
measure() {  # NAME OPTIONS...
    local name=$1; shift
    logged "$model-$name" "$PYTHON" -m homkv.cli eval --model "$source" --device "$DEVICE" $IMPL --no-speed \
        --num-threads 2 --json "$OUT/$model-$name.jsonl" "$@" ${SHORT:+--texts 1 --prefix 700 --scored 24} \
        ${SHORT:+--passkeys 1 --passkey-length 700 --copies 1 --greedy 1 --greedy-tokens 8 --problems 1 --code-tokens 8}
}

known() {  # NAME PATTERN: stored cases that match begin the part's record: they are not measured again
    local record=$OUT/$model-$1.jsonl
    [[ -e $record ]] || grep -hE "$2" "benchmarks/results/eval-$model-h"[12]00.jsonl > "$record" || true
}

evaluate() {  # MODEL PART
    local model=$1 source=${MODEL_DIR:+$MODEL_DIR/}$1${MODEL_DIR:+.gguf}
    local plans=(benchmarks/plans/"$model"-2.6.json benchmarks/plans/"$model"-2.25.json)
    local ours; ours=$(formats near-lossless quality balanced-long balanced small-long small "${plans[@]}")
    local few; few=$(formats near-lossless balanced-long balanced "${plans[@]}")
    local rivals; rivals=$(formats bf16 fp8 turbo decoquant kvquant:bits=3 kvquant cachegen cachegen:as=published)
    local serial; serial=$(formats kivi:bits=4 kivi hack-2026 hack)  # token by token: slow
    case $2 in
    text) measure text --batch 6 --task text --texts 6 --prefix 1792 --scored 384 $ours $rivals ;;
    find) measure find --batch 8 --task passkey --task copy --passkeys 8 --passkey-length 1900 --copies 2 --prefix 1792 \
        $ours $rivals $serial ;;
    greedy)
        known greedy '"task":"greedy"'
        measure greedy --batch 12 --task greedy --greedy 32 --greedy-tokens 128 --prefix 1792 \
            $(formats near-lossless balanced-long "${plans[0]}") ;;
    search)
        logged "$model-search" "$PYTHON" benchmarks/format_search.py "$source" k4420v2222 k4420v4222 \
            k4420v4222,vo={1,2} k4420v4220 k4420v4220,vo={1,2} k4420v2222,c8={1,4} k4420v4222,w=192 \
            k4420v4222,w=192,vo={1,2} k4420v4220,w=192,vo={1,2} k4420v2222,w=192 k4220v4220,vo={1,2} k4220v2222 \
            k4220v2222,c8={1,4} k8420v4222 k8420v4222,vo={1,2} --device "$DEVICE" --threads 2 --texts "${SHORT:-6}" \
            --prefix 1796 --scored 384 ${SHORT:+--prefix 516 --scored 64} --json "$OUT/$model-search.jsonl" ;;
    6k) measure 6k --batch 3 --task text --texts 3 --prefix 6016 --scored 256 $ours $(formats fp8 kvquant:bits=3) ;;
    16k) measure 16k --batch 3 --task text --texts 3 --prefix 16000 --scored 256 $few ;;
    32k) measure 32k --task text --texts 3 --prefix 32000 --scored 256 $few ;;
    keys6k) measure keys6k --batch 8 --task passkey --no-bf16 --passkeys 8 --passkey-length 6000 $ours $(formats fp8) ;;
    keys16k) measure keys16k --batch 4 --task passkey --no-bf16 --passkeys 8 --passkey-length 16000 $few ;;
    drift) measure drift --batch 3 --task text --texts 3 --prefix 1024 --scored 1024 $few ;;
    prefill) measure prefill --batch 3 --prefill quantized --no-bf16 --task text --texts 3 --prefix 1792 --scored 256 $few ;;
    gate) logged "$model-gate" "$PYTHON" -m homkv.cli eval --device "$DEVICE" $IMPL --num-threads 2 --batch 6 --gate \
        "benchmarks/gates/$model$([[ $model != smollm2 || $SHORT ]] || echo -full).json" ;;
    code)
        known code '"task":"code"'
        measure code --task code --no-bf16 --problems 16 --code-tokens 96 --run-code $few ;;
    serial)
        known serial '"format":"(exact|kivi|hack).*"task":"text".*"prefix":1792'
        measure serial --batch 6 --task text --no-bf16 --texts 6 --prefix 1792 --scored 384 $serial ;;
    basis)
        logged "$model-basis" "$PYTHON" -m homkv.cli basis --model "$source" --num-threads 4 --out "$BASES/$model.safetensors" \
            ${SHORT:+--texts 1 --tokens 128}
        measure basis --batch 6 --task text --no-bf16 --texts 6 --prefix 1792 --scored 384 \
            $(formats bf16 "basis:file=$BASES/$model.safetensors") ;;
    hack) measure hack --batch 6 --task text --no-bf16 --texts 6 --prefix 1792 --scored 384 \
        $(formats hack:rounding=nearest hack:pi=32 hack:pi=128 hack:rqe=0 hack-2026:pi=128) ;;
    *) echo "expected parts out of $PARTS 16k keys16k 32k, found $2"; return 1 ;;
    esac
}

lane() {  # "MODEL PART..."
    local words; read -ra words <<< "$1"
    for part in "${words[@]:1}"; do evaluate "${words[0]}" "$part"; done
}

(($#)) || set -- "smollm2 $PARTS" "qwen2.5-coder-0.5b $PARTS 16k keys16k 32k" "qwen2.5-coder-1.5b $PARTS 16k keys16k"
for words in "$@"; do lane "$words" & done
wait
