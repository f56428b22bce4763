#!/usr/bin/env bash
# Stage 2 of CM-IBQ on several GPUs: torchrun starts a process on each, and all hold the whole model.
# Usage: bash pipelines/cmibq_stage2_multi_gpu.sh [--smoke] RUN ... [OPTIONS OF mico finetune]
#   GPUS="0 1 2 3" bash pipelines/cmibq_stage2_multi_gpu.sh results/cmibq_stage1_multi_gpu/llava-1.5-7b-stage1-seed0 \
#     --train-file llava_instruct.json --image-folder coco
#   RUN is a folder that stage 1 left; --smoke without one makes it first. One training takes all GPUs of GPUS,
#   CUDA_VISIBLE_DEVICES or the machine; two processes on the CPU without any. 7B: 57 GB a GPU.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
extras="train"
together
begin "" tiny-llava "$@"
if [ ${#models[@]} -eq 0 ]; then die "name a folder that stage 1 left: bash $0 --help"; fi
cmibq_options
if [ "${models[*]}" = tiny-llava ]; then
    two_stages
    finish
fi
for run in "${models[@]}"; do
    for seed in $seeds; do
        cmibq_arm "$(label "$run")-stage2-seed$seed" "$run" 2 "${second[@]}" --seed "$seed"
    done
done
finish
