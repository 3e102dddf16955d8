"""Dry runs from the command line, for devices that are not here."""

import json

import pytest

from experiments import sweep

SMOKE = "--config=configs/default.py:smoke"


def test_a_named_device_is_planned_for_and_nothing_is_made(script, tmp_path):
    ended = script(sweep.main, SMOKE, "--dry_run", "--device=v5e", "--device_count=4", f"--workdir={tmp_path / 'w'}")
    assert ended.code == 0, ended.err
    assert "on 4 × v5e a cell" in ended.out and "an assumption" in ended.out
    assert "2 cells, 80 steps over all seeds" in ended.out and "device-hours" in ended.out
    assert not (tmp_path / "w").exists()


def test_a_users_device_and_record_decide_the_time(script, tmp_path):
    peaks = {"float32": 2.0, "bfloat16": 2.0}
    device = {"kinds": ["Toy"], "peak_tflops": peaks, "memory_gib": 1, "memory_gb_per_second": 1e6, "source": "made up"}
    (tmp_path / "mine.json").write_text(json.dumps({"toy": device}))
    record = {
        "benchmark": "train_step",
        "environment": {"device": "Toy", "devices": 1, "processor": "P", "cores": 1},
        "setting": {"devices": None},
        "rows": [{"step_flops": 1e9, "step_ms": {"mha_jax": {"median": 1.0}}}],
    }
    (tmp_path / "toy.json").write_text(json.dumps(record))
    flags = [SMOKE, "--dry_run", "--device=toy", f"--devices_file={tmp_path / 'mine.json'}", f"--records={tmp_path}"]
    ended = script(sweep.main, *flags)
    # 3 × 37,120 FLOPs of 8 × 32 bytes of 2 seeds at 1 TFLOP/s
    assert ended.code == 0 and "0.057 ms" in ended.out, ended.out + ended.err
    assert "50% of the peak of 2 TFLOP/s" in ended.out and "toy.json" in ended.out


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--dry_run", "--device=v9"], "--device='v9' is not in the table; v2, v3"),
        (["--dry_run", "--device=v5e", "--compile"], "--compile asks the compiler of the devices here"),
        (["--dry_run", "--topology=v5e:2x2", "--device=v5e"], "leave --device and --compile out"),
        (["--dry_run", "--device_count=2"], "--device_count=2 goes with --device"),
        (["--dry_run", "--device=v5e", "--devices_file=none.json"], "none.json cannot be read"),
        (["--dry_run", "--device=v5e", "--records=none"], "--records=none is no directory"),
        (["--topology=v5e:2x2", "--workdir=w"], "--topology goes with --dry_run"),
    ],
)
def test_flags_that_do_not_go_together_are_told_in_one_line(script, flags, complaint):
    assert complaint in script(sweep.main, SMOKE, *flags).complaint
