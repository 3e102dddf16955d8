"""The gates benchmark at a tiny size."""

import json

import pytest

from experiments import bench
from mha_jax.benchmarks.gates import WAYS

TINY = ["--num_layers=1", "--num_heads=3", "--d_model=12", "--d_ff=29", "--length=7", "--batch_size=3"]


@pytest.mark.slow
def test_every_way_of_gating_is_timed_beside_none(tmp_path, capsys):
    out = tmp_path / "gates.json"
    assert bench.main(["bench", "gates", "--rounds=2", "--devices=1", f"--out={out}", *TINY]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["gates"] for row in rows] == list(WAYS) and all(len(row["seconds"]) == 2 for row in rows)
    assert rows[0]["ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert "| hard concrete" in capsys.readouterr().out
