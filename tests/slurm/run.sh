#!/usr/bin/env bash
# The sample list as a Slurm array of 4 tasks, one of them requeued midway: every vector, none twice.
#
#   make test-slurm            (as root: it starts a cluster of this machine, tests/slurm/cluster.sh)
#
# Environment: WORK (a new folder under /tmp), PYTHON (.venv/bin/python),
#   MODEL (models/SmolLM2-135M-Instruct), STEPS (40)
set -euo pipefail
cd "$(dirname -- "${BASH_SOURCE[0]}")/../.."
WORK=${WORK:-$(mktemp -d)}
MODEL=${MODEL:-models/SmolLM2-135M-Instruct}
export PYTHON=${PYTHON:-.venv/bin/python}
export DATA_ROOT=sample_data OUTPUT_DIR=$WORK/runs LOG_DIR=$WORK/logs
export OMP_NUM_THREADS=1 SLURM_CONF=$WORK/slurm/slurm.conf
options=(--model "$MODEL" --layer 12 --max-steps "${STEPS:-40}" --save-every 5)

bash tests/slurm/cluster.sh start "$WORK/slurm"
trap 'bash tests/slurm/cluster.sh stop "$WORK/slurm"' EXIT

roles=(sample__role__pirate sample__role__noir_detective sample__role__drill_sergeant
    sample__trait__melodramatic)
printf '%s\n' "${roles[@]}" >"$WORK/roles.txt"
job=$(sbatch --parsable --array=0-3 --cpus-per-task=1 --output="$WORK/slurm-%a.log" \
    run_all_roles.sh "$WORK/roles.txt" "${options[@]}")
echo "submitted array $job"

until grep -q '"step": 8' "$WORK"/runs/*/layer12/"${roles[0]}"/metrics.jsonl 2>/dev/null; do
    sleep 1
done
echo "task 0 is past step 8: scontrol requeue ${job}_0"
scontrol requeue "${job}_0"

while [[ -n $(squeue --noheader --jobs "$job" 2>/dev/null) ]]; do
    now=$(squeue --noheader --array --jobs "$job" --format='%K:%T' | paste -sd' ' -)
    [[ $now == "${before:-}" ]] || echo "$(date +%T) $now"
    before=$now
    if grep -q 'BeginTime' <(squeue --noheader --jobs "$job" --format=%r); then
        scontrol update JobId="${job}_0" StartTime=now # Slurm waits two minutes by default
    fi
    sleep 2
done

echo
"$PYTHON" eval_steering.py --run "$WORK/runs" --report-only
bad=0
for role in "${roles[@]}"; do
    vectors=$(find "$WORK/runs" -path "*/$role/steering_vector.safetensors" | wc -l)
    finished=$(cat "$WORK"/runs/*/layer12/"$role"/train.log | grep -c '^done ')
    steps=$(cat "$WORK"/runs/*/layer12/"$role"/metrics.jsonl | grep -c '"loss"')
    resumed=$(cat "$WORK"/runs/*/layer12/"$role"/train.log | grep '^resume' || true)
    echo "$role: $vectors vector, finished $finished time, $steps steps logged; ${resumed:-not resumed}"
    [[ $vectors -eq 1 && $finished -eq 1 && $steps -eq ${STEPS:-40} ]] || bad=1
done
grep -q '^resume' "$WORK"/runs/*/layer12/"${roles[0]}"/train.log || bad=1
[[ $bad -eq 0 ]] && echo "all there, none twice" || echo "FAILED (logs in $WORK)"
exit "$bad"
