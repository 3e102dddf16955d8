#!/usr/bin/env bash
# A sweep on a TPU VM that is made or reused, followed from here, and made and started again where it is taken away.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

usage() {
  cat <<'TEXT'
usage: ./launch.sh tpu --name=N --zone=Z --type=v5litepod-8 [OPTIONS] -- SWEEP ARGS
       ./launch.sh tpu --name=N --zone=Z --delete      deletes the TPU VM, if this script made it

  --project=P         the project; left out: gcloud's own setting
  --workdir=gs://B/D  where the sweep's files go; left out: on the VM, and in the end into runs/N here
  --spot              a VM that may be taken away at any moment; needs --workdir=gs://
  --queued            waits in the queue of the zone until there is one
  --version=V         the VM's software; left out: what fits the type
  --delete            deletes the VM after the sweep, if this script made it
  --poll_seconds=15   how long to wait before looking again
  --dry_run           prints each command, runs none
TEXT
}

wrong() { echo "error: $*" >&2 && exit 2; }
failed() { echo "error: $*" >&2 && exit 1; }
say() { echo "== $*"; }

name='' zone='' type='' version='' project='' workdir='' spot='' queued='' delete='' dry_run='' poll_seconds=15
while [ $# -gt 0 ]; do
  case $1 in
    --name=* | --zone=* | --type=* | --version=* | --project=* | --workdir=* | --poll_seconds=*)
      assignment=${1#--}
      printf -v "${assignment%%=*}" %s "${assignment#*=}"
      ;;
    --spot | --queued | --delete | --dry_run) printf -v "${1#--}" yes ;;
    -h | --help) usage && exit ;;
    --) shift && break ;;
    *) wrong "unknown argument '$1' of ./launch.sh tpu; what the sweep is given comes after --" ;;
  esac
  shift
done
only_delete=$([ -z "$delete" ] || [ $# -gt 0 ] || echo yes)

[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || wrong "--name='$name' must be lower-case letters, digits and -: the TPU VM"
[ -n "$zone" ] || wrong "--zone is missing, for instance --zone=us-central1-a"
[[ $poll_seconds =~ ^[0-9]+([.][0-9]+)?$ ]] || wrong "--poll_seconds='$poll_seconds' must be a number of seconds"
if [ -z "$only_delete" ]; then
  [[ $type =~ ^[a-z0-9]+-[0-9]+$ ]] || wrong "--type='$type' must be a TPU type, for instance --type=v5litepod-8"
  [ -n "$version" ] || case $type in
    v[234]-*) version=tpu-ubuntu2204-base ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) wrong "--version is missing: which software a TPU VM of type $type runs is not known here" ;;
  esac
  [ -z "$workdir" ] || [[ $workdir == gs://?* ]] || wrong "--workdir='$workdir' must begin with gs://, or be left out"
  # A host has up to eight cores or chips, as its type counts them.
  workers=$([ "${type##*-}" -gt 8 ] && echo several || echo one)
  if [ -z "$workdir" ]; then
    [ -z "$spot" ] || wrong "--spot needs --workdir=gs://...: what lies on the VM goes with it"
    [ "$workers" = one ] || wrong "--type=$type has several hosts and needs --workdir=gs://..., which all of them see"
  fi
  config=''
  for argument in "$@"; do
    case $argument in
      --config=?*) config=$argument ;;
      --workdir* | --dry_run*) wrong "${argument%%=*} comes before --" ;;
      --prepare_only* | --cells* | --executor*) wrong "$argument is not for ./launch.sh tpu, where the VM trains the whole sweep" ;;
    esac
  done
  [ -n "$config" ] || wrong "the sweep's --config is missing, for instance: -- --config=configs/default.py"
  set -- "$@" --workdir="${workdir:-runs/$name}"
  [ "$workers" = one ] || set -- "$@" --multihost
fi
[ -n "$dry_run" ] || command -v gcloud >/dev/null || wrong "gcloud is not on the path; see cloud.google.com/sdk/docs/install"

mark=mha_jax_launch # the label of what this script made, and may delete
bundle=${TMPDIR:-/tmp}/mha_jax-$name.tgz
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'say "what was started on $name goes on; the same command follows it again"; exit 75' INT TERM

# Prints a command such that a shell reads it again, or runs it.
run() {
  local word quoted line=''
  if [ -z "$dry_run" ]; then
    "$@"
    return
  fi
  for word in "$@"; do
    quoted="'${word//\'/\'\\\'\'}'"
    if [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then quoted=$word; fi
    line+="$quoted "
  done
  echo "${line% }"
}
cloud() { run gcloud compute tpus "$@" --zone="$zone" ${project:+"--project=$project"}; }

# Why the last command failed, in one line.
reason() { grep -m 1 ERROR "$scratch/error" || tail -n 1 "$scratch/error"; }

# describe KIND FORMAT: sets `state` and `maker` of the tpu-vm or the queued-resource.
describe() {
  if cloud "$1" describe "$name" --format="value($2)" >"$scratch/answer" 2>"$scratch/error"; then
    if [ -n "$dry_run" ]; then cat "$scratch/answer"; fi
    IFS=$'\t' read -r state maker <"$scratch/answer" || true
  elif grep -q NOT_FOUND "$scratch/error"; then
    state=ABSENT maker=
  else
    state=UNKNOWN maker=
  fi
}
describe_vm() { describe tpu-vm state,labels.made_by; }
describe_queued() { describe queued-resources 'state.state,tpu.nodeSpec[0].node.labels.made_by'; }

# unanswered WHAT: says so, sleeps, and gives up after ten times without an answer in between.
silence=0
unanswered() {
  say "$*"
  silence=$((silence + 1))
  [ $silence -lt 10 ] || failed "$name has not answered ten times; what was started there goes on. The same command tries again"
  sleep "$poll_seconds"
}

create() {
  local kind=(tpu-vm create "$name" --accelerator-type="$type" --version="$version")
  if [ -n "$queued" ]; then
    kind=(queued-resources create "$name" --node-id="$name" --accelerator-type="$type" --runtime-version="$version")
  fi
  say "making $name, a $type in $zone${spot:+, spot}${queued:+, queued}"
  if cloud "${kind[@]}" --labels=made_by=$mark ${spot:+--spot} 2>"$scratch/error"; then
    return
  fi
  grep -qiE 'capacity|stockout' "$scratch/error" || failed "gcloud did not make $name: $(reason)"
  say "there is no free $type in $zone now; trying again"
  sleep "$poll_seconds"
}

# remove: the VM, if this script made it; `state` and `maker` tell.
remove() {
  [ "$state" != UNKNOWN ] || failed "gcloud does not tell whose $name is, so it is not deleted: $(reason)"
  [ "$maker" = $mark ] || failed "$name was not made by ./launch.sh tpu, so it is not deleted here"
  say "deleting $name"
  local kind=(tpu-vm delete "$name")
  [ -z "$queued" ] || kind=(queued-resources delete "$name" --force)
  cloud "${kind[@]}" --quiet 2>"$scratch/error" || failed "gcloud did not delete $name, which is still paid for: $(reason)"
}

# Returns when there is a VM that is ready, however long it takes.
get_ready() {
  local told=''
  while :; do
    describe_vm
    if [ "$state" = ABSENT ] && [ -n "$queued" ]; then
      describe_queued
    fi
    case $state in
      READY) return ;;
      ABSENT) create ;;
      PREEMPTED | TERMINATED | SUSPENDED | FAILED)
        say "$name was taken away ($state)"
        remove
        ;;
      UNKNOWN) unanswered "gcloud does not tell about $name: $(reason)" ;;
      STOPPED) cloud tpu-vm start "$name" 2>"$scratch/error" || failed "gcloud did not start $name: $(reason)" ;;
      *)
        [ "$state" = "$told" ] || say "waiting for $name: $state"
        told=$state
        sleep "$poll_seconds"
        ;;
    esac
  done
}

on_worker() { cloud tpu-vm ssh "$name" --worker="$1" --command="mha_jax/experiments/launch/worker.sh $2"; }

# start SWEEP ARGS: copies the clone to every worker and starts the sweep there.
start() {
  local command
  command=$(printf '%q ' "$@")
  commit=$(git rev-parse HEAD 2>/dev/null || true)
  [ -z "$commit" ] || [ -z "$(git status --porcelain --untracked-files=no)" ] || commit+=-dirty
  command="mkdir -p mha_jax && tar -xzf mha_jax.tgz -C mha_jax && MHA_JAX_COMMIT=$commit mha_jax/experiments/launch/worker.sh start ${command% }"
  run tar -czf "$bundle" --exclude=./.git --exclude=./.venv --exclude=./runs --exclude=./data --exclude=__pycache__ . &&
    cloud tpu-vm scp "$bundle" "$name:mha_jax.tgz" --worker=all &&
    cloud tpu-vm ssh "$name" --worker=all --command="$command"
}

# The sweep's log, from the line after the last one that was printed here.
follow() { on_worker 0 "follow $(($(wc -l <"$scratch/log.txt") + 1))" | tee -a "$scratch/log.txt" || true; }

# Sets `answer`: what worker 0 says of the sweep; nothing where it does not answer.
ask() {
  answer=$(on_worker 0 status 2>/dev/null | tail -n 1 || true)
  case $answer in
    running | absent | ended\ *) silence=0 ;;
    *) answer='' ;;
  esac
}

# bring: the results, from the VM to here. A VM whose results do not come is not deleted; one may have none.
bring() {
  run mkdir -p runs
  if cloud tpu-vm scp --recurse "$name:mha_jax/runs/$name" runs/ --worker=0; then
    return
  fi
  [ "$(on_worker 0 "results $name" 2>/dev/null | tail -n 1)" = none ] ||
    failed "the sweep ended with exit code $1, and runs/$name did not come from $name, which is kept for it and paid for; the same command tries again"
  say "there is nothing to bring from $name: the sweep ended before it made runs/$name"
  files=''
}

# finish CODE: brings the results here, and deletes the VM where that was asked for.
finish() {
  local files="; its files are in ${workdir:-runs/$name}"
  [ -n "$workdir" ] || bring "$1"
  if [ -n "$delete" ]; then
    describe_vm
    while [ "$state" = UNKNOWN ]; do
      unanswered "gcloud does not tell about $name: $(reason)"
      describe_vm
    done
    [ -z "$dry_run" ] || maker=$mark
    remove
  else
    say "$name is still there, and paid for; to delete it: ./launch.sh tpu --name=$name --zone=$zone${project:+ --project=$project}${queued:+ --queued} --delete"
  fi
  say "the sweep ended with exit code $1$files"
  exit "$1"
}

if [ -n "$only_delete" ]; then
  describe_vm
  [ -z "$dry_run" ] || maker=$mark
  [ "$state" != ABSENT ] || [ -z "$queued" ] || describe_queued
  [ "$state" != ABSENT ] || failed "there is no TPU VM $name in $zone"
  remove
  exit
fi

: >"$scratch/log.txt"
if [ -n "$dry_run" ]; then
  say() { :; }
  describe_vm
  create
  start "$@"
  follow
  on_worker 0 status
  finish 0
fi

while :; do
  get_ready
  ask
  if [ "$answer" = running ]; then
    say "a sweep is running on $name: following it"
  else
    say "starting the sweep on $name"
    : >"$scratch/log.txt"
    if ! start "$@"; then
      unanswered "$name does not answer"
      continue
    fi
    answer=running
  fi
  while [ "$answer" = running ]; do
    follow
    ask
    if [ "$answer" = running ]; then
      say "the connection was lost; following again"
      sleep "$poll_seconds"
    fi
  done
  case $answer in
    "ended 75")
      say "the sweep was stopped with its state saved: going on"
      sleep "$poll_seconds"
      ;;
    ended\ *) finish "${answer#ended }" ;;
    *) unanswered "$name does not answer" ;;
  esac
done
