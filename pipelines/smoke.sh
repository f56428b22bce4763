#!/usr/bin/env bash
# Every experiment with --smoke, one after the other, and the time each took: is the whole path in order?
# Usage: bash pipelines/smoke.sh [EXPERIMENT ...]        for example: bash pipelines/smoke.sh k_sweep mixtral
#   RESULTS  where to keep what comes out                 (default: a new temporary folder, removed when all went well)
#   JOBS     arms at a time                               (default: the CPU cores, at most 4; not with GPUS)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
case ${1:-} in -h | --help)
    header
    exit 0
    ;;
esac
experiments=("$@")
if [ $# -eq 0 ]; then
    experiments=(quick_test opt_ablation vicuna_13b llama2_7b mixtral k_sweep estimator_sweep sparsity_sweep eval_only paretoq_minicpm4
        sparsevlm_mme sparsevlm_pope sparsevlm_speed cmibq_quick_test cmibq_full cmibq_stage1_multi_gpu
        cmibq_stage2_multi_gpu cmibq_deepspeed cmibq_multi_node cmibq_wandb)
fi
cores=$(getconf _NPROCESSORS_ONLN)
if [ -z "${GPUS:-}" ]; then export JOBS=${JOBS:-$((cores < 4 ? cores : 4))}; fi
if [ -n "${RESULTS:-}" ]; then results=$RESULTS; else results=$(mktemp -d); fi
mkdir -p "$results"
times=() broken=0
trap 'stop 130' INT # the running experiment is told to end, too
trap 'stop 143' TERM HUP
for experiment in "${experiments[@]}"; do
    began=$SECONDS status=0
    RESULTS=$results/$experiment MICO_RESULTS=$results/shared bash "$root/pipelines/$experiment.sh" --smoke \
        >"$results/$experiment.log" 2>&1 &
    workers=($!)
    wait "${workers[@]}" || status=$?
    case $status in 0 | 130 | 143) ;; *) broken=$((broken + 1)) && tail -n 20 "$results/$experiment.log" >&2 ;; esac
    times+=("$(printf '%5d s  status %d  %s' $((SECONDS - began)) "$status" "$experiment")")
    note "${times[-1]}"
    if [ "$status" -ge 130 ]; then exit "$status"; fi
done
printf '%s\n' "${times[@]}" "$(printf '%5d s  %d of %d failed' "$SECONDS" "$broken" "${#experiments[@]}")"
if [ "$broken" -gt 0 ]; then die "logs: $results"; fi
if [ -z "${RESULTS:-}" ]; then rm -rf "$results"; fi
