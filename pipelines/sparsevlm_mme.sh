#!/usr/bin/env bash
# MME under SparseVLM: a LLaVA with all its visual tokens, and with 192, 128, 96 and 64 of them by versions 1.0 and 2.0.
# Usage: bash pipelines/sparsevlm_mme.sh [--smoke] [MODEL|RUN ...] --vlm-data DIR [OPTIONS OF mico eval]
#   RETAIN_TOKEN=192 USE_VERSION=2_0 bash pipelines/sparsevlm_mme.sh --vlm-data DIR --batch-size 16
#   RETAIN_TOKEN="192 64" and USE_VERSION="1_0 2_0" take several. MODEL is llava-1.5-7b; RUN, a folder of mico compress,
#   adds the bits of its weights to the table of points, tokens, time, memory and FLOPs. DIR: see calib_data/README.md.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin llava-1.5-7b tiny-llava "$@"
suite_arms mme
finish
