# shellcheck shell=bash
# What the experiments share; each of them sources this file, fills the queue with `arm` and ends with `finish`.
#
#   begin MODELS SMOKE_MODELS "$@"   read the arguments: sets models, options, results, mico; makes the environment
#   arm NAME MODEL OPTION...         queue one `mico compress`, whose run folder is $results/NAME
#   three_arms, sweep, suite_arms    what most experiments are made of
#   queue NAME WORD...               queue any command of mico, or -m MODULE of Python; after=OTHER queue ... waits for it
#   cmibq_options, two_stages        training by CM-IBQ; together: on all GPUs at once
#   finish                           run the queue, then compare what came out
#
# An arm that is finished is skipped, a started one goes on after its last finished block, a failed one does not stop
# the others. An experiment may set before `begin`: base (options of every arm), extras (of pipelines/setup.sh).

if [ "${BASH_VERSINFO[0]}${BASH_VERSINFO[1]}" -lt 44 ]; then
    echo "$0: bash ${BASH_VERSION} is too old: 4.4 or newer is needed" >&2
    exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
pipeline=$(basename "$0" .sh)
base=() extras="" # options of every arm; extras of setup.sh
small=()          # with --smoke: options that keep an evaluation short
models=() options=() smoke=""
names=() commands=() folders=() # the queue; run folders to compare at the end
after="" waits=()               # the arm that the next one waits for; that of every arm
processes=1                     # of a training where there is no GPU
torchrun=() port="" node=0      # options of torchrun; port and number of this machine where several train together
workers=()                      # the processes that empty it

note() { printf '== %s: %s\n' "$pipeline" "$*" >&2; }

die() {
    note "$*"
    exit 2
}

# The comment at the top of the script.
header() { sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0"; }

# The same, and what all experiments take.
usage() {
    header
    cat <<'TEXT'

  --smoke            the same on a reference model and little text, in minutes; no hub, no network
  -h, --help         this text; other options go to mico

Variables, for every experiment:
  RESULTS            folder of the results          (default: $MICO_RESULTS or results, then the experiment's name)
  SEEDS              seeds, an arm each             (default: "0")
  GPUS               GPUs to spread the arms over   (GPUS="0 1 2 3": four arms at a time; "0,1 2,3": two, of two GPUs)
  JOBS               arms at a time without a GPU   (default: 1; their logs then lie in RESULTS/logs)
  CUDA_VISIBLE_DEVICES  the GPU where GPUS is not set  (default: 0; "" for the CPU)
  MICO_VENV          environment; one that has mico is used as it is  (default: .venv, made by pipelines/setup.sh)
Killed, the same command goes on: finished arms are skipped, a started one resumes.
TEXT
}

# begin MODELS SMOKE_MODELS ARGUMENT...: leading words of the arguments name other models, the rest are options of mico.
begin() {
    local word named=() smoke_models
    read -ra models <<<"$1"
    read -ra smoke_models <<<"$2"
    shift 2
    for word in "$@"; do
        case $word in
            -h | --help)
                usage
                exit 0
                ;;
            --smoke) smoke=1 ;;
            -*) options+=("$word") ;;
            *) if [ ${#options[@]} -eq 0 ]; then named+=("$word"); else options+=("$word"); fi ;;
        esac
    done
    if [ -n "$smoke" ]; then models=("${smoke_models[@]}"); fi
    if [ ${#named[@]} -gt 0 ]; then models=("${named[@]}"); fi
    results=${RESULTS:-${MICO_RESULTS:-results}/$pipeline${smoke:+-smoke}}
    seeds=${SEEDS:-0}
    set_up
    mkdir -p "$results" || die "RESULTS $results cannot be made: choose another folder"
    if [ -n "$smoke" ]; then make_small; fi
}

set_up() {
    local venv=${MICO_VENV:-.venv}
    case $venv in /*) ;; *) venv=$root/$venv ;; esac # as pipelines/setup.sh sees it
    if [ -z "${MICO_VENV:-}" ] || [ ! -x "$venv/bin/mico" ]; then bash "$root/pipelines/setup.sh" "$extras"; fi
    mico=$venv/bin/mico
    python=$venv/bin/python
    export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-0}"
}

# Little calibration and this project's own pages to measure on, under the name of a text that mico knows.
make_small() {
    local texts=$results/texts
    if [ ! -f "$texts/wikitext2/test.txt" ]; then
        mkdir -p "$texts/wikitext2"
        cp "$root/README.md" "$texts/wikitext2/test.txt"
    fi
    small=(--seqlen 64 --batch-size 4 --eval wikitext2 --data-dir "$texts" --offline)
    base+=("${small[@]}" --nsamples 8 --calib docs)
    export MICO_RESULTS=${MICO_RESULTS:-$results} # statistics and groups too
    note "smoke: ${models[*]:-tiny-llama}; calibration: 8 windows of 64 tokens; 'wikitext2' is this project's README"
}

# make_once FOLDER COMMAND...: a model for --smoke; the command gets the folder as its last word.
make_once() {
    local folder=$1
    shift
    until [ "$node" -eq 0 ] || [ -d "$folder" ]; do sleep 0.2; done # node 0 makes it for all
    if [ -d "$folder" ]; then return; fi
    rm -rf "$folder.unfinished"
    PYTHONPATH=$root "$python" "$@" "$folder.unfinished"
    mv "$folder.unfinished" "$folder"
}

# --- the queue ------------------------------------------------------------------------------------------------------

# arm NAME MODEL OPTION...
arm() {
    local name=$1 model=$2
    shift 2
    refuse_own --save --json --push-to-hub "$@"
    folders+=("$results/$name")
    queue "$name" compress "$model" "${base[@]}" "${options[@]}" "$@" --save "$results/$name"
}

# queue NAME WORD...: any command of mico, or -m MODULE WORD... of Python. `after=OTHER queue ...` begins when the arm
# OTHER, queued before, has ended.
queue() {
    names+=("$1")
    waits+=("$after")
    shift
    commands+=("$(printf '%q ' "$@")")
}

# refuse_own OPTION...: what the experiment sets itself may not be among the options given to it.
refuse_own() {
    local given own
    for given in "${options[@]}"; do
        given=${given%%=*}
        for own in "$@"; do
            case $own in --*) if [ "${given//_/-}" = "$own" ]; then
                die "$given is set by this experiment, see: bash $0 --help"
            fi ;; esac
        done
    done
}

# take OPTION...: moves these, with their values, from options to taken.
take() {
    local word name left=() is_value=""
    taken=()
    for word in "${options[@]}"; do
        name=${word%%=*}
        if [ -n "$is_value" ] || [[ " $* " == *" ${name//_/-} "* ]]; then
            taken+=("$word")
            if [ -n "$is_value" ] || [[ $word == *=* ]]; then is_value=""; else is_value=1; fi
        else
            left+=("$word")
        fi
    done
    options=("${left[@]}")
}

# The last part of a model's name, as part of a folder name.
label() {
    local name=${1%/}
    echo "${name##*/}"
}

# The field's ablation for every model and seed; CONTROLS=1 adds the groupings that run beside MI.
three_arms() {
    local model seed name
    for model in "${models[@]}"; do
        for seed in $seeds; do
            for name in original enhanced mi; do
                arm "$(label "$model")-$name-seed$seed" "$model" --arm "$name" --seed "$seed"
            done
            if [ -z "${CONTROLS:-}" ]; then continue; fi
            for name in random range alpha; do
                arm "$(label "$model")-$name-seed$seed" "$model" --method mico --grouping "$name" --seed "$seed"
            done
        done
    done
}

# sweep ARM OPTION VALUES: one of the three arms for every model, seed and value of an option.
sweep() {
    local option=$2 model seed value
    for model in "${models[@]}"; do
        for seed in $seeds; do
            for value in $3; do
                arm "$(label "$model")-$1-${option#--}-$value-seed$seed" "$model" --arm "$1" "$option" "$value" \
                    --seed "$seed"
            done
        done
    done
}

# read_budgets DEFAULT: sets budgets and token_versions from RETAIN_TOKEN and USE_VERSION. SparseVLM's own scripts know
# the first as RETAIN_TOKN, which is heard too.
read_budgets() {
    local word wanted=${RETAIN_TOKEN:-${RETAIN_TOKN:-$1}}
    if [ "$wanted" != "${RETAIN_TOKN:-$wanted}" ]; then
        die "RETAIN_TOKEN=$RETAIN_TOKEN and RETAIN_TOKN=$RETAIN_TOKN differ: leave one out"
    fi
    read -ra budgets <<<"$wanted"
    for word in "${budgets[@]}"; do
        case $word in *[!0-9]* | 0*) die "RETAIN_TOKEN=$wanted: give numbers of visual tokens, as 192 or \"192 64\"" ;; esac
    done
    token_versions=()
    for word in ${USE_VERSION:-1_0 2_0}; do
        case $word in
            1_0 | 1.0) token_versions+=(1.0) ;;
            2_0 | 2.0) token_versions+=(2.0) ;;
            *) die "USE_VERSION=$USE_VERSION: give 1_0, 2_0, or both with a space" ;;
        esac
    done
}

# suite_arms SUITE: every model with all its visual tokens, and at every budget by every version of SparseVLM.
suite_arms() {
    local suite=$1 model name version retain data=()
    refuse_own --suite --retain-tokens --sparsevlm-version --output-path --json
    read_budgets "$([ -n "$smoke" ] && echo "48 32 24 16" || echo "192 128 96 64")"
    if [ -n "$smoke" ]; then # pictures of digits, 144 visual tokens each
        make_once "$results/suites" -m mico.metrics.vision.grid_files --pictures 6
        data=(--vlm-data "$results/suites" --offline)
    fi
    for model in "${models[@]}"; do
        name=$(label "$model")-$suite
        suite_arm "$name-all" "$model"
        for version in "${token_versions[@]}"; do
            for retain in "${budgets[@]}"; do
                suite_arm "$name-$retain-v$version" "$model" --retain-tokens "$retain" --sparsevlm-version "$version"
            done
        done
    done
}

# suite_arm NAME MODEL OPTION...: one `mico eval` of suite_arms, whose results.json lies in $results/NAME.
suite_arm() {
    local name=$1 model=$2
    shift 2
    folders+=("$results/$name")
    queue "$name" eval "$model" --suite "$suite" "${data[@]}" "${options[@]}" "$@" --output-path "$results/$name"
}

# --- CM-IBQ ---------------------------------------------------------------------------------------------------------

# The GPUs of this machine, with commas; nothing where there is none.
all_gpus() { nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd, || true; }

# together: every training takes all GPUs that GPUS, else CUDA_VISIBLE_DEVICES names, else all of the machine; two
# processes on the CPU where there is none. To be called before `begin`.
together() {
    local gpus=${GPUS:-${CUDA_VISIBLE_DEVICES-$(all_gpus)}}
    export CUDA_VISIBLE_DEVICES=${gpus// /,} GPUS=""
    processes=2
}

# cmibq_options: sets train (options of both stages), first and second (STAGE1 and STAGE2: options of one stage).
cmibq_options() {
    refuse_own --method --stage --seed --save --json
    read -ra first <<<"${STAGE1:-}"
    read -ra second <<<"${STAGE2:-}"
    train=(--method cmibq)
    if [ -n "$smoke" ]; then
        make_once "$results/grids" -m mico.metrics.vision.grid_files --pictures 6
        train+=(--train-file "$results/grids/instruct/pairs.json" --eval-share 0.2 --max-steps 3 --logging-steps 1
            --per-device-train-batch-size 4 --offline)
    fi
    if [ -z "$CUDA_VISIBLE_DEVICES" ] || [ -z "$(all_gpus)" ]; then
        train+=(--device cpu)
    elif [ -z "$smoke" ]; then
        train+=(--gradient-checkpointing)
        case " ${options[*]}" in *" --deepspeed"*) ;; *) train+=(--bf16) ;; esac # its configuration says it for itself
    fi
}

# cmibq_arm NAME MODEL STAGE OPTION...: one stage, whose run folder is $results/NAME.
cmibq_arm() {
    local name=$1 model=$2 stage=$3
    shift 3
    if [ "$node" -eq 0 ]; then folders+=("$results/$name"); fi # the others leave the report to it
    queue "$name" finetune "$model" "${train[@]}" --stage "$stage" "${options[@]}" "$@" --save "$results/$name"
}

# two_stages: both stages of every model and seed.
two_stages() {
    local model seed name
    for model in "${models[@]}"; do
        for seed in $seeds; do
            name=$(label "$model")-stage
            cmibq_arm "${name}1-seed$seed" "$model" 1 "${first[@]}" --seed "$seed"
            after="${name}1-seed$seed" cmibq_arm "${name}2-seed$seed" "$results/${name}1-seed$seed" 2 "${second[@]}" \
                --seed "$seed"
        done
    done
}

# --- running --------------------------------------------------------------------------------------------------------

# Whether what the command behind $1 leaves there is whole, and by the same command: report.json of a run folder,
# results.json of an evaluation, or $1.json of a module. --strict must tell its status again.
is_finished() {
    [[ -f $1/report.json || -f $1/results.json || -f $1.json ]] && "$python" - "$@" <<'PYTHON'
import hashlib, json, pathlib, sys

folder, command = pathlib.Path(sys.argv[1]), sys.argv[2:]
try:
    if command[0] == "eval":
        whole = json.loads((folder / "results.json").read_bytes())["mico"]["command"][1:] == command
    elif command[0] == "-m":
        whole = json.loads(folder.with_name(folder.name + ".json").read_bytes())["command"][1:] == command[2:]
    else:
        report = (folder / "report.json").read_bytes()
        written = json.loads((folder / "manifest.json").read_bytes())["completed"]["outputs"]["report.json"]
        whole = written == hashlib.sha256(report).hexdigest() and json.loads(report)["command"][1:] == command
except (OSError, ValueError, KeyError, TypeError):
    whole = False
sys.exit(not whole or "--strict" in command)
PYTHON
}

# run_arm INDEX: one arm; its status and seconds go to $state/INDEX.
run_arm() {
    local name=${names[$1]} status=0 began=$SECONDS words shown program=("$mico")
    eval "words=(${commands[$1]})"
    case ${words[0]} in
        -m) program=(env "PYTHONPATH=$root" "$python") ;;
        finetune) launch "$1" ;;
    esac
    if [[ ${words[0]} =~ ^(compress|finetune|eval|-m)$ ]] && is_finished "$results/$name" "${words[@]}"; then
        note "$name: finished before by the same command, skipped"
        echo skipped >"$state/$1"
        return
    fi
    shown=("${program[0]##*/}" "${program[@]:1}")
    note "$name: ${shown[*]} ${commands[$1]}"
    if [ ${#devices[@]} -eq 1 ]; then
        "${program[@]}" "${words[@]}" &
    else
        mkdir -p "$results/logs"
        "${program[@]}" "${words[@]}" >"$results/logs/$name.log" 2>&1 &
    fi
    wait $! || status=$?
    if [ "$status" -eq 0 ]; then note "$name: done in $((SECONDS - began)) s"; else tell_failure "$name" "$status"; fi
    echo "$status" >"$state/$1"
}

# launch INDEX: sets program, by which a training starts: torchrun where several processes share it, one a GPU. A port
# an arm: a machine that is done first shall wait for the others in the next arm, not meet them in the last one.
launch() {
    local gpus=() count=$processes
    if [ -n "$(all_gpus)" ]; then IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"; fi
    if [ ${#gpus[@]} -gt 0 ]; then count=${#gpus[@]}; fi
    if [ "$count" -eq 1 ] && [ ${#torchrun[@]} -eq 0 ]; then return; fi
    program=("$(dirname "$mico")/torchrun" --nproc-per-node "$count")
    if [ -n "$port" ]; then program+=(--master-port $((port + $1))); fi
    program+=("${torchrun[@]:---standalone}" -m mico)
}

# await NAME: until that arm has ended.
await() {
    local index
    for index in "${!names[@]}"; do
        if [ "${names[$index]}" = "$1" ]; then until [ -s "$state/$index" ]; do sleep 0.2; done; fi
    done
}

tell_failure() {
    note "$1: FAILED with status $2"
    if [ -f "$results/logs/$1.log" ] && [ ${#devices[@]} -gt 1 ]; then tail -n 1 "$results/logs/$1.log" >&2; fi
}

# work DEVICE: take arms that nobody has taken until none is left.
work() {
    local index
    trap 'kill -TERM $(jobs -p) 2>/dev/null; wait; exit 143' TERM
    export CUDA_VISIBLE_DEVICES=$1
    for index in "${!names[@]}"; do
        if mkdir "$state/$index.taken" 2>/dev/null; then
            await "${waits[$index]}"
            run_arm "$index"
        fi
    done
}

# Ctrl-C reaches this shell alone: what it starts in the background ignores it, so the workers are told to end.
stop() {
    trap '' INT TERM HUP
    kill -TERM "${workers[@]}" 2>/dev/null || true
    wait
    note "stopped; the same command goes on where it was"
    exit "$1"
}

# One worker a GPU of GPUS, or JOBS workers on what CUDA_VISIBLE_DEVICES names.
pick_devices() {
    local job cores
    devices=()
    if [ -n "${GPUS:-}" ]; then
        if [ -n "${JOBS:-}" ]; then die "GPUS=$GPUS and JOBS=$JOBS exclude each other: leave one out"; fi
        read -ra devices <<<"$GPUS"
    else
        case ${JOBS:-1} in *[!0-9]* | 0) die "JOBS=$JOBS: give a whole number of at least 1" ;; esac
        for ((job = 0; job < ${JOBS:-1}; job++)); do devices+=("$CUDA_VISIBLE_DEVICES"); done
    fi
    if [ ${#devices[@]} -gt 1 ] && [ -z "${OMP_NUM_THREADS:-}" ]; then # many threads of many arms slow each other down
        cores=$(getconf _NPROCESSORS_ONLN)
        export OMP_NUM_THREADS=$((cores > ${#devices[@]} ? cores / ${#devices[@]} : 1))
        note "${#devices[@]} arms at a time, OMP_NUM_THREADS=$OMP_NUM_THREADS each; their logs: $results/logs"
    fi
}

run_queue() {
    local device
    pick_devices
    state=$(mktemp -d)
    trap 'rm -rf "$state"' EXIT
    trap 'stop 130' INT
    trap 'stop 143' TERM HUP
    for device in "${devices[@]}"; do
        work "$device" &
        workers+=($!)
    done
    wait
    trap - INT TERM HUP
}

# Run the queue, compare the arms that are finished, and end with the status of the first arm that failed.
finish() {
    local index status folder done=0 skipped=0 failed=() worst=0 finished=()
    run_queue
    for index in "${!names[@]}"; do
        status=$(cat "$state/$index" 2>/dev/null || echo 1)
        case $status in
            0) done=$((done + 1)) ;;
            skipped) skipped=$((skipped + 1)) ;;
            *)
                failed+=("${names[$index]} (status $status)")
                if [ "$worst" -eq 0 ]; then worst=$status; fi
                ;;
        esac
    done
    for folder in "${folders[@]}"; do
        if [[ -f $folder/report.json || -f $folder/results.json ]]; then finished+=("$folder"); fi
    done
    if [ ${#finished[@]} -gt 0 ]; then
        "$mico" report "${finished[@]}" --html "$results/report.html" --markdown "$results/report.md" \
            --json "$results/report.json" --figures "$results/figures" || worst=$?
    fi
    note "$done done, $skipped skipped, ${#failed[@]} failed in $SECONDS s; results: $results"
    for status in "${failed[@]}"; do note "FAILED $status: the same command tries it again"; done
    exit "$worst"
}
