#!/usr/bin/env bash
# CM-IBQ on one device in minutes: stage 1 learns widths in a few steps, stage 2 goes on from it.
# Usage: bash pipelines/cmibq_quick_test.sh [--smoke] [MODEL ...] [OPTIONS OF mico finetune, for both stages]
#   bash pipelines/cmibq_quick_test.sh llava-1.5-7b --train-file llava_instruct.json --image-folder coco --max-steps 20
#   STAGE1="--target-bits-act 4 --target-bits-weight 3" STAGE2="--lora-rank 8" are options of one stage alone.
#   MODEL is tiny-llava, 100 steps a stage on pictures of digits.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
extras="train"
begin tiny-llava tiny-llava "$@"
cmibq_options
if [ -z "$smoke" ]; then train+=(--max-steps 100); fi
two_stages
finish
