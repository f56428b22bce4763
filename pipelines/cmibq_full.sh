#!/usr/bin/env bash
# CM-IBQ against fixed widths: stage 1, stage 2, and the arms uniform and knapsack, asked the suites and compared.
# Usage: bash pipelines/cmibq_full.sh [--smoke] [MODEL ...] --train-file FILE --image-folder DIR --vlm-data DIR
#        [--suite NAME,NAME] [OPTIONS OF mico finetune, for both stages]
#   SEEDS="0 1 2" bash pipelines/cmibq_full.sh --train-file llava_instruct.json --image-folder coco --vlm-data suites
#   STAGE1="--target-bits-act 4 --target-bits-weight 3" STAGE2="--lora-rank 8" are options of one stage alone; those of
#   STAGE1 hold for uniform and knapsack too. MODEL is llava-1.5-7b, the suites are mme,pope; without --vlm-data none.
#   Stage 1 keeps 16.8 bytes a parameter (7B: 119 GB), stage 2 two models (7B: 48 GB): one GPU of 141 GB. On
#   smaller ones GPUS="0,1,2,3" --deepspeed pipelines/deepspeed/zero2.json lets several train together.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
extras="train"
begin llava-1.5-7b tiny-llava "$@"
take --vlm-data --suite
refuse_own --bits-allocation
cmibq_options
ask=(--suite "mme,pope" "${taken[@]}")
if [ -n "$smoke" ]; then ask=(--suite grids --limit 24 --offline "${taken[@]}"); fi
two_stages
for model in "${models[@]}"; do
    for seed in $seeds; do
        for name in uniform knapsack; do
            cmibq_arm "$(label "$model")-$name-seed$seed" "$model" 1 "${first[@]}" --bits-allocation "$name" --seed "$seed"
        done
    done
done
trained=("${folders[@]}")
for model in "${models[@]}" "${trained[@]}"; do
    if [ -z "$smoke" ] && [[ " ${taken[*]}" != *" --vlm-data"* ]]; then break; fi
    name=$(label "$model")-suites
    folders+=("$results/$name")
    after=$(label "$model") queue "$name" eval "$model" "${ask[@]}" --output-path "$results/$name"
done
finish
