#!/usr/bin/env bash
# Which estimator of mutual information. Usage: bash pipelines/estimator_sweep.sh [--smoke] [MODEL ...] [OPTIONS]
#   MODEL is opt-125m, OPTIONS are those of mico compress; ESTIMATORS="gaussian copula histogram knn".
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
base=(--sparsity 0.5 --wbits 4)
begin opt-125m tiny-llama "$@"
sweep mi --mi-method "${ESTIMATORS:-gaussian copula histogram knn}"
finish
