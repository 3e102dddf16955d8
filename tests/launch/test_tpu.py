"""launch.sh tpu: a VM is made, lost, made again and deleted, and the sweep on it goes on."""

import subprocess

import pytest


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_vm_of_somebody_else_is_used_and_never_deleted(cloud):
    cloud.set("faults", 'mkdir -p "$CLOUD/home/mha_jax"; cp -rn "$CLOUD/clone/.venv" "$CLOUD/home/mha_jax" || true')
    (cloud.path / "vm").write_text("READY\t\n")
    ended = cloud.tpu("--type=v5litepod-8", "--workdir=gs://b/d", "--delete")
    assert ended.returncode == 1
    assert ended.stderr.strip() == "error: n was not made by ./launch.sh tpu, so it is not deleted here"
    assert cloud.verbs() == ["tpu-vm scp"]
    assert len(cloud.sweeps()) == 1


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_exit_code_of_the_sweep_is_ours(cloud):
    cloud.set("sweep", "echo 'error: planted' >&2; exit 2")
    ended = cloud.tpu("--type=v4-8", "--workdir=gs://b/d")
    assert ended.returncode == 2
    assert "error: planted" in ended.stdout.splitlines()
    assert len(cloud.sweeps()) == 1


@pytest.mark.slow
def test_a_vm_is_deleted_where_the_sweep_ended_before_it_had_results_and_kept_where_they_do_not_come(cloud):
    cloud.set("sweep", "echo 'error: planted' >&2; exit 2")
    ended = cloud.tpu("--type=v4-8", "--delete")
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert "== there is nothing to bring from n: the sweep ended before it made runs/n" in ended.stdout.splitlines()
    assert cloud.verbs()[-1] == "tpu-vm delete" and not (cloud.path / "vm").exists()
    cloud.set("sweep", "mkdir -p runs/n")
    cloud.set("faults", '[ "$verb $5" != "scp --recurse" ] || exit 255')
    ended = cloud.tpu("--type=v4-8", "--delete")
    assert ended.returncode == 1
    assert ended.stderr.startswith(
        "error: the sweep ended with exit code 0, and runs/n did not come from n, which is kept"
    )
    assert cloud.verbs()[-1] == "tpu-vm scp"


def test_what_gcloud_does_not_tell_or_do_ends_with_a_line(cloud):
    delete = ["tpu", "--name=n", "--zone=z", "--delete", "--poll_seconds=0"]
    (cloud.path / "vm").write_text("READY\tmha_jax_launch\n")
    refuse = 'echo "ERROR: (gcloud.compute.tpus) planted" >&2; exit 1'
    for verb, arguments, told in (
        (
            "describe",
            delete,
            "gcloud does not tell whose n is, so it is not deleted: ERROR: (gcloud.compute.tpus) planted",
        ),
        ("delete", delete, "gcloud did not delete n, which is still paid for: ERROR: (gcloud.compute.tpus) planted"),
    ):
        cloud.set("faults", f"[ $verb != {verb} ] || {{ {refuse}; }}")
        ended = cloud.run(*arguments)
        assert (ended.returncode, ended.stderr) == (1, f"error: {told}\n")
    (cloud.path / "vm").write_text("STOPPED\tmha_jax_launch\n")
    cloud.set("faults", f"[ $verb != start ] || {{ {refuse}; }}")
    ended = cloud.tpu("--type=v4-8", "--workdir=gs://b/d")
    assert (ended.returncode, ended.stderr.split(": ERROR")[0]) == (1, "error: gcloud did not start n")


def test_what_does_not_answer_is_given_up_with_a_line(cloud):
    cloud.set("faults", "[ $verb != ssh ] || exit 255")
    ended = cloud.tpu("--type=v4-8", "--workdir=gs://b/d")
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: n has not answered ten times")
