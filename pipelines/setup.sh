#!/usr/bin/env bash
# Make the virtual environment (once) and install mico into it at the tested versions.
# Usage: bash pipelines/setup.sh [EXTRAS]          for example: bash pipelines/setup.sh dev,train
#   MICO_VENV         folder of the environment              (default: .venv in the checkout)
#   MICO_PYTHON       interpreter that makes it, >= 3.10     (default: python3, then python)
#   MICO_CONSTRAINTS  file of pinned versions                (default: constraints.txt)
#   MICO_TORCH_INDEX  package index that torch comes from    (default: PyTorch's CPU index where there is no
#                     NVIDIA GPU and it can be reached, otherwise only what pip is configured with)
set -euo pipefail
case ${1:-} in -h | --help)
    sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${MICO_VENV:-.venv}
constraints=${MICO_CONSTRAINTS:-constraints.txt}
extras=${1:-}
cpu_index=https://download.pytorch.org/whl/cpu

find_python() {
    local candidate
    if [ -n "${MICO_PYTHON:-}" ]; then set -- "$MICO_PYTHON"; else set -- python3 python; fi
    for candidate in "$@"; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: no Python 3.10 or newer found as ${MICO_PYTHON:-python3 or python}:" \
        "install one, or name it: MICO_PYTHON=/path/to/python3" >&2
    return 1
}

# True when an NVIDIA GPU answers; a hanging driver counts as none.
has_gpu() { command -v nvidia-smi >/dev/null && timeout 20 nvidia-smi -L >/dev/null 2>&1; }

# True when the page can be read within a few seconds (name resolution included, hence `timeout`).
reachable() {
    timeout 10 "$venv/bin/python" -c \
        'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5).read(1)' "$1" >/dev/null 2>&1
}

pip_install() {
    local quiet=--quiet
    if [ -t 1 ]; then quiet=; fi # a person at a terminal sees the progress bars
    "$venv/bin/python" -m pip install --disable-pip-version-check ${quiet:+"$quiet"} -c "$constraints" "$@"
}

if [ ! -f "$constraints" ]; then
    echo "setup: MICO_CONSTRAINTS $constraints: no such file" >&2
    exit 2
fi
stamp="$venv/.mico-$(echo "${extras:-base}" | tr -c '[:alnum:]\n' '-')"
wanted=$(pwd && cat pyproject.toml "$constraints" | cksum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0 # this very setup was finished here before
fi

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    echo "setup: making $venv with $("$python" --version)"
    "$python" -m venv "$venv"
fi

# torch first and alone: on Linux PyPI's wheel is the CUDA build, which needs gigabytes of further packages.
# `torch==X` in the constraints also matches X+cpu, and pip prefers X+cpu wherever it can see both.
index=${MICO_TORCH_INDEX:-}
if [ -z "$index" ] && [ "$(uname -s)" = Linux ] && ! has_gpu; then
    if reachable "$cpu_index/torch/"; then
        index=$cpu_index
    else
        echo "setup: no GPU found and $cpu_index is out of reach: torch comes from where pip is configured to look" \
            "(PyPI itself has the CUDA build only; MICO_TORCH_INDEX=URL names another index)"
    fi
fi
echo "setup: installing torch${index:+ from $index}"
pip_install torch ${index:+--extra-index-url "$index"}
echo "setup: installing mico${extras:+[$extras]} and its dependencies at the versions of $constraints"
pip_install -e ".${extras:+[$extras]}"
echo "$wanted" >"$stamp"
echo "setup: done, $("$venv/bin/python" -c 'import torch; print("torch", torch.__version__)') in $venv"
