#!/usr/bin/env bash
# Prefill of a LLaVA under SparseVLM 1.0, 2.0 and FastV against all visual tokens, beside the ratio of FLOPs.
# Usage: bash pipelines/sparsevlm_speed.sh [--smoke] [MODEL|RUN ...] [OPTIONS OF python -m benchmarks.visual_tokens]
#   RETAIN_TOKEN="192 64" USE_VERSION=2_0 bash pipelines/sparsevlm_speed.sh llava-1.5-7b --batch 4 --repeats 9
#   MODEL is llava-1.5-7b. Every call's seconds go to RESULTS/MODEL-speed.json. Models that are measured beside each
#   other on one CPU (JOBS) slow each other down: leave JOBS away, or give each a GPU (GPUS).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin llava-1.5-7b tiny-llava "$@"
refuse_own --model --retain --arms --json
read_budgets "$([ -n "$smoke" ] && echo "48 32 24 16" || echo "192 128 96 64")"
versions=$(IFS=, && echo "${token_versions[*]}")
retain=$(IFS=, && echo "${budgets[*]}")
for model in "${models[@]}"; do
    name=$(label "$model")-speed
    queue "$name" -m benchmarks.visual_tokens --model "$model" --retain "$retain" --arms "$versions,fastv" \
        "${options[@]}" --json "$results/$name.json"
done
finish
