#!/usr/bin/env bash
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
# Train one steering vector for every dataset of a role list, on every GPU, and lose nothing.
#
#   bash run_all_roles.sh roles.txt [options of train_steering.py ...]
#   bash run_all_roles.sh roles.txt --model M --layer 16 22 28     # each of them at each layer
#   bash run_all_roles.sh status                                   # of the sweep last started here
#   tmux new -s roles 'bash run_all_roles.sh roles.txt --model Qwen/Qwen3-32B'     # detach: C-b d
#   sbatch --array=0-15 --gpus=1 run_all_roles.sh roles.txt --model Qwen/Qwen3-32B
#
# roles.txt: one dataset name a line, spaces and all; a line that starts with "#", and what follows
# " #" in another, is a comment. It is read once, when the sweep starts. Write one with:
#   python data_filter.py --data-root DATA --model ID --write-list roles.txt
# Run it again to go on: what is done is not done again. Workers, tasks of an array, other panes,
# users and nodes on one file system share a list by the locks of the run folders. A role that fails
# is tried once more at the end, then named in LOG_DIR/failed.txt; one in which a process dies five
# times in a row counts as failed. SIGTERM, SIGUSR1 and Ctrl-C are passed on: each role in work saves
# a checkpoint, and the loop exits when all have ended. A Slurm job that gets SIGUSR1 (near its time
# limit) requeues itself.
# Exit codes: 0 all done, 1 some failed, 2 bad usage, 75 or 130 (Ctrl-C) stopped.
#
# Environment (relative paths start at this script's folder):
#   DATA_ROOT       folder of the datasets                   (data)
#   OUTPUT_DIR      root of the run folders                  (runs)
#   LOG_DIR         a log per worker, and failed.txt         (logs)
#   GPUS            a worker for each, such as 0,1,2,3       (all visible; one on the CPU if none)
#   ONLY            patterns of names to take, such as "*__trait__* *pirate*"      (all; --only)
#   LIMIT           at most this many names, from the top of the list              (all; --limit)
#   DRY_RUN         1: only say what is done and what would be trained
#   EVAL            options of eval_steering.py, run over OUTPUT_DIR at the end, such as
#                   "--max-new-tokens 60"                    (no evaluation)
#   PYTHON          the interpreter                          (.venv/bin/python, else python3)
#   TRAIN           the script that trains                   (train_steering.py)
set -euo pipefail

if [[ $# -lt 1 || $1 == -h || $1 == --help ]]; then
    sed -n '/^# Train/,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    exit 2
fi
command=$1
shift
if [[ $command != status ]]; then
    # Read before the folder changes, and once: it may be a pipe, such as <(head -20 roles.txt).
    names=$(cat -- "$command") || { echo "error: $command: no such list" >&2; exit 2; }
fi
here=$(dirname -- "${BASH_SOURCE[0]}")
[[ -e $here/train_steering.py ]] || here=${SLURM_SUBMIT_DIR:-$here} # Slurm runs a copy
cd "$here"

DATA_ROOT=${DATA_ROOT:-data}
OUTPUT_DIR=${OUTPUT_DIR:-runs}
LOG_DIR=${LOG_DIR:-logs}
TRAIN=${TRAIN:-train_steering.py}
default_python=python3
[[ -x .venv/bin/python ]] && default_python=.venv/bin/python
PYTHON=${PYTHON:-$default_python}
mkdir -p "$LOG_DIR"

if [[ $command == status ]]; then
    [[ -r $LOG_DIR/sweep ]] || { echo "error: no sweep was started with LOG_DIR=$LOG_DIR" >&2; exit 2; }
    mapfile -d '' options <"$LOG_DIR/sweep"
    exec "$PYTHON" "$TRAIN" "${options[@]}" --print-status
fi
for option in "$@"; do
    case $option in
        --restart* | --print-* | --write-* | --plan* | --dataset* | --list-file* | --tensor-parallel)
            echo "error: $option is for train_steering.py alone; this loop goes on with what is there" >&2
            exit 2
            ;;
        --data-root*) echo "error: $option: set DATA_ROOT, which this loop reads too" >&2; exit 2 ;;
        --output-dir*) echo "error: $option: set OUTPUT_DIR, which this loop reads too" >&2; exit 2 ;;
        --only*) echo "error: $option: set ONLY, which this loop reads too" >&2; exit 2 ;;
        --limit*) echo "error: $option: set LIMIT, which this loop reads too" >&2; exit 2 ;;
    esac
done
options=(--data-root "$DATA_ROOT" --output-dir "$OUTPUT_DIR" "$@")
choice=()
set -f # ONLY's patterns are for names, not files
# shellcheck disable=SC2206 # patterns, split at spaces
[[ -z ${ONLY:-} ]] || choice+=(--only $ONLY)
set +f
[[ -z ${LIMIT:-} ]] || choice+=(--limit "$LIMIT")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
list=$work/names
printf '%s\n' "$names" >"$list"

todo() { # names that are neither done nor in another process's hands, into $work/todo; says how many
    local code=0
    "$PYTHON" "$TRAIN" "${options[@]}" "${choice[@]}" --list-file "$list" \
        --write-todo "$work/todo" </dev/null || code=$?
    [[ $code -eq 0 ]] || { echo "error: what is left to do cannot be told (exit code $code)" >&2; exit 2; }
    left=$(wc -l <"$work/todo")
}

todo # bad options: no use in starting workers
if [[ ${DRY_RUN:-0} == 1 ]]; then
    sed 's/^/would train: /' "$work/todo"
    exit 0
fi
cp -- "$list" "$LOG_DIR/names.$$" && mv -- "$LOG_DIR/names.$$" "$LOG_DIR/names" # whole, for any reader
printf '%s\0' "${options[@]}" "${choice[@]}" --list-file "$LOG_DIR/names" >"$LOG_DIR/sweep"

# ---------------------------------------------------------------- workers

if [[ -z ${GPUS:-} ]]; then
    GPUS=${CUDA_VISIBLE_DEVICES-}
    if [[ -z ${CUDA_VISIBLE_DEVICES+set} ]] && command -v nvidia-smi >/dev/null; then
        GPUS=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd, - || true)
        [[ $GPUS =~ ^[0-9]+(,[0-9]+)*$ ]] || {
            echo "error: nvidia-smi says: $GPUS. Name the GPUs with GPUS=0,1 or GPUS=cpu" >&2
            exit 2
        }
    fi
fi
IFS=, read -r -a gpus <<<"${GPUS:-cpu}"

wait_for() { # wait_for PID: its exit code, however many signals come in meanwhile
    local code=0
    wait "$1" || code=$?
    while kill -0 "$1" 2>/dev/null; do
        code=0
        wait "$1" || code=$?
    done
    return "$code"
}

worker() { # worker NUMBER GPU: train what nobody else trains; 75 if a signal stopped it
    local number=$1 gpu=$2 log code stopped='' child='' done_before='' deaths=0
    log="$LOG_DIR/${HOSTNAME:-host}${SLURM_ARRAY_TASK_ID:+-task$SLURM_ARRAY_TASK_ID}-${gpu//\//_}.$number.log"
    trap 'stopped=75; [[ -n $child ]] && kill -TERM "$child" 2>/dev/null' TERM INT HUP
    [[ $gpu == cpu ]] && gpu=
    export CUDA_VISIBLE_DEVICES=$gpu
    echo "$(date +%H:%M:%S) ${gpu:-cpu}: $(wc -l <"$work/queue") datasets -> $log"
    while [[ -z $stopped ]]; do
        "$PYTHON" "$TRAIN" "${options[@]}" --list-file "$work/queue" </dev/null >>"$log" 2>&1 &
        child=$! code=0
        [[ -z $stopped ]] || kill -TERM "$child" 2>/dev/null # it came before there was a child
        wait_for "$child" || code=$?
        child=''
        [[ -z $stopped ]] || return "$stopped"
        [[ $code -gt 128 ]] || return "$code"
        # The process was killed: another one goes on, unless none gets anything done.
        echo "$(date +%H:%M:%S) ${gpu:-cpu}: killed, exit code $code ($log)"
        deaths=$((deaths + 1))
        [[ $(grep -c '^done ' "$log") == "$done_before" ]] || deaths=1
        done_before=$(grep -c '^done ' "$log" || true)
        [[ $deaths -lt 20 ]] || return "$code"
    done
    return "$stopped"
}

stopped='' usr1='' bad=0 workers=()
pass_on() { for pid in "${workers[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done; }
trap 'stopped=75; pass_on' TERM HUP
trap 'stopped=75; usr1=1; pass_on' USR1
trap 'stopped=130; pass_on' INT # a background child of a script ignores the terminal's

for _ in 1 2; do # what failed is tried once more
    cp -- "$work/todo" "$work/queue"
    [[ -s $work/queue && -z $stopped ]] || break
    workers=()
    for number in "${!gpus[@]}"; do
        worker "$number" "${gpus[$number]}" &
        workers+=($!)
        [[ -z $stopped ]] || pass_on
    done
    for pid in "${workers[@]}"; do
        code=0
        wait_for "$pid" || code=$?
        [[ $code -ne 75 && $code -ne 130 ]] || stopped=${stopped:-$code}
    done
    [[ -z $stopped ]] || break # Slurm gives little time to requeue
    todo
done

# ---------------------------------------------------------------- what came out

leave_if_stopped() {
    [[ -n $stopped ]] || return 0
    echo "stopped; run it again to go on" >&2
    if [[ -n $usr1 && -n ${SLURM_JOB_ID:-} ]]; then
        scontrol requeue "$SLURM_JOB_ID" || echo "error: the job could not be requeued" >&2
    fi
    exit "$stopped"
}
leave_if_stopped
if [[ -n ${EVAL:-} ]]; then
    # shellcheck disable=SC2086 # options, split at spaces
    "$PYTHON" eval_steering.py --run "$OUTPUT_DIR" $EVAL </dev/null >>"$LOG_DIR/eval.log" 2>&1 &
    workers=($!)
    [[ -z $stopped ]] || pass_on
    code=0
    wait_for "${workers[0]}" || code=$?
    leave_if_stopped
    [[ $code -eq 0 ]] || { bad=1; echo "evaluation ended with exit code $code ($LOG_DIR/eval.log)" >&2; }
fi
if [[ -d $OUTPUT_DIR && ($left -gt 0 || ! -e $OUTPUT_DIR/report.csv) ]]; then
    "$PYTHON" eval_steering.py --run "$OUTPUT_DIR" --report-only </dev/null || true # no run at all, if every role failed
fi
if [[ $left -gt 0 ]]; then
    sed "s/^/$(date '+%F %T') /" "$work/todo" >>"$LOG_DIR/failed.txt"
    sed 's/^/failed: /' "$work/todo" >&2
    bad=1
fi
exit "$bad"
