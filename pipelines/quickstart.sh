#!/usr/bin/env bash
# From a fresh clone to a compressed model: set up, then compress the reference model that ships with mico.
# Needs no hub and no files. Options are passed on: bash pipelines/quickstart.sh --arm original
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"
bash pipelines/setup.sh
exec "${MICO_VENV:-.venv}/bin/mico" compress tiny-llama --sparsity 0.5 --wbits 4 "$@"
