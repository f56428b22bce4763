#!/usr/bin/env bash
# What there is, measured: perplexity, KL divergence to the dense model of a run, tasks of lm-eval, and one report.
# Usage: bash pipelines/eval_only.sh [--smoke] RUN|MODEL ... [OPTIONS OF mico eval]
#   bash pipelines/eval_only.sh results/vicuna_13b/* --tasks arc_easy,piqa --limit 200
#   RUN is a folder of mico compress and keeps its figures in RUN/eval; those of a MODEL go into RESULTS.
#   --smoke without RUN compresses tiny-llama first. Finished tasks are not run again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
extras="eval"
begin "" "" "$@"
measure=(--eval "wikitext2,ptb,c4" --tasks "arc_easy,arc_challenge,hellaswag,piqa,winogrande,boolq")
if [ -n "$smoke" ]; then
    measure=("${small[@]}" --tasks "mico_choice,mico_rolling" --limit 8)
    if [ ${#models[@]} -eq 0 ]; then
        "$mico" compress tiny-llama --quiet "${base[@]}" --save "$results/tiny-llama-mi"
        models=(tiny-llama "$results/tiny-llama-mi")
    fi
fi
if [ ${#models[@]} -eq 0 ]; then die "name a run folder or a model: bash $0 --help"; fi
refuse_own --output-path --json
for model in "${models[@]}"; do
    if [ -f "$model/report.json" ]; then
        folders+=("$model")
        queue "$(label "$model")" eval "$model" "${measure[@]}" "${options[@]}"
    else
        name=$(label "$model")
        queue "$name" eval "$model" "${measure[@]}" "${options[@]}" --output-path "$results/$name"
    fi
done
finish
