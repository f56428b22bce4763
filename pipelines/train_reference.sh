#!/usr/bin/env bash
# Train a reference model. Usage: bash pipelines/train_reference.sh DATA_DIR [llama|opt] [tiny|small]
# DATA_DIR is laid out as in calib_data/README.md. Uses a GPU where there is one, else all CPU cores but one.
# Killed, the same command goes on from its last checkpoint. tiny models go where the package ships them
# (mico/reference/tiny-ARCH), small ones into results/. Set MICO_TOKENS for another number of training tokens.
set -euo pipefail
usage="usage: bash pipelines/train_reference.sh DATA_DIR [llama|opt] [tiny|small]"
if [ ! -d "${1:-}" ]; then
    echo "train_reference: DATA_DIR '${1:-}' is not a folder: $usage" >&2
    exit 2
fi
data_dir=$(cd "$1" && pwd)
arch=${2:-llama}
size=${3:-tiny}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-0}"

case "$arch-$size" in
    llama-tiny | opt-tiny) out=mico/reference/tiny-$arch ;;
    llama-small | opt-small) out=results/small-$arch ;;
    *) echo "train_reference: $arch $size: $usage" >&2 && exit 2 ;;
esac
bash pipelines/setup.sh
exec "${MICO_VENV:-.venv}/bin/python" -m mico.reference.train --arch "$arch" --size "$size" \
    --data-dir "$data_dir" --work "results/training-$size-$arch" --out "$out" ${MICO_TOKENS:+--tokens "$MICO_TOKENS"}
