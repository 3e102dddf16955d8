"""The benchmark of layers at a tiny size."""

import dataclasses
import itertools

import pytest

from mha_jax.benchmarks import layers
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


TINY = {"num_heads": 3, "d_model": 12, "d_ff": 29, "length": 7, "batch_size": 5}
SECONDS = {way: 1.5 + number for number, way in enumerate(itertools.product(layers.LAYERS, layers.REMATS))}


def test_every_depth_has_a_row_for_every_way(monkeypatch):
    def compiled(run, batch):
        return lambda: None, SECONDS[run.model.layers, run.model.remat], run.model.num_layers

    monkeypatch.setattr(layers, "compiled_step", compiled)
    rows = measure_layers(2, depths=(1, 3), **TINY)
    found = [(row["num_layers"], (row["layers"], row["remat"]), row["compile_seconds"]) for row in rows]
    assert found == [(depth, way, seconds) for depth in (1, 3) for way, seconds in SECONDS.items()]
    assert len(SECONDS) == 2 * 4 and all(row["peak_bytes"] == row["num_layers"] for row in rows)


@pytest.mark.slow
def test_rows_have_time_and_bytes_of_what_was_compiled(monkeypatch):
    monkeypatch.setattr(layers, "REMATS", ("none", "block"))
    rows = measure_layers(2, depths=(2,), **TINY)
    assert len(rows) == 2 * 2
    assert all(row["compile_seconds"] > 0 and row["peak_bytes"] > 0 for row in rows)
    assert all(0 < row["step_ms"]["min"] <= row["step_ms"]["median"] <= row["step_ms"]["max"] for row in rows)
