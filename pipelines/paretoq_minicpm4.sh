#!/usr/bin/env bash
# Quantization-aware training by ParetoQ at every width: 4, 3, 2, 1.58 and 1 bits, compared in one report.
# Usage: bash pipelines/paretoq_minicpm4.sh [--smoke] [MODEL ...] [OPTIONS OF mico finetune]
#   bash pipelines/paretoq_minicpm4.sh --train-file text.jsonl --kd --bf16 --gradient-checkpointing
#   MODEL is minicpm4-0.5b; W_BITS="4 3 2 1.58 1" are the widths; --smoke takes a few steps on tiny-llama.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
extras="train"
begin minicpm4-0.5b tiny-llama "$@"
refuse_own --save --json --w-bits --seed
train=(--eval "wikitext2,ptb,c4")
if [ -n "$smoke" ]; then
    train=(--max-steps 4 --per-device-train-batch-size 4 --seqlen 64 --eval wikitext2 --data-dir "$results/texts" --offline)
fi
for model in "${models[@]}"; do
    for seed in $seeds; do
        for bits in ${W_BITS:-4 3 2 1.58 1}; do
            name=$(label "$model")-paretoq-$bits-seed$seed
            folders+=("$results/$name")
            queue "$name" finetune "$model" --w-bits "$bits" "${train[@]}" "${options[@]}" --seed "$seed" \
                --save "$results/$name"
        done
    done
done
finish
