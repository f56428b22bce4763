#!/usr/bin/env bash
# How many groups: MI groups, K of them in every stream. Usage: bash pipelines/k_sweep.sh [--smoke] [MODEL ...] [OPTIONS]
#   MODEL is opt-125m, OPTIONS are those of mico compress; N_GROUPS="5 10 20 50" are the values of --n-groups.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
base=(--sparsity 0.5 --wbits 4)
begin opt-125m tiny-llama "$@"
sweep mi --n-groups "${N_GROUPS:-5 10 20 50}"
finish
