#!/usr/bin/env bash
# Both stages of CM-IBQ, followed in TensorBoard and in Weights & Biases: loss, widths, information rate, alignment.
# Usage: WANDB_PROJECT=NAME bash pipelines/cmibq_wandb.sh [--smoke] [MODEL ...]
#        [OPTIONS OF mico finetune, for both stages]
#   WANDB_PROJECT=cmibq bash pipelines/cmibq_wandb.sh --train-file llava_instruct.json --image-folder coco
#   The variables are those of W&B: WANDB_ENTITY, WANDB_MODE=offline (which --smoke takes; `wandb sync` uploads later),
#   WANDB_DIR (RESULTS). MODEL is llava-1.5-7b. Every script of CM-IBQ takes --report-to tensorboard,wandb.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
extras="train,track"
begin llava-1.5-7b tiny-llava "$@"
refuse_own --report-to
export WANDB_DIR=${WANDB_DIR:-$results}
if [ -n "$smoke" ]; then export WANDB_MODE=${WANDB_MODE:-offline}; fi
options=(--report-to "tensorboard,wandb" "${options[@]}")
cmibq_options
two_stages
finish
