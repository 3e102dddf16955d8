"""Which part of a sweep an index of an array job trains."""

import pytest

from mha_jax.specs import UserError
from mha_jax.sweeps import array, grid
from mha_jax.sweeps.store import SweepDirectory


@pytest.fixture
def prepared(config_file, tmp_path):
    """Cells of 1, 2 and 3 heads; the fourth, of 5, does not divide d_model and is left out."""
    study = grid.load(config_file, {"mesh.data": 1})
    return SweepDirectory.create(tmp_path / "w", study, grid.cells(study), {})


def heads(runs):
    return [run.config["model"]["num_heads"] for run in runs]


def test_the_parts_together_are_every_legal_cell_once(prepared):
    assert heads(array.part(prepared.path, "0:2")) == [1, 2]
    assert heads(array.part(prepared.path, "2:4")) == [3]


@pytest.mark.parametrize("cells", ["3:4", "1:1", "2:1", "-1:2", "1", "a:b", ":", ""])
def test_a_part_that_is_none_is_refused_with_what_there_is(prepared, cells):
    with pytest.raises(UserError, match=f"--cells={cells} names no cells; 0:3 are all of"):
        array.part(prepared.path, cells)


def test_a_directory_of_no_sweep_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is no sweep's directory: it has no sweep\.json"):
        array.part(tmp_path, "0:1")
