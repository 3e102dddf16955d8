"""Stand-ins for gcloud, tmux, Slurm and Python that record calls and fail on demand."""

import os
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# One TPU VM whose disk is the directory home/. A test's `faults` come first and may answer in its place.
GCLOUD = r"""
echo "gcloud $*" >>"$CLOUD/calls"
kind=$3 verb=$4
ours() { printf '%s\tmha_jax_launch\n' "$1"; }
absent() { echo "ERROR: (gcloud.compute.tpus.$kind.$verb) NOT_FOUND: Resource 'n' was not found" >&2; exit 1; }
boot() { ours READY >"$CLOUD/vm"; mkdir -p "$CLOUD/home/mha_jax"; cp -r "$CLOUD/clone/.venv" "$CLOUD/home/mha_jax"; }
. "$CLOUD/faults"
case $kind-$verb in
  tpu-vm-create) boot ;;
  tpu-vm-describe) cat "$CLOUD/vm" 2>/dev/null || absent ;;
  queued-resources-create) ours WAITING_FOR_RESOURCES >"$CLOUD/queue" ;;
  queued-resources-describe)
    before=$(cat "$CLOUD/queue" 2>/dev/null) || absent
    echo "$before"
    case $before in WAITING*) ours PROVISIONING ;; *) boot; ours ACTIVE ;; esac >"$CLOUD/queue"
    ;;
  *-delete) rm -rf "$CLOUD/vm" "$CLOUD/queue" "$CLOUD/home" ;;
  *) # scp and ssh
    [[ $(cat "$CLOUD/vm") == READY* ]] || { echo "ssh: connect to host: timed out" >&2; exit 255; }
    cd "$CLOUD/home"
    case "$verb $5" in
      "scp --recurse") cp -r "${6#*:}" "$CLOUD/clone/$7" ;;
      scp*) cp "$5" "${6#*:}" ;;
      ssh*) for word; do case $word in --command=*) exec bash -c "${word#--command=}" ;; esac; done ;;
    esac
    ;;
esac
"""
TMUX = 'setsid bash -c "${@: -1}" </dev/null >/dev/null 2>&1 &'
PYTHON = r"""
case "$*" in *"-m pip"* | "-c "*) exit ;; esac
echo "python $* ${MHA_JAX_COMMIT-}" >>"$CLOUD/calls"
. "$CLOUD/sweep"
"""
SBATCH = r"""
echo "sbatch $*" >>"$CLOUD/calls"
. "$CLOUD/faults"
echo $((40 + $(grep -c ^sbatch "$CLOUD/calls")))
"""


class Cloud:
    """A clone of the scripts, with stand-ins first on its path."""

    def __init__(self, path: Path):
        self.path = path
        self.clone = path / "clone"
        (self.clone / "experiments").mkdir(parents=True)
        shutil.copytree(ROOT / "experiments" / "launch", self.clone / "experiments" / "launch")
        for file in (ROOT / "launch.sh", *ROOT.glob("requirements*.txt")):
            shutil.copy(file, self.clone)
            (self.clone / ".venv").mkdir(exist_ok=True)
            shutil.copy(file, self.clone / ".venv")  # as it is when they are installed
        stand_ins = {
            "gcloud": GCLOUD,
            "tmux": TMUX,
            "sbatch": SBATCH,
            "squeue": 'cat "$CLOUD/jobs" 2>/dev/null || true',
        }
        for name, text in stand_ins.items():
            self._script(path / "bin" / name, text)
        self._script(path / "bin" / "scontrol", 'echo "scontrol $*" >>"$CLOUD/calls"')
        self._script(self.clone / ".venv" / "bin" / "python", PYTHON)
        self.set("faults", "")
        self.set("sweep", "echo trained")

    def _script(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/usr/bin/env bash\nset -euo pipefail\n" + text)
        path.chmod(0o755)

    def set(self, name: str, text: str) -> None:
        (self.path / name).write_text(textwrap.dedent(text))

    @property
    def environment(self) -> dict[str, str]:
        path = f"{self.path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "CLOUD": str(self.path), "TMPDIR": str(self.path)}

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        command = ["bash", str(self.clone / "launch.sh"), *arguments]
        environment = self.environment | environment
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)

    def tpu(self, *options: str) -> subprocess.CompletedProcess:
        place = ["--name=n", "--zone=z", "--poll_seconds=0"]
        return self.run("tpu", *place, *options, "--", "--config=c.py")

    @property
    def calls(self) -> list[str]:
        file = self.path / "calls"
        return file.read_text().splitlines() if file.exists() else []

    def verbs(self) -> list[str]:
        """What was asked of gcloud but looks at states and ssh."""
        words = [call.split() for call in self.calls if call.startswith("gcloud")]
        return [f"{kind} {verb}" for _, _, _, kind, verb, *_ in words if verb not in ("describe", "ssh")]

    def sweeps(self) -> list[str]:
        return [call for call in self.calls if "experiments.sweep" in call and call.startswith("python")]


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)
