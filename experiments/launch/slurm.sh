#!/usr/bin/env bash
# A sweep as an array job of Slurm, and a job after it that writes the report.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

usage() {
  cat <<'TEXT'
usage: ./launch.sh slurm [OPTIONS] -- SWEEP ARGS

  --cells_per_job=1   how many cells an index of the array trains
  --partition=P --gres=gpu:1 --time=4:00:00 --account=A --qos=Q --mem=M --cpus_per_task=N --constraint=C
                      go to sbatch as they are
  --dry_run           prints the commands and the script of the jobs; submits nothing
TEXT
}

wrong() { echo "error: $*" >&2 && exit 2; }
failed() { echo "error: $*" >&2 && exit 1; }

cells_per_job=1 dry_run='' options=()
while [ $# -gt 0 ]; do
  case $1 in
    --cells_per_job=*) cells_per_job=${1#*=} ;;
    --cpus_per_task=*) options+=("--cpus-per-task=${1#*=}") ;;
    --partition=?* | --gres=?* | --time=?* | --account=?* | --qos=?* | --mem=?* | --constraint=?*) options+=("$1") ;;
    --dry_run) dry_run=--dry_run ;;
    -h | --help) usage && exit ;;
    --) shift && break ;;
    *) wrong "unknown argument '$1' of ./launch.sh slurm; what the sweep is given comes after --" ;;
  esac
  shift
done
[[ $cells_per_job =~ ^[1-9][0-9]*$ ]] || wrong "--cells_per_job='$cells_per_job' must be a number of at least 1"
workdir='' passed=()
for argument in "$@"; do
  case $argument in
    --workdir=?*) workdir=${argument#*=} ;;
    --workers=?* | --hang_seconds=?*) passed+=("$argument") ;;
    --workers | --hang_seconds) wrong "$argument: write it as $argument=NUMBER" ;;
    --dry_run*) wrong "--dry_run comes before --" ;;
    --executor* | --cells* | --prepare_only*) wrong "$argument is not for ./launch.sh slurm, which says itself who trains what" ;;
  esac
done
[ -n "$workdir" ] || wrong "the sweep's --workdir=DIR is missing: a directory that every node sees, or gs://..."
[[ $workdir == *://* || $workdir == /* ]] || workdir=$PWD/$workdir
[[ $workdir != *[[:space:]]* ]] || wrong "--workdir='$workdir' must have no blanks, as Slurm would part it there"
for tool in sbatch squeue; do
  [ -n "$dry_run" ] || command -v $tool >/dev/null || wrong "$tool is not on the path: this is no machine that submits to Slurm"
done

python=.venv/bin/python
job=experiments/launch/slurm_job.sh
logs=$PWD/runs/slurm
common=(--parsable --comment="$workdir" --chdir="$PWD" --open-mode=append)

if [ -z "$dry_run" ]; then
  queued=$(squeue --me --noheader --format='%A %k' | awk -v workdir="$workdir" '$2 == workdir { print $1; exit }') ||
    failed "squeue does not tell which jobs there are, so nothing is submitted"
  [ -z "$queued" ] || wrong "job $queued trains into $workdir already; wait for it, or: scancel $queued"
fi
# shellcheck source=environment.sh
. experiments/launch/environment.sh
install requirements.txt
prepared=$("$python" -m experiments.sweep "$@" --prepare_only ${dry_run:+"$dry_run"}) || exit $?
echo "$prepared"
cells=$(sed -nE 's/^([0-9]+) cells (would be )?prepared in .*/\1/p' <<<"$prepared" | tail -n 1)
[ -n "$cells" ] || failed "experiments.sweep did not say how many cells there are"
last=$(((cells + cells_per_job - 1) / cells_per_job - 1))

# Two minutes before the time is up the cells get SIGTERM: they save their state, and the job asks for another turn.
array=(sbatch "${common[@]}" --job-name=mha_jax --array="0-$last" --requeue --signal=B:TERM@120
  --output="$logs/%A_%a.txt" ${options[@]+"${options[@]}"} "$job" "$workdir" "$cells_per_job" ${passed[@]+"${passed[@]}"})
report() { echo "sbatch ${common[*]} --job-name=mha_jax_report --dependency=afterany:$1 --output=$logs/%A.txt $job $workdir report"; }

if [ -n "$dry_run" ]; then
  echo "${array[*]}"
  report JOB
  echo "# $job"
  cat "$job"
  exit
fi
mkdir -p "$logs"
array_id=$("${array[@]}") || failed "sbatch did not take the job"
array_id=${array_id%%;*} # JOB;CLUSTER where there are several
read -ra words <<<"$(report "$array_id")"
report_id=$("${words[@]}") || failed "sbatch took job $array_id, but not the report's; later: $python -m experiments.report --workdir=$workdir"
echo "job $array_id trains $cells cells in $((last + 1)) parts, job ${report_id%%;*} writes the report after it"
echo "what they say is in $logs; to look: squeue --job=$array_id"
