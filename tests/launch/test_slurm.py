"""launch.sh slurm: an array job of cells, requeued where it is stopped, and a report after it."""

import subprocess

PREPARED = """
case "$*" in
  *prepare_only*dry_run*) echo "3 cells, 80 steps"; echo "5 cells would be prepared in w" ;;
  *prepare_only*) echo "5 cells prepared in w" ;;
esac
"""


def test_slurm_gets_an_array_of_the_cells_and_a_report_after_it(cloud):
    cloud.set("sweep", PREPARED)
    flags = ["--config=c.py", "--workdir=w", "--workers=2", "--hang_seconds=9"]
    ended = cloud.run("slurm", "--partition=gpu", "--cells_per_job=2", "--", *flags)
    assert ended.returncode == 0, ended.stderr
    workdir = f"{cloud.clone}/w"
    array, report = [call for call in cloud.calls if call.startswith("sbatch")]
    for option in ("--array=0-2", "--requeue", "--signal=B:TERM@120", "--partition=gpu", f"--chdir={cloud.clone}"):
        assert option in array.split()
    assert array.endswith(f"experiments/launch/slurm_job.sh {workdir} 2 --workers=2 --hang_seconds=9")
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
    array, report = [line for line in ended.stdout.splitlines() if line.startswith("sbatch ")]
    assert "--array=0-4" in array and report.endswith(" report")
    assert (cloud.clone / "experiments" / "launch" / "slurm_job.sh").read_text() in ended.stdout
    assert not any(call.startswith("sbatch") for call in cloud.calls)


def job(cloud, *arguments):
    index = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "41"}
    command = ["bash", "experiments/launch/slurm_job.sh", *arguments]
    return subprocess.Popen(command, cwd=cloud.clone, env=cloud.environment | index)


def test_an_index_trains_its_cells_and_is_not_requeued_when_they_are_done(cloud):
    assert job(cloud, "w", "2", "--workers=2").wait(20) == 0
    (call,) = cloud.calls
    assert call.strip() == "python -m experiments.sweep --workdir=w --cells=2:4 --workers=2"


def test_an_index_that_is_stopped_saves_its_state_and_asks_for_another_turn(cloud):
    cloud.set("sweep", "trap 'sleep 0.1; exit 75' TERM; touch \"$CLOUD/up\"; while :; do sleep 0.05; done")
    process = job(cloud, "w", "2")
    while not (cloud.path / "up").exists():
        assert process.poll() is None
    process.terminate()
    assert process.wait(20) == 75
    assert cloud.calls[-1] == "scontrol requeue 41_1"
