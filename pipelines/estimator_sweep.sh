#!/usr/bin/env bash
# Which estimator of mutual information. Usage: bash pipelines/estimator_sweep.sh [--smoke] [MODEL ...] [OPTIONS]
#   MODEL is opt-125m, OPTIONS are those of mico compress; ESTIMATORS="gaussian copula histogram".
#   knn, the slow referee, takes streams of at most 1,024 channels and minutes a stream:
#   ESTIMATORS="gaussian copula histogram knn" bash pipelines/estimator_sweep.sh tiny-llama
#   --smoke runs all four on a Llama of two narrow layers with random weights: its perplexity means nothing.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
base=(--sparsity 0.5 --wbits 4)
begin opt-125m tiny-random "$@"
estimators=${ESTIMATORS:-gaussian copula histogram${smoke:+ knn}}
if [ "${models[*]}" = tiny-random ]; then
    models=("$results/tiny-random")
    make_once "${models[0]}" -m benchmarks.make_model --layers 2 --hidden 64 --ffn 96 --heads 4 --vocabulary 4096
fi
sweep mi --mi-method "$estimators"
finish
