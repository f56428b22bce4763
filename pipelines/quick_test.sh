#!/usr/bin/env bash
# The ablation of the field: SparseGPT as published, with groups by importance, with groups by MI, at equal true bits.
# Usage: bash pipelines/quick_test.sh [--smoke] [MODEL ...] [OPTIONS OF mico compress]      (MODEL: tiny-llama)
#   bash pipelines/quick_test.sh
#   SEEDS="0 1 2" bash pipelines/quick_test.sh vicuna-13b --sparsity 0.5 --wbits 4 --eval wikitext2,ptb,c4
#   CONTROLS=1 adds the controls of MI grouping: random, range-sorted and alpha-sorted groups.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin tiny-llama tiny-llama "$@"
three_arms
finish
