#!/usr/bin/env bash
# One job of Slurm, from the root of the clone: slurm_job.sh WORKDIR CELLS_PER_JOB [FLAGS], or slurm_job.sh WORKDIR report.
set -euo pipefail

if [ "$2" = report ]; then
  exec .venv/bin/python -m experiments.report --workdir="$1"
fi

first=$((SLURM_ARRAY_TASK_ID * $2))
.venv/bin/python -m experiments.sweep --workdir="$1" --cells="$first:$((first + $2))" "${@:3}" &
sweep=$!
trap 'kill -TERM $sweep' TERM
code=0
wait $sweep || code=$?
while kill -0 $sweep 2>/dev/null; do # a signal ends `wait`, not the sweep
  code=0
  wait $sweep || code=$?
done
if [ "$code" = 75 ]; then # stopped with its state saved
  scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
fi
exit "$code"
