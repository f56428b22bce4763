#!/usr/bin/env bash
# The three arms on Mixtral-8x7B: 50 % sparsity and 4 bits, C4 calibration, three texts.
# Usage: bash pipelines/mixtral.sh [--smoke] [MODEL ...] [OPTIONS OF mico compress]
#   CONTROLS=1 adds the controls of MI grouping: random, range-sorted and alpha-sorted groups.
#   The model takes 93 GB in 16 bits; --stream keeps its blocks on disk.
#   --smoke makes a Mixtral of four experts out of tiny-llama (pipelines/upcycle.py).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
base=(--sparsity 0.5 --wbits 4 --calib c4 --eval "wikitext2,ptb,c4")
begin mixtral-8x7b tiny-mixtral "$@"
if [ "${models[*]}" = tiny-mixtral ]; then
    models=("$results/tiny-mixtral")
    make_once "${models[0]}" "$root/pipelines/upcycle.py" tiny-llama
fi
three_arms
finish
