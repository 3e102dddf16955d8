"""The pruned contestant is the full model without half its heads; the built one has its very shape."""

import json

import jax
import numpy as np
import pytest

from experiments import bench
from mha_jax.benchmarks import pruned
from mha_jax.heads.surgery import head_shapes

TINY = pruned.Setting(batch_sizes=(1, 2), num_heads=4, num_layers=2, d_model=12, d_ff=13, length=7, rounds=2)


@pytest.mark.slow
def test_half_the_heads_are_gone_and_the_built_model_has_the_shape_that_is_left():
    found = pruned.models(TINY)
    (run, state), (built, drawn), (full, whole) = (found[name] for name in (pruned.PRUNED, pruned.BUILT, pruned.FULL))
    assert run == built and full.model.num_heads == 4
    counts = [shape.num_heads for shape in head_shapes(run).values()]
    assert sum(counts) == 4 and len(set(counts)) > 1
    assert [x.shape for x in jax.tree.leaves(state)] == [x.shape for x in jax.tree.leaves(drawn)]
    tokens = state["params"]["tokens"]["embedding"]
    np.testing.assert_array_equal(tokens, whole["params"]["tokens"]["embedding"])


@pytest.mark.slow
def test_the_verb_prints_a_row_a_batch_size(tmp_path, capsys):
    sizes = ["--num_heads=4", "--num_layers=2", "--d_model=12", "--d_ff=13", "--length=7", "--rounds=2"]
    assert bench.main(["bench", "pruned", "--batch_sizes=1,2", *sizes, f"--out={tmp_path}/pruned.json"]) == 0
    assert "pruned / built with its shape" in capsys.readouterr().out
    rows = json.loads((tmp_path / "pruned.json").read_text())["rows"]
    assert [row["batch_size"] for row in rows] == [1, 2]
    assert all(len(seconds) == 2 for row in rows for seconds in row["seconds"].values())
