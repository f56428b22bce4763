#!/usr/bin/env bash
# Both stages of CM-IBQ by DeepSpeed, which parts gradients and optimizer states among GPUs (ZeRO-2), or weights too
# (ZeRO-3).
# Usage: bash pipelines/cmibq_deepspeed.sh [--smoke] [MODEL ...] [OPTIONS OF mico finetune, for both stages]
#   GPUS="0 1 2 3" ZERO=3 bash pipelines/cmibq_deepspeed.sh --train-file llava_instruct.json --image-folder coco
#   ZERO: 2 or 3. OFFLOAD=1 keeps optimizer states in the memory of the host, for one GPU of 80 GB. STAGE1, STAGE2 and
#   the GPUs taken: as in cmibq_quick_test.sh, cmibq_stage1_multi_gpu.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
extras="train"
together
begin llava-1.5-7b tiny-llava "$@"
refuse_own --deepspeed
case ${ZERO:-2} in
    2 | 3) config=$root/pipelines/deepspeed/zero${ZERO:-2}${OFFLOAD:+_offload}.json ;;
    *) die "ZERO=$ZERO: give 2 or 3" ;;
esac
if [ -n "$smoke" ] && ! "$python" -c "import deepspeed" 2>/dev/null; then
    note "deepspeed is not installed (pip install deepspeed): nothing to try"
    exit 0
fi
torchrun=(--standalone) # DeepSpeed wants a launcher on one GPU, too
options=(--deepspeed "$config" "${options[@]}")
cmibq_options
two_stages
finish
