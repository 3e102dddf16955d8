"""The rows of queries against the definition, on cells of the grid; and what is refused."""

import dataclasses

import jax.numpy as jnp
import pytest

from mha_jax.attention import Causal, SlidingWindow
from mha_jax.attention.backends import rows
from mha_jax.attention.backends.call import Call
from mha_jax.attention.backends.tiling import make_plan
from mha_jax.attention.blockmap import BlockMap
from mha_jax.attention.regions import Span
from tests.attention.test_grid import CELLS, GRID, check

CALL = Call(2, 4096, 4096, 1, (0,), 1, 512, 512, jnp.dtype(jnp.float32), Causal(), 0.0)


@pytest.fixture(autouse=True)
def several_rows(monkeypatch):
    monkeypatch.setattr(rows, "_QUERIES", 48)
    monkeypatch.setattr(rows, "_COLUMN", 16)


@pytest.mark.parametrize("seed", [3, pytest.param(140, marks=pytest.mark.slow)])
def test_rows_agree_with_the_definition(seed):
    assert check(GRID[seed], "rows", seed)


@pytest.mark.slow
def test_rows_agree_with_the_definition_on_more_of_the_grid():
    assert all(check(GRID[seed], "rows", seed) for seed in range(7, CELLS, 40))


def test_a_row_reads_the_keys_that_it_sees_and_masks_only_where_it_must():
    plan, _ = make_plan(Causal() & SlidingWindow(32), 1, 96, 96, 1, 1.0, 0.0)
    tiles = BlockMap.of(Causal() & SlidingWindow(32), 96, 96, 48, 16)
    first, second = rows._rows(dataclasses.replace(plan, tiles=tiles))
    assert (first.t, first.s) == (Span(0, 48), Span(0, 48))
    assert (second.t, second.s) == (Span(48, 48), Span(16, 80))
    full = dataclasses.replace(plan, tiles=BlockMap.of(~Causal(-200), 96, 96, 48, 16))
    assert [row.masked for row in rows._rows(full)] == [False, False]


def test_long_programs_and_empty_axes_are_refused():
    assert "would unroll 86 rows of queries, and does 64" in (rows.refusal(CALL) or "")
    assert rows.refusal(dataclasses.replace(CALL, queries=3072)) is None
    assert "empty" in (rows.refusal(dataclasses.replace(CALL, keys=0)) or "")
