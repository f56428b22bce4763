#!/usr/bin/env bash
# Train tiny-llava, the shipped vision-language model, on pictures made from what scikit-learn brings along.
# Usage: bash pipelines/train_llava.sh [OPTIONS of python -m mico.reference.train_llava, as --steps 5000]
# Uses a GPU where there is one, else all CPU cores but one (about an hour). Killed, it goes on from its checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-0}"
bash pipelines/setup.sh
exec "${MICO_VENV:-.venv}/bin/python" -m mico.reference.train_llava \
    --work results/training-tiny-llava --out mico/reference/tiny-llava "$@"
