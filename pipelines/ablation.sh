#!/usr/bin/env bash
# The three arms of the field's ablation side by side, at equal true bits, and one table of the results.
# Usage: bash pipelines/ablation.sh MODEL [OPTIONS OF mico compress]
#   bash pipelines/ablation.sh tiny-llama
#   bash pipelines/ablation.sh vicuna-13b --sparsity 0.5 --wbits 4 --eval wikitext2,ptb,c4
#   CONTROLS=1 adds the controls of MI grouping (random, range- and alpha-sorted groups); RESULTS names the folder.
# A killed ablation goes on where it stopped: finished arms are reused, a started one resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"
bash pipelines/setup.sh
model=${1:?usage: bash pipelines/ablation.sh MODEL [OPTIONS OF mico compress]}
shift
mico=${MICO_VENV:-.venv}/bin/mico
results=${RESULTS:-results/ablation-$(basename "$model")}
runs=()
for arm in original enhanced mi; do
    "$mico" compress "$model" --arm "$arm" --save "$results/$arm" "$@"
    runs+=("$results/$arm")
done
if [ -n "${CONTROLS:-}" ]; then
    for control in random range alpha; do
        "$mico" compress "$model" --method mico --grouping "$control" --save "$results/$control" "$@"
        runs+=("$results/$control")
    done
fi
"$mico" report "${runs[@]}"
