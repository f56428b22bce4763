#!/usr/bin/env bash
# The three arms on Vicuna-13b v1.5: 50 % sparsity and 4 bits, C4 calibration, three texts.
# Usage: bash pipelines/vicuna_13b.sh [--smoke] [MODEL ...] [OPTIONS OF mico compress]
#   CONTROLS=1 adds the controls of MI grouping: random, range-sorted and alpha-sorted groups.
#   A GPU that does not hold the model in 16 bits (26 GB): --stream keeps its blocks on disk.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
base=(--sparsity 0.5 --wbits 4 --calib c4 --eval "wikitext2,ptb,c4")
begin vicuna-13b tiny-llama "$@"
three_arms
finish
