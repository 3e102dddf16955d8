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
       ./launch.sh bench WHAT ARGS   times what the library does, beside PyTorch; see experiments.bench
TEXT
}

# Asks each interpreter instead of looking for its name: a version manager's shim can exist and not run.
find_python() {
  local name
  for name in python3 python3.12 python3.11 python3.13; do
    if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "error: no Python 3.11, 3.12 or 3.13 on the path; install one and start again" >&2
  return 2
}

make_venv() {
  local python
  python=$(find_python)
  echo "making .venv with $("$python" --version)" >&2
  "$python" -m venv --clear .venv >/dev/null || {
    echo "error: $python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2
    return 2
  }
}

# install FILE...: .venv keeps a copy of every requirements file that is in, so that the next start skips it.
install() {
  local file missing=()
  for file in "$@"; do
    cmp -s "$file" ".venv/$file" || missing+=(-r "$file")
  done
  if [ ${#missing[@]} -gt 0 ]; then
    .venv/bin/python -m pip --version >/dev/null 2>&1 || make_venv
    echo "installing $* into .venv (about a minute the first time)" >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "${missing[@]}"
    cp "$@" .venv/
  fi
}

case "${1-}" in
  "")
    install requirements.txt
    exec .venv/bin/python -m experiments.sweep --config=configs/default.py --workdir=runs/default
    ;;
  test)
    install requirements.txt requirements-test.txt
    exec .venv/bin/python -m pytest -n 2 "${@:2}"
    ;;
  sweep)
    install requirements.txt
    exec .venv/bin/python -m experiments.sweep "${@:2}"
    ;;
  bench)
    install requirements.txt requirements-bench.txt
    exec .venv/bin/python -m experiments.bench "${@:2}"
    ;;
  tpu)
    echo "error: ./launch.sh tpu is not written yet; on a TPU VM install jax[tpu] (see README.md) and use ./launch.sh sweep" >&2
    exit 2
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
