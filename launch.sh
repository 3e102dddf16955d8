#!/usr/bin/env bash
# Makes .venv beside this file, installs what is missing, and runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# Keeps memory that a step frees for the next one, in large pages and one heap: fetching it anew takes a fifth of a small step on CPU.
export GLIBC_TUNABLES="${GLIBC_TUNABLES-glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456:glibc.malloc.arena_max=1}"

usage() {
  cat <<'TEXT'
usage: ./launch.sh                   trains the default study into runs/default, prints its table, names its report
       ./launch.sh test [ARGS]       runs the test suite; ARGS go to pytest
       ./launch.sh sweep ARGS        runs a sweep here; ARGS go to experiments.sweep
       ./launch.sh ray ARGS          the same with its cells on a Ray cluster
       ./launch.sh slurm OPTIONS -- ARGS   the same as an array job of Slurm; --help tells the options
       ./launch.sh tpu OPTIONS -- ARGS     the same on a TPU VM; --help tells the options
       ./launch.sh bench WHAT ARGS   times what the library does, beside PyTorch; see experiments.bench
TEXT
}

# shellcheck source=experiments/launch/environment.sh
. experiments/launch/environment.sh

case "${1-}" in
  "")
    install requirements.txt
    exec .venv/bin/python -m experiments.sweep --config=configs/default.py --workdir=runs/default
    ;;
  test)
    install requirements.txt requirements-test.txt
    exec .venv/bin/python -m pytest -n 2 --dist worksteal "${@:2}"
    ;;
  sweep)
    install requirements.txt
    exec .venv/bin/python -m experiments.sweep "${@:2}"
    ;;
  bench)
    install requirements.txt requirements-bench.txt
    exec .venv/bin/python -m experiments.bench "${@:2}"
    ;;
  ray)
    install requirements.txt requirements-ray.txt
    exec .venv/bin/python -m experiments.sweep --executor=ray "${@:2}"
    ;;
  slurm | tpu)
    exec "experiments/launch/$1.sh" "${@:2}"
    ;;
  -h | --help | help)
    usage
    ;;
  *)
    echo "error: unknown verb '$1'" >&2
    usage >&2
    exit 2
    ;;
esac
