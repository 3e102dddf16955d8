"""launch.sh: wrong input and missing tools in one line, and scripts that shellcheck accepts."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mha_jax.sweeps.executors.local import KEEP_MEMORY

ROOT = Path(__file__).parents[2]

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
    "a config by another name": (
        ["tpu", "--name=n", "--zone=z", "--type=v4-8", "--", "--configs=c.py"],
        "--config is missing",
    ),
    "a dry run of the sweep on a TPU VM": (
        ["tpu", "--name=n", "--zone=z", "--type=v4-8", "--", "--config=c.py", "--dry_run"],
        "--dry_run comes before --",
    ),
    "a sweep only prepared on a TPU VM": (
        ["tpu", "--name=n", "--zone=z", "--type=v4-8", "--", "--config=c.py", "--prepare_only"],
        "--prepare_only is not for ./launch.sh tpu",
    ),
    "a dry run of the sweep in Slurm": (["slurm", "--", "--workdir=w", "--dry_run"], "--dry_run comes before --"),
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


@pytest.mark.parametrize("tool", ["gcloud", "sbatch", "squeue"])
def test_a_missing_tool_is_named(cloud, tool):
    for name in ("bash", "dirname", "cmp", "cp", "env"):
        (cloud.path / "few").mkdir(exist_ok=True)
        (cloud.path / "few" / name).symlink_to(shutil.which(name))
    if tool == "squeue":
        (cloud.path / "few" / "sbatch").symlink_to(cloud.path / "bin" / "sbatch")
    slurm = ["slurm", "--", "--config=c.py", "--workdir=w"]
    arguments = ["tpu", "--name=n", "--zone=z", "--type=v4-8", "--", "--config=c.py"] if tool == "gcloud" else slurm
    ended = cloud.run(*arguments, PATH=str(cloud.path / "few"))
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith(f"error: {tool} is not on the path")


def test_the_script_keeps_memory_as_the_drivers_of_cells_do():
    (setting,) = re.findall(r"GLIBC_TUNABLES-([^}]*)", (ROOT / "launch.sh").read_text())
    assert sorted(setting.split(":")) == sorted(KEEP_MEMORY.split(":"))


def test_the_scripts_are_clean_to_shellcheck():
    tool = Path(sys.executable).with_name("shellcheck")
    if not tool.exists():
        pytest.skip("shellcheck is not installed beside Python")
    scripts = [ROOT / "launch.sh", *(ROOT / "experiments" / "launch").glob("*.sh")]
    ended = subprocess.run([tool, "-x", "-P", "SCRIPTDIR", *scripts], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stdout
