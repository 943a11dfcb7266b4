#!/usr/bin/env bash
# Train one steering vector for every dataset of a role list, one after the other.
#
#   bash run_all_roles.sh roles.txt [options of train_steering.py ...]
#   tmux new -s roles 'bash run_all_roles.sh roles.txt --model Qwen/Qwen3-32B'     # and detach: C-b d
#
# roles.txt: one full dataset name a line; "#" starts a comment, blank lines are skipped. Write one
# with: python data_filter.py --data-root DATA --model ID --write-list roles.txt
# Finished runs are skipped, so run it again to go on. A role that fails is recorded and the others
# still run. SIGTERM and SIGUSR1 are passed on: the role saves a checkpoint and the loop exits with 75.
# Exit codes: 0 all done, 1 some failed (they are listed), 2 bad usage, 75 or 130 (Ctrl-C) stopped.
#
# Environment (relative paths start at this script's folder):
#   DATA_ROOT   folder of the datasets         (data)
#   OUTPUT_DIR  root of the run folders        (runs)
#   LOG_DIR     one log per role goes here     (logs)
#   PYTHON      the interpreter                (.venv/bin/python if there is one, else python3)
#   TRAIN       the script it runs per role    (train_steering.py)
set -euo pipefail

if [[ $# -lt 1 || $1 == -h || $1 == --help ]]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    exit 2
fi
[[ -r $1 ]] || { echo "error: $1: no such list" >&2; exit 2; }
list=$(realpath -- "$1")
shift
cd "$(dirname -- "${BASH_SOURCE[0]}")"

DATA_ROOT=${DATA_ROOT:-data}
OUTPUT_DIR=${OUTPUT_DIR:-runs}
LOG_DIR=${LOG_DIR:-logs}
TRAIN=${TRAIN:-train_steering.py}
default_python=python3
[[ -x .venv/bin/python ]] && default_python=.venv/bin/python
PYTHON=${PYTHON:-$default_python}

mkdir -p "$LOG_DIR"

roles=()
while IFS= read -r line || [[ -n $line ]]; do
    line=${line%$'\r'} # Windows line ends
    line=${line%%#*}
    read -r role _ <<<"$line" || true
    [[ -n ${role:-} ]] && roles+=("$role")
done <"$list"
[[ ${#roles[@]} -gt 0 ]] || { echo "error: $list names no dataset" >&2; exit 2; }

# The role runs in the background, so that the traps act at once; it stops after its step.
child='' stopped=''
trap 'stopped=75; [[ -n $child ]] && kill -TERM "$child" 2>/dev/null' TERM USR1
trap 'stopped=130' INT # the terminal has sent it to the role too

failed=()
for i in "${!roles[@]}"; do
    role=${roles[$i]}
    log="$LOG_DIR/${role//[^A-Za-z0-9_.+-]/_}.log"
    echo "[$((i + 1))/${#roles[@]}] $(date +%H:%M:%S) $role -> $log"
    "$PYTHON" "$TRAIN" --data-root "$DATA_ROOT" --output-dir "$OUTPUT_DIR" --dataset "$role" "$@" \
        </dev/null >>"$log" 2>&1 &
    child=$!
    code=0
    wait "$child" || code=$?
    while [[ -n $stopped ]] && kill -0 "$child" 2>/dev/null; do
        wait "$child" || true # the first wait ended with the signal, not with the role
    done
    child=''
    case ${stopped:-$code} in
        0) echo "    ok: $(tail -n 1 -- "$log")" ;;
        75 | 130)
            echo "stopped in $role; run it again to go on" >&2
            exit "${stopped:-$code}"
            ;;
        *)
            echo "    FAILED (exit code $code): $(tail -n 1 -- "$log")"
            failed+=("$role")
            ;;
    esac
done

echo "$((${#roles[@]} - ${#failed[@]})) of ${#roles[@]} done"
if [[ ${#failed[@]} -gt 0 ]]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
