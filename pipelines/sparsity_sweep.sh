#!/usr/bin/env bash
# How much is pruned, with SparseGPT as published and with MI groups.
# Usage: bash pipelines/sparsity_sweep.sh [--smoke] [MODEL ...] [OPTIONS]
#   MODEL is opt-125m, OPTIONS are those of mico compress; SPARSITIES="0.3 0.5 0.7"; ARMS="original mi".
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
base=(--wbits 4)
begin opt-125m tiny-llama "$@"
for arm in ${ARMS:-original mi}; do sweep "$arm" --sparsity "${SPARSITIES:-0.3 0.5 0.7}"; done
finish
