#!/usr/bin/env bash
# Both stages of CM-IBQ on several machines: the same command on each, with its own NODE_RANK.
# Usage: NODE_RANK=R NNODES=N MASTER_ADDR=HOST bash pipelines/cmibq_multi_node.sh [--smoke] [MODEL ...]
#        [OPTIONS OF mico finetune, for both stages]
#   NODE_RANK=0 NNODES=2 MASTER_ADDR=10.0.0.1 GPUS="0 1 2 3" bash pipelines/cmibq_multi_node.sh \
#     --train-file llava_instruct.json --image-folder coco --deepspeed pipelines/deepspeed/zero2.json
#   NODE_RANK counts from 0, which is at MASTER_ADDR; MASTER_PORT (29500) and those behind it, one a training, are free
#   there; GPUS as in cmibq_stage1_multi_gpu.sh, as many on every machine. RESULTS, code and data lie where all machines
#   see them, under one path. --smoke without NODE_RANK is two machines here, of two processes on the CPU each.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
extras="train"
together
begin llava-1.5-7b tiny-llava "$@"
address=${MASTER_ADDR:-} rank=${NODE_RANK:-} count=${NNODES:-2} port=${MASTER_PORT:-29500}
if [ -n "$smoke" ]; then address=${address:-127.0.0.1}; fi
if [ -n "$smoke" ] && [ -z "$rank" ]; then
    NODE_RANK=1 NNODES=2 MASTER_ADDR=$address MASTER_PORT=$port RESULTS=$results bash "$0" "$@" &
    workers=($!) rank=0 count=2
fi
case $rank,$count,$port in
    *[!0-9,]* | ,* | *,, | *,)
        die "NODE_RANK=$rank NNODES=$count MASTER_PORT=$port: give numbers, NODE_RANK from 0 on each machine"
        ;;
esac
if [ -z "$address" ]; then die "MASTER_ADDR: name the machine of NODE_RANK=0"; fi
if [ "$rank" -ge "$count" ]; then die "NODE_RANK=$rank: must be below NNODES=$count"; fi
node=$rank
torchrun=(--nnodes "$count" --node-rank "$rank" --master-addr "$address" --rdzv-conf timeout=86400)
cmibq_options
two_stages
finish
