#!/usr/bin/env bash
# On a TPU VM, called by tpu.sh through ssh: starts the sweep under tmux, so that it outlives the ssh, and tells about it.
#
#   worker.sh start SWEEP ARGS   stops what runs here, then starts the sweep
#   worker.sh follow LINE        prints its log from that line on, until it ends
#   worker.sh status             prints "running", "ended CODE" or "absent"
#   worker.sh results NAME       prints "some" where the sweep of that name has made its directory, or "none"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
here=runs/.launch # pid, log.txt and code of the sweep at hand

running() { [ -f $here/pid ] && kill -0 "$(cat $here/pid)" 2>/dev/null; }

# A sweep saves its state on SIGTERM; one that hangs, as where another worker is gone, does not answer.
stop() {
  local seconds
  for seconds in {1..60}; do
    running || return 0
    kill -s "$([ "$seconds" -le 30 ] && echo TERM || echo KILL)" -- "-$(cat $here/pid)" || true
    sleep 1
  done
}

start() {
  stop
  mkdir -p $here
  rm -f $here/*
  command -v tmux >/dev/null || sudo apt-get install -y -q tmux >/dev/null
  touch $here/log.txt
  tmux new-session -d -s "mha_jax-$$" "$(printf '%q ' exec env MHA_JAX_COMMIT="${MHA_JAX_COMMIT-}" "$PWD/experiments/launch/worker.sh" run "$@")"
  while [ ! -f $here/pid ]; do sleep 0.05; done
}

# The Python of the system is too old on most images of TPU VMs: uv brings one.
environment() {
  # shellcheck source=environment.sh
  . experiments/launch/environment.sh
  if [ ! -x .venv/bin/python ] && ! find_python >/dev/null 2>&1; then
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --seed --python 3.12 .venv
  fi
  install requirements.txt requirements-tpu.txt
}

# tmux makes each session's command a process group of its own, so that its pid names the group.
run() {
  echo $$ >$here/pid
  trap 'echo $? >$here/code' EXIT
  exec >>$here/log.txt 2>&1
  environment
  local code=0
  PYTHONUNBUFFERED=1 .venv/bin/python -m experiments.sweep "$@" &
  trap 'kill -TERM $!' TERM HUP
  wait $! || code=$?
  while kill -0 $! 2>/dev/null; do # a signal ends `wait`, not the sweep
    code=0
    wait $! || code=$?
  done
  exit "$code"
}

case $1 in
  start | run) "$@" ;;
  follow) tail -n "+$2" -s 0.1 --pid="$(cat $here/pid)" -F $here/log.txt 2>/dev/null ;;
  results) [ -d "runs/$2" ] && echo some || echo none ;;
  status)
    if running; then
      echo running
    elif [ -f $here/code ]; then
      echo "ended $(cat $here/code)"
    else
      echo absent
    fi
    ;;
esac
