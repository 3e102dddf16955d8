import csv
import json

import pytest

from mha_jax.reporting import build_report, planned
from mha_jax.reporting.results import read
from mha_jax.sweeps.plan import Expectation

EXPECTED = Expectation("AMD", ("cpu",), 2, {"float32": 1e9}, None, "1 GFLOP/s in float32, an assumption")


@pytest.fixture
def sweep(make_sweep):
    """Two done cells, one of them trained on another device, as the sweep's plan and the runs' statuses tell."""
    made = make_sweep("configs/default.py:smoke", {0: [1.5, 1.6], 1: [1.4, 1.5]})
    _change(made.path / "sweep.json", expectation=EXPECTED.facts())
    for run, kind in zip(made.runs, ("cpu", "TPU v4"), strict=True):
        devices = {"platform": "cpu", "kind": kind, "count": 2}
        _change(run.path / "status.json", step_flops=2.5e8, update_bytes=1e6, devices=devices)
    return made


def _change(path, **facts):
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def test_a_run_is_set_beside_its_plan(sweep):
    (row,) = planned.rows(read(sweep.path))
    assert row["run"] == sweep.runs[0].run_id
    # 0.25 GFLOP on two cores of 1 GFLOP/s; the log says 0.25 s a step, and status.json 90 s of training in 105 s
    assert (row["planned_step_seconds"], row["step_seconds"]) == (0.125, 0.25)
    assert (row["planned_train_seconds"], row["train_seconds"], row["whole_seconds"]) == (50.0, 90.0, 105.0)
    assert row["planned_device_hours"] == pytest.approx(100 / 3600)
    assert row["device_hours"] == pytest.approx(210 / 3600)


def test_the_page_and_a_file_show_it(sweep):
    page = build_report(sweep.path).read_text()
    assert "Plan and what it took" in page and "2 cores of AMD" in page and "an assumption" in page
    assert "125 ms" in page and "250 ms" in page and "2.00" in page
    with (sweep.path / "report" / "plan.csv").open() as file:
        (line,) = csv.DictReader(file)
    assert (line["planned_step_seconds"], line["step_seconds"]) == ("0.125", "0.25")


def test_a_sweep_without_a_plan_shows_none(make_sweep):
    made = make_sweep("configs/default.py:smoke", {0: [1.5, 1.6]})
    assert planned.rows(read(made.path)) == [] and planned.basis(read(made.path)) == ""
    assert "Plan and what it took" not in build_report(made.path).read_text()
