import json
import math

import pytest

from mha_jax.reporting import results
from mha_jax.specs import UserError

DEFAULT = "configs/default.py"


def test_one_row_per_run_and_seed_with_swept_fields_and_last_values(make_sweep):
    sweep = make_sweep(DEFAULT, {0: [1.6, 1.7, 1.8], 3: [1.5, 1.4, 1.3]})
    rows = results.read(sweep.path).rows()
    assert [(r["model.num_heads"], r["seed"]) for r in rows] == [(1, 0), (1, 1), (1, 2), (8, 0), (8, 1), (8, 2)]
    assert [r["validation/loss"] for r in rows] == pytest.approx([1.6, 1.7, 1.8, 1.5, 1.4, 1.3])
    assert rows[0]["test/loss"] == pytest.approx(1.61)
    assert rows[0]["tokens_per_second"] == 1250.0  # the median of 1100, 1200, 1300 and 1400
    assert (rows[0]["peak_bytes"], rows[0]["predicted_peak_bytes"]) == (3 * 2**20, 5 * 2**20)


def test_unfinished_cells_have_no_row_and_a_reason(make_sweep):
    sweep = make_sweep(DEFAULT, {0: [1.6, 1.7, 1.8], 3: [1.5, 1.4, 1.3]})
    sweep.runs[0].update(state="running", step=120)
    sweep.runs[1].update(state="failed", error="out of memory")
    found = results.read(sweep.path)
    assert {row["model.num_heads"] for row in found.rows()} == {8}
    summaries = [cell.summary for cell in found.cells]
    assert summaries[0] == "running at step 120 of 400"
    assert summaries[1].startswith("failed: out of memory (traceback: runs/default-num_heads=2")
    assert summaries[2:] == ["queued", "done", "queued"]


def test_illegal_cells_say_why(make_sweep, tmp_path):
    config = tmp_path / "three_heads.py"
    config.write_text(
        "from configs.default import get_config\n"
        "def get_sweep(profile=''):\n    yield {'model.num_heads': 8}\n    yield {'model.num_heads': 3}\n"
    )
    cell = results.read(make_sweep(str(config), {0: [1.5, 1.4, 1.3]}).path).cells[1]
    assert cell.state == "illegal" and cell.summary.startswith("illegal: d_model=128 is not a multiple of num_heads=3")


def test_a_corrupt_line_is_named_and_the_rest_is_read(make_sweep):
    sweep = make_sweep(DEFAULT, {0: [1.6, 1.7, 1.8]})
    file = sweep.runs[0].path / "metrics.jsonl"
    file.write_text('{"step": 1\n' + file.read_text())
    (sweep.runs[1].path / "status.json").write_text("{")
    found = results.read(sweep.path)
    assert len(found.problems) == 2
    assert "metrics.jsonl: line 1" in found.problems[0] and "status.json is damaged" in found.problems[1]
    assert len(found.rows()) == 3


def test_a_value_that_is_not_finite_stays_so(make_sweep):
    sweep = make_sweep(DEFAULT, {0: [1.6, 1.7, 1.8]})
    null = {"step": 401, "seed": 1, "split": "validation", "name": "loss", "value": None}
    with (sweep.runs[0].path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(null) + "\n")
    values = results.read(sweep.path).cells[0].values("validation/loss")
    assert math.isnan(values[1]) and values[0] == pytest.approx(1.6)


def test_cells_are_found_by_what_they_change(make_sweep):
    found = results.read(make_sweep("configs/vaswani2017_table3.py:paper", {}).path)
    assert found.find({}) is found.cells[0]
    assert found.find({"model.qk_dim": 16, "model.num_heads": 8}) is found.cells[6]  # 8 heads are the base's own
    assert found.find({"model.qk_dim": 17}) is None
    assert [found.label(c.overrides) for c in found.cells][:3] == ["base", "(A) h=1", "(A) h=4"]


def test_no_sweep_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="holds no sweep"):
        results.read(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"cells": [', "{}"])
def test_a_damaged_sweep_json_is_told_in_one_line(tmp_path, text):
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(UserError, match=r"^\S*sweep.json is damaged; run the sweep again, which writes it anew$"):
        results.read(tmp_path)
