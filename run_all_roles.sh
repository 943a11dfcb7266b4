#!/usr/bin/env bash
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
# Train one steering vector for every dataset of a role list, on every GPU, and lose nothing.
#
#   bash run_all_roles.sh roles.txt [options of train_steering.py ...]
#   bash run_all_roles.sh status                                   # of the sweep last started here
#   tmux new -s roles 'bash run_all_roles.sh roles.txt --model Qwen/Qwen3-32B'     # detach: C-b d
#   sbatch --array=0-15 --gpus=1 run_all_roles.sh roles.txt --model Qwen/Qwen3-32B
#
# roles.txt: one full dataset name a line; "#" starts a comment, blank lines are skipped. Write one
# with: python data_filter.py --data-root DATA --model ID --write-list roles.txt
# Run it again to go on: what is done is not done again, and several of these loops (panes, users,
# nodes on one file system) may share a list. A role that fails is tried once more at the end (four
# times more if its process was killed), then written to LOG_DIR/failed.txt. SIGTERM and SIGUSR1 are
# passed on: each role in work saves a checkpoint, and the loop exits with 75. A Slurm job that gets
# SIGUSR1 (near its time limit) requeues itself; its array task takes every n-th role of the list.
# Exit codes: 0 all done, 1 some failed, 2 bad usage, 75 or 130 (Ctrl-C) stopped.
#
# Environment (relative paths start at this script's folder):
#   DATA_ROOT       folder of the datasets                   (data)
#   OUTPUT_DIR      root of the run folders                  (runs)
#   LOG_DIR         a log per worker, and failed.txt         (logs)
#   GPUS            a worker for each, such as 0,1,2,3       (all visible; one on the CPU if none)
#   ROLES_PER_LOAD  roles trained by one load of the model   (16)
#   ONLY            patterns of names to take, such as "*__trait__* *pirate*"      (all)
#   LIMIT           at most this many names, from the top of the list              (all)
#   DRY_RUN         1: only say what is done and what would be trained
#   EVAL            options of eval_steering.py, run over OUTPUT_DIR at the end, such as
#                   "--num-samples 0"                        (no evaluation)
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
    [[ -r $command ]] || { echo "error: $command: no such list" >&2; exit 2; }
    list=$(realpath -- "$command")
fi
here=$(dirname -- "${BASH_SOURCE[0]}")
[[ -e $here/train_steering.py ]] || here=${SLURM_SUBMIT_DIR:-$here} # Slurm runs a copy
cd "$here"

DATA_ROOT=${DATA_ROOT:-data}
OUTPUT_DIR=${OUTPUT_DIR:-runs}
LOG_DIR=${LOG_DIR:-logs}
ROLES_PER_LOAD=${ROLES_PER_LOAD:-16}
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
        --restart | --print-* | --dataset | --list-file)
            echo "error: $option is for train_steering.py alone; this loop goes on with what is there" >&2
            exit 2
            ;;
    esac
done
options=(--data-root "$DATA_ROOT" --output-dir "$OUTPUT_DIR" "$@")
printf '%s\0' "${options[@]}" --list-file "$list" >"$LOG_DIR/sweep"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
touch "$work/tries" "$work/failed"

todo() { # names of a file that are neither done nor in another process's hands
    "$PYTHON" "$TRAIN" "${options[@]}" --list-file "$1" --print-todo </dev/null
}

# ---------------------------------------------------------------- which names

wanted() { # whether ONLY takes the name
    local pattern
    for pattern in ${ONLY:-"*"}; do
        # shellcheck disable=SC2053 # a pattern
        [[ $1 == $pattern ]] && return 0
    done
    return 1
}

set -f # ONLY's patterns are for names, not files
index=0
while IFS= read -r line || [[ -n $line ]]; do
    line=${line%$'\r'} # Windows line ends
    line=${line%%#*}
    read -r role _ <<<"$line" || true
    if [[ -z ${role:-} ]] || ! wanted "$role"; then continue; fi
    [[ -z ${LIMIT:-} || $index -lt $LIMIT ]] || break
    first=${SLURM_ARRAY_TASK_MIN:-0} count=${SLURM_ARRAY_TASK_COUNT:-1}
    if ((index % count == (${SLURM_ARRAY_TASK_ID:-0} - first) / ${SLURM_ARRAY_TASK_STEP:-1})); then
        printf '%s\n' "$role"
    fi
    index=$((index + 1))
done <"$list" >"$work/names"
set +f
[[ -s $work/names ]] || { echo "error: $list names no dataset to train" >&2; exit 2; }
total=$(wc -l <"$work/names")

code=0
todo "$work/names" >"$work/todo" 2>"$work/errors" || code=$?
cat -- "$work/errors" >&2
[[ $code -eq 0 ]] || exit 2 # bad options: no use in starting workers
left=$(wc -l <"$work/todo")
echo "$total datasets: $((total - left)) done or in work elsewhere, $left to train"
if [[ ${DRY_RUN:-0} == 1 ]]; then
    sed 's/^/would train: /' "$work/todo"
    exit 0
fi

# ---------------------------------------------------------------- workers

if [[ -z ${GPUS:-} ]]; then
    GPUS=${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null |
        paste -sd, - || true)}
fi
IFS=, read -r -a gpus <<<"${GPUS:-cpu}"

take() { # move the next names of the queue to stdout: a fair share, at most ROLES_PER_LOAD
    local waiting share
    exec 9>"$work/lock"
    flock 9
    waiting=$(wc -l <"$work/queue")
    share=$(((waiting + ${#gpus[@]} - 1) / ${#gpus[@]}))
    share=$((share < ROLES_PER_LOAD ? share : ROLES_PER_LOAD))
    head -n "$share" "$work/queue"
    sed -i "1,${share}d" "$work/queue"
    exec 9>&-
}

give_back() { # put a name at the end of the queue
    exec 9>"$work/lock"
    flock 9
    echo "$1" >>"$work/queue"
    exec 9>&-
}

worker() { # worker NUMBER GPU: train what the queue holds; 75 or 130 if a signal stopped it
    local number=$1 gpu=$2 log code name stopped='' child='' names undone tries
    log="$LOG_DIR/${HOSTNAME:-host}${SLURM_ARRAY_TASK_ID:+-task$SLURM_ARRAY_TASK_ID}-$gpu.$number.log"
    trap 'stopped=75; [[ -n $child ]] && kill -TERM "$child" 2>/dev/null' TERM
    [[ $gpu == cpu ]] || export CUDA_VISIBLE_DEVICES=$gpu
    while [[ -z $stopped ]]; do
        mapfile -t names < <(take)
        [[ ${#names[@]} -gt 0 ]] || return 0
        echo "$(date +%H:%M:%S) $gpu: ${#names[@]} datasets from ${names[0]} on -> $log"
        "$PYTHON" "$TRAIN" "${options[@]}" --dataset "${names[@]}" </dev/null >>"$log" 2>&1 &
        child=$! code=0
        wait "$child" || code=$?
        while kill -0 "$child" 2>/dev/null; do
            code=0
            wait "$child" || code=$? # the first wait ended with the signal, not with the child
        done
        child=''
        if [[ $code -eq 75 || $code -eq 130 || -n $stopped ]]; then
            return "${stopped:-$code}"
        fi
        # What is not done has failed; of a process that was killed, only the one it was at, and
        # that may be tried more often: it goes on after its last checkpoint.
        tries=$((code < 128 ? 2 : 5))
        printf '%s\n' "${names[@]}" >"$work/chunk-$number"
        mapfile -t undone < <(todo "$work/chunk-$number" 2>/dev/null)
        for name in "${undone[@]}"; do
            if [[ $code -lt 128 || $name == "${undone[0]}" ]]; then
                echo "$name" >>"$work/tries"
                if [[ $(grep -cxF -- "$name" "$work/tries") -ge $tries ]]; then
                    echo "$name" >>"$work/failed"
                    echo "$(date '+%F %T') $name, exit code $code, $log" >>"$LOG_DIR/failed.txt"
                    echo "$(date +%H:%M:%S) $gpu: FAILED: $name ($log)"
                    continue
                fi
            fi
            give_back "$name"
        done
    done
    return "${stopped:-0}"
}

stopped='' usr1='' workers=()
pass_on() { for pid in "${workers[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done; }
trap 'stopped=75; pass_on' TERM
trap 'stopped=75; usr1=1; pass_on' USR1
trap 'stopped=130' INT # the terminal has sent it to the trainings too

for _ in 1 2 3 4 5; do # more than once only if a worker itself was killed
    grep -vxF -f "$work/failed" -- "$work/todo" >"$work/queue" || true
    [[ -s $work/queue && -z $stopped ]] || break
    workers=()
    for number in "${!gpus[@]}"; do
        worker "$number" "${gpus[$number]}" &
        workers+=($!)
    done
    for pid in "${workers[@]}"; do
        code=0
        wait "$pid" || code=$?
        while kill -0 "$pid" 2>/dev/null; do
            code=0
            wait "$pid" || code=$?
        done
        [[ $code -eq 75 || $code -eq 130 ]] && stopped=${stopped:-$code}
    done
    todo "$work/names" >"$work/todo" 2>/dev/null
done

# ---------------------------------------------------------------- what came out

if [[ -n $stopped ]]; then
    echo "stopped; run it again to go on" >&2
    if [[ -n $usr1 && -n ${SLURM_JOB_ID:-} ]]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$stopped"
fi
if [[ -n ${EVAL:-} ]]; then
    # shellcheck disable=SC2086 # options, split at spaces
    "$PYTHON" eval_steering.py --run "$OUTPUT_DIR" $EVAL </dev/null >>"$LOG_DIR/eval.log" 2>&1 ||
        echo "evaluation ended with exit code $? ($LOG_DIR/eval.log)" >&2
fi
if [[ -d $OUTPUT_DIR && ($left -gt 0 || ! -e $OUTPUT_DIR/report.csv) ]]; then
    "$PYTHON" eval_steering.py --run "$OUTPUT_DIR" --report-only </dev/null || true # no run at all, if every role failed
fi
left=$(wc -l <"$work/todo")
echo "$((total - left)) of $total done or in work elsewhere"
if [[ $left -gt 0 ]]; then
    sed 's/^/failed: /' "$work/todo" >&2
    exit 1
fi
