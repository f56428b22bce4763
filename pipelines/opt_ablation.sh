#!/usr/bin/env bash
# The three arms on OPT-125m, OPT-350m and OPT-1.3b: 50 % sparsity and 4 bits, C4 calibration, three texts.
# Usage: bash pipelines/opt_ablation.sh [--smoke] [MODEL ...] [OPTIONS OF mico compress]
#   CONTROLS=1 adds the controls of MI grouping: random, range-sorted and alpha-sorted groups.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
base=(--sparsity 0.5 --wbits 4 --calib c4 --eval "wikitext2,ptb,c4")
begin "opt-125m opt-350m opt-1.3b" tiny-opt "$@"
three_arms
finish
