"""Which cells train together: those of one shape, so few packs as leave no worker idle and fit."""

import dataclasses

import pytest

from mha_jax.config import resolve
from mha_jax.specs import UserError
from mha_jax.sweeps import grid, packing
from mha_jax.sweeps.store import RunDirectory
from mha_jax.training.estimates import estimated_peak_bytes
from tests import tiny

CPU = {"platform": "cpu", "kind": "cpu", "count": 1, "memory": None}
GPU = {"platform": "gpu", "kind": "gpu", "count": 1, "memory": 10**9}
RATES = [{"optimizer.learning_rate": rate} for rate in (1e-3, 2e-3, 3e-3, 4e-3, 5e-3)]


@pytest.fixture
def cells(config_file, tmp_path):
    """Directories of cells with these overrides, named by their place: "0", "1", ..."""

    def make(overrides, **common):
        found = []
        for number, values in enumerate(overrides):
            config = grid.load(config_file, {**common, **values}).config
            found.append(RunDirectory.create(tmp_path / "w" / "runs" / str(number), config))
        return found

    return make


def names(packs):
    return ["".join(directory.run_id for directory in pack) for pack in packs]


def test_cells_that_differ_in_seeds_rate_and_decay_go_together_and_others_do_not(cells):
    directories = cells(
        [
            {},
            {"model.num_heads": 3},
            {"optimizer.learning_rate": 0.1},
            {"seeds": (5,)},
            {"model.num_heads": 3, "optimizer.weight_decay": 0.5},
            {"optimizer.warmup_steps": 7},
        ]
    )
    assert names(packing.packs(directories, workers=1, devices=CPU)) == ["023", "14", "5"]


def test_every_worker_gets_a_pack_of_like_size(cells):
    directories = cells(RATES)
    assert names(packing.packs(directories, workers=2, devices=CPU)) == ["01", "234"]
    assert names(packing.packs(directories, workers=5, devices=CPU)) == list("01234")


def test_what_is_done_stays_alone_and_what_stands_at_another_step_apart(cells):
    directories = cells(RATES)
    directories[1].update(state="done")
    (directories[3].path / "checkpoints" / "8").mkdir(parents=True)
    assert names(packing.packs(directories, workers=1, devices=CPU)) == ["024", "1", "3"]


@pytest.mark.parametrize(
    ("pack", "packs"), [(1, list("01234")), (3, list("01234")), (4, ["0", "12", "34"]), ("6", ["01", "234"])]
)
def test_a_number_is_the_most_members_that_a_pack_has(cells, pack, packs):
    assert names(packing.packs(cells(RATES, pack=pack), workers=1, devices=CPU)) == packs  # two seeds each


def test_a_cpu_packs_short_cells_only_and_an_accelerator_long_ones_too(cells):
    directories = cells(RATES, **{"training.steps": 10**9})
    assert names(packing.packs(directories, workers=1, devices=CPU)) == list("01234")
    assert names(packing.packs(directories, workers=1, devices=GPU)) == ["01234"]


def test_a_pack_fits_the_memory_of_the_device(cells):
    directories = cells(RATES)
    cell = resolve(directories[0].config)
    two, three = (estimated_peak_bytes(dataclasses.replace(cell, seeds=tuple(range(n))), 1, "gpu") for n in (4, 6))
    room = {**GPU, "memory": int((two + three) / 2 / 0.8)}
    assert names(packing.packs(directories, workers=1, devices=room)) == ["0", "12", "34"]
    assert names(packing.packs(directories, workers=1, devices={**GPU, "memory": None})) == list("01234")


@pytest.mark.parametrize("pack", [0, -1, "many", 1.5])
def test_a_pack_that_is_no_number_is_refused(pack):
    with pytest.raises(UserError, match=r"pack=.* must be 'auto' or an integer of at least 1"):
        tiny.run("lm", pack=pack)
