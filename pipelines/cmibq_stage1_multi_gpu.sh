#!/usr/bin/env bash
# Stage 1 of CM-IBQ on several GPUs: torchrun starts a process on each, and all hold the whole model.
# Usage: bash pipelines/cmibq_stage1_multi_gpu.sh [--smoke] [MODEL ...] [OPTIONS OF mico finetune]
#   GPUS="0 1 2 3" bash pipelines/cmibq_stage1_multi_gpu.sh --train-file llava_instruct.json --image-folder coco \
#     --target-bits-act 4 --target-bits-weight 3
#   One training takes all GPUs of GPUS, CUDA_VISIBLE_DEVICES or the machine; two processes on the CPU without any.
#   MODEL is llava-1.5-7b, which keeps 119 GB a GPU: on smaller ones see cmibq_deepspeed.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
extras="train"
together
begin llava-1.5-7b tiny-llava "$@"
cmibq_options
for model in "${models[@]}"; do
    for seed in $seeds; do
        cmibq_arm "$(label "$model")-stage1-seed$seed" "$model" 1 "${first[@]}" --seed "$seed"
    done
done
finish
