#!/usr/bin/env bash
# The three arms on Llama-2-7b: 50 % sparsity and 4 bits, C4 calibration, three texts. The model is gated: `hf auth login`.
# Usage: bash pipelines/llama2_7b.sh [--smoke] [MODEL ...] [OPTIONS OF mico compress]
#   CONTROLS=1 adds the controls of MI grouping: random, range-sorted and alpha-sorted groups.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
base=(--sparsity 0.5 --wbits 4 --calib c4 --eval "wikitext2,ptb,c4")
begin llama2-7b tiny-llama "$@"
three_arms
finish
