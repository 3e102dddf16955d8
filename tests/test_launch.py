"""launch.sh and its helpers, with stand-ins for gcloud, tmux, Slurm and Python that record calls and fail on demand."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

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


WRONG = {
    "no verb of that name": (["tpus"], "unknown verb 'tpus'"),
    "no name": (["tpu", "--zone=z"], "--name='' must be"),
    "no zone": (["tpu", "--name=n"], "--zone is missing"),
    "no type": (["tpu", "--name=n", "--zone=z", "--", "--config=c.py"], "--type='' must be a TPU type"),
    "unknown type": (["tpu", "--name=n", "--zone=z", "--type=x9-8", "--", "--config=c"], "--version is missing"),
    "unknown flag": (["tpu", "--name=n", "--zones=z"], "unknown argument '--zones=z'"),
    "no config": (["tpu", "--name=n", "--zone=z", "--type=v4-8", "--"], "--config is missing"),
    "spot without a bucket": (
        ["tpu", "--name=n", "--zone=z", "--type=v4-8", "--spot", "--", "--config=c"],
        "--spot needs --workdir=gs://",
    ),
    "several hosts without a bucket": (
        ["tpu", "--name=n", "--zone=z", "--type=v5litepod-16", "--", "--config=c"],
        "has several hosts and needs --workdir=gs://",
    ),
    "a directory here": (
        ["tpu", "--name=n", "--zone=z", "--type=v4-8", "--workdir=w", "--", "--config=c"],
        "--workdir='w' must begin with gs://",
    ),
    "slurm without a directory": (["slurm", "--", "--config=c"], "--workdir=DIR is missing"),
    "slurm's unknown flag": (["slurm", "--node=4", "--", "--workdir=w"], "unknown argument '--node=4'"),
    "cells by hand": (["slurm", "--", "--workdir=w", "--cells=0:1"], "--cells=0:1 is not for ./launch.sh slurm"),
    "no cells a job": (["slurm", "--cells_per_job=0", "--", "--workdir=w"], "--cells_per_job='0' must be"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_answered_with_a_line_and_nothing_is_started(cloud, case):
    arguments, complaint = WRONG[case]
    ended = cloud.run(*arguments)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ") and complaint in ended.stderr.splitlines()[0]
    assert cloud.calls == []


@pytest.mark.parametrize("tool", ["gcloud", "sbatch"])
def test_a_missing_tool_is_named(cloud, tool):
    for name in ("bash", "dirname", "cmp", "cp", "env"):
        (cloud.path / "few").mkdir(exist_ok=True)
        (cloud.path / "few" / name).symlink_to(shutil.which(name))
    arguments = {
        "gcloud": ["tpu", "--name=n", "--zone=z", "--type=v4-8", "--", "--config=c.py"],
        "sbatch": ["slurm", "--", "--config=c.py", "--workdir=w"],
    }[tool]
    ended = cloud.run(*arguments, PATH=str(cloud.path / "few"))
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith(f"error: {tool} is not on the path")


def test_a_dry_run_prints_commands_that_a_shell_reads_and_runs_none(cloud):
    ended = cloud.tpu("--type=v5litepod-16", "--spot", "--queued", "--workdir=gs://b/d", "--delete", "--dry_run")
    assert ended.returncode == 0, ended.stderr
    assert cloud.calls == []
    lines = ended.stdout.splitlines()
    assert [" ".join(line.split()[3:5]) for line in lines if line.startswith("gcloud")] == [
        "tpu-vm describe",
        "queued-resources create",
        "tpu-vm scp",
        "tpu-vm ssh",
        "tpu-vm ssh",
        "tpu-vm ssh",
        "tpu-vm describe",
        "queued-resources delete",
    ]
    assert subprocess.run(["bash", "-n"], input=ended.stdout, text=True).returncode == 0
    start = next(line for line in lines if "worker.sh start" in line)
    assert "--worker=all" in start and "--config=c.py --workdir=gs://b/d --multihost" in start


def test_a_sweep_is_started_followed_and_its_results_come_back(cloud):
    git = ["git", "-C", str(cloud.clone), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "launch.sh"], ["commit", "-q", "-m", "m"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    (cloud.clone / "launch.sh").write_text((cloud.clone / "launch.sh").read_text() + "\n# changed\n")
    cloud.set("sweep", 'echo "[1/1] a: done"; mkdir -p runs/n/report; echo "| table |" >runs/n/report/table.md')
    ended = cloud.tpu("--type=v5litepod-8")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "[1/1] a: done" in ended.stdout.splitlines()
    assert "n is still there, and paid for" in ended.stdout
    assert cloud.verbs() == ["tpu-vm create", "tpu-vm scp", "tpu-vm scp"]
    assert (cloud.clone / "runs" / "n" / "report" / "table.md").read_text() == "| table |\n"
    copy = cloud.path / "home" / "mha_jax"
    assert (copy / "launch.sh").exists() and not (copy / ".git").exists()
    (call,) = cloud.sweeps()
    assert call == f"python -m experiments.sweep --config=c.py --workdir=runs/n {commit}-dirty"


# The VM is taken away while the first sweep trains; the second goes on.
TAKEN_AWAY = """
if [ ! -f "$CLOUD/taken" ]; then
  echo "[1/2] a: done"
  until grep -q follow "$CLOUD/calls"; do sleep 0.05; done
  sleep 0.2
  touch "$CLOUD/taken"
  printf 'PREEMPTED\\t%s\\n' "mha_jax_launch" >"$CLOUD/vm"
  exit 137
fi
echo "[2/2] b: done"
"""


def test_a_vm_that_is_taken_away_is_made_again_and_the_sweep_goes_on(cloud):
    cloud.set("sweep", TAKEN_AWAY)
    ended = cloud.tpu("--type=v5litepod-8", "--spot", "--workdir=gs://b/d", "--delete")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "== n was taken away (PREEMPTED)" in ended.stdout.splitlines()
    assert [line for line in ended.stdout.splitlines() if line.startswith("[")] == ["[1/2] a: done", "[2/2] b: done"]
    once = ["tpu-vm create", "tpu-vm scp", "tpu-vm delete"]
    assert cloud.verbs() == once + once
    assert len(set(cloud.sweeps())) == 1, "both are given the same arguments"
    assert not (cloud.path / "vm").exists()


def test_a_vm_of_somebody_else_is_used_and_never_deleted(cloud):
    cloud.set("faults", 'mkdir -p "$CLOUD/home/mha_jax"; cp -rn "$CLOUD/clone/.venv" "$CLOUD/home/mha_jax" || true')
    (cloud.path / "vm").write_text("READY\t\n")
    ended = cloud.tpu("--type=v5litepod-8", "--workdir=gs://b/d", "--delete")
    assert ended.returncode == 1
    assert ended.stderr.strip() == "error: n was not made by ./launch.sh tpu, so it is not deleted here"
    assert cloud.verbs() == ["tpu-vm scp"]
    assert len(cloud.sweeps()) == 1


def test_a_lost_connection_neither_ends_the_sweep_nor_prints_a_line_twice(cloud):
    cloud.set("sweep", 'echo one; until [ -f "$CLOUD/cut" ]; do sleep 0.05; done; echo two')
    cloud.set(
        "faults",
        """
        if [[ $* == *follow* && ! -f "$CLOUD/cut" ]]; then
          until grep -q one "$CLOUD/home/mha_jax/runs/.launch/log.txt"; do sleep 0.05; done
          cat "$CLOUD/home/mha_jax/runs/.launch/log.txt"
          touch "$CLOUD/cut"
          exit 255
        fi
        """,
    )
    ended = cloud.tpu("--type=v4-8", "--workdir=gs://b/d")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert [line for line in ended.stdout.splitlines() if line in ("one", "two")] == ["one", "two"]
    assert len(cloud.sweeps()) == 1


def test_a_refused_quota_ends_with_its_reason(cloud):
    reason = "ERROR: (gcloud.compute.tpus.tpu-vm.create) RESOURCE_EXHAUSTED: Quota limit 'TPUV5' has been exceeded"
    cloud.set("faults", f'[ $verb != create ] || {{ echo "{reason}. Limit: 0 in zone z." >&2; exit 1; }}')
    ended = cloud.tpu("--type=v4-8", "--workdir=gs://b/d")
    assert ended.returncode == 1
    assert ended.stderr == f"error: gcloud did not make n: {reason}. Limit: 0 in zone z.\n"
    assert cloud.verbs() == ["tpu-vm create"]


def test_no_capacity_and_the_queue_are_waited_for(cloud):
    cloud.set(
        "faults",
        """
        if [ "$verb" = create ] && [ ! -f "$CLOUD/full" ]; then
          touch "$CLOUD/full"
          echo "ERROR: There is no more capacity in the zone" >&2
          exit 1
        fi
        """,
    )
    ended = cloud.tpu("--type=v4-8", "--workdir=gs://b/d", "--queued", "--delete")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    waits = [line for line in ended.stdout.splitlines() if "waiting" in line or "no free" in line]
    assert waits == [
        "== there is no free v4-8 in z now; trying again",
        "== waiting for n: WAITING_FOR_RESOURCES",
        "== waiting for n: PROVISIONING",
    ]
    assert cloud.verbs() == [*["queued-resources create"] * 2, "tpu-vm scp", "queued-resources delete"]


def test_the_exit_code_of_the_sweep_is_ours(cloud):
    cloud.set("sweep", "echo 'error: planted' >&2; exit 2")
    ended = cloud.tpu("--type=v4-8", "--workdir=gs://b/d")
    assert ended.returncode == 2
    assert "error: planted" in ended.stdout.splitlines()
    assert len(cloud.sweeps()) == 1


def test_what_does_not_answer_is_given_up_with_a_line(cloud):
    cloud.set("faults", "[ $verb != ssh ] || exit 255")
    ended = cloud.tpu("--type=v4-8", "--workdir=gs://b/d")
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: n has not answered ten times")


PREPARED = 'case "$*" in *prepare_only* | *dry_run*) echo "5 cells prepared in w" ;; esac'


def test_slurm_gets_an_array_of_the_cells_and_a_report_after_it(cloud):
    cloud.set("sweep", PREPARED)
    ended = cloud.run("slurm", "--partition=gpu", "--cells_per_job=2", "--", "--config=c.py", "--workdir=w")
    assert ended.returncode == 0, ended.stderr
    workdir = f"{cloud.clone}/w"
    array, report = [call for call in cloud.calls if call.startswith("sbatch")]
    for option in ("--array=0-2", "--requeue", "--signal=B:TERM@120", "--partition=gpu", f"--chdir={cloud.clone}"):
        assert option in array.split()
    assert array.endswith(f"experiments/launch/slurm_job.sh {workdir} 2")
    assert "--dependency=afterany:41" in report.split() and report.endswith(f"slurm_job.sh {workdir} report")
    assert "job 41 trains 5 cells in 3 parts, job 42 writes the report after it" in ended.stdout


def test_slurm_is_not_given_the_same_sweep_twice(cloud):
    cloud.set("sweep", PREPARED)
    cloud.set("jobs", f"17 {cloud.clone}/other\n18 {cloud.clone}/w\n")
    ended = cloud.run("slurm", "--", "--config=c.py", "--workdir=w")
    assert ended.returncode == 2 and "job 18 trains into" in ended.stderr
    assert not any(call.startswith("sbatch") for call in cloud.calls)


def test_slurm_that_refuses_is_told(cloud):
    cloud.set("sweep", PREPARED)
    cloud.set("faults", "echo 'sbatch: error: invalid partition specified: gpux' >&2; exit 1")
    ended = cloud.run("slurm", "--partition=gpux", "--", "--config=c.py", "--workdir=w")
    assert ended.returncode == 1
    assert "invalid partition" in ended.stderr and ended.stderr.endswith("error: sbatch did not take the job\n")


def test_a_dry_run_for_slurm_prints_what_would_be_submitted(cloud):
    cloud.set("sweep", PREPARED)
    ended = cloud.run("slurm", "--time=1:00:00", "--dry_run", "--", "--config=c.py", "--workdir=w")
    assert ended.returncode == 0, ended.stderr
    assert sum(line.startswith("sbatch ") for line in ended.stdout.splitlines()) == 2
    assert (cloud.clone / "experiments" / "launch" / "slurm_job.sh").read_text() in ended.stdout
    assert not any(call.startswith("sbatch") for call in cloud.calls)


def job(cloud, *arguments):
    index = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "41"}
    command = ["bash", "experiments/launch/slurm_job.sh", *arguments]
    return subprocess.Popen(command, cwd=cloud.clone, env=cloud.environment | index)


def test_an_index_trains_its_cells_and_is_not_requeued_when_they_are_done(cloud):
    assert job(cloud, "w", "2").wait(20) == 0
    assert [call.strip() for call in cloud.calls] == ["python -m experiments.sweep --workdir=w --cells=2:4"]


def test_an_index_that_is_stopped_saves_its_state_and_asks_for_another_turn(cloud):
    cloud.set("sweep", "trap 'sleep 0.1; exit 75' TERM; touch \"$CLOUD/up\"; while :; do sleep 0.05; done")
    process = job(cloud, "w", "2")
    while not (cloud.path / "up").exists():
        assert process.poll() is None
    process.terminate()
    assert process.wait(20) == 75
    assert cloud.calls[-1] == "scontrol requeue 41_1"


def test_the_scripts_are_clean_to_shellcheck():
    tool = Path(sys.executable).with_name("shellcheck")
    if not tool.exists():
        pytest.skip("shellcheck is not installed beside Python")
    scripts = [ROOT / "launch.sh", *(ROOT / "experiments" / "launch").glob("*.sh")]
    ended = subprocess.run([tool, "-x", "-P", "SCRIPTDIR", *scripts], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stdout
