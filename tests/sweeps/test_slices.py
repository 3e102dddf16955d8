"""Plans of the compiler for a TPU slice that is not here."""

from importlib.util import find_spec

import jax
import pytest

from mha_jax.specs import UserError
from mha_jax.sweeps import slices
from mha_jax.sweeps.plan import Memory
from tests import tiny


def test_one_compilation_serves_all_cells_of_a_shape():
    asked = []
    memory = slices.once_a_shape(lambda run: asked.append(run) or Memory(1, None, False))
    for run in (
        tiny.run(),
        tiny.run(optimizer__learning_rate=1e-4, training__steps=30),
        tiny.run(seeds=(3, 4)),
        tiny.run(seeds=(0,)),
        tiny.run(model__num_heads=2),
    ):
        memory(run)
    assert [(len(run.seeds), run.model.num_heads) for run in asked] == [(2, 4), (1, 4), (2, 2)]


@pytest.mark.slow
def test_the_plan_for_the_devices_here_is_the_compilers():
    memory = slices.planned_memory(tiny.run(seeds=(0,)), jax.devices()[:2], 2**40)
    assert memory.needed is not None and 2**12 < memory.needed < 2**26
    assert str(memory).endswith("of 1,024.0 GiB")


def test_without_libtpu_the_way_to_it_is_told(monkeypatch):
    monkeypatch.setattr(slices, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--topology=v5e:2x2 needs libtpu: pip install -r requirements-tpu-test.txt"):
        slices.slice_devices("v5e:2x2")


@pytest.fixture(scope="module")
def four_chips():
    if find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install -r requirements-tpu-test.txt")
    return slices.slice_devices("v5e:2x2")


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v9:2x2", "junk"])
def test_an_unknown_slice_is_refused_in_one_line(four_chips, topology):
    with pytest.raises(UserError, match=rf"--topology='{topology}' is no TPU slice") as error:
        slices.slice_devices(topology)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_a_small_cell_fits_a_slice(four_chips, parallel):
    assert (len(four_chips), four_chips[0].device_kind) == (4, "TPU v5 lite")
    memory = slices.planned_memory(tiny.run(parallel=parallel), four_chips, 2**34)
    assert memory.needed is not None and 2**12 < memory.needed < 2**26


@pytest.mark.slow
def test_of_a_cell_that_does_not_fit_is_told_by_how_much(four_chips):
    # The table alone, its gradient and two moments are 4 * 4 * 12 * 2**27 bytes, one and a half times what a chip has.
    large = tiny.run(seeds=(0,), data__tokenizer="bpe", data__vocab_size=2**27, data__length=3, data__batch_size=4)
    memory = slices.planned_memory(large, four_chips, 2**34)
    assert not memory.estimated and memory.needed > memory.limit > 15 * 2**30
    assert str(memory).endswith("GiB too much")
