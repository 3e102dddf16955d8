"""The benchmark of layers at a tiny size."""

import dataclasses

import pytest

from mha_jax.benchmarks.layers import in_a_way, measure_layers
from mha_jax.benchmarks.train_step import language_model
from mha_jax.specs import UserError


def test_contestants_differ_in_how_layers_run_alone():
    run = language_model(3, d_model=12)
    scanned = in_a_way(run, "scan", "block")
    assert (scanned.model.layers, scanned.model.remat) == ("scan", "block")
    assert dataclasses.replace(scanned, model=run.model) == run
    assert in_a_way(scanned, "unrolled", "none") == run
    with pytest.raises(UserError, match=r"model\.remat='all' is not one of"):
        in_a_way(run, "scan", "all")


@pytest.mark.slow
def test_every_depth_has_a_row_for_every_way_with_time_and_bytes():
    rows = measure_layers(2, depths=(1, 3), num_heads=3, d_model=12, d_ff=29, length=7, batch_size=5)
    assert len({(row["num_layers"], row["layers"], row["remat"]) for row in rows}) == len(rows) == 2 * 2 * 4
    assert all(row["compile_seconds"] > 0 and row["peak_bytes"] > 0 for row in rows)
    assert all(0 < row["step_ms"]["min"] <= row["step_ms"]["median"] <= row["step_ms"]["max"] for row in rows)
