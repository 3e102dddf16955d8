# shellcheck shell=bash
# Sourced by the scripts, in the root of the clone: .venv with a Python that fits and what the requirements files name.

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
