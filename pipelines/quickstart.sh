#!/usr/bin/env bash
# From a fresh clone to a compressed model: set up, then compress the reference model that ships with mico.
# Needs no hub and no files. Options are passed on: bash pipelines/quickstart.sh --arm original
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
case ${1:-} in -h | --help)
    header
    exit 0
    ;;
esac
set_up
exec "$mico" compress tiny-llama --sparsity 0.5 --wbits 4 "$@"
